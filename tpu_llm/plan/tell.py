"""What launch/plan.py says of several plans: the search's, the fixes', and those of several slices."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from tpu_llm.config import ConfigError
from tpu_llm.parallel import chips
from tpu_llm.parallel.chips import Slice
from tpu_llm.plan.cache import Cache
from tpu_llm.plan.plan import make_plan
from tpu_llm.plan.search import Candidate, Changes, Tried, best, candidates, chosen, flags, space, varied, whole
from tpu_llm.plan.show import fit
from tpu_llm.train.run import Run


def search(run: Run, spec: str, where: Slice, compiles: int, cache: Cache | None, console: Console) -> int:
    """Compiles the most promising choices and prints the fastest as flags. Returns 0, or 3 where none fits."""
    ranked = candidates(run, where, space(run, where))
    if not ranked:
        raise ConfigError(f'no mesh of {where} holds {spec} with {run.data.global_batch} rows; change the batch')
    ranked = varied(ranked)
    console.print(f'{len(ranked)} choices for {where} may fit; compiling the {min(compiles, len(ranked))} best guesses')
    tried = []
    for each in best(run, where, ranked, compiles, cache):
        tried.append(each)
        console.print(f'  {line(each)}', highlight=False, soft_wrap=True)
    return _verdict(spec, where, tried, console)


def fix(run: Run, spec: str, where: Slice, cache: Cache | None, console: Console) -> int:
    """Tries one remedy of each kind against too little memory. Returns 0 where one helps, or 3."""
    remedies = list(_remedies(run, where))
    console.print(f'trying {len(remedies)} remedies, a compile each')
    tried = []
    for each in best(run, where, remedies, len(remedies), cache):
        tried.append(each)
        console.print(f'  {line(each)}', highlight=False, soft_wrap=True)
    return _verdict(spec, where, tried, console)


def compare(
    run: Run, spec: str, names: Sequence[str], cache: Cache | None, console: Console, prices: Mapping[str, float]
) -> int:
    """One row a slice, the mesh's fsdp taking what devices there are. Returns 0 where it fits one, or 3."""
    table = Table(box=None, pad_edge=False, header_style='bold')
    for column in ('slice', 'memory', 's a step', 'tokens/s a chip', 'MFU', 'days', 'chip-hours', 'dollars'):
        table.add_column(column, justify='left' if column in ('slice', 'memory') else 'right')
    fits = False
    for name in names:
        where = chips.find(name)
        mesh = dataclasses.replace(run.mesh, fsdp=-1)
        with console.status(f'compiling for {where}'):
            plan = make_plan(chosen(run, {'mesh': mesh}), where, config=spec, cache=cache)
        row = [where.name, fit(plan)]
        if plan.cost is not None:
            price, hours = prices.get(where.chip.name), plan.chip_hours
            row += [f'{plan.seconds:.3g}', f'{plan.tokens_per_second:,.0f}', f'{plan.mfu:.0%}']
            row += [
                f'{plan.steps * plan.seconds / 86_400:,.1f}',
                f'{hours:,.0f}',
                f'{hours * price:,.0f}' if price else '',
            ]
        table.add_row(*row)
        fits |= plan.fits
    console.print(table)
    return 0 if fits else 3


def line(tried: Tried) -> str:
    """`--config.model.remat=full: fits: 9.1 of 15.8 GiB, 42% to spare; 2.81 s a step`."""
    if tried.plan is None:
        return f'{tried.candidate}: {tried.reason}'
    speed = f'; {tried.plan.seconds:.3g} s a step, {tried.plan.mfu:.0%} MFU' if tried.plan.cost else ''
    return f'{tried.candidate}: {fit(tried.plan)}{speed}'


def _verdict(spec: str, where: Slice, tried: Sequence[Tried], console: Console) -> int:
    there = sorted((each.plan.seconds, i) for i, each in enumerate(tried) if each.plan is not None and each.fits)
    if not there:
        console.print('none of them fits; a larger slice, or a smaller batch')
        return 3
    first = tried[there[0][1]]
    assert first.plan is not None
    for seconds, i in there[1:]:
        console.print(
            f'  {seconds / there[0][0] - 1:+.0%} a step: {tried[i].candidate}', highlight=False, soft_wrap=True
        )
    console.print(
        f'the fastest that fits {where}: {first.plan.seconds:.3g} s a step, {first.plan.tokens_per_second:,.0f} '
        f'tokens/s a chip, predicted'
    )
    console.print(f'  python launch/run.py --config={_changed(spec, first.candidate.changes)}', soft_wrap=True)
    return 0


def _changed(spec: str, changes: Changes) -> str:
    """The command's config and flags with these in place of those that they change."""
    typed = flags(changes)
    names = {flag.partition('=')[0] for flag in typed}
    kept = [word for word in spec.split() if word.partition('=')[0] not in names]
    return ' '.join([*kept, *typed])


def _remedies(run: Run, where: Slice) -> Iterator[Candidate]:
    """Of each kind the one that is guessed to be the fastest of those that fit."""
    kinds: dict[str, list[Changes]] = {'remat': [], 'offload': [], 'accumulate': [], 'mesh': []}
    own = dataclasses.replace(run.mesh, **whole(run.mesh, where))
    for changes in space(run, where):
        same_mesh = changes['mesh'] == own
        same_remat = changes['model.remat'] == run.model.remat
        if same_mesh and changes['accumulate'] == run.accumulate:
            kind = 'offload' if '@' in changes['model.remat'] else 'remat'
            kinds[kind].append({'model.remat': changes['model.remat']})
        elif same_mesh and same_remat and changes['accumulate'] > run.accumulate:
            kinds['accumulate'].append({'accumulate': changes['accumulate']})
        elif same_remat and changes['accumulate'] == run.accumulate:
            kinds['mesh'].append({'mesh': changes['mesh']})
    kinds['chunk'] = [{'objective.chunk': n} for n in (64, 128, 256, 512) if n < getattr(run.objective, 'chunk', 0)]
    for choices in kinds.values():
        yield from candidates(run, where, choices)[:1]

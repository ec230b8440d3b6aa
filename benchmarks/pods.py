"""The pod pages compiled for their slices: cycles, memory, what travels, and the throughput that follows.

    JAX_PLATFORMS=cpu python benchmarks/pods.py                               # all of them; minutes each
    JAX_PLATFORMS=cpu python benchmarks/pods.py llama2_7b_v5e_256 --config.model.remat=full
    JAX_PLATFORMS=cpu python benchmarks/pods.py --write                       # and keeps them in tests/golden/pods
    python benchmarks/pods.py --kept                                          # what is kept there, without compiling

It needs libtpu (pip install -e '.[plan]'). What the figures mean is in docs/pods.md. Nothing here has run on a chip.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ['JAX_PLATFORMS'] = 'cpu'
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tpu_llm.command_line import load
from tpu_llm.config import ConfigError
from tpu_llm.parallel import chips
from tpu_llm.plan import budget
from tpu_llm.plan.cache import default
from tpu_llm.plan.plan import Plan, make_plan

GOLDEN = ROOT / 'tests/golden/pods'
GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """What a page is to reach, and what others report for the same work a chip."""

    cycles: float | None = None
    gib: float | None = None  # the chip's memory where there is none
    peer_cycles: float | None = None  # of MaxText 0.2.5's program
    peer_gib: float | None = None
    peer_gigabytes: float | None = None  # of its all-gathers and all-reduces
    published: int | None = None  # tokens/s a chip that MaxText's authors measured with their recipe


GOALS = {
    'llama2_7b_v5e_256': Goal(cycles=3.65e9, gib=15.2, peer_cycles=4.17e9, peer_gib=10.0, peer_gigabytes=26.4 + 13.5),
    'llama31_8b_v6e_256': Goal(cycles=5.40e9, gib=30.0, peer_cycles=6.10e9, published=7207),
    'llama2_70b_v5p_512': Goal(cycles=17.0e9, gib=88.0, peer_cycles=19.77e9, peer_gib=38.3, published=692),
    'mixtral_8x7b_v6e_256': Goal(
        cycles=11.2e9, gib=30.0, peer_cycles=12.49e9, peer_gib=29.4, peer_gigabytes=249.0 + 93.0, published=3899
    ),
    'llama31_70b_v6e_256': Goal(published=960),
    'llama2_70b_v6e_256': Goal(published=900),
    'mixtral_8x22b_v6e_256': Goal(published=1326),
    'mixtral_8x7b_v5p_256': Goal(published=2909),
}


def pages() -> list[str]:
    """The names of all pages, by name."""
    return sorted(path.stem for path in (ROOT / 'configs/pods').glob('*.py') if path.stem != '__init__')


def where(name: str) -> chips.Slice:
    """The slice that a page's name ends with."""
    return chips.find('-'.join(name.split('_')[-2:]))


def planned(name: str, overrides: Sequence[str] = ()) -> Plan:
    run = load(str(ROOT / f'configs/pods/{name}.py'), [*overrides])
    return make_plan(run, where(name), config=f'configs/pods/{name}.py', cache=default())


def kept(name: str) -> dict[str, Any]:
    """The budget that is kept of a page."""
    return json.loads((GOLDEN / f'{name}.json').read_text())


def report(name: str, figures: Mapping[str, Any]) -> str:
    """What the page's program costs, beside its goal."""
    return '\n'.join(_lines(GOALS.get(name, Goal()), where(name), figures, name)) + '\n'


def _lines(goal: Goal, there: chips.Slice, figures: Mapping[str, Any], name: str) -> Iterator[str]:
    cycles, charged = figures['cycles'], figures['cycles'] + figures['kernel_cycles']
    yield f'{name} on {figures["slice"]}, {figures["versions"]}'
    aim = f'   at most {goal.cycles / 1e9:.2f}e9' if goal.cycles else ''
    yield (
        f'  cycles    {cycles / 1e9:8.3f}e9'
        + aim
        + (f'; MaxText {goal.peer_cycles / 1e9:.2f}e9' if goal.peer_cycles else '')
    )
    yield f'  charged   {charged / 1e9:8.3f}e9'
    limit = goal.gib or there.chip.hbm / GIB
    peer = f'; MaxText {goal.peer_gib}' if goal.peer_gib else ''
    yield f'  peak HBM  {figures["peak_bytes"] / GIB:8.2f} GiB  at most {limit:.1f}{peer}'
    published = f'   MaxText measured {goal.published:,}' if goal.published else ''
    yield f'  predicted {figures["tokens_per_second_per_chip"]:8,} tokens/s a chip{published}'
    travels = sum(each['bytes'] for each in figures['collectives'].values()) / 1e9
    cap = f"   at most {goal.peer_gigabytes:.1f}, MaxText's" if goal.peer_gigabytes else ''
    yield f'  travels   {travels:8.1f} GB{cap}'
    gathers = sum(each['bytes'] for kind, each in figures['collectives'].items() if ' all-gather ' in kind)
    yield f'  gathered  {figures["gathered_while_computing"] / 1e9:8.1f} GB   while computing, of {gathers / 1e9:.1f}'
    for name in ('rollout', 'scoring'):
        if name in figures:
            peak, seconds = figures[name]['peak_bytes'] / GIB, figures[name]['seconds']
            yield f'  {name:9s} {peak:8.2f} GiB  {seconds:.3g} s at most'
    yield from (f'  kernel    {times:8d}      {kernel}' for kernel, times in figures['kernels'].items())


def main(argv: list[str]) -> None:
    overrides = [arg for arg in argv if arg.startswith('--config.')]
    for name in [arg for arg in argv if not arg.startswith('-')] or pages():
        if name not in pages():
            raise ConfigError(f'there is no page {name}; there are {", ".join(pages())}')
        if '--kept' in argv:
            print(report(name, kept(name)), flush=True)
            continue
        plan = planned(name, overrides)
        if plan.cost is None:
            print(f'{name}: {plan.reason}', flush=True)
            continue
        print(report(name, figures := budget.of(plan)), flush=True)
        print(f'{name}: compiled in {plan.cpu_seconds:.0f} CPU-seconds', file=sys.stderr)
        if '--write' in argv:
            GOLDEN.mkdir(parents=True, exist_ok=True)
            (GOLDEN / f'{name}.json').write_text(json.dumps(figures, indent=1) + '\n')


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f'error: {error}')

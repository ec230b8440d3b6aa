"""A plan as text for a terminal: does it fit, how fast, where memory and time go, and what to look at first.

What it says and how it rounds is used by the page (`plan/page.py`) as well.
"""

from collections.abc import Callable, Iterator, Mapping

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tpu_llm.plan.cost import Cost, Traffic
from tpu_llm.plan.memory import Buffer
from tpu_llm.plan.parts import PASSES
from tpu_llm.plan.plan import Plan
from tpu_llm.train.progress import short

GIB = 2**30
LATER = 'Predicted from the compiled program; nothing has run.'
_BAR = 24  # characters of the longest bar
_WORDS = ('collective', 'over', 'of', 'shape', '')  # columns that hold no numbers


def show(plan: Plan, price: float | None = None) -> RenderableType:
    """`price` is of a chip-hour, in dollars."""
    first, *answers = summary(plan, price)
    parts: list[RenderableType] = [Text(first), *(Padding(Text(line), (0, 0, 0, 2), expand=False) for line in answers)]
    if plan.cost is not None:
        parts += ['', _losses(plan.cost), '', _shares(plan.cost)]
        if plan.cost.traffic:
            parts += ['', _traffic(plan.cost)]
    parts += ['', _memory(plan)]
    if not plan.fits:
        parts += ['', _largest(plan)]
    parts += ['', *(Text(line) for line in [*advice(plan), LATER])]
    return Group(*parts)


def summary(plan: Plan, price: float | None = None) -> list[str]:
    """The answers, a line each; the first says what of."""
    cost = plan.cost
    lines = [plan.config, f'on {place(plan)}', f'{size(plan)}; {plan.tokens_per_step:,} tokens a step', fit(plan)]
    lines += [f'{name} {said}' for name, said in others(plan).items()]
    if cost is None:
        return lines
    alone = f' without {" and ".join(each.name for each in plan.others)}' if plan.others else ''
    lines.append(
        f'predicted{alone}: {seconds(cost.seconds)} a step, {plan.tokens_per_second:,.0f} tokens/s a chip, '
        f'{plan.mfu:.0%} of the peak (MFU)'
    )
    if cost.host_bytes:
        lines.append(
            f"to the host's memory and back: {cost.host_bytes / 1e9:.1f} GB a step, "
            f'{seconds(cost.host_seconds)} of PCIe'
        )
    if plan.steps:
        paid = f', ${rounded(plan.chip_hours * price)} at ${price:.2f}' if price else ''
        lines.append(
            f'the run{alone}: {short(plan.steps * plan.tokens_per_step)} tokens in {plan.steps:,} steps, '
            f'{duration(plan)}, {rounded(plan.chip_hours)} chip-hours{paid}'
        )
    return lines


def place(plan: Plan) -> str:
    """'v5e:16x16: 256 chips, fsdp 256'"""
    mesh = ', '.join(f'{axis} {size}' for axis, size in plan.mesh.items()) or 'one device'
    chips = plan.where.chips
    return f'{plan.slice}: {chips:,} chip{"s" if chips > 1 else ""}, {mesh}'


def size(plan: Plan) -> str:
    """'46.7B parameters, of which a token meets 12.9B'"""
    sparse = plan.active_parameters < plan.parameters
    met = f', of which a token meets {short(plan.active_parameters)}' if sparse else ''
    return f'{short(plan.parameters)} parameters{met}'


def fit(plan: Plan) -> str:
    """'fits: 25.6 of 31.2 GiB, 18% to spare'"""
    used, there, cost = plan.memory.allocated, plan.where.chip.hbm, plan.cost
    if cost is not None and used <= there and cost.host_seconds > cost.seconds:
        return (
            f'does not fit: {gib(used)} of {gib(there)} GiB, but the host cannot keep up: {seconds(cost.host_seconds)} '
            f'of PCIe a step of {seconds(cost.seconds)}'
        )
    return _room(used, there, plan.reason)


def others(plan: Plan) -> dict[str, str]:
    """'rollout': 'fits: 9.1 of 31.2 GiB, 71% to spare; predicted: …', of what runs besides the step."""
    said = {}
    for each in plan.others:
        said[each.name] = _room(each.memory.allocated, plan.where.chip.hbm, each.reason)
        if each.seconds:
            drawn = f' where a response has all of {each.tokens:,} tokens' if each.tokens else ''
            said[each.name] += f'; predicted: {seconds(each.seconds)}{drawn}'
    return said


def _room(used: int, there: int, reason: str) -> str:
    figures = f'{gib(used)} of {gib(there)} GiB'
    if used > there:
        return f'does not fit: {figures}, {gib(used - there)} too much'
    return f'does not fit: {figures}' if reason else f'fits: {figures}, {1 - used / there:.0%} to spare'


# ------------------------------------------------------------------------------------------------------- rounding


def gib(size: float) -> str:
    return f'{size / GIB:.1f}' if size >= GIB else f'{size / GIB:.2f}'


def rounded(number: float) -> str:
    """Three digits: what is predicted has no more. 169,613 is 170,000."""
    return f'{float(f"{number:.3g}"):,.0f}' if number >= 10 else f'{number:.2g}'


def seconds(time: float) -> str:
    """'2.50 s', '41.3 ms'"""
    value, unit = (time, 's') if time >= 0.1 or time == 0 else (1000 * time, 'ms')
    return f'{value:#.3g}'.rstrip('.') + f' {unit}'


def duration(plan: Plan) -> str:
    """Of the whole run, were nothing but steps in it."""
    hours = plan.steps * plan.seconds / 3600
    return f'{hours / 24:,.1f} days' if hours >= 48 else f'{hours:,.1f} hours'


def timer(cost: Cost) -> tuple[str, Callable[[float], str]]:
    """The unit in which parts of a step read well, and how to write them in it; nothing where it rounds to nothing."""
    unit, scale, digits = ('s', 1, 3) if cost.seconds >= 0.5 else ('ms', 1000, 2)

    def text(time: float) -> str:
        return f'{scale * time:.{digits}f}' if abs(scale * time) >= 0.5 * 10**-digits else ''

    return unit, text


# ------------------------------------------------------------------------------------------------- what is worth a row


def losses(cost: Cost) -> dict[str, float]:
    """From the model's own work to the step: the seconds that each loss adds."""
    return {name: time for name, time in cost.losses.items() if abs(time) >= 5e-4 * cost.seconds}


def shares(cost: Cost) -> dict[str, dict[str, float]]:
    """Seconds by part of the model and pass, the part that takes most first."""
    sums: dict[str, dict[str, float]] = {}
    for share in cost.shares:
        row = sums.setdefault(share.part, {})
        row[share.phase] = row.get(share.phase, 0.0) + share.seconds
    ordered = sorted(sums.items(), key=lambda each: -sum(each[1].values()))
    return {part: row for part, row in ordered if sum(row.values()) >= 5e-4 * cost.seconds}


def traffic(cost: Cost) -> list[Traffic]:
    """Collectives that move much or are waited for."""
    total = sum(each.bytes for each in cost.traffic)
    return [each for each in cost.traffic if each.bytes >= 0.005 * total or each.exposed >= 0.005 * cost.seconds]


def kinds(plan: Plan) -> dict[str, int]:
    """Bytes by what they are for; what the compiler's packing leaves between them is one of these."""
    rows = {**plan.memory.kinds, 'between buffers': plan.memory.allocated - plan.memory.peak}
    return {kind: size for kind, size in rows.items() if size >= 0.001 * plan.where.chip.hbm}


def largest(plan: Plan, number: int = 10) -> list[tuple[Buffer, int]]:
    """The largest buffers at the peak, and how many of each there are."""
    counts: dict[Buffer, int] = {}
    for each in plan.memory.buffers:
        counts[each] = counts.get(each, 0) + 1
    return list(counts.items())[:number]


# ------------------------------------------------------------------------------------------------------------ tables


def _long(unit: str) -> str:
    return 'seconds' if unit == 's' else unit


def _losses(cost: Cost) -> Table:
    unit, text = timer(cost)
    table = _table('a step on one device', _long(unit), 'of the step', '')
    longest = max(cost.losses.values())
    for name, time in losses(cost).items():
        table.add_row(name, text(time), f'{time / cost.seconds:.1%}', '█' * max(0, round(_BAR * time / longest)))
    table.add_row('the step', text(cost.seconds), '100.0%', '')
    return table


def _shares(cost: Cost) -> Table:
    unit, text = timer(cost)
    table = _table(f'{_long(unit)} by part', *PASSES, 'in all', 'of the step')
    for part, row in shares(cost).items():
        total = sum(row.values())
        table.add_row(
            part, *(text(row.get(phase, 0.0)) for phase in PASSES), text(total), f'{total / cost.seconds:.1%}'
        )
    return table


def _traffic(cost: Cost) -> Table:
    unit, text = timer(cost)
    table = _table('collective', 'over', 'of', 'GB', 'hidden', 'times', f'{_long(unit)} of links', 'waited')
    for each in traffic(cost):
        hidden = f'{each.hidden / each.bytes:.0%}' if each.bytes else ''
        figures = f'{each.bytes / 1e9:.2f}', hidden, f'{each.count:,}', text(each.seconds), text(each.exposed)
        table.add_row(each.kind, ', '.join(each.axes), each.part, *figures)
    return table


def _memory(plan: Plan) -> Table:
    table = _table('memory of one device', 'GiB', '')
    there = max(plan.where.chip.hbm, plan.memory.allocated)
    for kind, size in kinds(plan).items():
        table.add_row(kind, f'{size / GIB:.2f}', '█' * round(_BAR * size / there))
    table.add_row('in all', f'{plan.memory.allocated / GIB:.2f}', '')
    if plan.memory.host:
        table.add_row("on the host, for the device's program", f'{plan.memory.host / GIB:.2f}', '')
    return table


def _largest(plan: Plan) -> Table:
    table = _table('the largest buffers', 'GiB', '', 'shape')
    for each, count in largest(plan):
        times = f'x {count}' if count > 1 else ''
        table.add_row(f'{each.kind}: {each.where}', f'{each.bytes / GIB:.2f}', times, each.shape)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style='bold')
    for i, column in enumerate(columns):
        table.add_column(column, justify='left' if i == 0 or column in _WORDS else 'right', no_wrap=True)
    return table


# ------------------------------------------------------------------------------------------------ what to look at


_ADVICE: Mapping[str, str] = {
    'recomputed for the backward pass': 'save more for the backward pass: --config.model.remat names what',
    'pipeline bubble': 'more microbatches (--config.pipeline.microbatches) or circles make the bubble smaller',
    'masked or padded': 'work that no token needs: blocks of attention that are hidden in part, rows and vocabulary '
    'that only fill up',
    'matmuls below the peak': 'larger matmuls: more rows a chip, less tensor parallelism, or more fast memory for a '
    'fusion (xla_tpu_scoped_vmem_limit_kib in compiler_options)',
    'kernels below the peak': 'kernels that wait for memory: larger tiles take more rows a chip',
    'memory-bound operations': 'element by element, norms and copies: what is saved less often moves less',
    'waiting for other devices': 'more rows a chip, or another mesh (--search tries them)',
}


def advice(plan: Plan) -> Iterator[str]:
    """What takes most beyond the model's own work, or what is too large, and what helps against it."""
    cost = plan.cost
    if cost is None:
        kind, size = max(plan.memory.kinds.items(), key=lambda each: each[1])
        yield f'Most of the memory: {kind}, {gib(size)} of {gib(plan.memory.allocated)} GiB.'
        yield 'To make it fit: --fix tries what saves memory, each with a compile.'
        return
    if cost.host_seconds > cost.seconds:
        yield "Keep less on the host: --config.model.remat says what is saved, and where ('@host')."
    name = max((name for name in cost.losses if name != 'model'), key=lambda name: cost.losses[name])
    yield f'The bottleneck: {name}, {cost.losses[name] / cost.seconds:.0%} of the step. What helps: {_ADVICE[name]}.'
    if name == 'waiting for other devices':
        worst = max(cost.traffic, key=lambda each: each.exposed)
        yield f'Most of it: {worst.kind} over {", ".join(worst.axes)} for {worst.part}, {seconds(worst.exposed)}.'
    for loop in cost.uncounted:
        yield f'A loop whose turns depend on data is counted once: {loop}'

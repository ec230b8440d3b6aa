"""A plan on one HTML page that needs no network: the answers, where time and memory go, and what to look at."""

from collections.abc import Iterator
from html import escape
from pathlib import Path

from tpu_llm.plan import show
from tpu_llm.plan.cost import Cost
from tpu_llm.plan.parts import PASSES
from tpu_llm.plan.plan import Plan
from tpu_llm.plan.show import GIB, LATER, gib, rounded, seconds
from tpu_llm.train.bars import Part, strip, tower, waterfall
from tpu_llm.train.page import card, page, section, table
from tpu_llm.train.progress import short

_COLORS = 8  # that tell kinds of memory apart; 9 and 10 are for what is too much and what is left over

# In the order in which a device holds them: what stays, then what comes and goes.
_STAYS = ('parameters', 'optimizer state', 'moving average', 'frozen weights', 'reference', 'batch', 'counters')

# The colour of each, and what it means.
_LOSSES = {
    'model': (1, "the model's own FLOPs at the chip's peak"),
    'recomputed for the backward pass': (2, 'what was not saved on the way forward'),
    'pipeline bubble': (8, 'stages that work on nothing'),
    'masked or padded': (3, 'FLOPs that no token needs'),
    'matmuls below the peak': (4, 'beyond what their FLOPs take at the peak'),
    'kernels below the peak': (7, 'beyond what their FLOPs take at the peak'),
    'memory-bound operations': (5, 'what has no matmul in it'),
    'waiting for other devices': (9, 'collectives that no computation hides'),
}


def write_page(plan: Plan, path: Path, price: float | None) -> None:
    """`price` is of a chip-hour, in dollars; None leaves the costs out."""
    config, _, overrides = plan.config.partition(' ')
    more = f'<p><code>{escape(overrides)}</code></p>\n' if overrides else ''
    path_in_parts = escape(config).replace('/', '/<wbr>')
    header = (
        f'<h1>{path_in_parts}</h1>\n{more}<p>{escape(f"on {show.place(plan)}; {show.size(plan)}")}</p>\n'
        f'<p>{escape(f"{LATER} {plan.versions}.")}</p>\n'
        f'<dl class="cards">{"".join(_cards(plan, price))}</dl>'
    )
    memory = [_memory(plan), _largest(plan)]
    time = [_losses(plan.cost), _shares(plan.cost), _traffic(plan.cost)] if plan.cost else []
    sections = [_advice(plan), *(time + memory if plan.fits else memory + time), _choices(plan)]
    title = f'{config} on {plan.slice}'
    path.write_text(page(title, header, '\n'.join(filter(None, sections)), f'Written by tpu_llm. {LATER}'))


def _cards(plan: Plan, price: float | None) -> Iterator[str]:
    for name, said in {'memory': show.fit(plan), **show.others(plan)}.items():
        verdict, _, figures = said.partition(': ')
        yield card(name, verdict, figures, 'good' if verdict == 'fits' else 'bad')
    cost = plan.cost
    if cost is None:
        yield card('parameters', short(plan.parameters), f'{plan.parameters:,}')
        yield card('tokens a step', short(plan.tokens_per_step), f'{plan.tokens_per_step:,}')
        return
    yield card('a step', seconds(cost.seconds), f'{plan.tokens_per_step:,} tokens')
    whole = short(plan.tokens_per_second * plan.where.chips)
    yield card('tokens/s a chip', f'{plan.tokens_per_second:,.0f}', f'{whole} on all chips')
    peak = plan.where.chip.flops * plan.where.chip.devices
    yield card('MFU', f'{plan.mfu:.0%}', f'of {peak / 1e12:,.0f} TFLOP/s a chip')
    if cost.host_bytes:
        yield card('host traffic', f'{cost.host_bytes / 1e9:,.1f} GB', f'{seconds(cost.host_seconds)} of PCIe a step')
    if plan.steps:
        tokens = short(plan.steps * plan.tokens_per_step)
        yield card('the run', show.duration(plan), f'{tokens} tokens in {plan.steps:,} steps')
        paid = f'${rounded(plan.chip_hours * price)} at ${price:.2f}' if price else 'no price given'
        yield card('chip-hours', rounded(plan.chip_hours), paid)


def _advice(plan: Plan) -> str:
    reason = [f'The compiler: {plan.reason.partition("HloModule ")[0]}'] if plan.reason else []
    lines = ''.join(f'<p>{escape(line)}</p>' for line in [*show.advice(plan), *reason])
    return section('What to look at', f'<div class="panel">{lines}</div>')


# ---------------------------------------------------------------------------------------------------------------- time


def _losses(cost: Cost) -> str:
    unit, text = show.timer(cost)
    parts = [
        Part(name=name, size=time, color=_LOSSES[name][0], note=_LOSSES[name][1])
        for name, time in show.losses(cost).items()
    ]
    body = waterfall(parts, 'the step', lambda time: f'{text(time) or 0} {unit}')
    return section('Where the time goes', f'<div class="panel">{body}</div>')


def _shares(cost: Cost) -> str:
    """With the FLOPs and the traffic of memory that belong to the time."""
    unit, text = show.timer(cost)
    rows = []
    for part, row in show.shares(cost).items():
        own = [share for share in cost.shares if share.part == part]
        total, flops = sum(row.values()), sum(share.flops for share in own)
        figures = [
            *(text(row.get(phase, 0.0)) for phase in PASSES),
            text(total),
            f'{total / cost.seconds:.1%}',
            f'{flops / 1e12:,.2f}' if flops else '',
            f'{sum(share.bytes for share in own) / 1e9:,.1f}',
        ]
        rows.append([escape(part), *figures])
    head = [f'part, {unit}', *PASSES, 'in all', 'of the step', 'TFLOP', 'HBM, GB']
    note = 'Remat is what is computed once more for the backward pass; waiting for other devices is not in here.'
    return section('By part of the model', f'<div class="panel">{table(head, rows)}<p class="note">{note}</p></div>')


def _traffic(cost: Cost) -> str:
    found = show.traffic(cost)
    if not found:
        return ''
    unit, text = show.timer(cost)
    most = max(each.bytes for each in found)
    rows = []
    for each in found:
        parts = (
            Part(name='hidden', size=each.hidden, color=3),
            Part(name='exposed', size=each.bytes - each.hidden, color=2),
        )
        name = escape(f'{each.kind} over {", ".join(each.axes)}')
        hidden = f'{each.hidden / each.bytes:.0%}' if each.bytes else ''
        figures = [f'{each.bytes / 1e9:.2f}', hidden, f'{each.count:,}', text(each.seconds), text(each.exposed)]
        rows.append([name, escape(each.part), strip(parts, most or 1.0), *figures])
    head = ['collective', 'of', '', 'GB', 'hidden', 'times', f'{unit} of links', f'{unit} waited']
    legend = (
        '<ul class="legend"><li><i style="background:var(--color-3)"></i>while the device computes</li>'
        '<li><i style="background:var(--color-2)"></i>while it waits, or has nothing to hide it behind</li></ul>'
    )
    return section('Collectives', f'<div class="panel">{table(head, rows, words=3)}{legend}</div>')


# -------------------------------------------------------------------------------------------------------------- memory


def _memory(plan: Plan) -> str:
    there, colors = plan.where.chip.hbm, _colors(plan)
    picture = tower(list(_buffers(plan, colors)), there, lambda size: f'{gib(size)} GiB' if size else '0')
    rows = [
        [
            f'<i class="swatch" style="background:var(--color-{colors[kind]})"></i>{escape(kind)}',
            f'{size / GIB:.2f}',
            f'{size / there:.1%}',
        ]
        for kind, size in show.kinds(plan).items()
    ]
    rows.append(['in all', f'{plan.memory.allocated / GIB:.2f}', f'{plan.memory.allocated / there:.1%}'])
    numbers = table(['kind', 'GiB', 'share'], rows)
    if plan.memory.host:
        numbers += f'<p class="note">On the host, for the program of a device: {gib(plan.memory.host)} GiB.</p>'
    panels = f'<div class="panel">{picture}</div><div class="panel">{numbers}</div>'
    return section('Memory of one device, when most is in use', f'<div class="columns uneven">{panels}</div>')


def _colors(plan: Plan) -> dict[str, int]:
    """By kind; the small ones share the last colour."""
    found = {kind: min(number, _COLORS) for number, kind in enumerate(plan.memory.kinds, 1)}
    return {**found, 'between buffers': 10}


def _buffers(plan: Plan, colors: dict[str, int]) -> Iterator[Part]:
    """From the bottom up: each kind's large buffers, and the rest of it as one."""
    kinds = {kind: size for kind, size in show.kinds(plan).items() if kind in plan.memory.kinds}
    for kind in sorted(kinds, key=lambda kind: (kind not in _STAYS, -kinds[kind])):
        rest = kinds[kind]
        for each, count in show.largest(plan, number=len(plan.memory.buffers)):
            size = count * each.bytes
            if each.kind == kind and size >= 0.01 * plan.where.chip.hbm:
                times = f' × {count}' if count > 1 else ''
                yield Part(name=f'{each.where}{times}', size=size, color=colors[kind])
                rest -= size
        if rest:
            yield Part(name=kind if rest == kinds[kind] else f'more {kind}', size=rest, color=colors[kind])
    between = plan.memory.allocated - sum(kinds.values())
    yield Part(name='between buffers', size=max(between, 0), color=colors['between buffers'])


def _largest(plan: Plan) -> str:
    rows = [
        [
            escape(each.where),
            escape(each.kind),
            f'<code>{escape(each.shape)}</code>',
            f'{count:,}' if count > 1 else '',
            f'{each.bytes / GIB:.2f}',
            f'{count * each.bytes / GIB:.2f}',
        ]
        for each, count in show.largest(plan)
    ]
    head = ['where', 'kind', 'shape', 'times', 'GiB', 'in all']
    return section('The largest buffers', f'<div class="panel">{table(head, rows, words=3)}</div>')


def _choices(plan: Plan) -> str:
    rows = ''.join(
        f'<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>' for name, value in plan.choices.items()
    )
    body = f'<div class="scroll"><table class="config"><tbody>{rows}</tbody></table></div>'
    note = '<p class="note">What decides memory and speed, and no result; each can be given as --config.NAME=VALUE.</p>'
    return section('Choices', f'<div class="panel">{body}{note}</div>')

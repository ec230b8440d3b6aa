"""How long a step takes by the compiler's estimates, and where the time goes.

A device runs one instruction after another. An instruction takes the cycles that the compiler estimates for it, a
kernel what `plan/kernels.py` charges, and a collective what its links need beyond what is computed meanwhile. All of it
is a prediction: nothing here has run.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

from tpu_llm.parallel.chips import Chip
from tpu_llm.plan import collectives, hbm, kernels, parts
from tpu_llm.plan.links import Torus
from tpu_llm.plan.overlap import transfers
from tpu_llm.plan.program import Execution, Program


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What a device does as one: a fusion, a kernel or an instruction by itself. Figures are of all its runs."""

    op_name: str
    kernel: bool
    times: int
    seconds: float
    flops: float  # of dots, convolutions and kernels
    bytes: float  # read from HBM and written to it
    to_host: float  # bytes to the host's memory and from it


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one part of the model takes in one pass."""

    part: str
    phase: str
    seconds: float
    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Collectives of one kind along the same axes of the mesh."""

    kind: str
    axes: tuple[str, ...]
    part: str
    count: int
    bytes: float  # of their results on one device
    hidden: float  # of these, what goes on while the device computes
    seconds: float  # on their links
    exposed: float  # of these seconds, what the device waits


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """One step on one device."""

    cycles: int  # the compiler's estimate, without kernels
    kernel_cycles: float  # charged
    flops: float  # executed
    bytes: float  # of HBM
    host_bytes: float  # to the host's memory and back
    host_seconds: float  # that these take over PCIe, while the device computes if there is time
    seconds: float
    shares: tuple[Share, ...]
    traffic: tuple[Traffic, ...]
    kernels: Mapping[str, int]  # how often each runs
    losses: Mapping[str, float]  # seconds of the step by what they are lost to; 'model' is what is needed
    uncounted: tuple[str, ...]  # loops whose turns depend on data: they are counted once


def cost(program: Program, torus: Torus, mesh: Mapping[str, int], *, needed: float, bubble: float = 0.0) -> Cost:
    """Of a program on a slice. `needed` are the FLOPs of the model on one device; `bubble` is the share of the layers'
    executed work that a pipeline does not need.
    """
    chip = torus.chip
    work = list(works(program, chip))
    traffic = _traffic(program, torus, mesh)
    waits = sum(each.exposed for each in traffic)
    away = sum(each.to_host for each in work)
    charged = kernels.charged_cycles(program.kernels, chip)
    return Cost(
        cycles=program.cycles,
        kernel_cycles=charged,
        flops=sum(each.flops for each in work),
        bytes=sum(each.bytes for each in work),
        host_bytes=away,
        host_seconds=away / 2 / chip.pcie_bandwidth,  # both ways at once
        seconds=(program.cycles + charged) / chip.clock + waits,
        shares=_shares(work),
        traffic=traffic,
        kernels=_counts(program),
        losses=_losses(work, chip, waits, needed, bubble),
        uncounted=program.uncounted,
    )


def works(program: Program, chip: Chip) -> Iterator[Work]:
    """All that a device does, in the order of the program."""
    module = program.module
    home = {name: each for each in module.computations.values() for name in each.instructions}
    for whole, inner in _wholes(program.executed):
        instruction, times = whole.instruction, whole.times
        name = _name(whole, inner)
        if instruction.target == kernels.TARGET:
            charge = kernels.read(instruction, whole.operands, times).charge
            seconds = times * charge.cycles(chip) / chip.clock
            yield Work(name, True, times, seconds, times * charge.flops, times * charge.bytes, 0.0)
            continue
        flops = whole.flops + sum(each.flops for each in inner)
        moved = times * hbm.moved(module, home[instruction.name], instruction)
        away = times * hbm.to_host(home[instruction.name], instruction)
        if whole.cycles or flops or moved or away:
            yield Work(name, False, times, whole.cycles / chip.clock, flops, moved, away)


def _name(whole: Execution, inner: list[Execution]) -> str:
    """The op_name that says the most: of the matmul, else the fusion's own, else of what is near its end."""
    matmuls = (each.op_name for each in inner if each.flops)
    names = (*matmuls, whole.op_name, *(each.op_name for each in reversed(inner)))
    return next((name for name in names if parts.part(name) != 'other'), whole.op_name)


def _wholes(executed: Iterable[Execution]) -> Iterator[tuple[Execution, list[Execution]]]:
    """Each instruction with what is fused into it."""
    whole, inner = None, []
    for each in executed:
        if each.fused:
            inner.append(each)
            continue
        if whole is not None:
            yield whole, inner
        whole, inner = each, []
    if whole is not None:
        yield whole, inner


def _shares(work: list[Work]) -> tuple[Share, ...]:
    sums: dict[tuple[str, str], list[float]] = {}
    for each in work:
        total = sums.setdefault((parts.part(each.op_name), parts.pass_of(each.op_name)), [0.0, 0.0, 0.0])
        for i, figure in enumerate((each.seconds, each.flops, each.bytes)):
            total[i] += figure
    shares = [
        Share(part=part, phase=phase, seconds=seconds, flops=flops, bytes=moved)
        for (part, phase), (seconds, flops, moved) in sums.items()
    ]
    return tuple(sorted(shares, key=lambda each: -each.seconds))


def _traffic(program: Program, torus: Torus, mesh: Mapping[str, int]) -> tuple[Traffic, ...]:
    sums: dict[tuple[str, tuple[str, ...], str], list[float]] = {}
    for each in transfers(program, torus.chip):
        axes = collectives.axes([each.group], mesh) if each.group else ('slices',)
        total = sums.setdefault((each.kind, axes, parts.part(each.op_name)), [0.0] * 5)
        size = each.times * each.bytes
        figures = (each.times, size, size * each.hidden, each.times * each.seconds(torus), each.exposed(torus))
        for i, figure in enumerate(figures):
            total[i] += figure
    traffic = [
        Traffic(
            kind=kind, axes=axes, part=part, count=int(count), bytes=size, hidden=hidden, seconds=seconds, exposed=waits
        )
        for (kind, axes, part), (count, size, hidden, seconds, waits) in sums.items()
    ]
    return tuple(sorted(traffic, key=lambda each: -each.bytes))


def _counts(program: Program) -> dict[str, int]:
    counts: dict[str, int] = {}
    for kernel in program.kernels:
        counts[kernel.name] = counts.get(kernel.name, 0) + kernel.times
    return counts


def _losses(work: list[Work], chip: Chip, waits: float, needed: float, bubble: float) -> dict[str, float]:
    """From what the model needs at the chip's peak to what the step takes; the values add up to it."""

    def flops(chosen: Callable[[Work], bool]) -> float:
        return sum(each.flops for each in work if chosen(each))

    def slow(chosen: Callable[[Work], bool]) -> float:
        """Seconds beyond those that the FLOPs would take at the peak."""
        return sum(each.seconds - each.flops / chip.flops for each in work if chosen(each))

    executed = flops(lambda each: True)
    layers = flops(lambda each: parts.part(each.op_name) not in ('embed', 'head', 'loss', 'optimizer'))
    idle = bubble * layers
    again = (1 - bubble) * flops(lambda each: parts.pass_of(each.op_name) == 'remat')
    return {
        'model': needed / chip.flops,
        'recomputed for the backward pass': again / chip.flops,
        'pipeline bubble': idle / chip.flops,
        'masked or padded': (executed - needed - again - idle) / chip.flops,
        'matmuls below the peak': slow(lambda each: each.flops > 0 and not each.kernel),
        'kernels below the peak': slow(lambda each: each.kernel),
        'memory-bound operations': slow(lambda each: each.flops == 0),
        'waiting for other devices': waits,
    }

"""Which collectives go on while the device computes, as the compiler scheduled them.

One that does has a start and an end, with work between them; some fusions carry the collective on and name its channel.
The device waits for whatever starts and ends in the same instruction.
"""

import collections
import dataclasses

from tpu_llm.parallel.chips import Chip
from tpu_llm.plan import collectives, kernels
from tpu_llm.plan.hlo import Computation, Instruction, Module
from tpu_llm.plan.links import Torus
from tpu_llm.plan.program import Execution, Program, inside


@dataclasses.dataclass(frozen=True, slots=True)
class Transfer:
    """A collective, and how often it runs."""

    kind: str
    op_name: str
    bytes: int  # of its result on one device
    group: tuple[int, ...]  # the devices of the first group, as places in the mesh
    times: int
    meanwhile: float  # cycles of what is computed while it is under way
    scatters: bool = False  # an all-reduce that leaves each device its part

    @property
    def hidden(self) -> bool:
        return self.meanwhile > 0

    def exposed(self, torus: Torus) -> float:
        """Seconds that a device waits in all, had each collective its links to itself."""
        return self.times * max(0.0, self.seconds(torus) - self.meanwhile / torus.chip.clock)

    def seconds(self, torus: Torus) -> float:
        """How long one takes."""
        if self.scatters:
            return torus.seconds('reduce-scatter', self.bytes / len(self.group), self.group)
        return torus.seconds(self.kind, self.bytes, self.group)


def transfers(program: Program, chip: Chip) -> list[Transfer]:
    """All collectives of a program, in no order."""
    times: collections.Counter[str] = collections.Counter()
    for each in program.executed:
        times[each.instruction.name] += each.times
    computations = program.module.computations.values()
    parts = {
        name for each in computations for instruction in each.instructions.values() for name in _parts(instruction)
    }
    wholes = [each for each in computations if each.name not in parts and times[each.root.name]]
    return [transfer for each in wholes for transfer in _of(program.module, each, times, chip)]


def _parts(instruction: Instruction) -> list[str]:
    """The computations that an instruction is made of; a loop is not made of its body, it runs it."""
    return instruction.called('calls') if instruction.opcode in ('fusion', 'async-start') else []


def _of(module: Module, computation: Computation, times: collections.Counter[str], chip: Chip) -> list[Transfer]:
    order = list(computation.instructions.values())
    seen: dict[str, list[tuple[int, Instruction]]] = {}  # the places where each is under way
    channels = collectives.Channels()
    for place, instruction in enumerate(order):
        for key, collective in _under_way(module, computation, instruction, channels):
            # What a loop carries on, it neither starts nor ends: of that, where the loop stands counts.
            if key in seen or times[collective.name]:
                seen.setdefault(key, []).append((place, collective))
    if not seen:
        return []
    cycles = [_cycles(inside(module, computation, each), chip) for each in order]
    return [
        Transfer(
            collectives.kind(places[0][1]) or '',
            places[0][1].op_name or order[places[0][0]].op_name,
            collectives.result_bytes(places[0][1]),
            collectives.groups(places[0][1], module.devices)[0],
            times[order[places[0][0]].name],
            sum(cycles[places[0][0] + 1 : places[-1][0]]),
            collectives.scatters(order[places[0][0]]),
        )
        for places in seen.values()
    ]


def _cycles(executions: list[Execution], chip: Chip) -> float:
    """Of what runs, kernels charged."""
    found = [
        kernels.read(each.instruction, each.operands, each.times)
        for each in executions
        if each.instruction.target == kernels.TARGET
    ]
    return sum(each.cycles for each in executions) + kernels.charged_cycles(found, chip)


def _under_way(
    module: Module, computation: Computation, instruction: Instruction, channels: collectives.Channels
) -> list[tuple[str, Instruction]]:
    """The collectives that an instruction is, ends or carries on, each with what tells it from the others here.

    That is its start's name; between slices, the name under which sender and receiver meet.
    """
    if parts := _parts(instruction):
        inner = module.computations[parts[0]]
        found = [each for each in inner.instructions.values() if collectives.kind(each)]
        return [(channels.started_as(inner, each), each) for each in found]
    if instruction.opcode.endswith('-done') and instruction.operands[0] in computation.instructions:
        start = computation.instructions[instruction.operands[0]]
        return _under_way(module, computation, start, channels)
    if meeting := collectives.meeting(instruction):
        return [(meeting, instruction)]
    return [(instruction.name, instruction)] if collectives.kind(instruction) else []

"""What one device executes in one run of a compiled program: instructions, each with how often.

The program is walked from its entry, loops as often as they turn and of a conditional's branches the costliest. It is
the same for programs of CPUs and of TPUs; only the latter have estimated cycles.
"""

import dataclasses
from collections.abc import Iterable, Mapping

from tpu_llm.plan import arithmetic, collectives, kernels
from tpu_llm.plan.hlo import Computation, Instruction, Module, Shapes, parse
from tpu_llm.plan.kernels import Kernel
from tpu_llm.plan.loops import trip_count


@dataclasses.dataclass(frozen=True, slots=True)
class Execution:
    """An instruction and how often it runs. What is inside a fusion has no cycles of its own."""

    instruction: Instruction
    operands: tuple[Shapes, ...]
    times: int
    fused: bool
    around: str = ''  # the op_name of the loop, branch or fusion it is in

    @property
    def op_name(self) -> str:
        """Its own, or that of what it is in."""
        return self.instruction.op_name or self.around

    @property
    def flops(self) -> int:
        return self.times * arithmetic.flops(self.instruction, self.operands)

    @property
    def cycles(self) -> int:
        return 0 if self.fused else self.times * self.instruction.cycles


@dataclasses.dataclass(frozen=True, slots=True)
class Traffic:
    """Collectives of one kind along the same axes of the mesh."""

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int  # of their results on one device


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """All that a device executes. `uncounted` names loops whose turns depend on data: they are counted once, or as
    often as `read` is told.
    """

    module: Module
    executed: tuple[Execution, ...]
    uncounted: tuple[str, ...]

    @property
    def flops(self) -> int:
        """Of dots and convolutions; what kernels do is their own matter (`kernels`)."""
        return sum(each.flops for each in self.executed)

    @property
    def cycles(self) -> int:
        """The compiler's estimate. Collectives and kernels count nothing in it, and nothing in it overlaps."""
        return sum(each.cycles for each in self.executed)

    def traffic(self, mesh: Mapping[str, int]) -> list[Traffic]:
        """Collectives by kind and axes of the mesh, most bytes first."""
        sums: dict[tuple[str, tuple[str, ...]], tuple[int, int]] = {}
        for each in self.executed:
            kind = collectives.kind(each.instruction)
            if kind is None:
                continue
            groups = collectives.groups(each.instruction, self.module.devices)
            key = kind, collectives.axes(groups, mesh)
            count, total = sums.get(key, (0, 0))
            sums[key] = count + each.times, total + each.times * collectives.result_bytes(each.instruction)
        traffic = [Traffic(*key, *value) for key, value in sums.items()]
        return sorted(traffic, key=lambda each: -each.bytes)

    @property
    def kernels(self) -> list[Kernel]:
        """The calls of Pallas kernels, most often run first."""
        found = [
            kernels.read(each.instruction, each.operands, each.times)
            for each in self.executed
            if each.instruction.target == kernels.TARGET
        ]
        return sorted(found, key=lambda kernel: -kernel.times)


def inside(module: Module, computation: Computation, instruction: Instruction) -> list[Execution]:
    """What one run of an instruction of that computation executes."""
    return _Walker(module).one(computation, instruction, 1)


def read(text: str, turns: int = 1) -> Program:
    """From `compiled.as_text()`, a loop that depends on data making so many turns. Raises ValueError for other text."""
    return walk(parse(text), turns)


def walk(module: Module, turns: int = 1) -> Program:
    walker = _Walker(module, turns)
    executed = walker.run(module.entry, 1)
    return Program(module, tuple(executed), tuple(walker.uncounted))


class _Walker:
    def __init__(self, module: Module, turns: int = 1):
        self.module, self.turns = module, turns
        self.uncounted: list[str] = []
        self.channels = collectives.Channels()

    def run(self, computation: Computation, times: int, around: str = '') -> list[Execution]:
        steps = (self.one(computation, each, times, around) for each in computation.instructions.values())
        return [execution for step in steps for execution in step]

    def one(self, computation: Computation, instruction: Instruction, times: int, around: str = '') -> list[Execution]:
        """An instruction, and after it all that it runs."""
        out = [Execution(instruction, tuple(computation.shapes(instruction)), times, False, around)]
        around = instruction.op_name or around
        if instruction.opcode == 'fusion':
            out += self._fusion(self._computation(instruction, 'calls'), times, around)
        elif instruction.opcode == 'while':
            turns = trip_count(self.module, computation, instruction)
            if turns is None:
                self.uncounted.append(instruction.op_name or instruction.name)
            turns = self.turns if turns is None else turns
            out += self.run(self._computation(instruction, 'condition'), times * (turns + 1), around)
            out += self.run(self._computation(instruction, 'body'), times * turns, around)
        elif instruction.opcode == 'conditional':
            out += self._conditional(instruction, times, around)
        elif instruction.opcode == 'call':
            out += self.run(self._computation(instruction, 'to_apply'), times, around)
        elif instruction.opcode == 'async-start':
            out += self.run(self._computation(instruction, 'calls'), times, around)
        return out

    def _fusion(self, computation: Computation, times: int, around: str) -> Iterable[Execution]:
        """What is fused. A collective that goes on while fusions compute is one, in the first of them."""
        for instruction in computation.instructions.values():
            if collectives.kind(instruction) and self.channels.started_as(computation, instruction) != instruction.name:
                continue
            yield Execution(instruction, tuple(computation.shapes(instruction)), times, True, around)
            if instruction.opcode == 'fusion':
                inner = self._computation(instruction, 'calls')
                yield from self._fusion(inner, times, instruction.op_name or around)

    def _conditional(self, instruction: Instruction, times: int, around: str) -> list[Execution]:
        names = instruction.called('branch_computations')
        names = names or [*instruction.called('true_computation'), *instruction.called('false_computation')]
        branches = [self.run(self.module.computations[name], times, around) for name in names]
        return max(
            branches, key=lambda branch: (sum(each.cycles for each in branch), sum(each.flops for each in branch))
        )

    def _computation(self, instruction: Instruction, attribute: str) -> Computation:
        return self.module.computations[instruction.called(attribute)[0]]

"""Bytes that an instruction reads from HBM and writes to it, without what the compiler keeps in fast memory.

A fusion reads its operands once and writes its results once; of a stack of layers that it only takes a slice of, it
reads the slice, and one that it updates in place it writes only there. A collective counts where it starts.
"""

from collections.abc import Iterator

from tpu_llm.plan import collectives
from tpu_llm.plan.hlo import Computation, Instruction, Module, Shapes, leaves
from tpu_llm.plan.kernels import TARGET

HOST = 5  # the memory space of the host

# What names or groups values, or stands for what other instructions do.
_FREE = (
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call', 'after-all',
    'optimization-barrier', 'partition-id', 'replica-id', 'async-start', 'recv', 'add-dependency',
)  # fmt: skip


def moved(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes read and written in one run of it; what is inside of a loop or a branch counts there."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith('-done') or (opcode == 'custom-call' and instruction.target != TARGET):
        return 0
    operands = [computation.instructions[name].shape for name in instruction.operands]
    if opcode == 'fusion':
        inner = module.computations[instruction.called('calls')[0]]
        targets = {each.target for each in inner.instructions.values()}
        if 'AsyncCollectiveDone' in targets:
            return 0
        if 'AsyncCollectiveStart' in targets:
            found = [each for each in inner.instructions.values() if collectives.kind(each)]
            return sum(_bytes(shape) for each in found for shape in (*inner.shapes(each), each.shape))
        reads = sum(_read(module, inner, number, shape) for number, shape in enumerate(operands))
        return reads + sum(_written(inner, each) for each in _results(inner))
    if opcode == 'send':
        return _bytes(operands[0])
    result = _result(instruction)
    if opcode.removesuffix('-start') in ('dynamic-slice', 'gather', 'slice'):
        return _part(operands[0], result) + _bytes(result)
    if opcode.removesuffix('-start') == 'dynamic-update-slice':
        return _bytes(operands[1]) + _part(operands[0], operands[1])
    return sum(map(_bytes, operands)) + _bytes(result)


def _result(instruction: Instruction) -> Shapes:
    """Of what only starts here as well."""
    shape = instruction.shape
    if collectives.kind(instruction):
        return collectives.result(instruction)
    if not instruction.opcode.endswith('-start'):
        return shape
    assert isinstance(shape, tuple)
    return shape[1] if isinstance(shape[0], tuple) else shape[0]  # ((operands), result, …) or (result, operand, …)


def _part(whole: Shapes, part: Shapes) -> int:
    """Bytes of a part of something in HBM, wherever the part itself is."""
    return _size(part) if _bytes(whole) else 0


def to_host(computation: Computation, instruction: Instruction) -> int:
    """Bytes that go to the host's memory or come from there in one run of it."""
    if not instruction.opcode.endswith('-start'):
        return 0
    operands = [computation.instructions[name].shape for name in instruction.operands]
    there = [leaf for shape in (*operands, instruction.shape) for leaf in leaves(shape) if leaf.space == HOST]
    here = [leaf for shape in (*operands, instruction.shape) for leaf in leaves(shape) if leaf.space != HOST]
    # One side is the stack of all layers and the other one layer of it, or both are the same.
    return max((leaf.bytes for leaf in here if leaf.dtype == there[0].dtype), default=0) if there else 0


def _bytes(shape: Shapes) -> int:
    return sum(leaf.bytes for leaf in leaves(shape) if leaf.space == 0)


def _read(module: Module, inner: Computation, number: int, shape: Shapes) -> int:
    """Of the operand of that number; what is only cut out of it, if it is only cut."""
    whole = _bytes(shape)
    parameter = next(
        each for each in inner.instructions.values() if each.opcode == 'parameter' and each.literal == str(number)
    )
    parts = 0
    for user, place in _users(inner, parameter):
        if collectives.kind(user) and _only_carried(inner, user):
            continue
        if user.opcode in ('dynamic-slice', 'gather', 'slice') and place == 0:
            parts += _size(user.shape)
        elif user.opcode == 'tuple' or (user.opcode == 'dynamic-update-slice' and place == 0):
            continue  # handed on, or written in place
        elif user.opcode == 'fusion':
            called = module.computations[user.called('calls')[0]]
            parts += _read(module, called, place, shape)
        else:
            return whole
    return min(parts, whole)


def _only_carried(inner: Computation, collective: Instruction) -> bool:
    """Whether it goes on from before, or is left for later: where it starts it is counted."""
    return all(user is inner.root and user.opcode == 'tuple' for user, _ in _users(inner, collective))


def _users(inner: Computation, value: Instruction) -> Iterator[tuple[Instruction, int]]:
    """Who takes it, and as which operand; through what only looks at it in another shape."""
    for each in inner.instructions.values():
        for place, name in enumerate(each.operands):
            if name == value.name:
                if each.opcode == 'bitcast':
                    yield from _users(inner, each)
                else:
                    yield each, place


def _results(inner: Computation) -> list[Instruction]:
    if inner.root.opcode == 'tuple':
        return [inner.instructions[name] for name in inner.root.operands]
    return [inner.root]


def _written(inner: Computation, result: Instruction) -> int:
    while result.opcode == 'bitcast' and result.operands[0] in inner.instructions:
        result = inner.instructions[result.operands[0]]
    if result.opcode == 'parameter' or collectives.kind(result):
        return 0
    if result.opcode == 'dynamic-update-slice':
        return _part(result.shape, inner.instructions[result.operands[1]].shape)
    return _bytes(result.shape)


def _size(shape: Shapes) -> int:
    return sum(leaf.bytes for leaf in leaves(shape))

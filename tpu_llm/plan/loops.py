"""How often a loop runs: what the compiler wrote down, or what its counter, start and limit say."""

import math

from tpu_llm.plan.hlo import Computation, Instruction, Module

# What passes a number on as it is.
_PASSING = ('copy', 'convert', 'bitcast', 'copy-done', 'copy-start', 'reshape', 'optimization-barrier')


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """None where it depends on data, or is counted in a way unknown here."""
    known = loop.config('known_trip_count')
    if known:
        return int(known['n'])
    condition = module.computations[loop.called('condition')[0]]
    body = module.computations[loop.called('body')[0]]
    compared = _comparison(module, condition)
    if compared is None:
        return None
    counter, bound, direction = compared
    first = _constant(computation, _element(computation, loop.operands[0], counter))
    step = _step(module, body, counter)
    limit = bound if isinstance(bound, int) else None
    if first is None or limit is None or not step or direction not in ('LT', 'LE'):
        return None
    return max(0, math.ceil((limit + (direction == 'LE') - first) / step))


def _comparison(module: Module, condition: Computation) -> tuple[int, int | None, str] | None:
    """Which element of the loop's state is compared with which constant, and how."""
    root, values = _passed(condition, condition.root), {}
    if root.opcode == 'fusion':
        inner = module.computations[root.called('calls')[0]]
        values = {p.name: root.operands[int(p.literal)] for p in _parameters(inner)}
        root = inner.root
    if root.opcode != 'compare':
        return None
    left, right = (condition.instructions.get(values.get(name, name)) for name in root.operands)
    if left is None or right is None:
        return None
    left, right = _passed(condition, left), _passed(condition, right)
    direction = root.attribute('direction') or ''
    if left.opcode == 'constant':
        left, right, direction = right, left, {'GT': 'LT', 'GE': 'LE'}.get(direction, '')
    counter = left.attribute('index')
    if left.opcode != 'get-tuple-element' or counter is None:
        return None
    return int(counter), _constant(condition, right), direction


def _step(module: Module, body: Computation, counter: int) -> int | None:
    """What a turn adds to the counter."""
    added = _element(body, body.root.name, counter)
    if added is None:
        return None
    added = _passed(body, added)
    operands = [body.instructions[name] for name in added.operands]
    if added.opcode == 'fusion':
        inner = module.computations[added.called('calls')[0]]
        added, own = inner.root, [inner.instructions[name] for name in inner.root.operands]
        operands = [operands[int(each.literal)] if each.opcode == 'parameter' else each for each in own]
    if added.opcode != 'add' or len(operands) != 2:
        return None
    steps = [_constant(body, each) for each in operands]
    return next((step for step in steps if step is not None), None)


def _element(computation: Computation, state: str, index: int) -> Instruction | None:
    made = _passed(computation, computation.instructions[state])
    return computation.instructions[made.operands[index]] if made.opcode == 'tuple' else None


def _constant(computation: Computation, instruction: Instruction | None) -> int | None:
    if instruction is None:
        return None
    value = _passed(computation, instruction)
    return int(value.literal) if value.opcode == 'constant' and value.literal.lstrip('-').isdecimal() else None


def _passed(computation: Computation, instruction: Instruction) -> Instruction:
    """What it is a copy of."""
    while instruction.opcode in _PASSING and instruction.operands[0] in computation.instructions:
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _parameters(computation: Computation) -> list[Instruction]:
    return [each for each in computation.instructions.values() if each.opcode == 'parameter']

"""Where a device's memory goes when most of it is in use, from what the compiler writes down (`xla_dump_to`).

The compiler gives every value a place in memory and a time from which to which it lives; values that follow each other
share a place. It does so before it knows whether all of it fits, so a program that does not is explained as well.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tpu_llm.plan import collectives, parts
from tpu_llm.plan.hbm import HOST
from tpu_llm.plan.hlo import Computation, Instruction, Module, Shape, Shapes, leaves

# By what stands at the start of an argument's name.
_ARGUMENTS = {
    'state.params': 'parameters',
    'state.optimizer': 'optimizer state',
    'state.ema': 'moving average',
    'frozen.base': 'frozen weights',
    'frozen.other': 'reference',
    'weights': 'parameters',  # of rollouts and scoring, those that do not train included
    'batch': 'batch',
    'tokens': 'batch',
    'segments': 'batch',
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Buffer:
    """A piece of memory at the peak."""

    bytes: int
    kind: str  # 'parameters', 'activations', …
    where: str  # the parameter's path, or the part of the model and the operation it is from
    shape: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """HBM of one device."""

    allocated: int  # bytes: arguments, and the room that temporaries take packed
    peak: int  # of these, bytes in use when most are
    kinds: Mapping[str, int]  # bytes at the peak
    buffers: tuple[Buffer, ...]  # at the peak, largest first
    host: int = 0  # bytes on the host that the program keeps there


@dataclasses.dataclass(frozen=True, slots=True)
class _Value:
    """A value's name as the compiler lists it, `while.1{3}`, and its place."""

    name: str
    bytes: int
    offset: int


def notes(dump: Path, program: str) -> dict[str, str]:
    """What the compiler wrote to a folder of who lives where, and when, in the program of that name."""
    names = {'places': 'after_optimizations-buffer-assignment.txt', 'times': 'after_optimizations-live-range.txt'}
    return {about: _file(dump, program, name).read_text() for about, name in names.items()}


def read(notes: Mapping[str, str], module: Module) -> Memory:
    """From the compiler's notes on that module."""
    arguments, values, room = _allocations(notes['places'])
    lives = _lives(notes['times'])
    homes = {name: each for each in module.computations.values() for name in each.instructions}
    time = _busiest(values, lives)
    weights: dict[tuple[int, ...], str] = {}  # by their dims on a device, of equal ones the first
    for each, leaf in _arguments(module.entry, 'state.params'):
        weights.setdefault(leaf.dims, _argument(each, leaf).where)
    live = {(x.offset, x.bytes) for x in values if x.name in lives and lives[x.name][0] <= time <= lives[x.name][1]}
    places: dict[tuple[int, int], list[_Value]] = collections.defaultdict(list)
    for value in values:
        if (value.offset, value.bytes) in live:
            places[value.offset, value.bytes].append(value)
    buffers = [_buffer(module, homes, weights, found) for found in places.values()]
    buffers += [_argument(each, leaf) for each, leaf in _arguments(module.entry)]
    kinds: collections.Counter[str] = collections.Counter()
    for each in buffers:
        kinds[each.kind] += each.bytes
    return Memory(
        allocated=arguments + room[0],
        peak=sum(kinds.values()),
        kinds=dict(kinds.most_common()),
        buffers=tuple(sorted(buffers, key=lambda each: -each.bytes)[:100]),
        host=room[HOST],
    )


def among(memory: Memory, held: Mapping[str, int]) -> Memory:
    """The same where the device holds so much of each kind: what the program takes no part in as well, and what it is
    given twice once.
    """
    more = {kind: size - memory.kinds.get(kind, 0) for kind, size in held.items()}
    more = {kind: size for kind, size in more.items() if size}
    added = (Buffer(bytes=size, kind=kind, where='not in this program', shape='') for kind, size in more.items())
    kinds = collections.Counter(memory.kinds)
    kinds.update(more)
    return dataclasses.replace(
        memory,
        allocated=memory.allocated + sum(more.values()),
        peak=memory.peak + sum(more.values()),
        kinds={kind: size for kind, size in kinds.most_common() if size},
        buffers=tuple(sorted([*memory.buffers, *(each for each in added if each.bytes > 0)], key=lambda x: -x.bytes)),
    )


def load(values: Mapping[str, Any]) -> Memory:
    return Memory(**{**values, 'buffers': tuple(Buffer(**each) for each in values['buffers'])})


def scheduled(dump: Path, program: str) -> str:
    """The text of the program of that name that the compiler last wrote there."""
    return _file(dump, program, 'after_optimizations.txt').read_text()


def _file(dump: Path, program: str, ending: str) -> Path:
    return max(dump.glob(f'*.{program}.*.{ending}'), key=lambda path: path.stat().st_mtime)


def _allocations(text: str) -> tuple[int, list[_Value], collections.Counter[int]]:
    """Bytes of the arguments, the values in the temporaries' HBM, and the bytes of temporaries by memory space."""
    arguments, values, room = 0, [], collections.Counter[int]()
    inside = False
    for line in text.splitlines():
        if match := re.match(r'allocation \d+: size (\d+)(.*):$', line):
            color = re.search(r'color (\d+)', match[2])
            space = int(color[1]) if color else 0
            inside = 'preallocated-temp' in match[2] and space == 0
            if 'preallocated-temp' in match[2]:
                room[space] += int(match[1])
            elif space == 0 and 'thread-local' not in match[2]:
                arguments += int(match[1])
        elif inside and (match := re.match(r' value: <\d+ (\S+) @0> \(size=(\d+),offset=(\d+)\)', line)):
            name = match[1] if match[1].endswith('}') else f'{match[1]}{{}}'
            values.append(_Value(name, int(match[2]), int(match[3])))
        elif line and not line.startswith(' '):
            inside = False
    return arguments, values, room


def _lives(text: str) -> dict[str, tuple[int, int]]:
    """From when to when each value lives, in places of the schedule."""
    part = text.partition('BufferLiveRange:')[2].partition('Live ranges at')[0]
    return {match[1]: (int(match[2]), int(match[3])) for match in re.finditer(r'(\S+\{[\d,]*\}):(\d+)-(\d+)', part)}


def _busiest(values: Iterable[_Value], lives: Mapping[str, tuple[int, int]]) -> int:
    """When most memory is in use. Values that share a place are one."""
    changes: dict[int, list[tuple[int, _Value]]] = collections.defaultdict(list)
    for value in values:
        if value.name in lives:
            start, end = lives[value.name]
            changes[start].append((1, value))
            changes[end + 1].append((-1, value))
    users: collections.Counter[tuple[int, int]] = collections.Counter()
    used, most, when = 0, -1, 0
    for time in sorted(changes):
        for change, value in changes[time]:
            place = value.offset, value.bytes
            before = users[place]
            users[place] += change
            used += value.bytes * ((users[place] > 0) - (before > 0))
        if used > most:
            most, when = used, time
    return when


# ------------------------------------------------------------------------------------------------ what a buffer holds


def _arguments(entry: Computation, start: str = '') -> Iterable[tuple[Instruction, Shape]]:
    for each in entry.instructions.values():
        if each.opcode == 'parameter' and each.op_name.startswith(start) and isinstance(each.shape, Shape):
            yield each, each.shape


def _argument(instruction: Instruction, shape: Shape) -> Buffer:
    name = instruction.op_name.replace('\\', '')
    kind = next((kind for start, kind in _ARGUMENTS.items() if name.startswith(start)), 'counters')
    path = re.search(r"\['(.+)'\]$", name)
    return Buffer(bytes=shape.bytes, kind=kind, where=path[1] if path else name, shape=str(shape))


def _buffer(
    module: Module, homes: Mapping[str, Computation], weights: Mapping[tuple[int, ...], str], values: list[_Value]
) -> Buffer:
    """What is known of values that share a place: most stand for the same, seen by loops and by what fills it."""
    told: dict[str, Instruction] = {}
    for value in values:
        instruction = _instruction(homes, value)
        if instruction is not None and instruction.opcode not in ('while', 'parameter', 'tuple', 'conditional'):
            told.setdefault(_source(module, homes, instruction), instruction)
    name = max(told, key=lambda name: 2 * (parts.part(name) != 'other') + bool(name), default='')
    made = told.get(name)
    shape = _shape(_instruction(homes, values[0]), values[0])
    part = parts.part(name)
    where = ' '.join(dict.fromkeys(word for word in ('' if part == 'other' else part, _operation(name)) if word))
    if shape is not None and shape.dims in weights:
        where = f'such as {weights[shape.dims]}'
    return Buffer(
        bytes=values[0].bytes,
        kind=_kind(made, name, shape, weights),
        where=where or values[0].name.removesuffix('{}'),
        shape=str(shape or '?'),
    )


def _instruction(homes: Mapping[str, Computation], value: _Value) -> Instruction | None:
    name = value.name.partition('{')[0]
    return homes[name].instructions[name] if name in homes else None


def _shape(instruction: Instruction | None, value: _Value) -> Shape | None:
    if instruction is None:
        return None
    shape: Shapes = instruction.shape
    for index in re.findall(r'\d+', value.name.partition('{')[2]):
        if isinstance(shape, tuple) and int(index) < len(shape):
            shape = shape[int(index)]
    return next(iter(leaves(shape)), None)


def _source(module: Module, homes: Mapping[str, Computation], instruction: Instruction, far: int = 4) -> str:
    """The op_name that tells most: of what is written into a stack of layers, not of the writing."""
    if parts.part(instruction.op_name) != 'other' or far == 0:
        return instruction.op_name
    if instruction.opcode == 'fusion':
        inner = module.computations[instruction.called('calls')[0]]
        names = [each.op_name for each in inner.instructions.values() if parts.part(each.op_name) != 'other']
        if names:
            return names[-1]
    if instruction.opcode in (
        'fusion',
        'copy',
        'bitcast',
        'convert',
        'copy-start',
        'copy-done',
        'dynamic-update-slice',
    ):
        sources = [homes[name].instructions[name] for name in instruction.operands if name in homes]
        names = [_source(module, homes, each, far - 1) for each in sources if each.opcode != 'get-tuple-element']
        return next((name for name in names if parts.part(name) != 'other'), instruction.op_name)
    return instruction.op_name


def _kind(
    instruction: Instruction | None, name: str, shape: Shape | None, weights: Mapping[tuple[int, ...], str]
) -> str:
    phase = parts.pass_of(name)
    if shape is not None and shape.dims in weights:
        return 'gradients' if phase == 'backward' else 'weights in the compute dtype'
    if instruction is None or not name:
        return 'temporaries'
    if collectives.kind(instruction) or 'all-gather' in instruction.name or 'all-reduce' in instruction.name:
        return 'collectives'
    if parts.part(name) in ('head', 'loss'):
        return 'logits and loss'
    kinds = {'forward': 'activations', 'remat': 'recomputed activations', 'backward': 'backward pass'}
    return kinds.get(phase, 'temporaries')


def _operation(name: str) -> str:
    """'BTD,DF->BTF' or the last word of an op_name that says something."""
    words = [word for word in re.split(r'[/()]', name) if word]
    einsum = next((word for word in reversed(words) if '->' in word), None)
    plain = [word for word in words if word not in ('jit', 'step', 'while', 'body', 'closed_call', 'checkpoint')]
    last = plain[-1] if plain else ''
    # What a loop over layers stacks without a name of its own: mostly the stream between them.
    return einsum or ('saved for each layer' if last in ('dynamic_update_slice', 'broadcast_in_dim') else last)

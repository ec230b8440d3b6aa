"""A compiled program as data: computations of instructions, from the text that `compiled.as_text()` gives.

Only what every scheduled program has is read here (names, shapes, operands, attributes); what it costs to run is the
matter of `plan/program.py`. Nothing of jax is needed.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

_BITS = {'pred': 8, 'token': 0, 'opaque': 0, 'bf16': 16, 'c64': 64, 'c128': 128}


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """An array's type, dims and memory; the rest of its layout is not kept."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0  # of memory: 0 is HBM, 1 fast memory on the chip, 5 the host's

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without what a layout's tiles pad."""
        return math.ceil(self.size * bits(self.dtype) / 8)

    def __str__(self) -> str:
        return f'{self.dtype}[{",".join(map(str, self.dims))}]'


Shapes = Shape | tuple['Shapes', ...]


def bits(dtype: str) -> int:
    """Bits of an element: `f32` has 32, `f8e4m3fn` 8."""
    number = re.match(r'[a-z]+(\d+)', dtype)
    if dtype in _BITS:
        return _BITS[dtype]
    assert number, f'unknown element type {dtype!r}'
    return int(number[1])


def leaves(shape: Shapes) -> Iterator[Shape]:
    """The arrays of a tuple, however deep."""
    if isinstance(shape, Shape):
        yield shape
    else:
        for part in shape:
            yield from leaves(part)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `%name = shape opcode(operands), attributes`."""

    name: str
    shape: Shapes
    opcode: str
    operands: tuple[str, ...]  # names
    literal: str  # what stands in the parentheses, such as a constant's value or a parameter's number
    attributes: str

    def attribute(self, name: str) -> str | None:
        """`{1,0}`, `32`, `%comp`, … as printed. Not for metadata, frontend_attributes and backend_config."""
        match = re.search(rf', {name}=', self._own_attributes)
        return _value(self._own_attributes, match.end()) if match else None

    def ints(self, name: str) -> tuple[int, ...]:
        """A list attribute, `dimensions={0,1}`; empty where absent."""
        return tuple(map(int, re.findall(r'-?\d+', self.attribute(name) or '')))

    def called(self, name: str) -> list[str]:
        """The computations an attribute names: `calls=%a`, `branch_computations={%a, %b}`."""
        return re.findall(r'%([\w.\-]+)', self.attribute(name) or '')

    @functools.cached_property
    def _own_attributes(self) -> str:
        return re.split(r', (?:metadata|frontend_attributes|backend_config)=', self.attributes, maxsplit=1)[0]

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from: 'jit(step)/jvp()/while/body/BTD,DF->BTF/dot_general'."""
        match = re.search(r'metadata=\{[^}]*?op_name="([^"]*)"', self.attributes)
        return match[1] if match else ''

    @property
    def target(self) -> str:
        """Of a custom call."""
        return (self.attribute('custom_call_target') or '').strip('"')

    @property
    def bytes(self) -> int:
        return sum(leaf.bytes for leaf in leaves(self.shape))

    @functools.cached_property
    def cycles(self) -> int:
        """The compiler's estimate for one execution; 0 where it prints none."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(match[1]) if match else 0

    def config(self, name: str) -> dict[str, Any] | None:
        """An object of the backend_config, or of what the frontend attached: `{"n":"6"}`."""
        match = re.search(rf'"{name}":\s*(?=\{{)', self.attributes)
        return json.JSONDecoder().raw_decode(self.attributes, match.end())[0] if match else None


@dataclasses.dataclass(frozen=True, slots=True)
class Computation:
    """Instructions by name, in the order of the schedule."""

    name: str
    instructions: Mapping[str, Instruction]
    root: Instruction

    def shapes(self, instruction: Instruction) -> list[Shapes]:
        """The shapes of its operands."""
        return [self.instructions[name].shape for name in instruction.operands]


@dataclasses.dataclass(frozen=True, slots=True)
class Module:
    """A program of one device, the same on all of `devices`."""

    computations: Mapping[str, Computation]
    entry: Computation
    devices: int


_HEADER = re.compile(r'(?P<entry>ENTRY )?%(?P<name>[\w.\-]+) .*\) -> .*\{$')
_STATEMENT = re.compile(r'\s+(?P<root>ROOT )?%(?P<name>[\w.\-]+) = ')
_ARRAY = re.compile(r'(\w+)\[([^\]]*)\](?:\{[^}]*\})?')
_SEPARATOR = re.compile(r'(?:, |/\*index=\d+\*/)*')


def parse(text: str) -> Module:
    """Raises ValueError for text without an entry computation."""
    computations: dict[str, Computation] = {}
    entry = None
    for name, is_entry, lines in _blocks(text):
        parsed = [(_instruction(line), root) for line, root in lines]
        root = next((each for each, is_root in parsed if is_root), parsed[-1][0])
        computations[name] = Computation(name, {each.name: each for each, _ in parsed}, root)
        entry = computations[name] if is_entry else entry
    if entry is None:
        raise ValueError('this is not the text of a compiled program: it has no ENTRY computation')
    counts = re.findall(r'num_(?:partitions|replicas)=(\d+)', text.partition('\n')[0])
    return Module(computations, entry, math.prod(map(int, counts)))


def _blocks(text: str) -> Iterator[tuple[str, bool, list[tuple[str, bool]]]]:
    """Computations with their statements; a statement may go over several lines (a kernel's own JSON)."""
    name, is_entry, lines = '', False, []
    for line in text.split('\n'):
        if not line.startswith(' '):
            header = _HEADER.match(line)
            if header:
                if lines:
                    yield name, is_entry, lines
                name, is_entry, lines = header['name'], bool(header['entry']), []
                continue
        statement = _STATEMENT.match(line) if name else None
        if statement:
            lines.append((line.strip(), bool(statement['root'])))
        elif lines and line != '}':
            lines[-1] = (lines[-1][0] + line, lines[-1][1])
    if lines:
        yield name, is_entry, lines


def _instruction(line: str) -> Instruction:
    name, _, rest = line.removeprefix('ROOT ').partition(' = ')
    shape, at = _shape(rest, 0)
    opcode, _, rest = rest[at:].strip().partition('(')
    end = _closing(rest, '()')
    literal, attributes = rest[:end], rest[end + 1 :]
    operands = () if opcode in ('constant', 'parameter') else tuple(re.findall(r'%([\w.\-]+)', literal))
    return Instruction(name.removeprefix('%'), shape, opcode, operands, literal, attributes)


def _shape(text: str, at: int) -> tuple[Shapes, int]:
    """The shape that starts at a place, and where it ends."""
    if text[at] != '(':
        match = _ARRAY.match(text, at)
        assert match, f'no shape at {text[at : at + 40]!r}'
        dims = tuple(int(size.strip().removeprefix('<=')) for size in match[2].split(',') if size)
        space = re.search(r'S\((\d+)\)', match[0])
        return Shape(match[1], dims, int(space[1]) if space else 0), match.end()
    parts, at = [], at + 1
    while text[at] != ')':
        part, at = _shape(text, _past_separator(text, at))
        parts.append(part)
        at = _past_separator(text, at)
    return tuple(parts), at + 1


def _past_separator(text: str, at: int) -> int:
    match = _SEPARATOR.match(text, at)
    assert match
    return match.end()


def _closing(text: str, pair: str) -> int:
    """Where the bracket that is open at the start of the text closes."""
    depth = 1
    for match in re.finditer(rf'[{re.escape(pair)}]', text):
        depth += 1 if match[0] == pair[0] else -1
        if depth == 0:
            return match.start()
    raise AssertionError(f'unbalanced {pair} in {text[:80]!r}')


def _value(text: str, at: int) -> str:
    """An attribute's value: up to the next comma that is not in brackets."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] in '{[(') - (text[i] in '}])')
        if text[i] == ',' and depth == 0 and text[i + 1 : i + 2] == ' ':
            # The mesh form of replica groups goes on after a comma: mesh['a'=2], device_ids=([2]) {'a'}
            if text.startswith('device_ids=', i + 2):
                continue
            return text[at:i]
    return text[at:]

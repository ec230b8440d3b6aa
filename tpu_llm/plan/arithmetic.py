"""Floating-point operations of dots and convolutions, exactly, from their shapes. A multiply-add is two."""

import math
import re
from collections.abc import Sequence

from tpu_llm.plan.hlo import Instruction, Shape, Shapes


def flops(instruction: Instruction, operands: Sequence[Shapes]) -> int:
    """0 for what is neither a dot nor a convolution."""
    if instruction.opcode == 'dot':
        return _dot(instruction, *_arrays(operands))
    if instruction.opcode == 'convolution':
        return _convolution(instruction, *_arrays(operands))
    return 0


def _arrays(operands: Sequence[Shapes]) -> tuple[Shape, Shape]:
    lhs, rhs = operands[:2]
    assert isinstance(lhs, Shape)
    assert isinstance(rhs, Shape)
    return lhs, rhs


def _dot(instruction: Instruction, lhs: Shape, rhs: Shape) -> int:
    assert isinstance(instruction.shape, Shape)
    summed = math.prod(lhs.dims[i] for i in instruction.ints('lhs_contracting_dims'))
    return 2 * instruction.shape.size * summed


def _convolution(instruction: Instruction, lhs: Shape, rhs: Shape) -> int:
    """The TPU compiler writes dots this way: a batch dim becomes a window of which one place each counts."""
    assert isinstance(instruction.shape, Shape)
    labels = re.fullmatch(r'(\w+)_(\w+)->(\w+)', instruction.attribute('dim_labels') or '')
    assert labels, f'{instruction.name}: a convolution without dim_labels'
    inputs, kernel, outputs = labels.groups()
    window = _window(instruction)
    places = 1
    for dim in filter(str.isdigit, outputs):
        places *= _places(
            lhs.dims[inputs.index(dim)],
            rhs.dims[kernel.index(dim)],
            instruction.shape.dims[outputs.index(dim)],
            window,
            int(dim),
        )
    # The kernel's inputs are those of one group of features, the output's batch that of one group of the batch.
    batch, features = (instruction.shape.dims[outputs.index(each)] for each in 'bf')
    return 2 * batch * features * rhs.dims[kernel.index('i')] * places


def _window(instruction: Instruction) -> dict[str, list[str]]:
    """`{size=3x4 stride=1x2 pad=0_0x1_1 …}` by name, a value for each spatial dim."""
    pairs = (part.split('=') for part in (instruction.attribute('window') or '{}').strip('{}').split())
    return {name: values.split('x') for name, values in pairs}


def _places(size: int, kernel: int, out: int, window: dict[str, list[str]], dim: int) -> int:
    """How many pairs of an output and a kernel place fall on a real input, neither on padding nor between inputs."""

    def of(name: str, default: int = 1) -> int:
        return int(window[name][dim]) if name in window else default

    low = int(window['pad'][dim].split('_')[0]) if 'pad' in window else 0
    stride, spread, dilation = of('stride'), of('lhs_dilate'), of('rhs_dilate')
    total = 0
    for place in range(kernel):
        # Outputs o with 0 <= o * stride + start <= (size - 1) * spread, the sum divisible by spread.
        start = place * dilation - low
        first = max(0, math.ceil(-start / stride))
        last = min(out - 1, ((size - 1) * spread - start) // stride)
        step = spread // math.gcd(spread, stride)
        hit = next((o for o in range(first, min(first + step, last + 1)) if (o * stride + start) % spread == 0), None)
        total += 0 if hit is None else (last - hit) // step + 1
    return total

"""The block formats of ggml, the library below llama.cpp: from bytes to float32, and back for six of them.

A row of numbers is cut into blocks of 32 (or 256: the K formats) that lie one after the other; a block holds small
integers and the float16 scales that turn them back. Each format's layout is its NumPy dtype below, field by field
as in ggml's `ggml-common.h`; the arithmetic is that of `ggml-quants.c`, in float32 and in the same order, so that
results are equal to the last bit.

Where integers have less than a byte, the low half of a block's bytes is its first half: byte i of 16 holds number i
in its low four bits and number i + 16 in its high four. Fifth bits, where there are any, lie apart (`high`).
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, UInt8

_CHUNK_VALUES = 1 << 16  # what is worked on at a time stays in the processor's cache


@dataclasses.dataclass(frozen=True, slots=True)
class Format:
    """A type of tensor: its number in files, and how many bytes a block of so many values has."""

    name: str
    number: int
    block_values: int
    block_bytes: int

    def row_bytes(self, values: int) -> int:
        """Bytes of a row. Raises ValueError where it is not a whole number of blocks."""
        if values % self.block_values:
            raise ValueError(f'rows of {values} are not a whole number of {self.name} blocks of {self.block_values}')
        return values // self.block_values * self.block_bytes

    @property
    def decodes(self) -> bool:
        return self.name in _DECODERS

    @property
    def encodes(self) -> bool:
        return self.name in _ENCODERS


F32 = np.dtype([('value', '<f4')])
F16 = np.dtype([('value', '<f2')])
BF16 = np.dtype([('value', '<u2')])  # the high half of a float32
Q4_0 = np.dtype([('scale', '<f2'), ('low', 'u1', 16)])  # (q − 8) · scale
Q4_1 = np.dtype([('scale', '<f2'), ('least', '<f2'), ('low', 'u1', 16)])  # q · scale + least
Q5_0 = np.dtype([('scale', '<f2'), ('high', 'u1', 4), ('low', 'u1', 16)])  # (q − 16) · scale
Q5_1 = np.dtype([('scale', '<f2'), ('least', '<f2'), ('high', 'u1', 4), ('low', 'u1', 16)])
Q8_0 = np.dtype([('scale', '<f2'), ('value', 'i1', 32)])  # q · scale
# 8 groups of 32, each with a scale and a minimum of 6 bits: q · (scale · s) − (least · m).
Q4_K = np.dtype([('scale', '<f2'), ('least', '<f2'), ('groups', 'u1', 12), ('low', 'u1', 128)])
Q5_K = np.dtype([('scale', '<f2'), ('least', '<f2'), ('groups', 'u1', 12), ('high', 'u1', 32), ('low', 'u1', 128)])
# 16 groups of 16, each with a scale of 8 bits: (q − 32) · (scale · s).
Q6_K = np.dtype([('low', 'u1', 128), ('high', 'u1', 64), ('groups', 'i1', 16), ('scale', '<f2')])

_LAYOUTS = {'F32': F32, 'F16': F16, 'BF16': BF16, 'Q8_0': Q8_0, 'Q4_0': Q4_0, 'Q4_1': Q4_1, 'Q5_0': Q5_0, 'Q5_1': Q5_1}
_LAYOUTS |= {'Q4_K': Q4_K, 'Q5_K': Q5_K, 'Q6_K': Q6_K}


# ------------------------------------------------------------------------------------------------- decode


def decode(name: str, blocks: UInt8[np.ndarray, '*rows bytes']) -> Float32[np.ndarray, '*rows values']:
    """The numbers of rows of blocks of the named format.

    Raises ValueError where a row is not a whole number of blocks.
    """
    kind = FORMATS[name]
    *rows, size = blocks.shape
    if size % kind.block_bytes:
        raise ValueError(f'{size} bytes are not a whole number of {name} blocks of {kind.block_bytes}')
    flat = np.ascontiguousarray(blocks).reshape(-1).view(_LAYOUTS[name])
    values = np.empty((len(flat), kind.block_values), np.float32)
    step = _CHUNK_VALUES // kind.block_values
    for start in range(0, len(flat), step):
        _DECODERS[name](flat[start : start + step], values[start : start + step])
    return values.reshape(*rows, size // kind.block_bytes * kind.block_values)


def _decode_float(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:, 0] = blocks['value']


def _decode_bf16(blocks: np.ndarray, out: np.ndarray) -> None:
    out.view(np.uint32)[:, 0] = blocks['value'].astype(np.uint32) << 16


def _decode_q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(blocks['value'], _column(blocks['scale']), out=out)


def _decode_q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(_nibbles(blocks['low']).view(np.int8) - np.int8(8), _column(blocks['scale']), out=out)


def _decode_q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(_nibbles(blocks['low']), _column(blocks['scale']), out=out)
    out += _column(blocks['least'])


def _decode_q5_0(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(_five_bits(blocks).view(np.int8) - np.int8(16), _column(blocks['scale']), out=out)


def _decode_q5_1(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(_five_bits(blocks), _column(blocks['scale']), out=out)
    out += _column(blocks['least'])


def _decode_q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    _scale_groups(blocks, _nibbles(blocks['low'].reshape(-1, 4, 32)).reshape(-1, 8, 32), out)


def _decode_q5_k(blocks: np.ndarray, out: np.ndarray) -> None:
    quants = _nibbles(blocks['low'].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    # Bit g of byte i is the fifth bit of number i of group g.
    bits = blocks['high'][:, None, :] >> np.arange(8, dtype=np.uint8)[:, None]
    _scale_groups(blocks, quants | (bits & 1) << 4, out)


def _decode_q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    # Each half of the block: 64 bytes of low nibbles, 32 bytes that hold two high bits of each of four groups of 32.
    low = _nibbles(blocks['low'].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = blocks['high'].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    quants = (low | (high & 3) << 4).view(np.int8) - np.int8(32)
    scales = _column(blocks['scale']) * blocks['groups']
    np.multiply(quants.reshape(-1, 16, 16), scales[..., None], out=out.reshape(-1, 16, 16))


def _column(scales: np.ndarray) -> np.ndarray:
    """One float32 a block, to be spread over its values."""
    return scales.astype(np.float32)[:, None]


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Along the last dim, all the low halves of the bytes and then all the high ones."""
    return np.concatenate([packed & 15, packed >> 4], -1)


def _five_bits(blocks: np.ndarray) -> np.ndarray:
    """Numbers 0 … 31; bit i of `high`, from the lowest of its first byte, is the fifth bit of number i."""
    high = np.unpackbits(blocks['high'], axis=-1, bitorder='little')
    return _nibbles(blocks['low']) | high << 4


def _scale_groups(blocks: np.ndarray, quants: np.ndarray, out: np.ndarray) -> None:
    scales, leasts = _group_scales(blocks['groups'])
    groups = out.reshape(-1, 8, 32)
    np.multiply(quants, (_column(blocks['scale']) * scales)[..., None], out=groups)
    groups -= (_column(blocks['least']) * leasts)[..., None]


def _group_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """8 scales and 8 minima of 6 bits out of 12 bytes, each uint8 [blocks, 8].

    Bytes 0–3 hold the scales of groups 0–3 in their low six bits, bytes 4–7 the minima; the two bits above are the
    high bits of groups 4–7, whose low four are in bytes 8–11: of the scale in the low half, of the minimum in the high.
    """
    scale, least, both = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([scale & 63, (both & 15) | (scale >> 6) << 4], -1)
    leasts = np.concatenate([least & 63, (both >> 4) | (least >> 6) << 4], -1)
    return scales, leasts


# ------------------------------------------------------------------------------------------------- encode


def encode(name: str, values: Float32[np.ndarray, '*rows values']) -> UInt8[np.ndarray, '*rows bytes']:
    """Rows of numbers as blocks of the named format: F32, F16, BF16, Q8_0, Q4_0 or Q4_1.

    Raises ValueError where a row is not a whole number of blocks, or where the format cannot hold a number: a finite
    one beyond its range, or, with scales, one that is not finite.
    """
    kind = FORMATS[name]
    *rows, size = values.shape
    row_bytes = kind.row_bytes(size)
    flat = np.ascontiguousarray(values).reshape(-1, kind.block_values)
    blocks = np.empty(len(flat), _LAYOUTS[name])
    step = _CHUNK_VALUES // kind.block_values
    for start in range(0, len(flat), step):
        _ENCODERS[name](flat[start : start + step], blocks[start : start + step])
    return blocks.view(np.uint8).reshape(*rows, row_bytes)


def _encode_f32(values: np.ndarray, out: np.ndarray) -> None:
    out['value'] = values[:, 0]


def _encode_f16(values: np.ndarray, out: np.ndarray) -> None:
    out['value'] = _to_float16(values[:, 0])


def _encode_bf16(values: np.ndarray, out: np.ndarray) -> None:
    bits = values.view(np.uint32)[:, 0]
    nearest_even = (bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16
    quiet_nan = bits >> 16 | 0x40
    out['value'] = np.where(np.isnan(values[:, 0]), quiet_nan, nearest_even)


def _encode_q8_0(values: np.ndarray, out: np.ndarray) -> None:
    scale = abs(values).max(-1, keepdims=True) / 127
    out['scale'] = _to_float16(_finite(scale[:, 0]))
    scaled = values * _reciprocal(scale)
    whole = np.trunc(scaled)
    out['value'] = whole + np.trunc(2 * (scaled - whole))  # to nearest, halves away from zero


def _encode_q4_0(values: np.ndarray, out: np.ndarray) -> None:
    # The number furthest from zero, with its sign, becomes −8 exactly; so the scale may be negative.
    furthest = np.take_along_axis(values, abs(values).argmax(-1, keepdims=True), -1)
    scale = furthest / -8
    out['scale'] = _to_float16(_finite(scale[:, 0]))
    quants = np.minimum(values * _reciprocal(scale) + np.float32(8.5), 15).astype(np.uint8)
    out['low'] = quants[:, :16] | quants[:, 16:] << 4


def _encode_q4_1(values: np.ndarray, out: np.ndarray) -> None:
    least = values.min(-1, keepdims=True)
    scale = (values.max(-1, keepdims=True) - least) / 15
    out['scale'], out['least'] = _to_float16(_finite(scale[:, 0])), _to_float16(least[:, 0])
    quants = np.minimum((values - least) * _reciprocal(scale) + np.float32(0.5), 15).astype(np.uint8)
    out['low'] = quants[:, :16] | quants[:, 16:] << 4


def _to_float16(values: np.ndarray) -> np.ndarray:
    with np.errstate(over='ignore'):
        halves = values.astype(np.float16)
    if (np.isinf(halves) & np.isfinite(values)).any():
        worst = abs(values[np.isfinite(values)]).max()
        raise ValueError(f'{worst:.4g} is beyond float16, whose largest number is 65504')
    return halves


def _finite(scales: np.ndarray) -> np.ndarray:
    if not np.isfinite(scales).all():
        raise ValueError('a number is infinite or NaN, which no quantised format holds')
    return scales


def _reciprocal(scale: np.ndarray) -> np.ndarray:
    """1/scale; 0 where the scale is 0 or so small that its float16 is."""
    usable = abs(scale) > np.finfo(np.float32).tiny
    return np.divide(1, scale, out=np.zeros_like(scale), where=usable)


# -------------------------------------------------------------------------------------------------- table


_Coder = Callable[[np.ndarray, np.ndarray], None]  # from the first argument into the second
_DECODERS: dict[str, _Coder] = {
    'F32': _decode_float,
    'F16': _decode_float,
    'BF16': _decode_bf16,
    'Q8_0': _decode_q8_0,
    'Q4_0': _decode_q4_0,
    'Q4_1': _decode_q4_1,
    'Q5_0': _decode_q5_0,
    'Q5_1': _decode_q5_1,
    'Q4_K': _decode_q4_k,
    'Q5_K': _decode_q5_k,
    'Q6_K': _decode_q6_k,
}
_ENCODERS: dict[str, _Coder] = {
    'F32': _encode_f32,
    'F16': _encode_f16,
    'BF16': _encode_bf16,
    'Q8_0': _encode_q8_0,
    'Q4_0': _encode_q4_0,
    'Q4_1': _encode_q4_1,
}

# The types of ggml.h that files hold, with the sizes of ggml-common.h; only those above are read.
_TYPES = (
    Format('F32', 0, 1, 4),
    Format('F16', 1, 1, 2),
    Format('Q4_0', 2, 32, 18),
    Format('Q4_1', 3, 32, 20),
    Format('Q5_0', 6, 32, 22),
    Format('Q5_1', 7, 32, 24),
    Format('Q8_0', 8, 32, 34),
    Format('Q2_K', 10, 256, 84),
    Format('Q3_K', 11, 256, 110),
    Format('Q4_K', 12, 256, 144),
    Format('Q5_K', 13, 256, 176),
    Format('Q6_K', 14, 256, 210),
    Format('IQ2_XXS', 16, 256, 66),
    Format('IQ2_XS', 17, 256, 74),
    Format('IQ3_XXS', 18, 256, 98),
    Format('IQ1_S', 19, 256, 50),
    Format('IQ4_NL', 20, 32, 18),
    Format('IQ3_S', 21, 256, 110),
    Format('IQ2_S', 22, 256, 82),
    Format('IQ4_XS', 23, 256, 136),
    Format('I8', 24, 1, 1),
    Format('I16', 25, 1, 2),
    Format('I32', 26, 1, 4),
    Format('I64', 27, 1, 8),
    Format('F64', 28, 1, 8),
    Format('IQ1_M', 29, 256, 56),
    Format('BF16', 30, 1, 2),
    Format('TQ1_0', 34, 256, 54),
    Format('TQ2_0', 35, 256, 66),
    Format('MXFP4', 39, 32, 17),
    Format('NVFP4', 40, 64, 36),
    Format('Q1_0', 41, 128, 18),
)
FORMATS = {kind.name: kind for kind in _TYPES}

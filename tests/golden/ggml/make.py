"""Makes blocks.npz with the `gguf` package, the published implementation.

    pip install gguf
    python tests/golden/ggml/make.py

For each format, blocks of random bytes and the float32 it decodes them to; and where it encodes, numbers and the
blocks it makes of them.
"""

import pathlib

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

DECODED = ('F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q4_K', 'Q5_K', 'Q6_K')
ENCODED = ('F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1')


def main() -> None:
    rng = np.random.default_rng(5)
    arrays = {}
    for name in DECODED:
        kind = GGMLQuantizationType[name]
        blocks = rng.integers(0, 256, (40, GGML_QUANT_SIZES[kind][1]), np.uint8)
        with np.errstate(over='ignore', invalid='ignore'):
            values = dequantize(blocks, kind)
        finite = np.flatnonzero(np.isfinite(values).all(-1))[:3]
        arrays |= {f'{name}.blocks': blocks[finite], f'{name}.values': values[finite]}
    for name in ENCODED:
        given = (rng.standard_normal((3, 64)) * [[1e-3], [1.0], [50.0]]).astype(np.float32)
        encoded = quantize(given, GGMLQuantizationType[name])
        arrays |= {f'{name}.given': given, f'{name}.encoded': encoded.view(np.uint8)}
    np.savez_compressed(pathlib.Path(__file__).with_name('blocks.npz'), **arrays)


if __name__ == '__main__':
    main()

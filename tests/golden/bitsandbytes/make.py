"""NF4 with double quantisation as bitsandbytes does it: the code books, and the codes of a matrix.

    pip install bitsandbytes torch; python tests/golden/bitsandbytes/make.py      # writes nf4.npz beside this file

The matrix is [output, input] as in PyTorch: `numpy.random.default_rng(0).standard_normal((300, 128))`, in float32, its
rows times 0.01 to 3.0. `decoded` holds its first 8 rows after the round trip.
"""

from pathlib import Path

import bitsandbytes
import numpy as np
import torch
from bitsandbytes import functional


def main() -> None:
    weight = np.random.default_rng(0).standard_normal((300, 128)).astype(np.float32)
    weight *= (np.arange(1, 301) / 100).astype(np.float32)[:, None]
    codes, state = functional.quantize_4bit(
        torch.from_numpy(weight), blocksize=64, compress_statistics=True, quant_type='nf4'
    )
    decoded = functional.dequantize_4bit(codes, state)
    np.savez_compressed(
        Path(__file__).with_name('nf4.npz'),
        version=bitsandbytes.__version__,
        book=state.code.numpy()[:16],
        dynamic=state.state2.code.numpy(),
        codes=codes.numpy().reshape(300, 64),
        scales=state.absmax.numpy().reshape(300, 2),
        outer=state.state2.absmax.numpy(),
        offset=state.offset.numpy(),
        decoded=decoded.numpy()[:8],
    )


if __name__ == '__main__':
    main()

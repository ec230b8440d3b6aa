"""Model sizes by name: Llama-style decoders, with what depends on size alone."""

import dataclasses
from typing import Literal

from tpu_llm.config import choose
from tpu_llm.models.decoder_config import DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """`batch_tokens` and `learning_rate` are starting points, not laws; sweep them for a run that matters."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    batch_tokens: int
    learning_rate: float
    seq_len: int = 2048
    remat: str = 'none'  # what a chip of 16 GiB needs
    rope_theta: float = 10_000.0


# 125m and 350m: GPT-3's depths and widths. 3b: Llama 3.2. 8b and 70b: Llama 3. Learning rates: the same papers.
# smoke: seconds on a laptop.
SIZES = {
    '125m': Size(width=768, layers=12, heads=12, kv_heads=12, mlp_width=2048, batch_tokens=2**19, learning_rate=6e-4),
    '350m': Size(width=1024, layers=24, heads=16, kv_heads=16, mlp_width=2816, batch_tokens=2**19, learning_rate=3e-4),
    '1b': Size(
        width=2048,
        layers=16,
        heads=32,
        kv_heads=8,
        mlp_width=8192,
        batch_tokens=2**20,
        learning_rate=3e-4,
        remat='full',
    ),
    '3b': Size(
        width=3072,
        layers=28,
        heads=24,
        kv_heads=8,
        mlp_width=8192,
        batch_tokens=2**21,
        learning_rate=3e-4,
        remat='full',
    ),
    '8b': Size(
        width=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        mlp_width=14336,
        batch_tokens=2**22,
        learning_rate=3e-4,
        remat='full',
        rope_theta=500_000.0,
    ),
    '70b': Size(
        width=8192,
        layers=80,
        heads=64,
        kv_heads=8,
        mlp_width=28672,
        batch_tokens=2**22,
        learning_rate=1.5e-4,
        remat='full',
        rope_theta=500_000.0,
    ),
    'smoke': Size(
        width=64,
        layers=2,
        heads=2,
        kv_heads=1,
        mlp_width=128,
        batch_tokens=8 * 128,
        learning_rate=6e-4,
        seq_len=128,
    ),
}


def decoder(name: str, *, vocab_size: int, dtype: Literal['float32', 'bfloat16']) -> tuple[DecoderConfig, Size]:
    """The model of that size, and the size. Raises ConfigError on an unknown name, listing those there are."""
    size = choose('size', name, SIZES)
    model = DecoderConfig(
        vocab_size=vocab_size,
        width=size.width,
        layers=size.layers,
        heads=size.heads,
        kv_heads=size.kv_heads,
        head_dim=size.width // size.heads,
        mlp_width=size.mlp_width,
        rope_theta=size.rope_theta,
        remat=size.remat,
        dtype=dtype,
    )
    return model, size

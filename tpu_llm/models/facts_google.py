"""Gopher, Chinchilla, LaMDA, PaLM and Gemma."""

from typing import Any

from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.fact import Fact, Facts
from tpu_llm.nn.rope_scaling import Linear


def _gopher(width: int, layers: int, heads: int, head_dim: int) -> DecoderConfig:
    """Rae et al., 2021, arXiv 2112.11446, table 1. Chinchilla: Hoffmann et al., 2022, arXiv 2203.15556, table 4."""
    return DecoderConfig(
        vocab_size=32_000,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        mlp_width=4 * width,
        mlp='gelu',
        position='transformer_xl',
        max_length=2048,
        tied_embeddings=True,
    )


def _lamda() -> DecoderConfig:
    """Thoppilan et al., 2022, arXiv 2201.08239, section 3."""
    return DecoderConfig(
        vocab_size=32_000,
        width=8192,
        layers=64,
        heads=128,
        kv_heads=128,
        head_dim=128,
        mlp_width=65_536,
        mlp='geglu',
        position='relative',
        tied_embeddings=True,
    )


def _palm(width: int, layers: int, heads: int) -> DecoderConfig:
    """Chowdhery et al., 2022, arXiv 2204.02311, section 2 and table 1.

    Published are embeddings of deviation 1, and logits divided by sqrt(width); embeddings of deviation 1 / sqrt(width),
    multiplied by sqrt(width) on their way in, are the same function.
    """
    return DecoderConfig(
        vocab_size=256_000,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=1,
        head_dim=256,
        mlp_width=4 * width,
        norm='layer_no_bias',
        residual='parallel',
        max_length=2048,
        tied_embeddings=True,
        embed_scale=width**0.5,
    )


def _gemma(
    width: int, layers: int, heads: int, kv_heads: int, mlp_width: int, *, head_dim: int = 256, **rest: Any
) -> DecoderConfig:
    """Gemma team, 2024, arXiv 2403.08295, table 1, and the model cards' config.json."""
    return DecoderConfig(
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=mlp_width,
        mlp='geglu',
        norm='rms_offset',
        tied_embeddings=True,
        embed_scale=width**0.5,
        **{'vocab_size': 256_000, 'max_length': 8192, **rest},
    )


def _gemma2(*shape: int, **rest: Any) -> DecoderConfig:
    """Gemma team, 2024, arXiv 2408.00118, table 1, and the model cards' config.json."""
    return _gemma(*shape, norm_place='both', windows=(4096, 0), logit_softcap=30.0, attention_softcap=50.0, **rest)


def _gemma3(*shape: int, sees: bool = True, **rest: Any) -> DecoderConfig:
    """Gemma team, 2025, arXiv 2503.19786, tables 1 and 2, and the model cards' config.json: what reads and writes text.

    Models that also see have 64 more tokens and wider windows, and were taken from 32,768 tokens to four times that.
    """
    window = 1024 if sees else 512
    return _gemma(
        *shape,
        vocab_size=262_208 if sees else 262_144,
        norm_place='both',
        windows=(*5 * (window,), 0),
        qk_norm='head',
        rope_theta=1e6,
        local_rope_theta=10_000.0,
        rope_scaling=Linear(factor=8.0) if sees else None,
        max_length=131_072 if sees else 32_768,
        **rest,
    )


_GOPHER = {
    'gopher-44m': Fact(lambda: _gopher(512, 8, 16, 32), printed='44M'),
    'gopher-117m': Fact(lambda: _gopher(768, 12, 12, 64), printed='117M'),
    'gopher-417m': Fact(lambda: _gopher(1536, 12, 12, 128), printed='417M'),
    'gopher-1.4b': Fact(lambda: _gopher(2048, 24, 16, 128), printed='1.4B'),
    'gopher-7.1b': Fact(lambda: _gopher(4096, 32, 32, 128), printed='7.1B'),
    'gopher-280b': Fact(lambda: _gopher(16_384, 80, 128, 128), printed='280B'),
}
_CHINCHILLA = {'chinchilla-70b': Fact(lambda: _gopher(8192, 80, 64, 128), printed='70B')}
_LAMDA = {'lamda-137b': Fact(_lamda, printed='137B')}
_PALM = {
    'palm-8b': Fact(lambda: _palm(4096, 32, 16), printed='8.63B'),
    'palm-62b': Fact(lambda: _palm(8192, 64, 32), printed='62.50B'),
    'palm-540b': Fact(lambda: _palm(18_432, 118, 48), printed='540.35B'),
}
_GEMMA = {
    'gemma-2b': Fact(lambda: _gemma(2048, 18, 8, 1, 16_384), 2_506_172_416, '2.51B'),
    'gemma-7b': Fact(lambda: _gemma(3072, 28, 16, 16, 24_576), 8_537_680_896, '8.54B'),
}
_GEMMA2 = {
    'gemma-2-2b': Fact(lambda: _gemma2(2304, 26, 8, 4, 9216), 2_614_341_888, '2.61B'),
    'gemma-2-9b': Fact(lambda: _gemma2(3584, 42, 16, 8, 14_336), 9_241_705_984, '9.24B'),
    # Its scores are scaled by a head's share of the width, not by a head, which is narrower.
    'gemma-2-27b': Fact(
        lambda: _gemma2(4608, 46, 32, 16, 36_864, head_dim=128, attention_scale=144**-0.5), 27_227_128_320, '27.2B'
    ),
}
_GEMMA3 = {
    'gemma-3-270m': Fact(lambda: _gemma3(640, 18, 4, 1, 2048, sees=False), 268_098_176, '268M'),
    'gemma-3-1b': Fact(lambda: _gemma3(1152, 26, 4, 1, 6912, sees=False), 999_885_952, '1,000M'),
    'gemma-3-4b': Fact(lambda: _gemma3(2560, 34, 8, 4, 10_240), 3_880_263_168, '3.88B'),
    'gemma-3-12b': Fact(lambda: _gemma3(3840, 48, 16, 8, 15_360), 11_766_034_176, '11.77B'),
    'gemma-3-27b': Fact(
        lambda: _gemma3(5376, 62, 32, 16, 21_504, head_dim=128, attention_scale=168**-0.5),
        27_009_346_304,
        '27.0B',
    ),
}
FACTS = (
    Facts('Gopher', _GOPHER),
    Facts('Chinchilla', _CHINCHILLA),
    Facts('LaMDA', _LAMDA),
    Facts('PaLM', _PALM),
    Facts('Gemma', _GEMMA, 'GemmaForCausalLM'),
    Facts('Gemma 2', _GEMMA2, 'Gemma2ForCausalLM'),
    Facts('Gemma 3', _GEMMA3, 'Gemma3ForCausalLM'),
)

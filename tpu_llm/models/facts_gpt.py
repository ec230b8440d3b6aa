"""GPT and what kept its layer norms and plain MLPs: GPT-J, NeoX, OPT, BLOOM, MPT, Falcon, Phi, StarCoder.

Where nothing else is said, a fact is of the model card's config.json.
"""

import functools
from typing import Any

from tpu_llm.models.decoder_config import Biased, DecoderConfig
from tpu_llm.models.fact import Fact, Facts

_ALL: tuple[Biased, ...] = ('qkv', 'out', 'mlp')
# What they share: layer norms with biases, an MLP of four times the width.
_Plain = functools.partial(DecoderConfig, norm='layer', norm_eps=1e-5)


def _gpt1() -> DecoderConfig:
    """Radford et al., 2018, and the model card of openai-community/openai-gpt."""
    config = _gpt(768, 12, 12, 512)
    config.vocab_size, config.norm_place = 40_478, 'post'
    return config


def _gpt(width: int, layers: int, heads: int, max_length: int = 1024) -> DecoderConfig:
    """GPT-2: Radford et al., 2019, and the model cards of openai-community."""
    return _Plain(
        vocab_size=50_257,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_width=4 * width,
        mlp='gelu',
        position='learned',
        max_length=max_length,
        tied_embeddings=True,
        bias=_ALL,
    )


def _gpt3(width: int, layers: int, heads: int) -> DecoderConfig:
    """Brown et al., 2020, arXiv 2005.14165, table 2.1; parameters as in table D.1.

    Two rows of table 2.1 do not come to the parameters that they stand for: of the 1.3B, 24 heads, and of the 13B, a
    width of 5140. Width = heads x head width holds in the others, and does here.
    """
    return _gpt(width, layers, heads, max_length=2048)


def _gpt_neo(width: int, layers: int, heads: int) -> DecoderConfig:
    """Black et al., 2021: every second layer sees 256 back, and scores are not scaled."""
    config = _gpt(width, layers, heads, max_length=2048)
    config.windows, config.attention_scale = (0, 256), 1.0
    config.bias = ('out', 'mlp')
    return config


def _gptj() -> DecoderConfig:
    """Wang and Komatsuzaki, 2021, and the model card of EleutherAI/gpt-j-6b."""
    return _Plain(
        vocab_size=50_400,
        width=4096,
        layers=28,
        heads=16,
        kv_heads=16,
        head_dim=256,
        mlp_width=16_384,
        mlp='gelu',
        residual='parallel',
        rope_dim=64,
        max_length=2048,
        bias=('mlp', 'head'),
    )


def _neox(width: int, layers: int, heads: int, *, vocab_size: int, exact: bool = True) -> DecoderConfig:
    """GPT-NeoX-20B: Black et al., 2022, arXiv 2204.06745. Pythia: Biderman et al., 2023, arXiv 2304.01373, table 1.

    Their vocabulary is the same, padded by more where more devices shared it.
    """
    head_dim = width // heads
    return _Plain(
        vocab_size=vocab_size,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        mlp_width=4 * width,
        mlp='gelu_exact' if exact else 'gelu',
        residual='parallel_two_norms',
        rope_dim=head_dim // 4,
        max_length=2048,
        bias=_ALL,
    )


def _opt(width: int, layers: int, heads: int, **rest: Any) -> DecoderConfig:
    """Zhang et al., 2022, arXiv 2205.01068, table 1. The 350M norms behind, and its embeddings are half as wide."""
    return _Plain(
        vocab_size=50_272,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_width=4 * width,
        mlp='relu',
        position='learned',
        max_length=2048,
        position_offset=2,
        tied_embeddings=True,
        bias=_ALL,
        **rest,
    )


def _bloom(width: int, layers: int, heads: int) -> DecoderConfig:
    """BigScience, 2022, arXiv 2211.05100, table 3."""
    return _Plain(
        vocab_size=250_880,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_width=4 * width,
        mlp='gelu',
        position='alibi',
        tied_embeddings=True,
        embed_norm=True,
        bias=_ALL,
    )


def _mpt(width: int, layers: int, heads: int, max_length: int, **rest: Any) -> DecoderConfig:
    """MosaicML, 2023."""
    return DecoderConfig(
        vocab_size=50_432,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_width=4 * width,
        mlp='gelu_exact',
        norm='layer_no_bias',
        norm_eps=1e-5,
        position='alibi',
        max_length=max_length,
        tied_embeddings=True,
        **rest,
    )


def _falcon(width: int, layers: int, heads: int, kv_heads: int) -> DecoderConfig:
    """Almazrouei et al., 2023, arXiv 2311.16867. The 7B has one norm a layer, the others two."""
    return _Plain(
        vocab_size=65_024,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=64,
        mlp_width=4 * width,
        mlp='gelu_exact',
        residual='parallel' if kv_heads == 1 else 'parallel_two_norms',
        max_length=2048,
        tied_embeddings=True,
    )


def _falcon_rw(width: int, layers: int, heads: int, vocab_size: int) -> DecoderConfig:
    """Penedo et al., 2023, arXiv 2306.01116, and the model cards of tiiuae/falcon-rw-1b and 7b."""
    return _Plain(
        vocab_size=vocab_size,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=64,
        mlp_width=4 * width,
        mlp='gelu_exact',
        position='alibi',
        alibi_scale=0.125,
        max_length=2048,
        tied_embeddings=True,
        bias=_ALL,
    )


def _phi(width: int, layers: int, heads: int) -> DecoderConfig:
    """Phi-1.5: Li et al., 2023, arXiv 2309.05463; Phi-2: Microsoft, 2023."""
    return _Plain(
        vocab_size=51_200,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_width=4 * width,
        mlp='gelu',
        residual='parallel',
        rope_dim=32,
        max_length=2048,
        bias=(*_ALL, 'head'),
    )


def _starcoder() -> DecoderConfig:
    """Li et al., 2023, arXiv 2305.06161, table 6."""
    config = _gpt(6144, 40, 48, max_length=8192)
    config.vocab_size, config.kv_heads = 49_152, 1
    return config


def _starcoder2(
    width: int, layers: int, heads: int, kv_heads: int, *, rope_theta: float, tied: bool = True
) -> DecoderConfig:
    """Lozhkov et al., 2024, arXiv 2402.19173, table 6."""
    return _Plain(
        vocab_size=49_152,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=128,
        mlp_width=4 * width,
        mlp='gelu',
        rope_theta=rope_theta,
        windows=(4096,),
        max_length=16_384,
        tied_embeddings=tied,
        bias=_ALL,
    )


_GPT1 = {'gpt-1': Fact(_gpt1, 116_534_784, '117M')}
_GPT2 = {
    'gpt-2': Fact(lambda: _gpt(768, 12, 12), 124_439_808, '124M'),
    'gpt-2-medium': Fact(lambda: _gpt(1024, 24, 16), 354_823_168, '355M'),
    'gpt-2-large': Fact(lambda: _gpt(1280, 36, 20), 774_030_080, '774M'),
    'gpt-2-xl': Fact(lambda: _gpt(1600, 48, 25), 1_557_611_200, '1558M'),
}
_GPT3 = {
    'gpt-3-125m': Fact(lambda: _gpt3(768, 12, 12), printed='125M'),
    'gpt-3-350m': Fact(lambda: _gpt3(1024, 24, 16), printed='356M'),
    'gpt-3-760m': Fact(lambda: _gpt3(1536, 24, 16), printed='760M'),
    'gpt-3-1.3b': Fact(lambda: _gpt3(2048, 24, 16), printed='1,320M'),
    'gpt-3-2.7b': Fact(lambda: _gpt3(2560, 32, 32), printed='2,650M'),
    'gpt-3-6.7b': Fact(lambda: _gpt3(4096, 32, 32), printed='6,660M'),
    'gpt-3-13b': Fact(lambda: _gpt3(5120, 40, 40), printed='12,850M'),
    'gpt-3-175b': Fact(lambda: _gpt3(12_288, 96, 96), printed='174,600M'),
}
_GPT_NEO = {
    'gpt-neo-125m': Fact(lambda: _gpt_neo(768, 12, 12), 125_198_592, '125M'),
    'gpt-neo-1.3b': Fact(lambda: _gpt_neo(2048, 24, 16), 1_315_575_808, '1.3B'),
    'gpt-neo-2.7b': Fact(lambda: _gpt_neo(2560, 32, 20), 2_651_307_520, '2.7B'),
}
_GPTJ = {'gpt-j-6b': Fact(_gptj, 6_050_882_784, '6.05B')}
_NEOX = {
    'gpt-neox-20b': Fact(lambda: _neox(6144, 44, 64, vocab_size=50_432, exact=False), 20_554_567_680, '20B'),
}
_PYTHIA = {
    'pythia-70m': Fact(lambda: _neox(512, 6, 8, vocab_size=50_304), 70_426_624, '70,426,624'),
    'pythia-160m': Fact(lambda: _neox(768, 12, 12, vocab_size=50_304), 162_322_944, '162,322,944'),
    'pythia-410m': Fact(lambda: _neox(1024, 24, 16, vocab_size=50_304), 405_334_016, '405,334,016'),
    'pythia-1b': Fact(lambda: _neox(2048, 16, 8, vocab_size=50_304), 1_011_781_632, '1,011,781,632'),
    'pythia-1.4b': Fact(lambda: _neox(2048, 24, 16, vocab_size=50_304), 1_414_647_808, '1,414,647,808'),
    'pythia-2.8b': Fact(lambda: _neox(2560, 32, 32, vocab_size=50_304), 2_775_208_960, '2,775,208,960'),
    'pythia-6.9b': Fact(lambda: _neox(4096, 32, 32, vocab_size=50_432), 6_857_302_016, '6,857,302,016'),
    'pythia-12b': Fact(lambda: _neox(5120, 36, 40, vocab_size=50_688), 11_846_072_320, '11,846,072,320'),
}
_OPT = {
    'opt-125m': Fact(lambda: _opt(768, 12, 12), 125_239_296, '125M'),
    'opt-350m': Fact(lambda: _opt(1024, 24, 16, embed_width=512, norm_place='post'), 331_196_416, '331M'),
    'opt-1.3b': Fact(lambda: _opt(2048, 24, 32), 1_315_758_080, '1.3B'),
    'opt-2.7b': Fact(lambda: _opt(2560, 32, 32), 2_651_596_800, '2.7B'),
    'opt-6.7b': Fact(lambda: _opt(4096, 32, 32), 6_658_473_984, '6.7B'),
    'opt-13b': Fact(lambda: _opt(5120, 40, 40), 12_853_473_280, '13B'),
    'opt-30b': Fact(lambda: _opt(7168, 48, 56), 29_974_540_288, '30B'),
    'opt-66b': Fact(lambda: _opt(9216, 64, 72), 65_719_701_504, '66B'),
    'opt-175b': Fact(lambda: _opt(12_288, 96, 96), 174_604_468_224, '175B'),
}
_BLOOM = {
    'bloom-560m': Fact(lambda: _bloom(1024, 24, 16), 559_214_592, '559,214,592'),
    'bloom-1b1': Fact(lambda: _bloom(1536, 24, 16), 1_065_314_304, '1,065,314,304'),
    'bloom-1b7': Fact(lambda: _bloom(2048, 24, 16), 1_722_408_960, '1,722,408,960'),
    'bloom-3b': Fact(lambda: _bloom(2560, 30, 32), 3_002_557_440, '3,002,557,440'),
    'bloom-7b1': Fact(lambda: _bloom(4096, 30, 32), 7_069_016_064, '7,069,016,064'),
    'bloom-176b': Fact(lambda: _bloom(14_336, 70, 112), 176_247_271_424, '176,247,271,424'),
}
_MPT = {
    'mpt-7b': Fact(lambda: _mpt(4096, 32, 32, 2048), 6_649_286_656, '7B'),
    'mpt-7b-storywriter': Fact(lambda: _mpt(4096, 32, 32, 65_536, qkv_clip=6.0, alibi_max=16.0), 6_649_286_656, '7B'),
    'mpt-30b': Fact(lambda: _mpt(7168, 48, 64, 8192), 29_957_200_896, '30B'),
}
_FALCON = {
    'falcon-rw-1b': Fact(lambda: _falcon_rw(2048, 24, 32, 50_304), 1_311_625_216, '1B'),
    'falcon-rw-7b': Fact(lambda: _falcon_rw(4096, 36, 64, 65_024), 7_516_020_736, '7B'),
    'falcon-7b': Fact(lambda: _falcon(4544, 32, 71, 1), 6_921_720_704, '7B'),
    'falcon-40b': Fact(lambda: _falcon(8192, 60, 128, 8), 41_303_293_952, '40B'),
    'falcon-180b': Fact(lambda: _falcon(14_848, 80, 232, 8), 178_557_088_768, '180B'),
}
_PHI = {
    'phi-1.5': Fact(lambda: _phi(2048, 24, 32), 1_418_270_720, '1.42B'),
    'phi-2': Fact(lambda: _phi(2560, 32, 32), 2_779_683_840, '2.78B'),
}
_STARCODER = {'starcoder': Fact(_starcoder, 15_517_456_384, '15.5B')}
_STARCODER2 = {
    'starcoder2-3b': Fact(lambda: _starcoder2(3072, 30, 24, 2, rope_theta=999_999.4420358813), 3_030_371_328, '3.03B'),
    'starcoder2-7b': Fact(lambda: _starcoder2(4608, 32, 36, 4, rope_theta=1e6), 7_173_923_840, '7.17B'),
    'starcoder2-15b': Fact(lambda: _starcoder2(6144, 40, 48, 4, rope_theta=1e5, tied=False), 15_957_889_024, '16.0B'),
}
FACTS = (
    Facts('GPT-1', _GPT1, 'OpenAIGPTLMHeadModel'),
    Facts('GPT-2', _GPT2, 'GPT2LMHeadModel'),
    Facts(
        'GPT-3',
        _GPT3,
        lacks='sparse attention in every second layer, of a pattern not published in detail: here all are dense',
    ),
    Facts('GPT-Neo', _GPT_NEO, 'GPTNeoForCausalLM'),
    Facts('GPT-J', _GPTJ, 'GPTJForCausalLM'),
    Facts('GPT-NeoX', _NEOX, 'GPTNeoXForCausalLM'),
    Facts('Pythia', _PYTHIA, 'GPTNeoXForCausalLM'),
    Facts('OPT', _OPT, 'OPTForCausalLM'),
    Facts('BLOOM', _BLOOM, 'BloomForCausalLM'),
    Facts('MPT', _MPT, 'MptForCausalLM'),
    Facts('Falcon', _FALCON, 'FalconForCausalLM'),
    Facts('Phi-1.5 and Phi-2', _PHI, 'PhiForCausalLM'),
    Facts('StarCoder', _STARCODER, 'GPTBigCodeForCausalLM'),
    Facts('StarCoder2', _STARCODER2, 'Starcoder2ForCausalLM'),
)

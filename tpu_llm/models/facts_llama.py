"""Llama and what descends from it: Mistral, Qwen, Yi, DeepSeek LLM, SmolLM, Phi-3, OLMo, StableLM, Cohere.

Where nothing else is said, a fact is of the model card's config.json. Shapes are width, layers, heads, key-value heads,
MLP width.
"""

from typing import Any

from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.fact import Fact, Facts
from tpu_llm.nn.rope_scaling import Llama3


def llama(width: int, layers: int, heads: int, kv_heads: int, mlp_width: int, **rest: Any) -> DecoderConfig:
    """RMSNorm, rope, SwiGLU, no biases. Heads share the width and `norm_eps` is 1e-5 unless `rest` says otherwise."""
    return DecoderConfig(
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        mlp_width=mlp_width,
        **{'head_dim': width // heads, 'norm_eps': 1e-5, **rest},
    )


def _llama1(*shape: int, norm_eps: float = 1e-6) -> DecoderConfig:
    """Touvron et al., 2023, arXiv 2302.13971, table 2."""
    return llama(*shape, vocab_size=32_000, norm_eps=norm_eps, max_length=2048)


def _llama2(*shape: int) -> DecoderConfig:
    """Touvron et al., 2023, arXiv 2307.09288."""
    return llama(*shape, vocab_size=32_000, max_length=4096)


def _llama3(*shape: int, **rest: Any) -> DecoderConfig:
    """Grattafiori et al., 2024, arXiv 2407.21783, table 3."""
    return llama(*shape, vocab_size=128_256, rope_theta=500_000.0, **{'max_length': 8192, **rest})


def _llama31(*shape: int) -> DecoderConfig:
    """The same, taken to longer texts: its section 3.4.2, and the model cards."""
    return _llama3(*shape, max_length=131_072, rope_scaling=Llama3(factor=8.0, original_length=8192))


def _llama32(*shape: int) -> DecoderConfig:
    """The model cards of meta-llama, 2024."""
    scaling = Llama3(factor=32.0, original_length=8192)
    return _llama3(*shape, max_length=131_072, rope_scaling=scaling, tied_embeddings=True)


def _mistral(
    *, vocab_size: int = 32_000, rope_theta: float = 1e6, window: int = 0, max_length: int = 32_768
) -> DecoderConfig:
    """Jiang et al., 2023, arXiv 2310.06825, table 1, and the model cards."""
    shape = (4096, 32, 32, 8, 14_336)
    return llama(*shape, vocab_size=vocab_size, rope_theta=rope_theta, windows=(window,), max_length=max_length)


def _qwen15(*shape: int, vocab_size: int = 151_936, tied: bool = False) -> DecoderConfig:
    """Qwen team, 2024. Its vocabulary is the same throughout, padded by more in the larger sizes."""
    return _qwen(*shape, vocab_size=vocab_size, tied_embeddings=tied, max_length=32_768)


def _qwen2(*shape: int, vocab_size: int = 151_936, tied: bool = False, norm_eps: float = 1e-6) -> DecoderConfig:
    """Yang et al., 2024, arXiv 2407.10671, table 1."""
    return _qwen(*shape, vocab_size=vocab_size, tied_embeddings=tied, norm_eps=norm_eps, max_length=131_072)


def _qwen25(*shape: int, max_length: int = 131_072, **rest: Any) -> DecoderConfig:
    """Qwen team, 2024, arXiv 2412.15115, table 1."""
    return _qwen(*shape, max_length=max_length, **{'vocab_size': 152_064, **rest})


def _qwen(*shape: int, **rest: Any) -> DecoderConfig:
    return llama(*shape, rope_theta=1e6, bias=('qkv',), **{'norm_eps': 1e-6, **rest})


def _qwen3(*shape: int, tied: bool = False) -> DecoderConfig:
    """Qwen team, 2025, arXiv 2505.09388, table 1."""
    return llama(
        *shape,
        vocab_size=151_936,
        head_dim=128,
        norm_eps=1e-6,
        rope_theta=1e6,
        qk_norm='head',
        max_length=40_960,
        tied_embeddings=tied,
    )


def _yi(*shape: int, rope_theta: float = 5e6, norm_eps: float = 1e-5) -> DecoderConfig:
    """01.AI, 2024, arXiv 2403.04652, table 1."""
    return llama(*shape, vocab_size=64_000, rope_theta=rope_theta, norm_eps=norm_eps, max_length=4096)


def _deepseek_llm(*shape: int) -> DecoderConfig:
    """DeepSeek-AI, 2024, arXiv 2401.02954, table 2."""
    return llama(*shape, vocab_size=102_400, norm_eps=1e-6, max_length=4096)


def _smollm(*shape: int, rope_theta: float = 10_000.0, max_length: int = 2048, tied: bool = True) -> DecoderConfig:
    """SmolLM: Allal et al., 2024. SmolLM2: Allal et al., 2025, arXiv 2502.02737."""
    return llama(*shape, vocab_size=49_152, rope_theta=rope_theta, max_length=max_length, tied_embeddings=tied)


def _smollm3(*shape: int) -> DecoderConfig:
    """Bakouch et al., 2025, and the model card: every fourth layer knows no positions."""
    return llama(
        *shape,
        vocab_size=128_256,
        norm_eps=1e-6,
        rope_theta=5e6,
        rope_layers=(True, True, True, False),
        max_length=65_536,
        tied_embeddings=True,
    )


def _phi3(*shape: int) -> DecoderConfig:
    """Abdin et al., 2024, arXiv 2404.14219: the variants of 4,096 tokens."""
    return llama(*shape, vocab_size=32_064, windows=(2047,), max_length=4096)


def _olmo(*shape: int, clip: float = 0.0, max_length: int = 2048, tied: bool = False) -> DecoderConfig:
    """Groeneveld et al., 2024, arXiv 2402.00838, table 1."""
    return llama(
        *shape, vocab_size=50_304, norm='layer_fixed', qkv_clip=clip, max_length=max_length, tied_embeddings=tied
    )


def _olmo2(*shape: int) -> DecoderConfig:
    """OLMo team, 2024, arXiv 2501.00656, table 3."""
    return llama(
        *shape,
        vocab_size=100_352,
        norm_eps=1e-6,
        norm_place='out',
        rope_theta=500_000.0,
        qk_norm='all_heads',
        max_length=4096,
    )


def _stablelm(*shape: int, vocab_size: int = 100_352, **rest: Any) -> DecoderConfig:
    """StableLM 3B-4E1T: Tow et al., 2023. StableLM 2: Bellagente et al., 2024, arXiv 2402.17834."""
    quarter = shape[0] // shape[2] // 4
    return llama(*shape, vocab_size=vocab_size, norm='layer', rope_dim=quarter, max_length=4096, **rest)


def _cohere2(*shape: int, **rest: Any) -> DecoderConfig:
    """Cohere, 2025, arXiv 2504.00698: three layers with a window and rope, then one with neither."""
    windows = (4096, 4096, 4096, 0)
    rope_layers = (True, True, True, False)
    return _cohere(*shape, rope_theta=50_000.0, logit_scale=0.25, windows=windows, rope_layers=rope_layers, **rest)


def _cohere(*shape: int, rope_theta: float, logit_scale: float, **rest: Any) -> DecoderConfig:
    """Cohere, 2024."""
    return llama(
        *shape,
        vocab_size=256_000,
        norm='layer_no_bias',
        residual='parallel',
        rope_theta=rope_theta,
        logit_scale=logit_scale,
        tied_embeddings=True,
        **{'max_length': 131_072, **rest},
    )


_LLAMA1 = {
    'llama-7b': Fact(lambda: _llama1(4096, 32, 32, 32, 11_008), 6_738_415_616, '6.7B'),
    'llama-13b': Fact(lambda: _llama1(5120, 40, 40, 40, 13_824), 13_015_864_320, '13.0B'),
    'llama-33b': Fact(lambda: _llama1(6656, 60, 52, 52, 17_920), 32_528_943_616, '32.5B'),
    'llama-65b': Fact(lambda: _llama1(8192, 80, 64, 64, 22_016, norm_eps=1e-5), 65_285_660_672, '65.2B'),
}
_LLAMA2 = {
    'llama-2-7b': Fact(lambda: _llama2(4096, 32, 32, 32, 11_008), 6_738_415_616, '6.74B'),
    'llama-2-13b': Fact(lambda: _llama2(5120, 40, 40, 40, 13_824), 13_015_864_320, '13.0B'),
    'llama-2-70b': Fact(lambda: _llama2(8192, 80, 64, 8, 28_672), 68_976_648_192, '69.0B'),
}
_LLAMA3 = {
    'llama-3-8b': Fact(lambda: _llama3(4096, 32, 32, 8, 14_336), 8_030_261_248, '8.03B'),
    'llama-3-70b': Fact(lambda: _llama3(8192, 80, 64, 8, 28_672), 70_553_706_496, '70.6B'),
}
_LLAMA31 = {
    'llama-3.1-8b': Fact(lambda: _llama31(4096, 32, 32, 8, 14_336), 8_030_261_248, '8.03B'),
    'llama-3.1-70b': Fact(lambda: _llama31(8192, 80, 64, 8, 28_672), 70_553_706_496, '70.6B'),
    'llama-3.1-405b': Fact(lambda: _llama31(16_384, 126, 128, 8, 53_248), 405_853_388_800, '406B'),
}
_LLAMA32 = {
    'llama-3.2-1b': Fact(lambda: _llama32(2048, 16, 32, 8, 8192), 1_235_814_400, '1.23B'),
    'llama-3.2-3b': Fact(lambda: _llama32(3072, 28, 24, 8, 8192), 3_212_749_824, '3.21B'),
}
_MISTRAL = {
    'mistral-7b-v0.1': Fact(lambda: _mistral(rope_theta=10_000.0, window=4096), 7_241_732_096, '7.24B'),
    'mistral-7b-v0.2': Fact(_mistral, 7_241_732_096, '7.24B'),
    'mistral-7b-v0.3': Fact(lambda: _mistral(vocab_size=32_768), 7_248_023_552, '7.25B'),
}
_QWEN15 = {
    'qwen1.5-0.5b': Fact(lambda: _qwen15(1024, 24, 16, 16, 2816, tied=True), 463_987_712, '464M'),
    'qwen1.5-1.8b': Fact(lambda: _qwen15(2048, 24, 16, 16, 5504), 1_836_828_672, '1.84B'),
    'qwen1.5-4b': Fact(lambda: _qwen15(2560, 40, 20, 20, 6912), 3_950_369_280, '3.95B'),
    'qwen1.5-7b': Fact(lambda: _qwen15(4096, 32, 32, 32, 11_008), 7_721_324_544, '7.72B'),
    'qwen1.5-14b': Fact(lambda: _qwen15(5120, 40, 40, 40, 13_696, vocab_size=152_064), 14_167_290_880, '14.2B'),
    'qwen1.5-32b': Fact(lambda: _qwen15(5120, 64, 40, 8, 27_392, vocab_size=152_064), 32_512_218_112, '32.5B'),
    'qwen1.5-72b': Fact(lambda: _qwen15(8192, 80, 64, 64, 24_576, vocab_size=152_064), 72_287_920_128, '72.3B'),
    'qwen1.5-110b': Fact(lambda: _qwen15(8192, 80, 64, 8, 49_152, vocab_size=152_064), 111_209_914_368, '111B'),
}
_QWEN2 = {
    'qwen2-0.5b': Fact(lambda: _qwen2(896, 24, 14, 2, 4864, tied=True), 494_032_768, '494M'),
    'qwen2-1.5b': Fact(lambda: _qwen2(1536, 28, 12, 2, 8960, tied=True), 1_543_714_304, '1.54B'),
    'qwen2-7b': Fact(lambda: _qwen2(3584, 28, 28, 4, 18_944, vocab_size=152_064), 7_615_616_512, '7.62B'),
    'qwen2-72b': Fact(
        lambda: _qwen2(8192, 80, 64, 8, 29_568, vocab_size=152_064, norm_eps=1e-5), 72_706_203_648, '72.7B'
    ),
}
_SMALL = {'vocab_size': 151_936, 'tied_embeddings': True}
_QWEN25 = {
    'qwen2.5-0.5b': Fact(lambda: _qwen25(896, 24, 14, 2, 4864, max_length=32_768, **_SMALL), 494_032_768, '494M'),
    'qwen2.5-1.5b': Fact(lambda: _qwen25(1536, 28, 12, 2, 8960, **_SMALL), 1_543_714_304, '1.54B'),
    'qwen2.5-3b': Fact(lambda: _qwen25(2048, 36, 16, 2, 11_008, max_length=32_768, **_SMALL), 3_085_938_688, '3.09B'),
    'qwen2.5-7b': Fact(lambda: _qwen25(3584, 28, 28, 4, 18_944), 7_615_616_512, '7.62B'),
    'qwen2.5-14b': Fact(lambda: _qwen25(5120, 48, 40, 8, 13_824, norm_eps=1e-5), 14_770_033_664, '14.8B'),
    'qwen2.5-32b': Fact(lambda: _qwen25(5120, 64, 40, 8, 27_648, norm_eps=1e-5), 32_763_876_352, '32.8B'),
    'qwen2.5-72b': Fact(lambda: _qwen25(8192, 80, 64, 8, 29_568, norm_eps=1e-5), 72_706_203_648, '72.7B'),
}
_QWEN3 = {
    'qwen3-0.6b': Fact(lambda: _qwen3(1024, 28, 16, 8, 3072, tied=True), 596_049_920, '0.6B'),
    'qwen3-1.7b': Fact(lambda: _qwen3(2048, 28, 16, 8, 6144, tied=True), 1_720_574_976, '1.7B'),
    'qwen3-4b': Fact(lambda: _qwen3(2560, 36, 32, 8, 9728, tied=True), 4_022_468_096, '4.0B'),
    'qwen3-8b': Fact(lambda: _qwen3(4096, 36, 32, 8, 12_288), 8_190_735_360, '8.2B'),
    'qwen3-14b': Fact(lambda: _qwen3(5120, 40, 40, 8, 17_408), 14_768_307_200, '14.8B'),
    'qwen3-32b': Fact(lambda: _qwen3(5120, 64, 64, 8, 25_600), 32_762_123_264, '32.8B'),
}
_YI = {
    'yi-6b': Fact(lambda: _yi(4096, 32, 32, 4, 11_008), 6_061_035_520, '6.06B'),
    'yi-9b': Fact(lambda: _yi(4096, 48, 32, 4, 11_008, rope_theta=10_000.0, norm_eps=1e-6), 8_829_407_232, '8.83B'),
    'yi-34b': Fact(lambda: _yi(7168, 60, 56, 8, 20_480), 34_388_917_248, '34.4B'),
}
_DEEPSEEK_LLM = {
    'deepseek-llm-7b': Fact(lambda: _deepseek_llm(4096, 30, 32, 32, 11_008), 6_910_365_696, '6.91B'),
    'deepseek-llm-67b': Fact(lambda: _deepseek_llm(8192, 95, 64, 8, 22_016), 67_425_001_472, '67.4B'),
}
_SMOLLM = {
    'smollm-135m': Fact(lambda: _smollm(576, 30, 9, 3, 1536), 134_515_008, '135M'),
    'smollm-360m': Fact(lambda: _smollm(960, 32, 15, 5, 2560), 361_821_120, '362M'),
    'smollm-1.7b': Fact(lambda: _smollm(2048, 24, 32, 32, 8192), 1_711_376_384, '1.71B'),
    'smollm2-135m': Fact(
        lambda: _smollm(576, 30, 9, 3, 1536, rope_theta=100_000.0, max_length=8192), 134_515_008, '135M'
    ),
    'smollm2-360m': Fact(
        lambda: _smollm(960, 32, 15, 5, 2560, rope_theta=100_000.0, max_length=8192), 361_821_120, '362M'
    ),
    'smollm2-1.7b': Fact(
        lambda: _smollm(2048, 24, 32, 32, 8192, rope_theta=130_000.0, max_length=8192), 1_711_376_384, '1.71B'
    ),
}
_SMOLLM3 = {'smollm3-3b': Fact(lambda: _smollm3(2048, 36, 16, 4, 11_008), 3_075_098_624, '3.08B')}
_PHI3 = {
    'phi-3-mini': Fact(lambda: _phi3(3072, 32, 32, 32, 8192), 3_821_079_552, '3.8B'),
    'phi-3-medium': Fact(lambda: _phi3(5120, 40, 40, 10, 17_920), 13_960_238_080, '14B'),
}
_OLMO = {
    'olmo-1b': Fact(lambda: _olmo(2048, 16, 16, 16, 8192, tied=True), 1_176_764_416, '1.18B'),
    'olmo-7b': Fact(lambda: _olmo(4096, 32, 32, 32, 11_008), 6_888_095_744, '6.89B'),
    'olmo-7b-0424': Fact(lambda: _olmo(4096, 32, 32, 32, 11_008, clip=8.0, max_length=4096), 6_888_095_744, '6.89B'),
}
_OLMO2 = {
    'olmo-2-1b': Fact(lambda: _olmo2(2048, 16, 16, 16, 8192), 1_484_916_736, '1.48B'),
    'olmo-2-7b': Fact(lambda: _olmo2(4096, 32, 32, 32, 11_008), 7_298_617_344, '7.3B'),
    'olmo-2-13b': Fact(lambda: _olmo2(5120, 40, 40, 40, 13_824), 13_716_198_400, '13.7B'),
    'olmo-2-32b': Fact(lambda: _olmo2(5120, 64, 40, 8, 27_648), 32_234_279_936, '32.2B'),
}
_STABLELM = {
    'stablelm-3b': Fact(lambda: _stablelm(2560, 32, 32, 32, 6912, vocab_size=50_304), 2_795_443_200, '2,795,443,200'),
    'stablelm-2-1.6b': Fact(lambda: _stablelm(2048, 24, 32, 32, 5632, bias=('qkv',)), 1_644_515_328, '1.64B'),
    'stablelm-2-12b': Fact(
        lambda: _stablelm(5120, 40, 32, 8, 13_824, residual='parallel', qk_norm='each_head'), 12_143_185_920, '12.1B'
    ),
}
_COHERE = {
    'command-r': Fact(
        lambda: _cohere(8192, 40, 64, 64, 22_528, rope_theta=8e6, logit_scale=0.0625), 34_980_831_232, '35B'
    ),
    'command-r-plus': Fact(
        lambda: _cohere(12_288, 64, 96, 8, 33_792, rope_theta=75e6, logit_scale=5 / 6, qk_norm='each_head'),
        103_810_674_688,
        '104B',
    ),
}
_COHERE2 = {
    'command-r7b': Fact(lambda: _cohere2(4096, 32, 32, 8, 14_336, max_length=132_096), 8_028_033_024, '8.03B'),
    'command-a': Fact(lambda: _cohere2(12_288, 64, 96, 8, 36_864), 111_057_580_032, '111B'),
}
_LLAMA = 'LlamaForCausalLM'
FACTS = (
    Facts('LLaMA', _LLAMA1, _LLAMA),
    Facts('Llama 2', _LLAMA2, _LLAMA),
    Facts('Llama 3', _LLAMA3, _LLAMA),
    Facts('Llama 3.1', _LLAMA31, _LLAMA),
    Facts('Llama 3.2', _LLAMA32, _LLAMA),
    Facts('Mistral', _MISTRAL, 'MistralForCausalLM'),
    Facts('Qwen1.5', _QWEN15, 'Qwen2ForCausalLM'),
    Facts('Qwen2', _QWEN2, 'Qwen2ForCausalLM'),
    Facts('Qwen2.5', _QWEN25, 'Qwen2ForCausalLM'),
    Facts('Qwen3', _QWEN3, 'Qwen3ForCausalLM'),
    Facts('Yi', _YI, _LLAMA),
    Facts('DeepSeek LLM', _DEEPSEEK_LLM, _LLAMA),
    Facts('SmolLM and SmolLM2', _SMOLLM, _LLAMA),
    Facts('SmolLM3', _SMOLLM3, 'SmolLM3ForCausalLM'),
    Facts('Phi-3', _PHI3, 'Phi3ForCausalLM'),
    Facts('OLMo', _OLMO, 'OlmoForCausalLM'),
    Facts('OLMo 2', _OLMO2, 'Olmo2ForCausalLM'),
    Facts('StableLM', _STABLELM, 'StableLmForCausalLM'),
    Facts('Command R', _COHERE, 'CohereForCausalLM'),
    Facts('Command R7B and A', _COHERE2, 'Cohere2ForCausalLM'),
)

"""Models with experts: Mixtral, OLMoE, Grok-1, DBRX, Qwen2-MoE, Qwen3-MoE, DeepSeek V2 and V3, GLaM, Switch.

Auxiliary losses are those of the source where it states them in our terms (an even load is worth 1).
"""

import math
from typing import Any

from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.fact import Fact, Facts
from tpu_llm.models.facts_llama import llama
from tpu_llm.nn.mla import MLA
from tpu_llm.nn.moe import MoE
from tpu_llm.nn.rope_scaling import YaRN
from tpu_llm.nn.router import Router


def _mixtral(*shape: int, max_length: int) -> DecoderConfig:
    """Jiang et al., 2024, arXiv 2401.04088, table 1; 8x22B: the model card of mistralai/Mixtral-8x22B-v0.1."""
    moe = MoE(experts=8, chosen=2, expert_width=shape[-1], router=Router(choice='topk_then_softmax'))
    return llama(*shape, vocab_size=32_000, rope_theta=1e6, max_length=max_length, moe=moe)


def _olmoe() -> DecoderConfig:
    """Muennighoff et al., 2024, arXiv 2409.02060, table 10."""
    moe = MoE(experts=64, chosen=8, expert_width=1024, router=Router(choice='softmax_then_topk', z_loss=0.001))
    return llama(2048, 16, 16, 16, 1024, vocab_size=50_304, qk_norm='all_heads', max_length=4096, moe=moe)


def _qwen2_moe(*shape: int, max_length: int, **sizes: Any) -> DecoderConfig:
    """Qwen1.5-MoE: Qwen team, 2024. 57B: Yang et al., 2024, arXiv 2407.10671, table 1. And their config.json."""
    return llama(
        *shape,
        vocab_size=151_936,
        norm_eps=1e-6,
        rope_theta=1e6,
        bias=('qkv',),
        max_length=max_length,
        moe=MoE(**sizes, shared_gate=True, router=Router(choice='softmax_then_topk')),
    )


def _qwen3_moe(*shape: int, expert_width: int) -> DecoderConfig:
    """Qwen team, 2025, arXiv 2505.09388, table 2, and the model cards' config.json."""
    router = Router(choice='softmax_then_topk', normalise=True)
    return llama(
        *shape,
        vocab_size=151_936,
        head_dim=128,
        norm_eps=1e-6,
        rope_theta=1e6,
        qk_norm='head',
        max_length=40_960,
        moe=MoE(experts=128, chosen=8, expert_width=expert_width, router=router),
    )


def _grok1() -> DecoderConfig:
    """xai-org/grok-1, run.py and model.py."""
    return DecoderConfig(
        vocab_size=131_072,
        width=6144,
        layers=64,
        heads=48,
        kv_heads=8,
        head_dim=128,
        mlp_width=32_768,
        mlp='geglu',
        norm_place='both',
        norm_eps=1e-5,
        max_length=8192,
        attention_softcap=30.0,
        tied_embeddings=True,
        embed_scale=6144**0.5,
        logit_scale=0.5773502691896257,
        moe=MoE(experts=8, chosen=2, expert_width=32_768, router=Router(choice='softmax_then_topk')),
    )


def _dbrx() -> DecoderConfig:
    """The model card of databricks/dbrx-base, 2024."""
    return DecoderConfig(
        vocab_size=100_352,
        width=6144,
        layers=40,
        heads=48,
        kv_heads=8,
        head_dim=128,
        mlp_width=10_752,
        norm='layer_no_bias',
        norm_eps=1e-5,
        rope_theta=500_000.0,
        max_length=32_768,
        qkv_clip=8.0,
        moe=MoE(experts=16, chosen=4, expert_width=10_752, router=Router(choice='softmax_then_topk', normalise=True)),
    )


def _glam(width: int, layers: int, heads: int, mlp_width: int) -> DecoderConfig:
    """Du et al., 2021, arXiv 2112.06905, section 4 and table 4.

    Each layer has a bias of relative positions of its own. The parameters that a token meets are those of the table
    with T5's, not with the matrix a layer that Transformer-XL's take.
    """
    return DecoderConfig(
        vocab_size=256_000,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=128,
        mlp_width=mlp_width,
        mlp='geglu',
        position='relative_each',
        max_length=1024,
        tied_embeddings=True,
        moe=MoE(
            experts=64,
            chosen=2,
            expert_width=mlp_width,
            mlp='gelu',  # only the dense layers are gated
            every=2,
            capacity=1.0,  # GShard's
            router=Router(choice='softmax_then_topk', normalise=True),
        ),
    )


def _switch(
    width: int, layers: int, heads: int, mlp_width: int, *, experts: int, every: int, gated: bool
) -> DecoderConfig:
    """Fedus et al., 2021, arXiv 2101.03961, table 9: as many layers as encoder and decoder have together."""
    router = Router(choice='softmax_then_topk', jitter=0.01, balance_loss=0.01)
    return DecoderConfig(
        vocab_size=32_128,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=64,
        mlp_width=mlp_width,
        mlp='geglu' if gated else 'relu',
        moe=MoE(experts=experts, chosen=1, expert_width=mlp_width, every=every, capacity=1.25, router=router),
    )


def _deepseek(
    width: int, layers: int, heads: int, mlp_width: int, moe: MoE, *, vocab_size: int, query_rank: int, mscale: float
) -> DecoderConfig:
    """What DeepSeek-V2 and V3 share: latent attention, and YaRN, which took them from 4,096 tokens to 40 times that.

    Scores are sharper for it, by the square of what YaRN multiplies by; sin and cos stay as they are.
    """
    factor = 40.0
    sharper = 0.1 * mscale * math.log(factor) + 1.0
    return DecoderConfig(
        vocab_size=vocab_size,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=128,
        mlp_width=mlp_width,
        mla=MLA(kv_rank=512, query_rank=query_rank, rope_dim=64, value_dim=128),
        moe=moe,
        rope_scaling=YaRN(factor=factor, original_length=4096, attention_factor=1.0),
        attention_scale=(128 + 64) ** -0.5 * sharper * sharper,
        max_length=163_840,
    )


def _deepseek_v2() -> DecoderConfig:
    """DeepSeek-V2, 2024, arXiv 2405.04434, sections 3.1.2 and 3.1.4."""
    router = Router(
        choice='softmax_then_topk',
        scale=16.0,
        groups=8,
        chosen_groups=3,
        balance_loss=0.003,
        balance_over='row',
    )
    moe = MoE(experts=160, chosen=6, expert_width=1536, shared=2, first_dense=1, router=router)
    return _deepseek(5120, 60, 128, 12_288, moe, vocab_size=102_400, query_rank=1536, mscale=0.707)


def _deepseek_v2_lite() -> DecoderConfig:
    """The same, appendix B: queries have no latent of their own, experts no groups."""
    router = Router(choice='softmax_then_topk', balance_loss=0.001, balance_over='row')
    moe = MoE(experts=64, chosen=6, expert_width=1408, shared=2, first_dense=1, router=router)
    return _deepseek(2048, 27, 16, 10_944, moe, vocab_size=102_400, query_rank=0, mscale=0.707)


def _deepseek_v3() -> DecoderConfig:
    """DeepSeek-V3, 2024, arXiv 2412.19437, sections 4.2 and 4.3. R1, 2025, arXiv 2501.12948, is this model.

    The 671B are without the layer that predicts one token more, which adds 11.6B. The published files hold embedding
    and head for it once more, and scales of FP8: 685B.
    """
    router = Router(
        choice='sigmoid',
        scale=2.5,
        groups=8,
        chosen_groups=4,
        balance_loss=1e-4,
        balance_over='row',
        bias_rate=0.001,
    )
    moe = MoE(experts=256, chosen=8, expert_width=2048, shared=1, first_dense=3, router=router)
    config = _deepseek(7168, 61, 128, 18_432, moe, vocab_size=129_280, query_rank=1536, mscale=1.0)
    config.predict_ahead = 1
    return config


_MIXTRAL = {
    'mixtral-8x7b': Fact(lambda: _mixtral(4096, 32, 32, 8, 14_336, max_length=32_768), 46_702_792_704, '46.7B'),
    'mixtral-8x22b': Fact(lambda: _mixtral(6144, 56, 48, 8, 16_384, max_length=65_536), 140_620_634_112, '141B'),
}
_OLMOE = {'olmoe-1b-7b': Fact(_olmoe, 6_919_161_856, '6.92B')}
_QWEN2_MOE = {
    'qwen1.5-moe-a2.7b': Fact(
        lambda: _qwen2_moe(2048, 24, 16, 16, 5632, max_length=8192, experts=60, chosen=4, expert_width=1408, shared=4),
        14_315_784_192,
        '14.3B',
    ),
    'qwen2-57b-a14b': Fact(
        lambda: _qwen2_moe(
            3584, 28, 28, 4, 18_944, max_length=131_072, experts=64, chosen=8, expert_width=2560, shared=8
        ),
        57_408_658_944,
        '57.4B',
    ),
}
_QWEN3_MOE = {
    'qwen3-30b-a3b': Fact(lambda: _qwen3_moe(2048, 48, 32, 4, 6144, expert_width=768), 30_532_122_624, '30.5B'),
    'qwen3-235b-a22b': Fact(lambda: _qwen3_moe(4096, 94, 64, 4, 12_288, expert_width=1536), 235_093_634_560, '235B'),
}
_DEEPSEEK_V2 = {
    'deepseek-v2': Fact(_deepseek_v2, 235_741_434_880, '236B'),
    'deepseek-v2-lite': Fact(_deepseek_v2_lite, 15_706_484_224, '15.7B'),
}
_DEEPSEEK_V3 = {
    'deepseek-v3': Fact(_deepseek_v3, 671_026_419_200, '671B'),
    'deepseek-r1': Fact(_deepseek_v3, 671_026_419_200, '671B'),
}
_GROK = {'grok-1': Fact(_grok1, printed='314B')}
_DBRX = {'dbrx': Fact(_dbrx, 131_596_523_520, '132B')}
_GLAM = {
    'glam-1.7b-64e': Fact(lambda: _glam(2048, 24, 16, 8192), printed='27B'),
    'glam-8b-64e': Fact(lambda: _glam(4096, 32, 32, 16_384), printed='143B'),
    'glam-64b-64e': Fact(lambda: _glam(8192, 64, 128, 32_768), printed='1.2T'),
}
_SWITCH = {
    'switch-base-128': Fact(lambda: _switch(768, 24, 12, 2048, experts=128, every=2, gated=True), printed='7.4B'),
    'switch-c': Fact(lambda: _switch(2080, 30, 32, 6144, experts=2048, every=1, gated=False), printed='1571B'),
}
FACTS = (
    Facts('Mixtral', _MIXTRAL, 'MixtralForCausalLM'),
    Facts('OLMoE', _OLMOE, 'OlmoeForCausalLM'),
    Facts('Qwen2-MoE', _QWEN2_MOE, 'Qwen2MoeForCausalLM'),
    Facts('Qwen3-MoE', _QWEN3_MOE, 'Qwen3MoeForCausalLM'),
    Facts('DeepSeek-V2', _DEEPSEEK_V2, 'DeepseekV2ForCausalLM'),
    Facts('DeepSeek-V3 and R1', _DEEPSEEK_V3, 'DeepseekV3ForCausalLM'),
    Facts('Grok-1', _GROK),
    Facts('DBRX', _DBRX, 'DbrxForCausalLM'),
    Facts('GLaM', _GLAM),
    Facts(
        'Switch',
        _SWITCH,
        lacks='an encoder, cross-attention and relative position biases: here all layers are one decoder, with rope',
    ),
)

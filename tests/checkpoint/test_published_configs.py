"""Configs as published files spell them: older names, keys left out, and what must be refused."""

import pytest

from tpu_llm.checkpoint import fields, huggingface
from tpu_llm.config import ConfigError
from tpu_llm.nn.rope_scaling import LongRope

LLAMA_LIKE = {
    'vocab_size': 100,
    'hidden_size': 64,
    'intermediate_size': 96,
    'num_hidden_layers': 7,
    'num_attention_heads': 4,
    'num_key_value_heads': 4,
    'max_position_embeddings': 128,
}
GPT_LIKE = {'vocab_size': 100, 'n_embd': 64, 'n_head': 4, 'n_layer': 2}
MPT_LIKE = {'vocab_size': 100, 'd_model': 64, 'n_heads': 4, 'n_layers': 2}
FALCON_LIKE = {'vocab_size': 100, 'hidden_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 4}
PHI3_ROPE = {'type': 'su', 'short_factor': [1.0] * 8, 'long_factor': [2.0] * 8}


def read(architecture, base, **said):
    family = huggingface.ARCHITECTURES[architecture]
    return fields.read(family.items, {**base, **said}, family.make)


@pytest.mark.parametrize(
    ('architecture', 'base', 'said', 'ours'),
    [
        # Gemma 3 before it listed its layers, and with two bases of rope.
        (
            'Gemma3ForCausalLM',
            LLAMA_LIKE,
            {'sliding_window': 8, 'sliding_window_pattern': 6, 'rope_local_base_freq': 100.0, 'head_dim': 16},
            {'windows': (8, 8, 8, 8, 8, 0), 'rope_theta': 1e6, 'local_rope_theta': 100.0, 'logit_softcap': 0.0},
        ),
        # Caps that are null are none, those left out are the class's.
        (
            'Gemma2ForCausalLM',
            LLAMA_LIKE,
            {'attn_logit_softcapping': None},
            {'attention_softcap': 0.0, 'logit_softcap': 30.0, 'windows': (4096, 0), 'head_dim': 256},
        ),
        ('GemmaForCausalLM', LLAMA_LIKE, {'hidden_act': 'gelu', 'hidden_activation': None}, {'mlp': 'geglu'}),
        ('Qwen2ForCausalLM', LLAMA_LIKE, {'sliding_window': 8, 'use_sliding_window': False}, {'windows': (0,)}),
        (
            'Qwen2ForCausalLM',
            LLAMA_LIKE,
            {'sliding_window': 8, 'use_sliding_window': True, 'max_window_layers': 5},
            {'windows': (0, 0, 0, 0, 0, 8, 8)},
        ),
        (
            'Phi3ForCausalLM',
            LLAMA_LIKE,
            {'rope_scaling': PHI3_ROPE, 'original_max_position_embeddings': 32},
            {
                'rope_scaling': LongRope(
                    short=(1.0,) * 8, long=(2.0,) * 8, original_length=32, attention_factor=1.4**0.5
                ),
                'norm_eps': 1e-5,
            },
        ),
        ('PhiForCausalLM', LLAMA_LIKE, {}, {'rope_dim': 8, 'mlp': 'gelu'}),
        ('StableLmForCausalLM', LLAMA_LIKE, {}, {'rope_dim': 4, 'qk_norm': 'none', 'bias': ()}),
        ('GPTNeoXForCausalLM', LLAMA_LIKE, {'rotary_pct': 0.5, 'rotary_emb_base': 100}, {'rope_dim': 8}),
        ('CohereForCausalLM', LLAMA_LIKE, {}, {'logit_scale': 0.0625, 'rope_theta': 5e5, 'tied_embeddings': True}),
        ('GPT2LMHeadModel', GPT_LIKE, {'n_ctx': 64, 'n_positions': 64}, {'max_length': 64, 'mlp_width': 256}),
        ('GPTJForCausalLM', GPT_LIKE, {'rotary_dim': 8, 'n_inner': None}, {'rope_dim': 8, 'bias': ('mlp', 'head')}),
        (
            'BloomForCausalLM',
            {},
            {'vocab_size': 100, 'n_embed': 64, 'num_attention_heads': 4, 'n_layer': 2, 'offset_alibi': 100},
            {'width': 64, 'heads': 4, 'position': 'alibi', 'mlp_width': 256},
        ),
        ('MPTForCausalLM', MPT_LIKE, {'attn_config': {'alibi': True, 'clip_qkv': None}}, {'qkv_clip': 0.0}),
        ('MPTForCausalLM', MPT_LIKE, {'attn_config': {'alibi_bias_max': 16}}, {'alibi_max': 16.0}),
        ('FalconForCausalLM', FALCON_LIKE, {'alibi': True}, {'position': 'alibi', 'alibi_scale': 0.25}),
        ('FalconForCausalLM', FALCON_LIKE, {}, {'kv_heads': 1, 'residual': 'parallel', 'bias': ()}),
        (
            'FalconForCausalLM',
            FALCON_LIKE,
            {'new_decoder_architecture': True, 'num_kv_heads': 2},
            {'kv_heads': 2, 'residual': 'parallel_two_norms'},
        ),
    ],
)
def test_they_are_read(architecture, base, said, ours):
    config = read(architecture, base, **said)
    assert {name: getattr(config, name) for name in ours} == ours


@pytest.mark.parametrize(
    ('architecture', 'base', 'said', 'reason'),
    [
        ('Gemma3ForCausalLM', LLAMA_LIKE, {'attn_logit_softcapping': 50.0}, 'attn_logit_softcapping = 50.0'),
        ('GemmaForCausalLM', LLAMA_LIKE, {'use_bidirectional_attention': True}, 'use_bidirectional_attention'),
        (
            'SmolLM3ForCausalLM',
            LLAMA_LIKE,
            {'no_rope_layers': [1]},
            r'no_rope_layers = \[1\] and .* do not say of each',
        ),
        (
            'SmolLM3ForCausalLM',
            LLAMA_LIKE,
            {'no_rope_layer_interval': 0},
            'no_rope_layer_interval = 0 do not say of each',
        ),
        ('Cohere2ForCausalLM', LLAMA_LIKE, {'sliding_window': None}, 'no layer has a window, so none knows positions'),
        (
            'Qwen2MoeForCausalLM',
            LLAMA_LIKE,
            {'shared_expert_intermediate_size': 100},
            'shared_expert_intermediate_size = 100 is no multiple of moe_intermediate_size = 1408',
        ),
        ('GPT2LMHeadModel', GPT_LIKE, {'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx'),
        ('BloomForCausalLM', GPT_LIKE, {'hidden_size': 64, 'n_embd': 8}, 'n_embd = 8'),
        ('FalconForCausalLM', FALCON_LIKE, {'num_ln_in_parallel_attn': 2}, 'num_ln_in_parallel_attn = 2'),
        (
            'GPTNeoForCausalLM',
            {'vocab_size': 100, 'hidden_size': 64, 'num_layers': 3, 'num_heads': 4},
            {'attention_types': [[['global', 'local'], 1]]},
            'attention_types',
        ),
    ],
)
def test_what_is_not_implemented_is_refused(architecture, base, said, reason):
    with pytest.raises(ConfigError, match=reason):
        read(architecture, base, **said)


def test_windows_of_some_layers_are_not_written_where_transformers_passes_them_over():
    config = read('MistralForCausalLM', LLAMA_LIKE, sliding_window=8)
    assert huggingface.expressible(config)[0].architecture == 'MistralForCausalLM'
    config.windows = (8, 0)
    assert huggingface.expressible(config)[0].architecture == 'SmolLM3ForCausalLM'  # whose class reads layer_types
    config.windows = (8, 4)
    with pytest.raises(ConfigError, match='no architecture of transformers is this model'):
        huggingface.expressible(config)

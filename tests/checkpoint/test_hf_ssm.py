"""Configs of state spaces as published files spell them, and what of them is refused."""

import math

import pytest

from tpu_llm.checkpoint import fields, gguf, huggingface
from tpu_llm.checkpoint.family import first
from tpu_llm.config import ConfigError
from tpu_llm.models.families import published

MAMBA = {
    'bos_token_id': 0,
    'conv_kernel': 4,
    'd_inner': 1536,
    'd_model': 768,
    'expand': 2,
    'fused_add_norm': True,
    'hidden_act': 'silu',
    'hidden_size': 768,
    'intermediate_size': 1536,
    'layer_norm_epsilon': 1e-05,
    'n_layer': 24,
    'num_hidden_layers': 24,
    'pad_vocab_size_multiple': 8,
    'residual_in_fp32': True,
    'rms_norm': True,
    'ssm_cfg': {},
    'state_size': 16,
    'time_step_rank': 48,
    'time_step_scale': 1.0,
    'use_bias': False,
    'use_conv_bias': True,
    'vocab_size': 50280,
}
MAMBA2 = {
    'hidden_size': 4096,
    'num_heads': 128,
    'head_dim': 64,
    'n_groups': 8,
    'vocab_size': 32768,
    'num_hidden_layers': 64,
    'state_size': 128,
    'norm_before_gate': True,
    'tie_word_embeddings': False,
    'time_step_limit': [0.0, math.inf],
    'time_step_rank': 256,
    'chunk_size': 256,
}
JAMBA = {
    'attn_layer_offset': 4,
    'attn_layer_period': 8,
    'expert_layer_offset': 1,
    'expert_layer_period': 2,
    'hidden_size': 4096,
    'intermediate_size': 14336,
    'mamba_d_conv': 4,
    'mamba_dt_rank': 256,
    'mamba_inner_layernorms': True,
    'max_position_embeddings': 262144,
    'num_attention_heads': 32,
    'num_experts': 16,
    'num_experts_per_tok': 2,
    'num_hidden_layers': 32,
    'num_key_value_heads': 8,
    'num_logits_to_keep': 1,
    'sliding_window': None,
    'vocab_size': 65536,
}


def read(architecture, said):
    family = huggingface.ARCHITECTURES[architecture]
    return fields.read(family.items, said, family.make)


@pytest.mark.parametrize(
    ('architecture', 'said', 'name'),
    [
        ('MambaForCausalLM', MAMBA, 'mamba-130m'),
        ('Mamba2ForCausalLM', MAMBA2, 'mamba-codestral-7b'),
        ('JambaForCausalLM', JAMBA, 'jamba-v0.1'),
    ],
)
def test_published_files_are_the_published_sizes(architecture, said, name):
    config, wanted = read(architecture, said), published(name)
    config.ssm.chunk = wanted.ssm.chunk  # how much is computed at once is ours to choose
    assert config == wanted


def test_older_files_have_another_name_for_the_embedding():
    family = huggingface.ARCHITECTURES['MambaForCausalLM']
    assert family.now('backbone.embedding.weight') == 'backbone.embeddings.weight'
    assert family.now('backbone.embeddings.weight') == 'backbone.embeddings.weight'


@pytest.mark.parametrize(
    ('architecture', 'said', 'reason'),
    [
        ('MambaForCausalLM', MAMBA | {'use_bias': True}, 'use_bias = True'),
        ('MambaForCausalLM', MAMBA | {'use_conv_bias': False}, 'use_conv_bias = False'),
        ('MambaForCausalLM', MAMBA | {'rms_norm': False}, 'rms_norm = False'),
        ('MambaForCausalLM', MAMBA | {'intermediate_size': 99}, r'99 is not expand x hidden_size = 1536'),
        ('Mamba2ForCausalLM', MAMBA2 | {'num_heads': 64}, r'64 x 64 is not expand x hidden_size = 8192'),
        ('Mamba2ForCausalLM', MAMBA2 | {'time_step_limit': [0.01, 0.1]}, r'time_step_limit = \[0.01, 0.1\]'),
        ('JambaForCausalLM', JAMBA | {'expert_layer_offset': 0}, 'expert_layer_offset = 0 is not the last'),
        ('JambaForCausalLM', JAMBA | {'attn_layer_offset': 8}, 'attn_layer_offset = 8 is not below'),
        ('JambaForCausalLM', JAMBA | {'sliding_window': 4096}, 'sliding_window = 4096'),
    ],
)
def test_what_is_not_implemented_is_refused(architecture, said, reason):
    with pytest.raises(ConfigError, match=reason):
        read(architecture, said)


def test_attention_alone_says_no_state_space():
    with pytest.raises(ConfigError, match=r'no architecture of llama\.cpp is this model; the nearest is none that has'):
        first(list(gguf.ARCHITECTURES.values()), published('mamba-130m'), 'llama.cpp')
    config = published('jamba-v0.1')
    config.moe.capacity = 1.5
    with pytest.raises(ConfigError, match=r'the nearest is JambaForCausalLM: it has no moe.capacity = 1\.5'):
        huggingface.expressible(config)

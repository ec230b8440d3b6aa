"""Configs of decoders with experts: the published ones, what is refused, and both ways of what a table cannot show."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from tpu_llm.checkpoint import fields, huggingface, pretrained, safetensors_file
from tpu_llm.checkpoint.files import CheckpointError
from tpu_llm.checkpoint.huggingface import ARCHITECTURES
from tpu_llm.config import ConfigError
from tpu_llm.models.families import published
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.param import named_params, param_sharding
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.parallel.rules import PRESETS
from tpu_llm.parallel.sharding import Layout

ZOO = Path(__file__).parents[1] / 'golden/zoo'


def said(name, **changes):
    return json.loads((ZOO / name / 'config.json').read_text()) | changes


def read(config):
    family = ARCHITECTURES[config['architectures'][0]]
    return fields.read(family.items, config, family.make)


YARN = {'type': 'yarn', 'factor': 40, 'original_max_position_embeddings': 4096, 'beta_fast': 32, 'beta_slow': 1}
LATENT = {
    'kv_lora_rank': 512,
    'qk_nope_head_dim': 128,
    'qk_rope_head_dim': 64,
    'v_head_dim': 128,
    'max_position_embeddings': 163840,
    'rms_norm_eps': 1e-06,
    'rope_theta': 10000,
    'moe_layer_freq': 1,
    'hidden_act': 'silu',
    'attention_bias': False,
    'ep_size': 1,
    'aux_loss_alpha': 0.001,
    'seq_aux': True,
    'pretraining_tp': 1,
    'auto_map': {'AutoConfig': 'configuration_deepseek.DeepseekV2Config'},
}
# What the folders of these models say, without the ids of marks.
PUBLISHED = {
    'mixtral-8x7b': {
        'architectures': ['MixtralForCausalLM'],
        'hidden_act': 'silu',
        'hidden_size': 4096,
        'intermediate_size': 14336,
        'max_position_embeddings': 32768,
        'num_attention_heads': 32,
        'num_experts_per_tok': 2,
        'num_hidden_layers': 32,
        'num_key_value_heads': 8,
        'num_local_experts': 8,
        'output_router_logits': False,
        'rms_norm_eps': 1e-05,
        'rope_theta': 1000000.0,
        'router_aux_loss_coef': 0.02,
        'sliding_window': None,
        'tie_word_embeddings': False,
        'vocab_size': 32000,
    },
    'qwen3-30b-a3b': {
        'architectures': ['Qwen3MoeForCausalLM'],
        'attention_bias': False,
        'decoder_sparse_step': 1,
        'head_dim': 128,
        'hidden_act': 'silu',
        'hidden_size': 2048,
        'intermediate_size': 6144,
        'max_position_embeddings': 40960,
        'max_window_layers': 48,
        'mlp_only_layers': [],
        'moe_intermediate_size': 768,
        'norm_topk_prob': True,
        'num_attention_heads': 32,
        'num_experts': 128,
        'num_experts_per_tok': 8,
        'num_hidden_layers': 48,
        'num_key_value_heads': 4,
        'rms_norm_eps': 1e-06,
        'rope_scaling': None,
        'rope_theta': 1000000.0,
        'router_aux_loss_coef': 0.001,
        'sliding_window': None,
        'tie_word_embeddings': False,
        'use_sliding_window': False,
        'vocab_size': 151936,
    },
    'deepseek-v2-lite': LATENT
    | {
        'architectures': ['DeepseekV2ForCausalLM'],
        'first_k_dense_replace': 1,
        'hidden_size': 2048,
        'intermediate_size': 10944,
        'moe_intermediate_size': 1408,
        'n_group': 1,
        'n_routed_experts': 64,
        'n_shared_experts': 2,
        'norm_topk_prob': False,
        'num_attention_heads': 16,
        'num_experts_per_tok': 6,
        'num_hidden_layers': 27,
        'num_key_value_heads': 16,
        'q_lora_rank': None,
        'rope_scaling': {**YARN, 'mscale': 0.707, 'mscale_all_dim': 0.707},
        'routed_scaling_factor': 1.0,
        'scoring_func': 'softmax',
        'topk_group': 1,
        'topk_method': 'greedy',
        'vocab_size': 102400,
    },
    'deepseek-v3': LATENT
    | {
        'architectures': ['DeepseekV3ForCausalLM'],
        'first_k_dense_replace': 3,
        'hidden_size': 7168,
        'intermediate_size': 18432,
        'moe_intermediate_size': 2048,
        'n_group': 8,
        'n_routed_experts': 256,
        'n_shared_experts': 1,
        'norm_topk_prob': True,
        'num_attention_heads': 128,
        'num_experts_per_tok': 8,
        'num_hidden_layers': 61,
        'num_key_value_heads': 128,
        'num_nextn_predict_layers': 1,
        'q_lora_rank': 1536,
        'rope_scaling': {**YARN, 'mscale': 1.0, 'mscale_all_dim': 1.0},
        'routed_scaling_factor': 2.5,
        'scoring_func': 'sigmoid',
        'topk_group': 4,
        'topk_method': 'noaux_tc',
        'vocab_size': 129280,
    },
    'dbrx': {
        'architectures': ['DbrxForCausalLM'],
        'attn_config': {'clip_qkv': 8, 'kv_n_heads': 8, 'model_type': '', 'rope_theta': 500000},
        'd_model': 6144,
        'emb_pdrop': 0.0,
        'ffn_config': {
            'ffn_hidden_size': 10752,
            'model_type': '',
            'moe_jitter_eps': 0,
            'moe_loss_weight': 0.05,
            'moe_num_experts': 16,
            'moe_top_k': 4,
        },
        'max_seq_len': 32768,
        'n_heads': 48,
        'n_layers': 40,
        'output_router_logits': False,
        'resid_pdrop': 0.0,
        'tie_word_embeddings': False,
        'vocab_size': 100352,
    },
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_published_config_is_that_of_our_table(name):
    family = ARCHITECTURES[PUBLISHED[name]['architectures'][0]]
    assert fields.write(family.items, read(PUBLISHED[name])) == fields.write(family.items, published(name))


@pytest.mark.parametrize(
    ('name', 'changes', 'message'),
    [
        ('deepseek-v3', {'quantization_config': {'quant_method': 'fp8'}}, 'quantization_config = .*not implemented'),
        ('deepseek-v3', {'scoring_func': 'softmax'}, "scoring_func = 'softmax' is not implemented"),
        ('deepseek-v3', {'topk_method': 'greedy'}, "topk_method = 'greedy' is not implemented; known are 'noaux_tc'"),
        ('deepseek-v3', {'rope_interleave': False}, 'rope_interleave = False is not implemented'),
        ('deepseek-v3', {'norm_topk_prob': False}, 'norm_topk_prob = False is not implemented'),
        ('deepseek-v3', {'attention_bias': True}, 'attention_bias = True is not implemented'),
        ('deepseek-v2', {'norm_topk_prob': True}, 'norm_topk_prob = True is not implemented'),
        ('deepseek-v2', {'topk_method': 'noaux_tc'}, "topk_method = 'noaux_tc' is not implemented"),
        ('deepseek-v2', {'rope_parameters': 'yarn'}, "rope_parameters is 'yarn', not an object"),
        ('olmoe', {'clip_qkv': 8.0}, r'clip_qkv = 8\.0 is not implemented'),
        ('qwen3-moe', {'mlp_only_layers': [3], 'decoder_sparse_step': 1}, r'mlp_only_layers = \[3\] are not the first'),
        ('qwen3-moe', {'decoder_sparse_step': 0}, 'decoder_sparse_step is 0'),
        ('dbrx', {'attn_config': {'rope_theta': 7.0}}, r'rope_theta = 7\.0 and .* = 100\.0 disagree; leave the one'),
        ('dbrx', {'rope_parameters': {'rope_type': 'linear'}}, "rope_type = 'linear' is not implemented"),
        ('dbrx', {'ffn_config': {'ffn_act_fn': {'name': 'gelu'}}}, "ffn_act_fn = {'name': 'gelu'} is not implemented"),
        ('dbrx', {'ffn_config': {'moe_normalize_expert_weights': 2}}, 'moe_normalize_expert_weights = 2 is not'),
        ('dbrx', {'ffn_config': {'moe_uniform': True}}, r'ffn_config\.moe_uniform = True, which is not implemented'),
        ('dbrx', {'attn_config': 5}, 'attn_config is 5, not an object'),
    ],
)
def test_what_is_not_implemented_is_refused(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        read(said(name, **changes))


def test_weights_may_go_without_a_norm():
    inside = said('dbrx')['ffn_config'] | {'moe_normalize_expert_weights': None}
    config = read(said('dbrx', ffn_config=inside))
    assert not config.moe.router.normalise
    _, again = huggingface.expressible(config)
    assert again['ffn_config']['moe_normalize_expert_weights'] is None


@pytest.mark.parametrize(
    ('step', 'dense', 'layers', 'written'),
    [
        (1, [], [0, 1, 2, 3, 4, 5], []),
        (2, [], [1, 3, 5], []),
        (1, [1, 0], [2, 3, 4, 5], [0, 1]),
        (2, [1], [3, 5], [0, 1]),
        (3, [0, 1, 2, 3], [5], [0, 1, 2]),
    ],
)
def test_which_layers_have_experts(step, dense, layers, written):
    config = read(said('qwen3-moe', num_hidden_layers=6, decoder_sparse_step=step, mlp_only_layers=dense))
    assert [i for i in range(6) if config.moe.at(i)] == layers
    _, again = huggingface.expressible(config)
    assert (again['decoder_sparse_step'], again['mlp_only_layers']) == (step, written)


def test_dense_layers_that_no_list_can_say():
    config = read(said('qwen3-moe', num_hidden_layers=6))
    config.moe.first_dense = 1
    with pytest.raises(ConfigError, match=r'moe\.first_dense = 1 is no multiple of every = 2'):
        huggingface.expressible(config, 'Qwen3MoeForCausalLM')


@pytest.mark.parametrize('weight', [0.707, 1.0, 1 / 3, 2.5])
@pytest.mark.parametrize('factor', [1.5, 40.0])
def test_sharper_scores_go_back_to_the_weight_they_came_from(weight, factor):
    yarn = {'rope_type': 'yarn', 'factor': factor, 'original_max_position_embeddings': 16, 'mscale_all_dim': weight}
    config = read(said('deepseek-v2', rope_parameters=yarn))
    _, again = huggingface.expressible(config)
    assert again['rope_scaling']['mscale_all_dim'] == pytest.approx(weight, rel=1e-12)


def test_scores_that_no_weight_sharpens():
    config = dataclasses.replace(read(said('deepseek-v2')), attention_scale=0.1)
    with pytest.raises(ConfigError, match=r'attention_scale = 0\.1 has no mscale_all_dim'):
        huggingface.expressible(config, 'DeepseekV2ForCausalLM')


def test_what_only_training_reads_is_no_obstacle_and_all_else_is():
    config = read(said('deepseek-v3'))
    router = dataclasses.replace(config.moe.router, balance_loss=0.5, z_loss=0.1, jitter=0.1, bias_rate=0.01)
    config.moe = dataclasses.replace(config.moe, router=router, room=2.0)
    huggingface.expressible(config)
    config.moe = dataclasses.replace(config.moe, room=0.0, capacity=1.25)
    with pytest.raises(ConfigError, match=r'it has no moe\.capacity = 1\.25'):
        huggingface.expressible(config, 'DeepseekV3ForCausalLM')
    config.moe = None
    with pytest.raises(ConfigError, match='it needs moe, which is None'):
        huggingface.expressible(config, 'DeepseekV3ForCausalLM')


AHEAD = [('DeepseekV3ForCausalLM', 'deepseek-v3-ahead', 2), ('Glm4MoeForCausalLM', 'glm4-moe', 1)]


@pytest.mark.parametrize(('architecture', 'name', 'depths'), AHEAD)
def test_layers_that_predict_further_tokens_are_passed_over_where_none_is_asked_for(architecture, name, depths):
    folder = huggingface.open_folder(ZOO / name)
    assert folder.config.predict_ahead == depths
    config = dataclasses.replace(folder.config, predict_ahead=0)
    plain, tensors = ModelGraph(config.make(vocab_multiple=1)), folder.tensors()
    folder.bind(plain)
    joint = f'model.layers.{config.layers}.eh_proj.weight'
    if depths == 1:
        without = {name: shape for name, shape in tensors.items() if name != joint}
        with pytest.raises(CheckpointError, match='without a place'):
            ARCHITECTURES[architecture].checked(config, plain, without, 'here')
    more = tensors | {joint.replace('eh_proj', 'mlp.extra'): (16,)}
    with pytest.raises(CheckpointError, match=r'1 without a place: .*mlp\.extra'):
        ARCHITECTURES[architecture].checked(
            folder.config, ModelGraph(folder.config.make(vocab_multiple=1)), more, 'here'
        )


def test_a_count_of_layers_that_the_folder_does_not_have_is_that_of_none():
    """As transformers leaves it, which saves none of them."""
    assert json.loads((ZOO / 'deepseek-v3/config.json').read_text())['num_nextn_predict_layers'] == 1
    assert huggingface.open_folder(ZOO / 'deepseek-v3').config.predict_ahead == 0


def copied(folder, change):
    """The tiny DeepSeek-V3 that predicts further tokens, with other tensors."""
    source = huggingface.open_folder(ZOO / 'deepseek-v3-ahead')
    tensors = {name: source.read(name) for name in source.names}
    change(tensors)
    infos = [(name, array.dtype, array.shape) for name, array in tensors.items()]
    safetensors_file.write(folder / 'model.safetensors', infos, tensors.__getitem__, {'format': 'pt'})
    (folder / 'config.json').write_text((ZOO / 'deepseek-v3-ahead/config.json').read_text())
    return pretrained.read_model(pretrained.open_source(folder), 'float32')


SHARED = ('model.layers.1.embed_tokens.weight', 'model.layers.2.shared_head.head.weight')


@pytest.mark.parametrize('name', SHARED)
def test_embedding_and_head_of_such_layers_are_the_models(name, tmp_path):
    def change(tensors):
        tensors[name] = tensors[name] + np.float32(1e-3) * (np.arange(31) == 30)[:, None]

    with pytest.raises(CheckpointError, match=f'{re.escape(name)} is not what the model shares with it; only equal'):
        copied(tmp_path, change)


def test_a_folder_may_leave_them_out(tmp_path):
    model = copied(tmp_path, lambda tensors: [tensors.pop(name) for name in SHARED])
    assert len(model.ahead) == 2


@pytest.mark.parametrize('name', ['mixtral', 'dbrx', 'deepseek-v3'])
def test_each_device_is_given_its_experts(name):
    """Whether they are tensors of their own or all of them one."""
    source = pretrained.open_source(ZOO / name)
    layout = Layout(Mesh(data=2, expert=2, fsdp=2).make(), PRESETS['zero3'])
    graph = ModelGraph(source.config.make(vocab_multiple=8))
    like = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param_sharding(layout, path, leaf))
        for path, leaf in graph.leaves.items()
    }
    loaded = source.load(graph, like, lambda name: None)
    whole = {path: leaf.get_value() for path, leaf in named_params(pretrained.read_model(source, 'float32'))}
    spread = {path: array for path, array in loaded.items() if '.moe.experts.' in path}
    assert len(spread) == 3
    for path, array in spread.items():
        assert not array.is_fully_replicated
        np.testing.assert_array_equal(array, whole[path], err_msg=path)

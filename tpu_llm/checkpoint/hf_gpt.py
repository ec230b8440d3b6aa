"""Dense decoders of transformers in the line of GPT: plain MLPs, layer norms, learned positions or ALiBi."""

from collections.abc import Mapping
from typing import Any

from tpu_llm.checkpoint.family import (
    PLAIN,
    Biases,
    Family,
    activation,
    attention,
    ends,
    joined_attention,
    linear,
    mlp,
    norm,
    period,
)
from tpu_llm.checkpoint.fields import Aliases, Choice, Fixed, Item, Must, Rule, Same, Theirs, Unused
from tpu_llm.checkpoint.renaming import Row
from tpu_llm.config import ConfigError

BUFFERS = r'.*\.(attn|attention)\.(masked_)?bias|.*\.inv_freq'  # masks and frequencies that old files keep

# A group's queries, then its key, then its value: whether each head has a key of its own, all share one, or some do.
GROUPS = {'attention.query': '(K+GH)D', 'attention.key': '(K+H)D', 'attention.value': '(K+H)D'}


def equal_heads(width: str, heads: str) -> Item:
    """Each head has its own key and an equal share of the width."""
    return Rule(lambda theirs: {'kv_heads': theirs[heads], 'head_dim': theirs[width] // theirs[heads]}, lambda ours: {})


def gpt_shape(*, tied: bool, max_length: int) -> tuple[Item, ...]:
    """The names that GPT-2 gave, all but those of its heads' keys; what other names its class takes for them."""
    return (
        Aliases({'hidden_size': 'n_embd', 'num_hidden_layers': 'n_layer', 'num_attention_heads': 'n_head'}),
        Aliases({'max_position_embeddings': 'n_positions'}),
        Same('vocab_size', 'vocab_size'),
        Same('n_embd', 'width'),
        Same('n_layer', 'layers'),
        Same('n_head', 'heads'),
        Same('n_positions', 'max_length', max_length),
        Same('layer_norm_epsilon', 'norm_eps', 1e-5),
        Same('tie_word_embeddings', 'tied_embeddings', tied),
        Unused(('n_ctx',)),
    )


INNER = Same('n_inner', 'mlp_width', lambda theirs: 4 * theirs['n_embd'])
ACTIVATION = activation(PLAIN, 'gelu_new', 'activation_function')
_GPT_NORMS = [*norm('transformer.h.{i}.ln_1', 'attention_norm'), *norm('transformer.h.{i}.ln_2', 'mlp_norm')]
# GPT-2's maps are [in, out].
_GPT_BLOCK = [
    *_GPT_NORMS,
    *linear(
        'transformer.h.{i}.attn.c_attn',
        {'attention.query': 'D(+NH)', 'attention.key': 'D(+KH)', 'attention.value': 'D(+KH)'},
    ),
    *linear('transformer.h.{i}.attn.c_proj', 'attention.out', '(NH)D', 'D'),
    *linear('transformer.h.{i}.mlp.c_fc', 'mlp.up', 'DF', 'F'),
    *linear('transformer.h.{i}.mlp.c_proj', 'mlp.down', 'FD', 'D'),
]
_GPT_ENDS = [
    *ends('transformer.wte', 'transformer.ln_f'),
    Row('transformer.wpe.weight', {'position_embed.table': 'TD'}),
]
_ALL_BIASED = {'norm': 'layer', 'position': 'learned', 'bias': ('qkv', 'out', 'mlp')}

GPT2 = Family(
    architecture='GPT2LMHeadModel',
    model_type='gpt2',
    items=(
        *gpt_shape(tied=True, max_length=1024),
        INNER,
        equal_heads('n_embd', 'n_head'),
        ACTIVATION,
        Fixed(_ALL_BIASED),
        Must('scale_attn_weights', (True,)),
        Must('scale_attn_by_inverse_layer_idx', (False,)),
        Must('add_cross_attention', (False,)),
        Unused(('reorder_and_upcast_attn',)),
    ),
    rows=[*_GPT_ENDS, *_GPT_BLOCK],
    ignored=BUFFERS,
    prefix='transformer.',
)

GPT1 = Family(
    architecture='OpenAIGPTLMHeadModel',
    model_type='openai-gpt',
    items=(
        *gpt_shape(tied=True, max_length=512),
        Rule(lambda theirs: {'mlp_width': 4 * theirs['n_embd']}, lambda ours: {}),
        equal_heads('n_embd', 'n_head'),
        activation({'gelu': 'gelu', 'relu': 'relu'}, 'gelu', 'afn'),  # its gelu is the approximation by tanh
        Fixed(_ALL_BIASED | {'norm_place': 'post'}),
        Unused(('n_special', 'predict_special_tokens')),
    ),
    rows=[
        Row('transformer.tokens_embed.weight', {'embed.table': 'VD'}),
        Row('transformer.positions_embed.weight', {'position_embed.table': 'TD'}),
        *_GPT_BLOCK,
    ],
    ignored=BUFFERS + r'|.*position_ids',
    prefix='transformer.',
)

BIGCODE = Family(
    architecture='GPTBigCodeForCausalLM',
    model_type='gpt_bigcode',
    items=(
        *gpt_shape(tied=True, max_length=1024),
        INNER,
        Rule(
            lambda theirs: {
                'kv_heads': 1 if theirs.take('multi_query', True) else theirs['n_head'],
                'head_dim': theirs['n_embd'] // theirs['n_head'],
            },
            lambda ours: {'multi_query': ours.kv_heads == 1},
        ),
        activation(PLAIN, 'gelu_pytorch_tanh', 'activation_function'),
        Fixed(_ALL_BIASED),
        Must('scale_attn_weights', (True,)),
        Must('add_cross_attention', (False,)),
        # How exactly the softmax is computed, and how another library ran the model.
        Unused(('attention_softmax_in_fp32', 'scale_attention_softmax_in_fp32', 'num_key_value_heads')),
        Unused(
            ('inference_runner', 'max_batch_size', 'max_sequence_length', 'pad_key_length', 'pre_allocate_kv_cache')
        ),
        Unused(('validate_runner_input',)),
    ),
    rows=[
        *_GPT_ENDS,
        *_GPT_NORMS,
        *linear('transformer.h.{i}.attn.c_attn', GROUPS),
        *linear('transformer.h.{i}.attn.c_proj', 'attention.out', 'D(NH)', 'D'),
        *mlp('transformer.h.{i}.mlp', 'c_fc c_proj'),
    ],
    ignored=BUFFERS,
    prefix='transformer.',
)


def _local_layers(theirs: Theirs) -> Mapping[str, Any]:
    """`attention_types` is [[kinds, how often], …], a kind for each layer."""
    said = theirs.take('attention_types', [[['global', 'local'], 12]])
    kinds = [kind for some, times in said for kind in some * times]
    if len(kinds) != theirs['num_layers'] or set(kinds) - {'global', 'local'}:
        raise ConfigError(f'attention_types = {said} is not a kind, global or local, for each layer')
    window = theirs.take('window_size', 256)
    return {'windows': tuple(window if kind == 'local' else 0 for kind in period(kinds))}


def _local_layers_back(ours: Any) -> Mapping[str, Any]:
    sizes = {size for size in ours.windows if size} or {256}
    if len(sizes) > 1 or ours.layers % len(ours.windows):
        raise ConfigError(f'windows = {ours.windows} are not a period of one size')
    kinds = ['local' if size else 'global' for size in ours.windows]
    return {'attention_types': [[kinds, ours.layers // len(kinds)]], 'window_size': sizes.pop()}


GPTNEO = Family(
    architecture='GPTNeoForCausalLM',
    model_type='gpt_neo',
    items=(
        Aliases({'num_hidden_layers': 'num_layers', 'num_attention_heads': 'num_heads'}),
        Same('vocab_size', 'vocab_size'),
        Same('hidden_size', 'width'),
        Same('num_layers', 'layers'),
        Same('num_heads', 'heads'),
        equal_heads('hidden_size', 'num_heads'),
        Same('intermediate_size', 'mlp_width', lambda theirs: 4 * theirs['hidden_size']),
        Same('max_position_embeddings', 'max_length', 2048),
        Same('layer_norm_epsilon', 'norm_eps', 1e-5),
        Same('tie_word_embeddings', 'tied_embeddings', True),
        ACTIVATION,
        Rule(_local_layers, _local_layers_back),
        Fixed({'norm': 'layer', 'position': 'learned', 'bias': ('out', 'mlp'), 'attention_scale': 1.0}),
        Unused(('attention_layers',)),  # the same as attention_types, layer by layer
    ),
    rows=[
        *_GPT_ENDS,
        *_GPT_NORMS,
        *attention('transformer.h.{i}.attn.attention', 'q_proj k_proj v_proj out_proj'),
        *mlp('transformer.h.{i}.mlp', 'c_fc c_proj'),
    ],
    ignored=BUFFERS,
    prefix='transformer.',
)


def _opt_embeddings(theirs: Theirs) -> Mapping[str, Any]:
    width = theirs['hidden_size']
    own = theirs.take('word_embed_proj_dim', width)
    return {'embed_width': 0 if own == width else own}


OPT = Family(
    architecture='OPTForCausalLM',
    model_type='opt',
    items=(
        Same('vocab_size', 'vocab_size'),
        Same('hidden_size', 'width'),
        Same('num_hidden_layers', 'layers'),
        Same('num_attention_heads', 'heads'),
        equal_heads('hidden_size', 'num_attention_heads'),
        Same('ffn_dim', 'mlp_width'),
        Same('max_position_embeddings', 'max_length', 2048),
        Same('tie_word_embeddings', 'tied_embeddings', True),
        activation(PLAIN, 'relu', 'activation_function'),
        Choice('do_layer_norm_before', 'norm_place', {True: 'pre', False: 'post'}, True),
        Rule(_opt_embeddings, lambda ours: {'word_embed_proj_dim': ours.embed_width or ours.width}),
        Must('_remove_final_layer_norm', (False,)),
        Choice('layer_norm_elementwise_affine', 'norm', {True: 'layer', False: 'layer_fixed'}, True),
        Biases({'enable_bias': (('qkv', 'out', 'mlp'), True)}),
        Fixed({'position': 'learned', 'position_offset': 2, 'norm_eps': 1e-5}),
    ),
    rows=[
        *ends('model.decoder.embed_tokens', 'model.decoder.final_layer_norm'),
        Row('model.decoder.embed_positions.weight', {'position_embed.table': 'TD'}),
        Row('model.decoder.project_in.weight', {'embed.widen.kernel': 'DY'}),
        Row('model.decoder.project_out.weight', {'narrow.kernel': 'YD'}),
        *norm('model.decoder.layers.{i}.self_attn_layer_norm', 'attention_norm'),
        *attention('model.decoder.layers.{i}.self_attn', 'q_proj k_proj v_proj out_proj'),
        *norm('model.decoder.layers.{i}.final_layer_norm', 'mlp_norm'),
        *mlp('model.decoder.layers.{i}', 'fc1 fc2'),
    ],
    prefix='model.',
)

BLOOM = Family(
    architecture='BloomForCausalLM',
    model_type='bloom',
    items=(
        Aliases({'n_embed': 'hidden_size', 'num_hidden_layers': 'n_layer', 'num_attention_heads': 'n_head'}),
        Same('vocab_size', 'vocab_size'),
        Same('hidden_size', 'width'),
        Same('n_layer', 'layers'),
        Same('n_head', 'heads'),
        equal_heads('hidden_size', 'n_head'),
        Rule(lambda theirs: {'mlp_width': 4 * theirs['hidden_size']}, lambda ours: {}),
        Same('seq_length', 'max_length', 0),
        Same('layer_norm_epsilon', 'norm_eps', 1e-5),
        Same('tie_word_embeddings', 'tied_embeddings', True),
        Fixed({'norm': 'layer', 'mlp': 'gelu', 'position': 'alibi', 'embed_norm': True}),
        Fixed({'bias': ('qkv', 'out', 'mlp')}),
        Must('apply_residual_connection_post_layernorm', (False,)),
        # How Megatron ran the model.
        Unused(
            ('attention_softmax_in_fp32', 'bias_dropout_fusion', 'masked_softmax_fusion', 'n_inner', 'offset_alibi')
        ),
        Unused(('skip_bias_add', 'skip_bias_add_qkv', 'slow_but_exact')),
    ),
    rows=[
        *ends('transformer.word_embeddings', 'transformer.ln_f'),
        *norm('transformer.word_embeddings_layernorm', 'embed_norm'),
        *norm('transformer.h.{i}.input_layernorm', 'attention_norm'),
        *linear('transformer.h.{i}.self_attention.query_key_value', GROUPS),
        *linear('transformer.h.{i}.self_attention.dense', 'attention.out', 'D(NH)', 'D'),
        *norm('transformer.h.{i}.post_attention_layernorm', 'mlp_norm'),
        *mlp('transformer.h.{i}.mlp', 'dense_h_to_4h dense_4h_to_h'),
    ],
    prefix='transformer.',
)

# The class always adds ALiBi, whatever `alibi` says, and knows none of what the other values switch on. Nor does it
# read alibi_bias_max: what that does is what the code published with the models does.
_MPT_ATTENTION = {
    'alibi': True,
    'attn_type': 'multihead_attention',
    'prefix_lm': False,
    'qk_ln': False,
    'attn_uses_sequence_id': False,
}


def _mpt_attention(theirs: Theirs) -> Mapping[str, Any]:
    said = dict(theirs.take('attn_config', {}))
    for key, known in _MPT_ATTENTION.items():
        if said.get(key, known) != known:
            raise ConfigError(f'attn_config.{key} = {said[key]!r} is not implemented; known is {known!r}')
    return {
        'qkv_clip': float(said.get('clip_qkv') or 0),
        'attention_scale': float(said.get('softmax_scale') or 0),
        'alibi_max': float(said.get('alibi_bias_max', 8)),
    }


def _mpt_attention_back(ours: Any) -> Mapping[str, Any]:
    own = {'clip_qkv': ours.qkv_clip or None, 'softmax_scale': ours.attention_scale or None}
    own['alibi_bias_max'] = int(ours.alibi_max)
    return {'attn_config': {**_MPT_ATTENTION, **own}}


MPT = Family(
    architecture='MptForCausalLM',
    model_type='mpt',
    items=(
        Aliases({'hidden_size': 'd_model', 'num_hidden_layers': 'n_layers', 'num_attention_heads': 'n_heads'}),
        Same('vocab_size', 'vocab_size'),
        Same('d_model', 'width'),
        Same('n_layers', 'layers'),
        Same('n_heads', 'heads'),
        equal_heads('d_model', 'n_heads'),
        Rule(lambda theirs: {'mlp_width': 4 * theirs['d_model']}, lambda ours: {}),
        Must('expansion_ratio', (4,)),
        Same('max_seq_len', 'max_length', 2048),
        Same('layer_norm_epsilon', 'norm_eps', 1e-5),
        Same('tie_word_embeddings', 'tied_embeddings', True),
        Rule(_mpt_attention, _mpt_attention_back),
        Fixed({'norm': 'layer_no_bias', 'mlp': 'gelu_exact', 'position': 'alibi'}),
        Must('no_bias', (True,)),
        Must('norm_type', ('low_precision_layernorm',)),
        Must('logit_scale', (None,)),
        Must('embedding_fraction', (1.0,)),
        Unused(('init_config', 'init_device', 'learned_pos_emb', 'tokenizer_name', 'verbose')),
    ),
    rows=[
        *ends('transformer.wte', 'transformer.norm_f'),
        *norm('transformer.blocks.{i}.norm_1', 'attention_norm'),
        *joined_attention('transformer.blocks.{i}.attn', 'Wqkv', 'out_proj'),
        *norm('transformer.blocks.{i}.norm_2', 'mlp_norm'),
        *mlp('transformer.blocks.{i}.ffn', 'up_proj down_proj'),
    ],
    prefix='transformer.',
)


GPT = {family.architecture: family for family in (GPT2, GPT1, BIGCODE, GPTNEO, OPT, BLOOM, MPT)} | {
    'MPTForCausalLM': MPT
}  # as published files call it, which came before transformers had it

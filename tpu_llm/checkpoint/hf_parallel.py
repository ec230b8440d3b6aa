"""Dense decoders of transformers whose attention and MLP stand side by side: GPT-J, GPT-NeoX, Phi, Falcon."""

from collections.abc import Mapping, Sequence
from typing import Any

from tpu_llm.checkpoint.family import PLAIN, Biases, Family, activation, attention, ends, linear, mlp, norm, shape
from tpu_llm.checkpoint.fields import Aliases, Choice, Fixed, Must, Rule, Same, Theirs, Unused
from tpu_llm.checkpoint.hf_gpt import ACTIVATION, BUFFERS, GROUPS, INNER, equal_heads, gpt_shape
from tpu_llm.checkpoint.renaming import Row
from tpu_llm.checkpoint.rope_fields import Rope
from tpu_llm.config import ConfigError

GPTJ = Family(
    architecture='GPTJForCausalLM',
    model_type='gptj',
    items=(
        *gpt_shape(tied=False, max_length=2048),
        INNER,
        equal_heads('n_embd', 'n_head'),
        ACTIVATION,
        Rule(
            lambda theirs: {'rope_dim': theirs.take('rotary_dim', 64) % (theirs['n_embd'] // theirs['n_head'])},
            lambda ours: {'rotary_dim': ours.turned},
        ),
        Fixed({'norm': 'layer', 'residual': 'parallel', 'bias': ('mlp', 'head')}),
        Must('scale_attn_weights', (True,)),
        Must('rotary', (True,)),
    ),
    rows=[
        *ends('transformer.wte', 'transformer.ln_f'),
        *norm('transformer.h.{i}.ln_1', 'attention_norm'),
        *attention('transformer.h.{i}.attn', 'q_proj k_proj v_proj out_proj', rotary='h'),
        *mlp('transformer.h.{i}.mlp', 'fc_in fc_out'),
    ],
    ignored=BUFFERS,
    prefix='transformer.',
)

NEOX = Family(
    architecture='GPTNeoXForCausalLM',
    model_type='gpt_neox',
    items=(
        *shape(eps='layer_norm_eps', default_eps=1e-5),
        Rope(partial=0.25, keys=('rotary_emb_base', 'rotary_pct')),
        activation(PLAIN, 'gelu'),
        Fixed({'norm': 'layer'}),
        Biases({'attention_bias': (('qkv', 'out'), True)}, always=('mlp',)),
        Choice('use_parallel_residual', 'residual', {True: 'parallel_two_norms', False: 'serial'}, True),
    ),
    rows=[
        *ends('gpt_neox.embed_in', 'gpt_neox.final_layer_norm', 'embed_out'),
        *norm('gpt_neox.layers.{i}.input_layernorm', 'attention_norm'),
        *linear('gpt_neox.layers.{i}.attention.query_key_value', GROUPS),
        *linear('gpt_neox.layers.{i}.attention.dense', 'attention.out', 'D(NH)', 'D'),
        *norm('gpt_neox.layers.{i}.post_attention_layernorm', 'mlp_norm'),
        *mlp('gpt_neox.layers.{i}.mlp', 'dense_h_to_4h dense_4h_to_h'),
    ],
    ignored=BUFFERS,
    prefix='gpt_neox.',
)

PHI = Family(
    architecture='PhiForCausalLM',
    model_type='phi',
    items=(
        *shape(eps='layer_norm_eps', default_eps=1e-5),
        Rope(partial=0.5),
        activation(PLAIN, 'gelu_new'),
        Fixed({'norm': 'layer', 'residual': 'parallel', 'bias': ('qkv', 'out', 'mlp', 'head')}),
        Choice('qk_layernorm', 'qk_norm', {False: 'none', True: 'head_biased'}, False),
    ),
    rows=[
        *ends('model.embed_tokens', 'model.final_layernorm'),
        *norm('model.layers.{i}.input_layernorm', 'attention_norm'),
        *attention('model.layers.{i}.self_attn', 'q_proj k_proj v_proj dense'),
        *norm('model.layers.{i}.self_attn.q_layernorm', 'attention.query_norm', 'H'),
        *norm('model.layers.{i}.self_attn.k_layernorm', 'attention.key_norm', 'H'),
        *mlp('model.layers.{i}.mlp', 'fc1 fc2'),
    ],
    ignored=BUFFERS,
)


def _falcon_positions(theirs: Theirs) -> Mapping[str, Any]:
    """Rope, or ALiBi that is scaled as scores are (Falcon-RW)."""
    rope = Rope().read(theirs)
    if not theirs.take('alibi', False):
        return rope
    return {'position': 'alibi', 'alibi_scale': _head_dim(theirs) ** -0.5}


def _falcon_positions_back(ours: Any) -> Mapping[str, Any]:
    alibi = ours.position == 'alibi'
    return {'alibi': alibi, **({} if alibi else Rope().write(ours))}


def _head_dim(theirs: Theirs) -> int:
    return theirs['hidden_size'] // theirs['num_attention_heads']


def _falcon_block(theirs: Theirs) -> Mapping[str, Any]:
    heads, new = theirs['num_attention_heads'], theirs.take('new_decoder_architecture', False)
    parallel, norms = theirs.take('parallel_attn', True), theirs.take('num_ln_in_parallel_attn', 2 if new else 1)
    if (new and not parallel) or (norms == 2 and not new):
        raise ConfigError(
            f'new_decoder_architecture = {new} with parallel_attn = {parallel} and num_ln_in_parallel_attn = {norms} '
            'is not implemented'
        )
    grouped, one = theirs.take('num_kv_heads', heads), theirs.take('multi_query', True)
    kv_heads = grouped if new else 1 if one else heads
    residual = 'parallel_two_norms' if norms == 2 else 'parallel'
    return {'kv_heads': kv_heads, 'residual': residual if parallel else 'serial'}


def _falcon_block_back(ours: Any) -> Mapping[str, Any]:
    two = ours.residual == 'parallel_two_norms'
    return {
        'new_decoder_architecture': two or ours.kv_heads not in (1, ours.heads),
        'multi_query': ours.kv_heads == 1,
        'num_kv_heads': ours.kv_heads,
        'parallel_attn': ours.residual != 'serial',
        'num_ln_in_parallel_attn': 2 if two else 1,
    }


def _falcon_rows(config: Any) -> Sequence[Row]:
    two = config.residual == 'parallel_two_norms'
    before, between = ('ln_attn', 'ln_mlp') if two else ('input_layernorm', 'post_attention_layernorm')
    return [
        *ends('transformer.word_embeddings', 'transformer.ln_f'),
        *norm(f'transformer.h.{{i}}.{before}', 'attention_norm'),
        *linear('transformer.h.{i}.self_attention.query_key_value', GROUPS),
        *linear('transformer.h.{i}.self_attention.dense', 'attention.out', 'D(NH)', 'D'),
        *norm(f'transformer.h.{{i}}.{between}', 'mlp_norm'),
        *mlp('transformer.h.{i}.mlp', 'dense_h_to_4h dense_4h_to_h'),
    ]


FALCON = Family(
    architecture='FalconForCausalLM',
    model_type='falcon',
    items=(
        Aliases({'n_embed': 'hidden_size', 'n_layer': 'num_hidden_layers', 'n_head': 'num_attention_heads'}),
        Aliases({'n_head_kv': 'num_kv_heads'}),
        Same('vocab_size', 'vocab_size'),
        Same('hidden_size', 'width'),
        Same('num_hidden_layers', 'layers'),
        Same('num_attention_heads', 'heads'),
        Rule(lambda theirs: {'head_dim': _head_dim(theirs)}, lambda ours: {}),
        Same('ffn_hidden_size', 'mlp_width', lambda theirs: 4 * theirs['hidden_size']),
        Same('max_position_embeddings', 'max_length', 2048),
        Same('layer_norm_epsilon', 'norm_eps', 1e-5),
        Same('tie_word_embeddings', 'tied_embeddings', True),
        Rule(_falcon_positions, _falcon_positions_back),
        activation(PLAIN, 'gelu', 'activation'),
        Fixed({'norm': 'layer'}),
        Biases({'bias': (('qkv', 'out', 'mlp'), False)}),
        Rule(_falcon_block, _falcon_block_back),
        Must('apply_residual_connection_post_layernorm', (False,)),
        Unused(('ff_factor',)),
    ),
    rows=_falcon_rows,
    ignored=BUFFERS,
    prefix='transformer.',
)

PARALLEL = {family.architecture: family for family in (GPTJ, NEOX, PHI, FALCON)}

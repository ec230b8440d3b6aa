"""Decoders of transformers with experts; those of DeepSeek are in `hf_deepseek.py`."""

from collections.abc import Mapping
from typing import Any

from tpu_llm.checkpoint.family import (
    GATED,
    Biases,
    Family,
    Window,
    activation,
    attention,
    ends,
    experts,
    head_norms,
    joined_attention,
    mlp,
    norm,
    shape,
)
from tpu_llm.checkpoint.fields import Fixed, Inside, Must, Node, OrNull, Rule, Same, Theirs, Unused
from tpu_llm.checkpoint.hf_deepseek import DEEPSEEK
from tpu_llm.checkpoint.renaming import Row
from tpu_llm.checkpoint.rope_fields import Rope
from tpu_llm.config import ConfigError
from tpu_llm.nn.moe import MoE
from tpu_llm.nn.router import Router

_LAYER = 'model.layers.{i}'
_ATTENTION = f'{_LAYER}.self_attn'
_NORMS = [
    *norm(f'{_LAYER}.input_layernorm', 'attention_norm'),
    *norm(f'{_LAYER}.post_attention_layernorm', 'mlp_norm'),
]
_ENDS = ends('model.embed_tokens', 'model.norm')
_SILU = activation(GATED, 'silu')

# ------------------------------------------------------------------------------------------------- Mixtral, OLMoE

MIXTRAL = Family(
    architecture='MixtralForCausalLM',
    model_type='mixtral',
    items=(
        *shape(default_eps=1e-5, kv_heads=8),
        Rope(theta=1e6),
        _SILU,
        Window(),
        Node(
            'moe',
            MoE,
            (
                Same('num_local_experts', 'experts', 8),
                Same('num_experts_per_tok', 'chosen', 2),
                Same('intermediate_size', 'expert_width'),
                Node('router', Router, (Fixed({'choice': 'topk_then_softmax'}),)),
            ),
        ),
    ),
    rows=[*_ENDS, *_NORMS, *attention(_ATTENTION), *experts(f'{_LAYER}.block_sparse_moe', 'w1 w3 w2')],
)

_SOFTMAX = Node('router', Router, (Fixed({'choice': 'softmax_then_topk'}), Same('norm_topk_prob', 'normalise', False)))

OLMOE = Family(
    architecture='OlmoeForCausalLM',
    model_type='olmoe',
    items=(
        *shape(default_eps=1e-5),
        Rope(),
        _SILU,
        Biases({'attention_bias': (('qkv', 'out'), False)}),
        Fixed({'qk_norm': 'all_heads'}),
        Must('clip_qkv', (None,)),  # it cuts behind the norms, we before them
        Node(
            'moe',
            MoE,
            (
                Same('num_experts', 'experts', 64),
                Same('num_experts_per_tok', 'chosen', 8),
                Same('intermediate_size', 'expert_width'),
                _SOFTMAX,
            ),
        ),
    ),
    rows=[
        *_ENDS,
        *_NORMS,
        *attention(_ATTENTION),
        *head_norms(_ATTENTION, '(NH)', '(KH)'),
        *experts(f'{_LAYER}.mlp'),
    ],
)

# ------------------------------------------------------------------------------------------------- Qwen2, Qwen3


def _read_sparse(theirs: Theirs) -> Mapping[str, Any]:
    """Layer i has experts where the step divides i + 1 and no list says otherwise."""
    step, dense = theirs.take('decoder_sparse_step', 1), theirs.take('mlp_only_layers', [])
    layers = range(theirs['num_hidden_layers'])
    if step < 1:
        raise ConfigError(f'decoder_sparse_step is {step}; it must be at least 1')
    sparse = [i for i in layers if (i + 1) % step == 0 and i not in dense]
    for first in range(0, len(layers) + 1, step):
        if sparse == [i for i in layers if i >= first and (i + 1) % step == 0]:
            return {'first_dense': first, 'every': step}
    raise ConfigError(f'mlp_only_layers = {dense} are not the first ones, which is not implemented')


def _write_sparse(moe: MoE) -> Mapping[str, Any]:
    if moe.first_dense % moe.every:
        raise ConfigError(f'moe.first_dense = {moe.first_dense} is no multiple of every = {moe.every}')
    return {'decoder_sparse_step': moe.every, 'mlp_only_layers': list(range(moe.first_dense))}


def _read_shared(theirs: Theirs) -> Mapping[str, Any]:
    one, shared = theirs.take('moe_intermediate_size', 1408), theirs.take('shared_expert_intermediate_size', 5632)
    if shared % one or not shared:
        raise ConfigError(
            f'shared_expert_intermediate_size = {shared} is no multiple of moe_intermediate_size = {one}, which is not '
            'implemented'
        )
    return {'expert_width': one, 'shared': shared // one, 'shared_gate': True}


def _write_shared(moe: MoE) -> Mapping[str, Any]:
    return {
        'moe_intermediate_size': moe.expert_width,
        'shared_expert_intermediate_size': moe.shared * moe.expert_width,
    }


def _every_second(theirs: Theirs) -> list[bool]:
    """Of the first `max_window_layers`."""
    first = theirs.take('max_window_layers', 28)
    return [i % 2 == 0 and i < first for i in range(theirs['num_hidden_layers'])]


QWEN2_MOE = Family(
    architecture='Qwen2MoeForCausalLM',
    model_type='qwen2_moe',
    items=(
        *shape(kv_heads=16),
        Rope(),
        _SILU,
        Window(default=4096, switch='use_sliding_window', pattern=_every_second),
        Unused(('max_window_layers',)),  # where there is no window, or layers are listed
        Biases({'qkv_bias': (('qkv',), True)}),
        Node(
            'moe',
            MoE,
            (
                Same('num_experts', 'experts', 60),
                Same('num_experts_per_tok', 'chosen', 4),
                Rule(_read_shared, _write_shared),
                Rule(_read_sparse, _write_sparse),
                _SOFTMAX,
            ),
        ),
    ),
    rows=[
        *_ENDS,
        *_NORMS,
        *attention(_ATTENTION),
        *mlp(f'{_LAYER}.mlp'),
        *experts(f'{_LAYER}.mlp'),
        Row(f'{_LAYER}.mlp.shared_expert.gate_proj.weight', {'moe.shared.gate.kernel': 'FD'}),
        Row(f'{_LAYER}.mlp.shared_expert.up_proj.weight', {'moe.shared.up.kernel': 'FD'}),
        Row(f'{_LAYER}.mlp.shared_expert.down_proj.weight', {'moe.shared.down.kernel': 'DF'}),
        Row(f'{_LAYER}.mlp.shared_expert_gate.weight', {'moe.shared_gate.kernel': 'YD'}),
    ],
)

QWEN3_MOE = Family(
    architecture='Qwen3MoeForCausalLM',
    model_type='qwen3_moe',
    items=(
        *shape(kv_heads=4),
        Rope(),
        _SILU,
        Window(default=4096, switch='use_sliding_window'),
        Unused(('max_window_layers',)),
        Biases({'attention_bias': (('qkv', 'out'), False)}),
        Fixed({'qk_norm': 'head'}),
        Node(
            'moe',
            MoE,
            (
                # Its name from version 5 on, and before.
                Same('num_experts', 'experts', lambda theirs: theirs.take('num_local_experts', 128)),
                Same('num_experts_per_tok', 'chosen', 8),
                Same('moe_intermediate_size', 'expert_width', 768),
                Rule(_read_sparse, _write_sparse),
                _SOFTMAX,
            ),
        ),
    ),
    rows=[
        *_ENDS,
        *_NORMS,
        *attention(_ATTENTION),
        *head_norms(_ATTENTION),
        *mlp(f'{_LAYER}.mlp'),
        *experts(f'{_LAYER}.mlp'),
    ],
)

# ------------------------------------------------------------------------------------------------- DBRX


def _read_dbrx_rope(theirs: Theirs) -> Mapping[str, Any]:
    """The base is attention's own, or beside all else from version 5 of transformers on, which computes with that."""
    old = theirs.inside('attn_config').get('rope_theta')
    said = {'rope_type': 'default', 'rope_theta': old or 10_000.0} | theirs.inside('rope_parameters')
    if said['rope_type'] != 'default':
        raise ConfigError(f'rope_type = {said["rope_type"]!r} is not implemented for this architecture')
    if old and old != said['rope_theta']:
        raise ConfigError(
            f'attn_config.rope_theta = {old} and rope_parameters.rope_theta = {said["rope_theta"]} disagree; leave the '
            'one that the model was trained with in both'
        )
    return {'position': 'rope', 'rope_theta': float(said['rope_theta'])}


def _write_dbrx_rope(ours: Any) -> Mapping[str, Any]:
    return {'rope_parameters': {'rope_type': 'default', 'rope_theta': ours.rope_theta}}


def _read_order(theirs: Theirs) -> Mapping[str, Any]:
    """The order of the norm that weights are divided by; null divides by nothing."""
    theirs.seen.add('moe_normalize_expert_weights')
    order = theirs.get('moe_normalize_expert_weights', 1.0)
    if order not in (1.0, None):
        raise ConfigError(f'moe_normalize_expert_weights = {order} is not implemented; known are 1, null')
    return {'normalise': order is not None}


def _write_order(router: Router) -> Mapping[str, Any]:
    return {'moe_normalize_expert_weights': 1.0 if router.normalise else None}


_DBRX_EXPERTS = Node(
    'moe',
    MoE,
    (
        Same('moe_num_experts', 'experts', 4),
        Same('moe_top_k', 'chosen', 1),
        Same('ffn_hidden_size', 'expert_width', 3584),
        Node('router', Router, (Fixed({'choice': 'softmax_then_topk'}), Rule(_read_order, _write_order))),
    ),
)
_BLOCK = 'transformer.blocks.{i}'
_NORM_ATTENTION_NORM = f'{_BLOCK}.norm_attn_norm'

DBRX = Family(
    architecture='DbrxForCausalLM',
    model_type='dbrx',
    items=(
        Same('vocab_size', 'vocab_size'),
        Same('d_model', 'width'),
        Same('n_layers', 'layers'),
        Same('n_heads', 'heads'),
        Rule(lambda theirs: {'head_dim': theirs['d_model'] // theirs['n_heads']}, lambda ours: {}),
        Same('max_seq_len', 'max_length', 2048),
        Must('tie_word_embeddings', (False,)),
        Unused(('num_key_value_heads',)),  # again, what attn_config says
        Fixed({'norm': 'layer_no_bias', 'norm_eps': 1e-5}),
        Inside(
            'attn_config',
            (
                OrNull('clip_qkv', 'qkv_clip'),
                Same('kv_n_heads', 'kv_heads', 1),
                Same('rope_theta', 'rope_theta', 10_000.0),
            ),
        ),
        Rule(_read_dbrx_rope, _write_dbrx_rope),
        Inside(
            'ffn_config',
            (
                Same('ffn_hidden_size', 'mlp_width', 3584),
                Must('ffn_act_fn', ({'name': 'silu'},)),
                Unused(('hidden_size', 'moe_jitter_eps', 'moe_loss_weight')),
                _DBRX_EXPERTS,
            ),
        ),
    ),
    rows=[
        *ends('transformer.wte', 'transformer.norm_f'),
        *norm(f'{_NORM_ATTENTION_NORM}.norm_1', 'attention_norm'),
        *joined_attention(f'{_NORM_ATTENTION_NORM}.attn', 'Wqkv', 'out_proj'),
        *norm(f'{_NORM_ATTENTION_NORM}.norm_2', 'mlp_norm'),
        Row(f'{_BLOCK}.ffn.router.layer.weight', {'moe.router.map.kernel': 'ED'}),
        # One matrix each for all experts; w1 is the gate, and w2 lies as it is multiplied, not transposed.
        Row(f'{_BLOCK}.ffn.experts.mlp.w1', {'moe.experts.gate.kernel': '(EF)D'}),
        Row(f'{_BLOCK}.ffn.experts.mlp.v1', {'moe.experts.up.kernel': '(EF)D'}),
        Row(f'{_BLOCK}.ffn.experts.mlp.w2', {'moe.experts.down.kernel': '(EF)D'}),
    ],
)

EXPERTS = {family.architecture: family for family in (MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE, *DEEPSEEK, DBRX)}

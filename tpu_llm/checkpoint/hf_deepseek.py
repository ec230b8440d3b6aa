"""DeepSeek-V2 and V3, and what descends from them: latent attention, shared experts, a bias that balances them.

V3 and GLM-4.5 have layers of multi-token prediction behind their last, numbered on. transformers drops them when it
saves a model, and leaves their count in the config: without their tensors there are none, whatever it says.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tpu_llm.checkpoint.family import (
    GATED,
    Biases,
    Family,
    activation,
    attention,
    ends,
    experts,
    head_norms,
    mlp,
    norm,
    shape,
)
from tpu_llm.checkpoint.fields import Aliases, Choice, Fixed, Item, Must, Node, Rule, Same, Theirs, Unused
from tpu_llm.checkpoint.renaming import Row
from tpu_llm.checkpoint.rope_fields import LatentRope, Rope
from tpu_llm.config import ConfigError
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.nn.mla import MLA
from tpu_llm.nn.moe import MoE
from tpu_llm.nn.router import Router

_LAYER = 'model.layers.{i}'
_ATTENTION = f'{_LAYER}.self_attn'
_BLOCK = [
    *norm(f'{_LAYER}.input_layernorm', 'attention_norm'),
    *norm(f'{_LAYER}.post_attention_layernorm', 'mlp_norm'),
    *mlp(f'{_LAYER}.mlp'),
    *experts(f'{_LAYER}.mlp'),
    Row(f'{_LAYER}.mlp.gate.e_score_correction_bias', {'moe.router.bias': 'E'}),
    Row(f'{_LAYER}.mlp.shared_experts.gate_proj.weight', {'moe.shared.gate.kernel': 'FD'}),
    Row(f'{_LAYER}.mlp.shared_experts.up_proj.weight', {'moe.shared.up.kernel': 'FD'}),
    Row(f'{_LAYER}.mlp.shared_experts.down_proj.weight', {'moe.shared.down.kernel': 'DF'}),
]
_ENDS = ends('model.embed_tokens', 'model.norm')
_SILU = activation(GATED, 'silu')


def _read_query_rank(theirs: Theirs) -> Mapping[str, Any]:
    theirs.seen.add('q_lora_rank')
    return {'query_rank': theirs.get('q_lora_rank', 1536) or 0}


_LATENT: tuple[Item, ...] = (
    *shape(eps=''),
    Same('rms_norm_eps', 'norm_eps', 1e-6),
    Same('qk_nope_head_dim', 'head_dim', 128),
    Node(
        'mla',
        MLA,
        (
            Same('kv_lora_rank', 'kv_rank', 512),
            Rule(_read_query_rank, lambda mla: {'q_lora_rank': mla.query_rank or None}),
            Same('qk_rope_head_dim', 'rope_dim', 64),
            Same('v_head_dim', 'value_dim', 128),
            # The norms of latents have 1e-6 whatever the others have.
            Rule(
                lambda theirs: {'norm_eps': 0.0 if theirs.take('rms_norm_eps', 1e-6) == 1e-6 else 1e-6}, lambda mla: {}
            ),
        ),
    ),
    Unused(('qk_head_dim',)),
    LatentRope(),
    _SILU,
    Must('attention_bias', (False,)),
)
_LATENT_ROWS = [
    Row(f'{_ATTENTION}.q_proj.weight', {'attention.query.kernel': '(N+H)D', 'attention.query_rope.kernel': '(N+j)D'}),
    Row(f'{_ATTENTION}.q_a_proj.weight', {'attention.query_down.kernel': 'QD'}),
    Row(f'{_ATTENTION}.q_a_layernorm.weight', {'attention.query_norm.scale': 'Q'}),
    Row(f'{_ATTENTION}.q_b_proj.weight', {'attention.query.kernel': '(N+H)Q', 'attention.query_rope.kernel': '(N+j)Q'}),
    Row(
        f'{_ATTENTION}.kv_a_proj_with_mqa.weight',
        {'attention.latent.kernel': '(+Z)D', 'attention.key_rope.kernel': '(+j)D'},
    ),
    Row(f'{_ATTENTION}.kv_a_layernorm.weight', {'attention.latent_norm.scale': 'Z'}),
    Row(f'{_ATTENTION}.kv_b_proj.weight', {'attention.key.kernel': '(N+H)Z', 'attention.value.kernel': '(N+U)Z'}),
    Row(f'{_ATTENTION}.o_proj.weight', {'attention.out.kernel': 'D(NU)'}),
]


def _read_groups(theirs: Theirs) -> Mapping[str, Any]:
    method = theirs.take('topk_method', 'greedy')
    groups, chosen = theirs.take('n_group', 1), theirs.take('topk_group', 1)
    if method == 'greedy':
        return {}
    if method != 'group_limited_greedy':
        raise ConfigError(f"topk_method = {method!r} is not implemented; known are 'greedy', 'group_limited_greedy'")
    return {'groups': groups, 'chosen_groups': chosen}


def _write_groups(router: Router) -> Mapping[str, Any]:
    method = 'greedy' if router.groups == 1 else 'group_limited_greedy'
    return {'topk_method': method, 'n_group': router.groups, 'topk_group': router.chosen_groups}


DEEPSEEK_V2 = Family(
    architecture='DeepseekV2ForCausalLM',
    model_type='deepseek_v2',
    items=(
        *_LATENT,
        Must('mlp_bias', (False,)),
        Must('moe_layer_freq', (1,)),
        Must('scoring_func', ('softmax',)),
        Must('norm_topk_prob', (False,)),
        Node(
            'moe',
            MoE,
            (
                Same('n_routed_experts', 'experts', 64),
                Same('num_experts_per_tok', 'chosen'),
                Same('moe_intermediate_size', 'expert_width', 1407),
                Same('n_shared_experts', 'shared', 2),
                Same('first_k_dense_replace', 'first_dense', 0),
                Node(
                    'router',
                    Router,
                    (
                        Fixed({'choice': 'softmax_then_topk'}),
                        Same('routed_scaling_factor', 'scale', 1.0),
                        Rule(_read_groups, _write_groups),
                    ),
                ),
            ),
        ),
    ),
    rows=[*_ENDS, *_BLOCK, *_LATENT_ROWS],
)


def _sigmoid_experts(*, count: int, width: int, dense: int, scale: float, groups: int, chosen_groups: int) -> Node:
    """The numbers are the defaults of the class. The biases that balance V3 moved by 0.001 a step (its section 4.2)."""
    return Node(
        'moe',
        MoE,
        (
            Same('n_routed_experts', 'experts', count),
            Same('num_experts_per_tok', 'chosen', 8),
            Same('moe_intermediate_size', 'expert_width', width),
            Same('n_shared_experts', 'shared', 1),
            Same('first_k_dense_replace', 'first_dense', dense),
            Node(
                'router',
                Router,
                (
                    Fixed({'choice': 'sigmoid', 'bias_rate': 0.001}),
                    Same('routed_scaling_factor', 'scale', scale),
                    Same('n_group', 'groups', groups),
                    Same('topk_group', 'chosen_groups', chosen_groups),
                ),
            ),
        ),
    )


_AHEAD = (
    Aliases({'num_mtp_layers': 'num_nextn_predict_layers'}),
    Same('num_nextn_predict_layers', 'predict_ahead', 1),
)


def _rows_ahead(config: DecoderConfig, layer: Sequence[Row]) -> list[Row]:
    """Of the layers that predict further tokens, `layer` being the rows of any layer; the embedding goes first into
    what joins the two.
    """
    rows: list[Row] = []
    for k in range(config.predict_ahead):
        theirs, ours = _LAYER.format(i=config.layers + k), f'ahead.{k}'
        rows += [
            Row(f'{theirs}.enorm.weight', {f'{ours}.token_norm.scale': 'D'}),
            Row(f'{theirs}.hnorm.weight', {f'{ours}.hidden_norm.scale': 'D'}),
            Row(
                f'{theirs}.eh_proj.weight', {f'{ours}.token_map.kernel': 'Y(+D)', f'{ours}.hidden_map.kernel': 'Y(+D)'}
            ),
            *(
                Row(
                    row.theirs.replace(_LAYER, theirs), {f'{ours}.layers.0.{name}': at for name, at in row.ours.items()}
                )
                for row in layer
            ),
            Row(f'{theirs}.shared_head.norm.weight', {f'{ours}.norm.scale': 'D'}),
            Row(f'{theirs}.embed_tokens.weight', {'embed.table': 'VD'}, again=True),
            Row(f'{theirs}.shared_head.head.weight', {'head.kernel': 'VD'}, again=True),
        ]
    return rows


def _layers_ahead(names: Collection[str]) -> list[str]:
    """The numbers of layers that predict further tokens: they alone join two streams."""
    found = (re.fullmatch(r'model\.layers\.(\d+)\.eh_proj\.weight', name) for name in names)
    return [each[1] for each in found if each]


def _with_what_is_there(config: DecoderConfig, names: Collection[str]) -> DecoderConfig:
    return config if _layers_ahead(names) else dataclasses.replace(config, predict_ahead=0)


def _not_wanted(names: Collection[str], wanted: Collection[str]) -> str:
    """Layers that predict further tokens than the model shall."""
    layers = '|'.join(sorted(set(_layers_ahead(names)) - set(_layers_ahead(wanted))))
    return rf'model\.layers\.({layers})\..*' if layers else ''


def _v3_rows(config: DecoderConfig) -> list[Row]:
    layer = [*_BLOCK, *_LATENT_ROWS]
    return [*_ENDS, *layer, *_rows_ahead(config, layer)]


def _glm4_moe_rows(config: DecoderConfig) -> list[Row]:
    layer = [*_BLOCK, *attention(_ATTENTION), *head_norms(_ATTENTION)]
    return [*_ENDS, *layer, *_rows_ahead(config, layer)]


DEEPSEEK_V3 = Family(
    architecture='DeepseekV3ForCausalLM',
    model_type='deepseek_v3',
    items=(
        *_LATENT,
        *_AHEAD,
        Must('rope_interleave', (True,)),
        Must('moe_layer_freq', (1,)),
        Must('scoring_func', ('sigmoid',)),
        Must('topk_method', ('noaux_tc',)),
        Must('norm_topk_prob', (True,)),
        _sigmoid_experts(count=256, width=2048, dense=3, scale=2.5, groups=8, chosen_groups=4),
    ),
    rows=_v3_rows,
    settle=_with_what_is_there,
    ignored=_not_wanted,
)

GLM4_MOE = Family(
    architecture='Glm4MoeForCausalLM',
    model_type='glm4_moe',
    items=(
        *shape(default_eps=1e-5, kv_heads=8),
        Rope(partial=0.5),
        _SILU,
        Biases({'attention_bias': (('qkv',), False)}),
        Choice('use_qk_norm', 'qk_norm', {True: 'head', False: 'none'}, False),
        *_AHEAD,
        Must('norm_topk_prob', (True,)),
        _sigmoid_experts(count=128, width=1408, dense=1, scale=1.0, groups=1, chosen_groups=1),
    ),
    rows=_glm4_moe_rows,
    settle=_with_what_is_there,
    ignored=_not_wanted,
)

DEEPSEEK = (DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE)

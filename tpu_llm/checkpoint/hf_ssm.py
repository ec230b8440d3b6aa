"""Decoders of transformers whose layers, or most of them, are state spaces: Mamba, Mamba-2, Jamba."""

import math
from collections.abc import Mapping
from typing import Any

from tpu_llm.checkpoint.family import GATED, Family, activation, attention, ends, experts, linear, mlp, norm, shape
from tpu_llm.checkpoint.fields import Fixed, Must, Node, Rule, Same, Theirs, Unused
from tpu_llm.checkpoint.renaming import Row
from tpu_llm.config import ConfigError
from tpu_llm.nn.mamba import Mamba
from tpu_llm.nn.mamba2 import Mamba2
from tpu_llm.nn.moe import MoE
from tpu_llm.nn.router import Router

# Nothing but the weights that training begins with depends on these, or only how the same numbers come about.
_UNUSED = Unused(
    (
        *('residual_in_fp32', 'rescale_prenorm_residual', 'time_step_min', 'time_step_max', 'time_step_floor'),
        *('time_step_scale', 'time_step_init_scheme', 'use_mambapy', 'use_associative_scan', 'use_mamba_kernels'),
    )
)
# No layer attends, and none has an MLP.
_BARE = Fixed({'heads': 0, 'kv_heads': 0, 'head_dim': 0, 'mlp_width': 0, 'position': 'none', 'mixers': ('ssm',)})
_ENDS = ends('backbone.embeddings', 'backbone.norm_f')
_LAYER = 'backbone.layers.{i}'
_MIXER = f'{_LAYER}.mixer'


def _bare(vocab_size: int, width: int, layers: int, *, tied: bool) -> tuple[Any, ...]:
    """Items with the defaults of keys that the config lacks."""
    return (
        Same('vocab_size', 'vocab_size', vocab_size),
        Same('hidden_size', 'width', width),
        Same('num_hidden_layers', 'layers', layers),
        Same('layer_norm_epsilon', 'norm_eps', 1e-5),
        Same('tie_word_embeddings', 'tied_embeddings', tied),
        Must('hidden_act', ('silu',)),
        Must('use_bias', (False,)),
        Must('use_conv_bias', (True,)),
        _BARE,
        _UNUSED,
    )


# ------------------------------------------------------------------------------------------------- Mamba


def _rank(key: str) -> Rule:
    """Where the steps' rank is 'auto', as where it is 0 here, it is a 16th of the width."""

    def read(theirs: Theirs) -> Mapping[str, Any]:
        rank, auto = theirs.take(key, 'auto'), math.ceil(theirs.take('hidden_size', 768) / 16)
        return {'rank': 0 if rank in ('auto', auto) else rank}

    return Rule(read, lambda ours: {key: ours.rank or 'auto'})


def _read_inner(theirs: Theirs) -> Mapping[str, Any]:
    """It is written beside `expand`, which alone counts."""
    inner, expand, width = theirs.take('intermediate_size', 0), theirs.take('expand', 2), theirs.take('hidden_size')
    if inner and inner != expand * width:
        raise ConfigError(f'intermediate_size = {inner} is not expand x hidden_size = {expand * width}')
    return {}


_INNER = Rule(_read_inner, lambda ours: {'intermediate_size': ours.ssm.expand * ours.width})


def _channels(at: str) -> list[Row]:
    """The tensors of a Mamba layer."""
    return [
        Row(f'{at}.in_proj.weight', {'ssm.input.kernel': '(+P)D', 'ssm.gate.kernel': '(+P)D'}),
        *linear(f'{at}.conv1d', 'ssm.conv', 'P1W', 'P'),
        Row(
            f'{at}.x_proj.weight',
            {'ssm.step_down.kernel': '(+R)P', 'ssm.write.kernel': '(+M)P', 'ssm.read.kernel': '(+M)P'},
        ),
        Row(f'{at}.dt_proj.weight', {'ssm.step.kernel': 'PR'}),
        Row(f'{at}.dt_proj.bias', {'ssm.step_bias': 'P'}),
        Row(f'{at}.A_log', {'ssm.log_decay': 'PM'}),
        Row(f'{at}.D', {'ssm.skip': 'P'}),
        Row(f'{at}.out_proj.weight', {'ssm.out.kernel': 'DP'}),
    ]


MAMBA = Family(
    architecture='MambaForCausalLM',
    model_type='mamba',
    mixers=frozenset({'ssm'}),
    items=(
        *_bare(50_280, 768, 32, tied=True),
        _INNER,
        Must('rms_norm', (True,)),
        # Again, by the names that the authors gave, or how what is said elsewhere is computed.
        Unused(('d_model', 'd_inner', 'n_layer', 'ssm_cfg', 'fused_add_norm', 'pad_vocab_size_multiple')),
        Node(
            'ssm',
            Mamba,
            (
                Same('state_size', 'state', 16),
                Same('conv_kernel', 'conv', 4),
                Same('expand', 'expand', 2),
                _rank('time_step_rank'),
            ),
        ),
    ),
    rows=[*_ENDS, *norm(f'{_LAYER}.norm', 'attention_norm'), *_channels(_MIXER)],
    older={'backbone.embedding.weight': 'backbone.embeddings.weight'},
    prefix='backbone.',
)

# ------------------------------------------------------------------------------------------------- Mamba-2


def _read_heads(theirs: Theirs) -> Mapping[str, Any]:
    heads, head_dim = theirs.take('num_heads', 128), theirs.take('head_dim', 64)
    inner = theirs.take('expand', 2) * theirs.take('hidden_size', 4096)
    if heads * head_dim != inner:
        raise ConfigError(f'num_heads x head_dim = {heads} x {head_dim} is not expand x hidden_size = {inner}')
    return {}


_HEADS = Rule(_read_heads, lambda ours: {'num_heads': ours.ssm.expand * ours.width // ours.ssm.head_dim})


def _read_limit(theirs: Theirs) -> Mapping[str, Any]:
    limit = list(theirs.take('time_step_limit', [0.0, math.inf]))
    # The file says Infinity, which is no JSON, or as some write it, an object with its name.
    if limit[0] != 0.0 or str(limit[1]) not in ('inf', "{'__float__': 'Infinity'}", 'Infinity'):
        raise ConfigError(f'time_step_limit = {limit} is not implemented; known is [0, Infinity]')
    return {}


MAMBA2 = Family(
    architecture='Mamba2ForCausalLM',
    model_type='mamba2',
    mixers=frozenset({'ssm'}),
    items=(
        *_bare(32_768, 4096, 64, tied=False),
        _HEADS,
        Rule(_read_limit, lambda ours: {}),
        Must('rms_norm', (True,)),
        Unused(('norm_before_gate', 'intermediate_size', 'time_step_rank')),  # which transformers does not read
        Node(
            'ssm',
            Mamba2,
            (
                Same('state_size', 'state', 128),
                Same('conv_kernel', 'conv', 4),
                Same('expand', 'expand', 2),
                Same('head_dim', 'head_dim', 64),
                Same('n_groups', 'groups', 8),
                Same('chunk_size', 'chunk', 256),
            ),
        ),
    ),
    rows=[
        *_ENDS,
        *norm(f'{_LAYER}.norm', 'attention_norm'),
        Row(
            f'{_MIXER}.in_proj.weight',
            {
                'ssm.gate.kernel': '(+PH)D',
                'ssm.input.kernel': '(+PH)D',
                'ssm.write.kernel': '(+OM)D',
                'ssm.read.kernel': '(+OM)D',
                'ssm.step.kernel': '(+P)D',
            },
        ),
        Row(
            f'{_MIXER}.conv1d.weight',
            {
                'ssm.input_conv.kernel': '(+PH)1W',
                'ssm.write_conv.kernel': '(+OM)1W',
                'ssm.read_conv.kernel': '(+OM)1W',
            },
        ),
        Row(
            f'{_MIXER}.conv1d.bias',
            {'ssm.input_conv.bias': '(+PH)', 'ssm.write_conv.bias': '(+OM)', 'ssm.read_conv.bias': '(+OM)'},
        ),
        Row(f'{_MIXER}.dt_bias', {'ssm.step_bias': 'P'}),
        Row(f'{_MIXER}.A_log', {'ssm.log_decay': 'P'}),
        Row(f'{_MIXER}.D', {'ssm.skip': 'P'}),
        Row(f'{_MIXER}.norm.weight', {'ssm.scale': '(PH)'}),
        Row(f'{_MIXER}.out_proj.weight', {'ssm.out.kernel': 'D(PH)'}),
    ],
    older={'backbone.embedding.weight': 'backbone.embeddings.weight'},
    prefix='backbone.',
)

# ------------------------------------------------------------------------------------------------- Jamba


def _read_mixers(theirs: Theirs) -> Mapping[str, Any]:
    every, at = theirs.take('attn_layer_period', 8), theirs.take('attn_layer_offset', 4)
    if not 0 <= at < every:
        raise ConfigError(f'attn_layer_offset = {at} is not below attn_layer_period = {every}')
    return {'mixers': tuple('attention' if i == at else 'ssm' for i in range(every)), 'position': 'none'}


def _write_mixers(ours: Any) -> Mapping[str, Any]:
    if ours.mixers.count('attention') != 1:
        raise ConfigError(f'mixers = {ours.mixers} do not attend once')
    return {'attn_layer_period': len(ours.mixers), 'attn_layer_offset': ours.mixers.index('attention')}


_ROUTER = Node('router', Router, (Fixed({'choice': 'softmax_then_topk'}),))
_EXPERTS = Node(
    'moe',
    MoE,
    (
        Same('num_experts', 'experts', 16),
        Same('num_experts_per_tok', 'chosen', 2),
        Same('intermediate_size', 'expert_width'),
        Same('expert_layer_period', 'every', 2),
        _ROUTER,
    ),
)


def _read_experts(theirs: Theirs) -> Mapping[str, Any]:
    if 'num_local_experts' in theirs:
        theirs.setdefault('num_experts', theirs.pop('num_local_experts'))
    every, at = theirs.take('expert_layer_period', 2), theirs.take('expert_layer_offset', 1)
    if theirs.take('num_experts', 16) == 1:
        theirs.seen.add('num_experts_per_tok')
        return {'moe': None}
    if at != every - 1:
        raise ConfigError(f'expert_layer_offset = {at} is not the last of expert_layer_period = {every}')
    return _EXPERTS.read(theirs)


def _write_experts(ours: Any) -> Mapping[str, Any]:
    if ours.moe is None:
        return {'num_experts': 1}
    return {**_EXPERTS.write(ours), 'expert_layer_offset': ours.moe.every - 1}


_BLOCK = 'model.layers.{i}'
_STATE = f'{_BLOCK}.mamba'

JAMBA = Family(
    architecture='JambaForCausalLM',
    model_type='jamba',
    mixers=frozenset({'attention', 'ssm'}),
    items=(
        *shape(kv_heads=8),
        activation(GATED, 'silu'),
        Rule(_read_mixers, _write_mixers),
        Rule(_read_experts, _write_experts),
        Must('mamba_conv_bias', (True,)),
        Must('mamba_proj_bias', (False,)),
        Must('mamba_inner_layernorms', (True,)),
        Must('sliding_window', (None,)),
        Unused(('num_logits_to_keep', 'calc_logits_for_entire_prompt', 'attn_layer_type')),
        _UNUSED,
        Node(
            'ssm',
            Mamba,
            (
                Same('mamba_d_state', 'state', 16),
                Same('mamba_d_conv', 'conv', 4),
                Same('mamba_expand', 'expand', 2),
                _rank('mamba_dt_rank'),
                Fixed({'norms': True}),
            ),
        ),
    ),
    rows=[
        *ends('model.embed_tokens', 'model.final_layernorm'),
        *norm(f'{_BLOCK}.input_layernorm', 'attention_norm'),
        *norm(f'{_BLOCK}.pre_ff_layernorm', 'mlp_norm'),
        *attention(f'{_BLOCK}.self_attn'),
        *_channels(_STATE),
        Row(f'{_STATE}.dt_layernorm.weight', {'ssm.step_norm.scale': 'R'}),
        Row(f'{_STATE}.b_layernorm.weight', {'ssm.write_norm.scale': 'M'}),
        Row(f'{_STATE}.c_layernorm.weight', {'ssm.read_norm.scale': 'M'}),
        *mlp(f'{_BLOCK}.feed_forward'),
        *experts(f'{_BLOCK}.feed_forward', router='router'),
    ],
)

SSM = {family.architecture: family for family in (MAMBA, MAMBA2, JAMBA)}

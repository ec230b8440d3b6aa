"""Decoders of Cohere: one layer norm before attention and MLP, side by side; in the second line only windows turn."""

from collections.abc import Mapping
from typing import Any

from tpu_llm.checkpoint.family import GATED, Biases, Family, Window, activation, attention, ends, mlp, norm, shape
from tpu_llm.checkpoint.fields import Choice, Fixed, Must, Rule, Same, Theirs, Unused
from tpu_llm.checkpoint.renaming import Row
from tpu_llm.checkpoint.rope_fields import Rope
from tpu_llm.config import ConfigError

_LAYER = 'model.layers.{i}'
_ATTENTION = f'{_LAYER}.self_attn'
_ENDS = ends('model.embed_tokens', 'model.norm')
_INV_FREQ = r'.*\.rotary_emb\.inv_freq'
_SILU = activation(GATED, 'silu')
_LAYER_NORM = {'eps': 'layer_norm_eps', 'default_eps': 1e-5}
_ATTENTION_BIAS = Biases({'attention_bias': (('qkv', 'out'), False)})

COMMAND_R = Family(
    architecture='CohereForCausalLM',
    model_type='cohere',
    items=(
        *shape(tied=True, **_LAYER_NORM),
        Rope(theta=500_000.0),
        _SILU,
        Fixed({'norm': 'layer_no_bias', 'residual': 'parallel'}),
        _ATTENTION_BIAS,
        Same('logit_scale', 'logit_scale', 0.0625),
        Choice('use_qk_norm', 'qk_norm', {False: 'none', True: 'each_head'}, False),
        Unused(('model_max_length',)),
    ),
    rows=[
        *_ENDS,
        *norm(f'{_LAYER}.input_layernorm', 'attention_norm'),
        *attention(_ATTENTION, rotary='h'),
        Row(f'{_ATTENTION}.q_norm.weight', {'attention.query_norm.scale': 'Nh'}),
        Row(f'{_ATTENTION}.k_norm.weight', {'attention.key_norm.scale': 'Kh'}),
        *mlp(f'{_LAYER}.mlp'),
    ],
    ignored=_INV_FREQ,
)


def _local_turns(theirs: Theirs) -> Mapping[str, Any]:
    """Only layers with a window turn."""
    windows = _WINDOW.read(theirs)['windows']
    if not any(windows):
        raise ConfigError('no layer has a window, so none knows positions, which is not implemented')
    return {'windows': windows, 'rope_layers': tuple(map(bool, windows))}


def _all_but_one(theirs: Theirs) -> list[bool]:
    of = theirs.take('sliding_window_pattern', 4)
    return [(i + 1) % of != 0 for i in range(theirs['num_hidden_layers'])]


_WINDOW = Window(default=4096, pattern=_all_but_one)

COMMAND_A = Family(
    architecture='Cohere2ForCausalLM',
    model_type='cohere2',
    items=(
        *shape(tied=True, **_LAYER_NORM),
        Rope(),
        _SILU,
        Fixed({'norm': 'layer_no_bias', 'residual': 'parallel'}),
        _ATTENTION_BIAS,
        Same('logit_scale', 'logit_scale', 0.0625),
        Rule(_local_turns, _WINDOW.write),
        Unused(('sliding_window_pattern',)),  # where layers are listed
        # The class reads none of what published files have beside its own keys.
        Unused(('cache_implementation', 'layer_switch', 'model_max_length', 'order_of_interleaved_layers')),
        Unused(('position_embedding_type', 'rotary_pct', 'use_embedding_sharing', 'use_gated_activation')),
        Unused(('use_parallel_block', 'use_parallel_embedding')),
        Must('use_qk_norm', (False,)),
    ),
    rows=[
        *_ENDS,
        *norm(f'{_LAYER}.input_layernorm', 'attention_norm'),
        *attention(_ATTENTION, rotary='h'),
        *mlp(f'{_LAYER}.mlp'),
    ],
    ignored=_INV_FREQ,
)

COHERE = (COMMAND_R, COMMAND_A)

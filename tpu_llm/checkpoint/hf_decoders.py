"""Dense decoders of transformers that descend from Llama: rotary positions, mostly gated MLPs and RMS norms."""

from collections.abc import Mapping
from typing import Any

from tpu_llm.checkpoint.family import (
    GATED,
    PLAIN,
    Biases,
    Family,
    Window,
    activation,
    attention,
    ends,
    joined_attention,
    linear,
    mlp,
    norm,
    period,
    shape,
)
from tpu_llm.checkpoint.fields import Choice, Fixed, Must, OrNull, Rule, Theirs, Unused
from tpu_llm.checkpoint.hf_cohere import COHERE
from tpu_llm.checkpoint.renaming import Row
from tpu_llm.checkpoint.rope_fields import Rope
from tpu_llm.config import ConfigError

_LAYER = 'model.layers.{i}'
_ATTENTION = f'{_LAYER}.self_attn'
_LLAMA_BLOCK = [
    *norm(f'{_LAYER}.input_layernorm', 'attention_norm'),
    *attention(_ATTENTION),
    *norm(f'{_LAYER}.post_attention_layernorm', 'mlp_norm'),
    *mlp(f'{_LAYER}.mlp'),
]
_ENDS = ends('model.embed_tokens', 'model.norm')
_LLAMA_ROWS = [*_ENDS, *_LLAMA_BLOCK]
_QK_NORM = [
    Row(f'{_ATTENTION}.q_norm.weight', {'attention.query_norm.scale': 'H'}),
    Row(f'{_ATTENTION}.k_norm.weight', {'attention.key_norm.scale': 'H'}),
]
_INV_FREQ = r'.*\.rotary_emb\.inv_freq'
_SILU = activation(GATED, 'silu')

LLAMA = Family(
    architecture='LlamaForCausalLM',
    model_type='llama',
    items=(
        *shape(),
        Rope(),
        _SILU,
        Biases({'attention_bias': (('qkv', 'out'), False), 'mlp_bias': (('mlp',), False)}),
    ),
    rows=_LLAMA_ROWS,
    ignored=_INV_FREQ,
)

MISTRAL = Family(
    architecture='MistralForCausalLM',
    model_type='mistral',
    items=(*shape(kv_heads=8), Rope(), _SILU, Window(default=4096)),
    rows=_LLAMA_ROWS,
    ignored=_INV_FREQ,
)


def _last_slide(theirs: Theirs) -> list[bool]:
    """Qwen's layers from `max_window_layers` on."""
    first = theirs.take('max_window_layers', 28)
    return [i >= first for i in range(theirs['num_hidden_layers'])]


_QWEN_WINDOW = (
    Window(default=4096, switch='use_sliding_window', pattern=_last_slide),
    Unused(('max_window_layers',)),  # where there is no window, or layers are listed
)

QWEN2 = Family(
    architecture='Qwen2ForCausalLM',
    model_type='qwen2',
    items=(
        *shape(kv_heads=32),
        Rope(),
        _SILU,
        Fixed({'bias': ('qkv',)}),
        *_QWEN_WINDOW,
        Unused(('use_mrope',)),  # of the vision models that share this class of configs; always false here
    ),
    rows=_LLAMA_ROWS,
    ignored=_INV_FREQ,
)

QWEN3 = Family(
    architecture='Qwen3ForCausalLM',
    model_type='qwen3',
    items=(
        *shape(kv_heads=32, head_dim=128),
        Rope(),
        _SILU,
        Fixed({'qk_norm': 'head'}),
        Biases({'attention_bias': (('qkv', 'out'), False)}),
        *_QWEN_WINDOW,
    ),
    rows=[*_LLAMA_ROWS, *_QK_NORM],
    ignored=_INV_FREQ,
)

# ------------------------------------------------------------------------------------------------- Gemma

_EMBED_SCALE = Rule(lambda theirs: {'embed_scale': theirs['hidden_size'] ** 0.5}, lambda ours: {})
_CAUSAL = Must('use_bidirectional_attention', (False,))
_ATTENTION_BIAS = Biases({'attention_bias': (('qkv', 'out'), False)})


def _score_scale(theirs: Theirs) -> Mapping[str, Any]:
    scalar = theirs.take('query_pre_attn_scalar', 256)
    return {'attention_scale': 0.0 if scalar == theirs.take('head_dim', 256) else scalar**-0.5}


def _score_scale_back(ours: Any) -> Mapping[str, Any]:
    return {'query_pre_attn_scalar': round(ours.attention_scale**-2) if ours.attention_scale else ours.head_dim}


_GEMMA2_ITEMS = (
    Choice('hidden_activation', 'mlp', GATED, 'gelu_pytorch_tanh'),
    _ATTENTION_BIAS,
    _EMBED_SCALE,
    _CAUSAL,
    Rule(_score_scale, _score_scale_back),
    # What follows is of the first releases' files; the class reads none of it.
    Unused(('hidden_act', 'cache_implementation', 'sliding_window_size')),
)
_GEMMA2_ROWS = [
    *_ENDS,
    *norm(f'{_LAYER}.input_layernorm', 'attention_norm'),
    *attention(_ATTENTION),
    *norm(f'{_LAYER}.post_attention_layernorm', 'attention_out_norm'),
    *norm(f'{_LAYER}.pre_feedforward_layernorm', 'mlp_norm'),
    *mlp(f'{_LAYER}.mlp'),
    *norm(f'{_LAYER}.post_feedforward_layernorm', 'mlp_out_norm'),
]

GEMMA = Family(
    architecture='GemmaForCausalLM',
    model_type='gemma',
    items=(
        *shape(tied=True, kv_heads=16, head_dim=256),
        Rope(),
        # Published files say 'gelu' and mean its approximation by tanh.
        activation({'gelu_pytorch_tanh': 'geglu', 'gelu': 'geglu'}, 'gelu_pytorch_tanh'),
        Must('hidden_activation', ('gelu_pytorch_tanh',)),
        Fixed({'norm': 'rms_offset'}),
        _ATTENTION_BIAS,
        _EMBED_SCALE,
        _CAUSAL,
    ),
    rows=_LLAMA_ROWS,
    ignored=_INV_FREQ,
)


def _every_second(theirs: Theirs) -> list[bool]:
    return [i % 2 == 0 for i in range(theirs['num_hidden_layers'])]


GEMMA2 = Family(
    architecture='Gemma2ForCausalLM',
    model_type='gemma2',
    items=(
        *shape(tied=True, kv_heads=4, head_dim=256),
        Rope(),
        *_GEMMA2_ITEMS,
        Fixed({'norm': 'rms_offset', 'norm_place': 'both'}),
        Window(default=4096, pattern=_every_second),
        OrNull('attn_logit_softcapping', 'attention_softcap', 50.0),
        OrNull('final_logit_softcapping', 'logit_softcap', 30.0),
    ),
    rows=_GEMMA2_ROWS,
    ignored=_INV_FREQ,
)


def _all_but_one(theirs: Theirs) -> list[bool]:
    of = theirs.take('sliding_window_pattern', 6)
    return [(i + 1) % of != 0 for i in range(theirs['num_hidden_layers'])]


GEMMA3 = Family(
    architecture='Gemma3ForCausalLM',
    model_type='gemma3_text',
    items=(
        *shape(tied=True, kv_heads=4, head_dim=256),
        Rope(theta=1e6, local=10_000.0),
        *_GEMMA2_ITEMS,
        Fixed({'norm': 'rms_offset', 'norm_place': 'both', 'qk_norm': 'head'}),
        Window(default=4096, pattern=_all_but_one),
        Unused(('sliding_window_pattern',)),  # where layers are listed
        Must('attn_logit_softcapping', (None,)),
        OrNull('final_logit_softcapping', 'logit_softcap'),
    ),
    rows=[*_GEMMA2_ROWS, *_QK_NORM],
    ignored=_INV_FREQ,
)

# ------------------------------------------------------------------------------------------------- the others

_LAYER_NORM = {'eps': 'layer_norm_eps', 'default_eps': 1e-5}

PHI3 = Family(
    architecture='Phi3ForCausalLM',
    model_type='phi3',
    items=(
        *shape(default_eps=1e-5),
        Rope(original=4096),
        _SILU,
        Window(),
        # Published files say these; the class reads none of them.
        *(Must(key, (False,)) for key in ('attention_bias', 'mlp_bias', 'lm_head_bias')),
        *(Must(key, (1,)) for key in ('full_attn_mod', 'interpolate_factor')),
    ),
    rows=[
        *_ENDS,
        *norm(f'{_LAYER}.input_layernorm', 'attention_norm'),
        *joined_attention(_ATTENTION, 'qkv_proj', 'o_proj'),
        *norm(f'{_LAYER}.post_attention_layernorm', 'mlp_norm'),
        *linear(f'{_LAYER}.mlp.gate_up_proj', {'mlp.gate': '(+F)D', 'mlp.up': '(+F)D'}),
        *linear(f'{_LAYER}.mlp.down_proj', 'mlp.down', 'DF', 'D'),
    ],
    ignored=_INV_FREQ,
)

STABLELM = Family(
    architecture='StableLmForCausalLM',
    model_type='stablelm',
    items=(
        *shape(**_LAYER_NORM, kv_heads=32),
        Rope(partial=0.25),
        _SILU,
        Fixed({'norm': 'layer'}),
        Biases({'use_qkv_bias': (('qkv',), False)}),
        Choice('use_parallel_residual', 'residual', {False: 'serial', True: 'parallel'}, False),
        Choice('qk_layernorm', 'qk_norm', {False: 'none', True: 'each_head'}, False),
    ),
    rows=[
        *_LLAMA_ROWS,
        # {e}: a norm for each head.
        Row(f'{_ATTENTION}.q_layernorm.norms.{{e}}.weight', {'attention.query_norm.scale': 'H'}),
        Row(f'{_ATTENTION}.k_layernorm.norms.{{e}}.weight', {'attention.key_norm.scale': 'H'}),
    ],
    ignored=_INV_FREQ,
)

STARCODER2 = Family(
    architecture='Starcoder2ForCausalLM',
    model_type='starcoder2',
    items=(
        *shape(tied=True, eps='norm_epsilon', default_eps=1e-5, kv_heads=2),
        Rope(),
        activation(PLAIN, 'gelu_pytorch_tanh'),
        Fixed({'norm': 'layer'}),
        Biases({'use_bias': (('qkv', 'out', 'mlp'), True)}),
        Window(),
        Must('mlp_type', ('default',)),
        Must('norm_type', ('layer_norm',)),
        # The class reads none of what published files have beside its own keys.
        Unused(('activation_function', 'layer_norm_epsilon', 'attention_softmax_in_fp32')),
        Unused(('scale_attention_softmax_in_fp32', 'scale_attn_weights')),
    ),
    rows=[
        *_ENDS,
        *norm(f'{_LAYER}.input_layernorm', 'attention_norm'),
        *attention(_ATTENTION),
        *norm(f'{_LAYER}.post_attention_layernorm', 'mlp_norm'),
        *mlp(f'{_LAYER}.mlp', 'c_fc c_proj'),
    ],
    ignored=_INV_FREQ,
)

OLMO = Family(
    architecture='OlmoForCausalLM',
    model_type='olmo',
    items=(
        *shape(eps=''),
        Rope(),
        _SILU,
        Fixed({'norm': 'layer_fixed', 'norm_eps': 1e-5}),
        _ATTENTION_BIAS,
        OrNull('clip_qkv', 'qkv_clip'),
    ),
    rows=_LLAMA_ROWS,
    ignored=_INV_FREQ,
)

OLMO2 = Family(
    architecture='Olmo2ForCausalLM',
    model_type='olmo2',
    items=(
        *shape(default_eps=1e-5),
        Rope(),
        _SILU,
        Fixed({'norm_place': 'out', 'qk_norm': 'all_heads'}),
        _ATTENTION_BIAS,
    ),
    rows=[
        *_ENDS,
        *attention(_ATTENTION),
        Row(f'{_ATTENTION}.q_norm.weight', {'attention.query_norm.scale': '(NH)'}),
        Row(f'{_ATTENTION}.k_norm.weight', {'attention.key_norm.scale': '(KH)'}),
        *norm(f'{_LAYER}.post_attention_layernorm', 'attention_out_norm'),
        *mlp(f'{_LAYER}.mlp'),
        *norm(f'{_LAYER}.post_feedforward_layernorm', 'mlp_out_norm'),
    ],
    ignored=_INV_FREQ,
)


def _turning(theirs: Theirs) -> list[bool]:
    """Of each layer: listed, or all but one of an interval."""
    interval, listed = theirs.take('no_rope_layer_interval', 4), theirs.take('no_rope_layers', None)
    layers = theirs['num_hidden_layers']
    if listed is None and interval > 0:
        return [(i + 1) % interval != 0 for i in range(layers)]
    if not listed or len(listed) != layers:
        raise ConfigError(
            f'no_rope_layers = {listed} and no_rope_layer_interval = {interval} do not say of each of {layers} layers '
            'whether it turns'
        )
    return list(map(bool, listed))


def _turning_back(ours: Any) -> Mapping[str, Any]:
    return {'no_rope_layers': [int(ours.rope_layers[i % len(ours.rope_layers)]) for i in range(ours.layers)]}


SMOLLM3 = Family(
    architecture='SmolLM3ForCausalLM',
    model_type='smollm3',
    items=(
        *shape(tied=True, kv_heads=4),
        Rope(theta=2e6),
        _SILU,
        Biases({'attention_bias': (('qkv', 'out'), False), 'mlp_bias': (('mlp',), False)}),
        Rule(lambda theirs: {'rope_layers': tuple(period(_turning(theirs)))}, _turning_back),
        Window(switch='use_sliding_window', pattern=lambda theirs: [not turns for turns in _turning(theirs)]),
        Unused(('max_window_layers',)),  # the class does not read it
    ),
    rows=_LLAMA_ROWS,
    ignored=_INV_FREQ,
)

DENSE = {
    family.architecture: family
    for family in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        GEMMA,
        GEMMA2,
        GEMMA3,
        PHI3,
        STABLELM,
        STARCODER2,
        OLMO,
        OLMO2,
        *COHERE,
        SMOLLM3,
    )
}

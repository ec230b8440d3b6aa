"""Dense decoders by llama.cpp's names.

Metadata go by their keys less the architecture's name, `block_count` for `llama.block_count`. Keys in parentheses are
what only the tensors tell: `(blk.0.attn_q.bias)` that there is such a tensor.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tpu_llm.checkpoint.family import Biases, Family, linear, norm
from tpu_llm.checkpoint.fields import Choice, Fixed, Item, Must, Rule, Same, Theirs, Unused
from tpu_llm.checkpoint.gguf_positions import FREQS, LONG, ROPE, SHORT, rope, windows
from tpu_llm.checkpoint.renaming import Row

TIED = '(no output.weight)'
_QUERY_BIAS, _OUT_BIAS, _MLP_BIAS = '(blk.0.attn_q.bias)', '(blk.0.attn_output.bias)', '(blk.0.ffn_up.bias)'
_QUERY_NORM, _MLP_NORM, _SECOND_NORM = (
    '(blk.0.attn_q_norm.weight)',
    '(blk.0.ffn_norm.weight)',
    '(blk.0.attn_norm_2.weight)',
)
PRESENT = (_QUERY_BIAS, _OUT_BIAS, _MLP_BIAS, _QUERY_NORM, _MLP_NORM, _SECOND_NORM)

# ------------------------------------------------------------------------------------------------- what many share

_RMS, _LAYER = 'attention.layer_norm_rms_epsilon', 'attention.layer_norm_epsilon'


def _shape(eps: str = _RMS) -> tuple[Item, ...]:
    return (
        Same('block_count', 'layers'),
        Same('context_length', 'max_length', 0),
        Same('embedding_length', 'width'),
        Same('feed_forward_length', 'mlp_width'),
        Same('attention.head_count', 'heads'),
        Same('attention.head_count_kv', 'kv_heads', lambda theirs: theirs['attention.head_count']),
        Same(eps, 'norm_eps'),
        Same('vocab_size', 'vocab_size'),
        Same(TIED, 'tied_embeddings'),
        Unused(('attention.value_length', 'rope.scaling.original_context_length', 'rope.scaling.finetuned', *PRESENT)),
    )


_ENDS = [
    Row('token_embd.weight', {'embed.table': 'VD'}),
    *norm('output_norm', 'norm'),
    *linear('output', 'head', 'VD', 'V'),
]
_NORMS = [*norm('blk.{i}.attn_norm', 'attention_norm'), *norm('blk.{i}.ffn_norm', 'mlp_norm')]
_QK_NORM = [
    Row('blk.{i}.attn_q_norm.weight', {'attention.query_norm.scale': 'H'}),
    Row('blk.{i}.attn_k_norm.weight', {'attention.key_norm.scale': 'H'}),
]
_POSITIONS = Row('position_embd.weight', {'position_embed.table': 'TD'})


def _attention(rotary: str) -> list[Row]:
    """`rotary` is 'h' where llama.cpp turns pairs that lie side by side."""
    return [
        *linear('blk.{i}.attn_q', 'attention.query', f'(N{rotary})D', f'(N{rotary})'),
        *linear('blk.{i}.attn_k', 'attention.key', f'(K{rotary})D', f'(K{rotary})'),
        *linear('blk.{i}.attn_v', 'attention.value', '(KH)D', '(KH)'),
        *linear('blk.{i}.attn_output', 'attention.out', 'D(NH)', 'D'),
    ]


_JOINED = [
    *linear(
        'blk.{i}.attn_qkv',
        {'attention.query': '(+NH)D', 'attention.key': '(+KH)D', 'attention.value': '(+KH)D'},
    ),
    *linear('blk.{i}.attn_output', 'attention.out', 'D(NH)', 'D'),
]
_MLP = [
    *linear('blk.{i}.ffn_gate', 'mlp.gate', 'FD', 'F'),
    *linear('blk.{i}.ffn_up', 'mlp.up', 'FD', 'F'),
    *linear('blk.{i}.ffn_down', 'mlp.down', 'DF', 'D'),
]
_LLAMA_ROWS = [*_ENDS, *_NORMS, *_attention('h'), *_MLP]
_SPLIT_ROWS = [*_ENDS, *_NORMS, *_attention('H'), *_MLP]
_EQUAL_HEADS = Rule(
    lambda theirs: {'head_dim': theirs['embedding_length'] // theirs['attention.head_count']}, lambda ours: {}
)
_BIASES = Biases({_QUERY_BIAS: (('qkv',), False), _OUT_BIAS: (('out',), False), _MLP_BIAS: (('mlp',), False)})
_ALL_BIASED = {'norm': 'layer', 'bias': ('qkv', 'out', 'mlp')}
_TABLES = r'rope_(freqs|factors_short|factors_long)\.weight'
_UNTIED = Fixed({'tied_embeddings': False})  # llama.cpp wants a head
_TIED = Fixed({'tied_embeddings': True})  # llama.cpp reads no head of its own

# ------------------------------------------------------------------------------------------------- in Llama's line

LLAMA = Family(
    architecture='llama',
    model_type='llama',
    items=(*_shape(), rope(FREQS), _BIASES),
    rows=_LLAMA_ROWS,
    ignored=_TABLES,
)
QWEN2 = Family(
    architecture='qwen2',
    model_type='qwen2',
    items=(*_shape(), ROPE, Fixed({'bias': ('qkv',)})),
    rows=_SPLIT_ROWS,
)
QWEN3 = Family(
    architecture='qwen3',
    model_type='qwen3',
    items=(*_shape(), ROPE, Fixed({'qk_norm': 'head'})),
    rows=[*_SPLIT_ROWS, *_QK_NORM],
)
PHI3 = Family(
    architecture='phi3',
    model_type='phi3',
    items=(*_shape(), rope(SHORT, LONG), windows(0, 0)),
    rows=[
        *_ENDS,
        *_NORMS,
        *_JOINED,
        *linear('blk.{i}.ffn_up', {'mlp.gate': '(+F)D', 'mlp.up': '(+F)D'}),
        *linear('blk.{i}.ffn_down', 'mlp.down', 'DF', 'D'),
    ],
    ignored=_TABLES,
)
STABLELM = Family(
    architecture='stablelm',
    model_type='stablelm',
    items=(
        *_shape(_LAYER),
        ROPE,
        _UNTIED,
        Fixed({'norm': 'layer'}),
        Biases({_QUERY_BIAS: (('qkv',), False)}),
        Choice(_MLP_NORM, 'residual', {True: 'serial', False: 'parallel'}, False),
        Choice(_QUERY_NORM, 'qk_norm', {True: 'each_head', False: 'none'}, False),
        Unused(('use_parallel_residual',)),  # what norms there are says it; this key is wrong in files of old models
    ),
    rows=[
        *_SPLIT_ROWS,
        Row('blk.{i}.attn_q_norm.weight', {'attention.query_norm.scale': 'NH'}),
        Row('blk.{i}.attn_k_norm.weight', {'attention.key_norm.scale': 'KH'}),
    ],
)
STARCODER2 = Family(
    architecture='starcoder2',
    model_type='starcoder2',
    items=(*_shape(_LAYER), ROPE, Fixed({**_ALL_BIASED, 'mlp': 'gelu'})),
    rows=_SPLIT_ROWS,
)
OLMO = Family(
    architecture='olmo',
    model_type='olmo',
    items=(*_shape(_LAYER), ROPE, Fixed({'norm': 'layer_fixed'}), Same('attention.clamp_kqv', 'qkv_clip', 0.0)),
    rows=_LLAMA_ROWS,
)
OLMO2 = Family(
    architecture='olmo2',
    model_type='olmo2',
    items=(*_shape(), ROPE, Fixed({'norm_place': 'out', 'qk_norm': 'all_heads'})),
    rows=[
        *_ENDS,
        *_attention('H'),
        Row('blk.{i}.attn_q_norm.weight', {'attention.query_norm.scale': '(NH)'}),
        Row('blk.{i}.attn_k_norm.weight', {'attention.key_norm.scale': '(KH)'}),
        *norm('blk.{i}.post_attention_norm', 'attention_out_norm'),
        *_MLP,
        *norm('blk.{i}.post_ffw_norm', 'mlp_out_norm'),
    ],
)
COMMAND_R = Family(
    architecture='command-r',
    model_type='command-r',
    items=(
        *_shape(_LAYER),
        ROPE,
        _TIED,
        Fixed({'norm': 'layer_no_bias', 'residual': 'parallel'}),
        Biases({_QUERY_BIAS: (('qkv',), False)}),
        # llama.cpp looks for these norms where there are 64 layers or more, and only there.
        Rule(
            lambda theirs: {'qk_norm': 'each_head' if theirs.take(_QUERY_NORM, False) else 'none'},
            lambda ours: {_QUERY_NORM: ours.layers >= 64},
        ),
        Same('logit_scale', 'logit_scale', 0.0625),
    ),
    rows=[
        *_ENDS,
        *norm('blk.{i}.attn_norm', 'attention_norm'),
        *_attention('h'),
        Row('blk.{i}.attn_q_norm.weight', {'attention.query_norm.scale': 'Nh'}),
        Row('blk.{i}.attn_k_norm.weight', {'attention.key_norm.scale': 'Kh'}),
        *_MLP,
    ],
)

# ------------------------------------------------------------------------------------------------- Gemma


def _plus_one(rows: Sequence[Row]) -> list[Row]:
    """Norms as they multiply, 1 + scale."""
    return [Row(row.theirs, row.ours, added=1.0) for row in rows if row.theirs.endswith('norm.weight')]


_GEMMA = (
    ROPE,
    _TIED,
    Fixed({'norm': 'rms_offset', 'mlp': 'geglu'}),
    Rule(lambda theirs: {'embed_scale': theirs['embedding_length'] ** 0.5}, lambda ours: {}),
)
_GEMMA_ROWS = [
    Row('token_embd.weight', {'embed.table': 'VD'}),
    *_plus_one([*norm('output_norm', 'norm'), *_NORMS]),
    *_attention('H'),
    *_MLP,
]
_GEMMA2_ROWS = [
    *_GEMMA_ROWS,
    *_plus_one(norm('blk.{i}.post_attention_norm', 'attention_out_norm')),
    *_plus_one(norm('blk.{i}.post_ffw_norm', 'mlp_out_norm')),
]


def _score_scale(layers: int) -> Item:
    """The model of so many layers, 27B, scales scores by the share that a head has of the width."""

    def read(theirs: Theirs) -> Mapping[str, Any]:
        share = theirs['embedding_length'] // theirs['attention.head_count']
        return {'attention_scale': share**-0.5 if theirs['block_count'] == layers else 0.0}

    return Rule(read, lambda ours: {})


def _cap(key: str, name: str, default: float) -> Item:
    """A cap that is always there: none is not said."""
    return Rule(
        lambda theirs: {name: theirs.take(key, default)},
        lambda ours: {key: getattr(ours, name)} if getattr(ours, name) else {},
    )


GEMMA = Family(architecture='gemma', model_type='gemma', items=(*_shape(), *_GEMMA), rows=_GEMMA_ROWS)
GEMMA2 = Family(
    architecture='gemma2',
    model_type='gemma2',
    items=(
        *_shape(),
        *_GEMMA,
        Fixed({'norm_place': 'both'}),
        windows(4096, 2),
        _score_scale(46),
        _cap('attn_logit_softcapping', 'attention_softcap', 50.0),
        _cap('final_logit_softcapping', 'logit_softcap', 30.0),
    ),
    rows=_GEMMA2_ROWS,
)
GEMMA3 = Family(
    architecture='gemma3',
    model_type='gemma3',
    items=(
        *_shape(),
        *_GEMMA,
        Fixed({'norm_place': 'both', 'qk_norm': 'head'}),
        windows(0, 6),
        _score_scale(62),
        Same('rope.freq_base_swa', 'local_rope_theta', 10_000.0),
        Same('final_logit_softcapping', 'logit_softcap', 0.0),
    ),
    rows=[*_GEMMA2_ROWS, *_plus_one(_QK_NORM)],
)

# ------------------------------------------------------------------------------------------------- in GPT's line

_PLAIN = [*_ENDS, *_NORMS, *_JOINED, *_MLP]

STARCODER = Family(
    architecture='starcoder',
    model_type='starcoder',
    items=(*_shape(_LAYER), _EQUAL_HEADS, Fixed({**_ALL_BIASED, 'mlp': 'gelu', 'position': 'learned'})),
    rows=[*_PLAIN, _POSITIONS],
)
GPT2 = Family(
    architecture='gpt2',
    model_type='gpt2',
    items=(*STARCODER.items, Rule(lambda theirs: {'kv_heads': theirs['attention.head_count']}, lambda ours: {})),
    rows=STARCODER.rows,
)
NEOX = Family(
    architecture='gptneox',
    model_type='gptneox',
    items=(
        *_shape(_LAYER),
        ROPE,
        _UNTIED,
        Fixed({**_ALL_BIASED, 'mlp': 'gelu_exact'}),
        Choice('use_parallel_residual', 'residual', {True: 'parallel_two_norms', False: 'serial'}),
    ),
    rows=_PLAIN,
)
PHI2 = Family(
    architecture='phi2',
    model_type='phi2',
    items=(
        *_shape(_LAYER),
        ROPE,
        _UNTIED,
        Fixed({'norm': 'layer', 'mlp': 'gelu', 'residual': 'parallel', 'bias': ('qkv', 'out', 'mlp', 'head')}),
    ),
    rows=_SPLIT_ROWS,
)
BLOOM = Family(
    architecture='bloom',
    model_type='bloom',
    items=(
        *_shape(_LAYER),
        _EQUAL_HEADS,
        Fixed({**_ALL_BIASED, 'mlp': 'gelu', 'position': 'alibi', 'embed_norm': True}),
    ),
    rows=[*_PLAIN, *norm('token_embd_norm', 'embed_norm')],
)
MPT = Family(
    architecture='mpt',
    model_type='mpt',
    items=(
        *_shape(_LAYER),
        _EQUAL_HEADS,
        Fixed({'norm': 'layer_no_bias', 'mlp': 'gelu_exact', 'position': 'alibi'}),
        Same('attention.max_alibi_bias', 'alibi_max', 8.0),
        Same('attention.clamp_kqv', 'qkv_clip', 0.0),
    ),
    rows=_PLAIN,
)


def _falcon_rows(config: Any) -> list[Row]:
    """Where there are two norms, `attn_norm` is the MLP's and `attn_norm_2` the attention's."""
    first, second = (
        ('mlp_norm', 'attention_norm') if config.residual == 'parallel_two_norms' else ('attention_norm', '')
    )
    norms = [*norm('blk.{i}.attn_norm', first), *(norm('blk.{i}.attn_norm_2', second) if second else [])]
    return [*_ENDS, *norms, *_JOINED, *_MLP]


FALCON = Family(
    architecture='falcon',
    model_type='falcon',
    items=(
        *_shape(_LAYER),
        ROPE,
        Fixed({'norm': 'layer', 'mlp': 'gelu_exact'}),
        Choice(_SECOND_NORM, 'residual', {True: 'parallel_two_norms', False: 'parallel'}, False),
        Must('tensor_data_layout', ('jploski',)),  # queries, keys and values one after the other
    ),
    rows=_falcon_rows,
)

DENSE = {
    family.architecture: family
    for family in (
        QWEN2,
        LLAMA,
        QWEN3,
        PHI3,
        STABLELM,
        STARCODER2,
        OLMO,
        OLMO2,
        COMMAND_R,
        GEMMA,
        GEMMA2,
        GEMMA3,
        GPT2,
        STARCODER,
        NEOX,
        PHI2,
        BLOOM,
        MPT,
        FALCON,
    )
}

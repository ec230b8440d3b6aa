"""What it takes to know an architecture of another library: its config in items, its tensors in rows.

The pieces that many families share are made here. A family is an entry of the tables in `hf_decoders.py` and beside it;
adding one touches a table, `models/families.py` and a row of tests.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from tpu_llm.checkpoint import fields, renaming
from tpu_llm.checkpoint.fields import Choice, Item, Same, Theirs
from tpu_llm.checkpoint.renaming import Bound, Row
from tpu_llm.config import ConfigError
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.graph import ModelGraph

BIASED = ('qkv', 'out', 'mlp', 'head')


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One architecture of transformers, by the names that its config.json has."""

    architecture: str
    model_type: str
    items: Sequence[Item]
    rows: Sequence[Row] | Callable[[Any], Sequence[Row]]  # or those of a config
    # The config, of what config.json says and the names of the tensors there are.
    settle: Callable[[Any, Collection[str]], Any] = lambda config, names: config
    # A regular expression of tensors that this model does without, or what tells it from the names of all there are
    # and of those that have a place.
    ignored: str | Callable[[Collection[str], Collection[str]], str] = ''
    older: Mapping[str, str] = dataclasses.field(default_factory=dict)  # ends that names have in older files, and now
    prefix: str = ''  # what tensors of a file saved without its head lack ('model.', 'transformer.')
    make: type[Any] = DecoderConfig
    mixers: frozenset[str] = frozenset({'attention'})  # that its layers may have

    def now(self, name: str) -> str:
        """What a tensor of an older file is called."""
        for old, new in self.older.items():
            if name.endswith(old):
                return name.removesuffix(old) + new
        return name

    def table(self, config: Any) -> Sequence[Row]:
        return self.rows(config) if callable(self.rows) else self.rows

    def bind(self, config: Any, graph: ModelGraph) -> list[list[Bound]]:
        """Their tensors bound to those of the graph's model."""
        sizes = {'N': config.heads, 'K': getattr(config, 'kv_heads', config.heads), 'H': config.head_dim}
        model = graph.bind(graph.shapes())
        return renaming.bind(self.table(config), model, sizes=sizes, rotary=getattr(config, 'turned', 0))

    def checked(
        self, config: Any, graph: ModelGraph, tensors: Mapping[str, tuple[int, ...]], where: str
    ) -> list[list[Bound]]:
        """The same, of a file with these tensors and shapes.

        Raises CheckpointError that lists those that are missing, left over or misshapen, all of them at once.
        """
        bound = self.bind(config, graph)
        # A tied head is the embedding once more.
        tied = r'(.*\.)?lm_head\.weight' if getattr(config, 'tied_embeddings', False) else ''
        wanted = [each.name for group in bound for each in group]
        own = self.ignored if isinstance(self.ignored, str) else self.ignored(tensors, wanted)
        ignored = '|'.join(pattern for pattern in (own, tied) if pattern) or r'(?!)'
        renaming.check(bound, tensors, ignored, where)
        return bound


def first(families: Sequence[Family], config: Any, whose: str) -> tuple[Family, dict[str, Any]]:
    """The first of the families that can say all of a config, and what it says.

    Raises ConfigError where there is none, with the reason of the one that comes nearest.
    """
    reasons: list[tuple[int, str]] = []  # how far each is, and why
    for family in families:
        mixers = set(getattr(config, 'mixers', ()))
        # One that has state spaces is not near to a model without.
        if type(config) is not family.make or mixers - family.mixers or ('ssm' in family.mixers) > ('ssm' in mixers):
            continue
        try:
            said = fields.write(family.items, config)
        except ConfigError as error:
            far = error.count if isinstance(error, fields.Lacking) else fields.distance(family.items, config)
            reasons.append((far, f'{family.architecture}: {error}'))
            continue
        if renaming.covers(family.table(config), config.make(vocab_multiple=1)):
            return family, said
        reasons.append((1, f'{family.architecture}: some of the tensors have no place there'))
    _, nearest = min(reasons, default=(0, 'none that has such layers'))
    raise ConfigError(f'no architecture of {whose} is this model; the nearest is {nearest}')


# ------------------------------------------------------------------------------------------------- config items


def shape(
    *,
    tied: bool = False,
    eps: str = 'rms_norm_eps',
    default_eps: float = 1e-6,
    kv_heads: int = 0,
    head_dim: int = 0,
) -> tuple[Item, ...]:
    """The names that Llama gave and most have kept. The defaults are those of keys that the config lacks; without
    `kv_heads` each head has its own key, without `head_dim` heads share the width.
    """
    return (
        Same('vocab_size', 'vocab_size'),
        Same('hidden_size', 'width'),
        Same('num_hidden_layers', 'layers'),
        Same('num_attention_heads', 'heads'),
        Same('num_key_value_heads', 'kv_heads', _where_absent('num_key_value_heads', kv_heads, _heads)),
        Same('head_dim', 'head_dim', _where_absent('head_dim', head_dim, _share)),
        Same('intermediate_size', 'mlp_width'),
        Same('max_position_embeddings', 'max_length', 0),
        *((Same(eps, 'norm_eps', default_eps),) if eps else ()),
        Same('tie_word_embeddings', 'tied_embeddings', tied),
    )


def _heads(theirs: Theirs) -> int:
    return theirs['num_attention_heads']


def _share(theirs: Theirs) -> int:
    return theirs['hidden_size'] // theirs['num_attention_heads']


def _where_absent(key: str, default: int, computed: Callable[[Theirs], int]) -> Callable[[Theirs], int]:
    """A key that is null is computed; one that is not there has the default of the class, if the class has one."""
    return lambda theirs: default if default and key not in theirs else computed(theirs)


GATED = {'silu': 'swiglu', 'swish': 'swiglu', 'gelu_pytorch_tanh': 'geglu', 'gelu_new': 'geglu', 'gelu': 'geglu_exact'}
PLAIN = {'gelu_new': 'gelu', 'gelu_pytorch_tanh': 'gelu', 'gelu_fast': 'gelu', 'gelu': 'gelu_exact', 'relu': 'relu'}


def activation(kinds: Mapping[str, str], default: str, key: str = 'hidden_act') -> Item:
    return Choice(key, 'mlp', kinds, default)


@dataclasses.dataclass(frozen=True, slots=True)
class Biases:
    """Flags that give linear maps a bias, with their defaults: `{'attention_bias': (('qkv', 'out'), False)}`."""

    flags: Mapping[str, tuple[tuple[str, ...], bool]]
    always: tuple[str, ...] = ()

    def read(self, theirs: Theirs) -> Mapping[str, Any]:
        places = set(self.always)
        for key, (those, default) in self.flags.items():
            if theirs.take(key, default):
                places |= set(those)
        return {'bias': tuple(place for place in BIASED if place in places)}

    def write(self, ours: Any) -> Mapping[str, Any]:
        return {key: set(those) <= set(ours.bias) for key, (those, _) in self.flags.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """One window for all layers; with a `pattern` for those that `layer_types` says, or it where they are not listed.

    `switch` is a flag that must be on.
    """

    key: str = 'sliding_window'
    default: int = 0  # where the config lacks the key
    switch: str = ''
    pattern: Callable[[Theirs], Sequence[bool]] | None = None

    def read(self, theirs: Theirs) -> Mapping[str, Any]:
        window = theirs.take(self.key, 0 if self.key in theirs else self.default)
        on = theirs.take(self.switch, False) if self.switch else True
        kinds = theirs.take('layer_types', None) if self.pattern else None
        if not window or not on:
            return {'windows': (0,)}
        if not self.pattern:
            return {'windows': (window,)}
        if kinds is not None:
            unknown = set(kinds) - {'sliding_attention', 'full_attention'}
            if unknown:
                raise ConfigError(f'layer_types has {", ".join(sorted(unknown))}, which is not implemented')
            slides = [kind == 'sliding_attention' for kind in kinds]
        else:
            slides = list(self.pattern(theirs))
        return {'windows': tuple(window if each else 0 for each in period(slides))}

    def write(self, ours: Any) -> Mapping[str, Any]:
        sizes = {size for size in ours.windows if size}
        if len(sizes) > 1:
            raise ConfigError(f'windows = {ours.windows} have more than one size')
        theirs: dict[str, Any] = {self.key: next(iter(sizes), None)}
        if self.switch:
            theirs[self.switch] = bool(sizes)
        if sizes and self.pattern:
            slides = [bool(ours.windows[i % len(ours.windows)]) for i in range(ours.layers)]
            theirs['layer_types'] = ['sliding_attention' if each else 'full_attention' for each in slides]
        return theirs


def period(values: Sequence[Any]) -> Sequence[Any]:
    """The shortest beginning whose repetition gives all of them."""
    for length in range(1, len(values)):
        if all(value == values[i % length] for i, value in enumerate(values)):
            return values[:length]
    return values


# ------------------------------------------------------------------------------------------------- tensor rows


def linear(theirs: str, ours: str | Mapping[str, str], weight: str = '', bias: str = '') -> list[Row]:
    """The weight and bias of a linear map that holds one map of ours, or several: `{ours: (weight, bias)}`.

    PyTorch's weights are [out, in].
    """
    if isinstance(ours, str):
        return [
            Row(f'{theirs}.weight', {f'{ours}.kernel': weight}),
            *([Row(f'{theirs}.bias', {f'{ours}.bias': bias})] if bias else []),
        ]
    joined = {f'{name}.kernel': layout for name, layout in ours.items()}
    biases = {f'{name}.bias': ''.join(_output(layout)) for name, layout in ours.items()}
    return [Row(f'{theirs}.weight', joined), Row(f'{theirs}.bias', biases)]


def _output(layout: str) -> str:
    """The group of a weight's layout that its bias has: the one with the plus."""
    inside = layout[layout.index('(') : layout.index(')') + 1]
    assert '+' in inside
    return inside


def norm(theirs: str, ours: str, dims: str = 'D') -> list[Row]:
    return [Row(f'{theirs}.weight', {f'{ours}.scale': dims}), Row(f'{theirs}.bias', {f'{ours}.bias': dims})]


def attention(at: str, names: str = 'q_proj k_proj v_proj o_proj', rotary: str = 'H') -> list[Row]:
    """Four maps side by side; `rotary` is 'h' where pairs of queries and keys are interleaved."""
    query, key, value, out = names.split()
    return [
        *linear(f'{at}.{query}', 'attention.query', f'(N{rotary})D', f'(N{rotary})'),
        *linear(f'{at}.{key}', 'attention.key', f'(K{rotary})D', f'(K{rotary})'),
        *linear(f'{at}.{value}', 'attention.value', '(KH)D', '(KH)'),
        *linear(f'{at}.{out}', 'attention.out', 'D(NH)', 'D'),
    ]


def joined_attention(at: str, qkv: str, out: str, layout: str = '(+{}H)D') -> list[Row]:
    """Query, key and value as one map; `layout` has {} for N or K."""
    parts = {
        'attention.query': layout.format('N'),
        'attention.key': layout.format('K'),
        'attention.value': layout.format('K'),
    }
    return [*linear(f'{at}.{qkv}', parts), *linear(f'{at}.{out}', 'attention.out', 'D(NH)', 'D')]


def head_norms(at: str, query: str = 'H', key: str = 'H') -> list[Row]:
    """The norms of queries and keys: one scale for all heads, or the dims they have."""
    return [
        Row(f'{at}.q_norm.weight', {'attention.query_norm.scale': query}),
        Row(f'{at}.k_norm.weight', {'attention.key_norm.scale': key}),
    ]


def mlp(at: str, names: str = 'gate_proj up_proj down_proj') -> list[Row]:
    """Of three names a gated MLP, of two a plain one."""
    *gate, up, down = names.split()
    return [
        *(linear(f'{at}.{gate[0]}', 'mlp.gate', 'FD', 'F') if gate else []),
        *linear(f'{at}.{up}', 'mlp.up', 'FD', 'F'),
        *linear(f'{at}.{down}', 'mlp.down', 'DF', 'D'),
    ]


def experts(at: str, names: str = 'gate_proj up_proj down_proj', router: str = 'gate') -> list[Row]:
    """A router and gated MLPs, each a tensor of its own."""
    gate, up, down = names.split()
    return [
        Row(f'{at}.{router}.weight', {'moe.router.map.kernel': 'ED'}),
        Row(f'{at}.experts.{{e}}.{gate}.weight', {'moe.experts.gate.kernel': 'FD'}),
        Row(f'{at}.experts.{{e}}.{up}.weight', {'moe.experts.up.kernel': 'FD'}),
        Row(f'{at}.experts.{{e}}.{down}.weight', {'moe.experts.down.kernel': 'DF'}),
    ]


def ends(embed: str, norm_name: str, head: str = 'lm_head') -> list[Row]:
    """Embedding, last norm and head."""
    return [
        Row(f'{embed}.weight', {'embed.table': 'VD'}),
        *norm(norm_name, 'norm'),
        *linear(head, 'head', 'VD', 'V'),
    ]

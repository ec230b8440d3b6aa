"""The config of another library in ours and back: a family's config is a list of items, each of which does both.

Nothing is passed over: a key that no item reads is refused unless it cannot change what the model computes, and a
config of ours that comes back changed from theirs is not written.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from tpu_llm.config import ConfigError

_MISSING = object()

# Keys on which no number depends that a trained model computes.
HARMLESS = re.compile(
    r'_.*|architectures|auto_map|.*attn_implementation|.*dropout.*|.*pdrop|layerdrop|.*token_id|(torch_)?dtype'
    r'|chunk_size_feed_forward|finetuning_task|gradient_checkpointing|id2label|label2id|init\w*_(range|factor|std)'
    r'|is_(encoder_)?decoder|keys_to_ignore_at_inference|max_position_embeddings|model_type|output_.*|pretraining_tp'
    r'|prefix|do_sample|early_stopping|(max|min)_length|num_beams|temperature|top_[kp]|(length|repetition)_penalty'
    r'|problem_type|return_dict.*|use_return_dict|use_cache|summary_.*|task_specific_params|tokenizer_class'
    r'|transformers_version|unsloth_.*|router_aux_loss_coef|router_jitter_noise|aux_loss_alpha|seq_aux|ep_size'
)

# Fields of ours on which no number depends that a trained model computes, and those of which only whether they are 0.
_TRAINING = ('dtype', 'dropout', 'jitter', 'balance_loss', 'balance_over', 'z_loss')
_PRESENT = ('bias_rate',)


class Theirs(dict[str, Any]):
    """Their config, which remembers what was read of it."""

    def __init__(self, values: Mapping[str, Any]):
        super().__init__(values)
        self.seen: set[str] = set()

    def take(self, key: str, default: Any = _MISSING) -> Any:
        """The value; null is as good as absent. Raises ConfigError where it is absent and has no default."""
        self.seen.add(key)
        value = self.get(key)
        if value is None:
            if default is _MISSING:
                raise ConfigError(f'the config has no {key}')
            return default
        return value

    def inside(self, key: str) -> dict[str, Any]:
        """The object under a key; empty where it is null or absent. Raises ConfigError for anything else."""
        value = self.take(key, {})
        if not isinstance(value, Mapping):
            raise ConfigError(f'{key} is {value!r}, not an object')
        return dict(value)

    def unread(self) -> dict[str, Any]:
        return {
            key: value
            for key, value in self.items()
            if key not in self.seen and value is not None and not HARMLESS.fullmatch(key)
        }


class Item(Protocol):
    def read(self, theirs: Theirs) -> Mapping[str, Any]:
        """Fields of ours. Raises ConfigError for a value that we do not implement."""
        ...

    def write(self, ours: Any) -> Mapping[str, Any]:
        """Keys of theirs."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Same:
    """A value under another name."""

    theirs: str
    ours: str
    default: Any = _MISSING

    def read(self, theirs: Theirs) -> Mapping[str, Any]:
        default = self.default(theirs) if callable(self.default) else self.default
        return {self.ours: theirs.take(self.theirs, default)}

    def write(self, ours: Any) -> Mapping[str, Any]:
        return {self.theirs: getattr(ours, self.ours)}


@dataclasses.dataclass(frozen=True, slots=True)
class Aliases:
    """Other names of keys, `{other: name}`, for the items behind it."""

    names: Mapping[str, str]

    def read(self, theirs: Theirs) -> Mapping[str, Any]:
        for other, name in self.names.items():
            if other in theirs:
                theirs.setdefault(name, theirs.pop(other))
        return {}

    def write(self, ours: Any) -> Mapping[str, Any]:
        del ours
        return {}


@dataclasses.dataclass(frozen=True, slots=True)
class OrNull:
    """A number that is null where what it measures is off, which is 0 here."""

    theirs: str
    ours: str
    absent: float = 0.0  # what it is where the config lacks the key

    def read(self, theirs: Theirs) -> Mapping[str, Any]:
        default = 0.0 if self.theirs in theirs else self.absent
        return {self.ours: float(theirs.take(self.theirs, default))}

    def write(self, ours: Any) -> Mapping[str, Any]:
        return {self.theirs: getattr(ours, self.ours) or None}


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """A value with another name for each of its values: `Choice('hidden_act', 'mlp', {'silu': 'swiglu'})`."""

    theirs: str
    ours: str
    values: Mapping[Any, Any]
    default: Any = _MISSING  # of theirs

    def read(self, theirs: Theirs) -> Mapping[str, Any]:
        value = theirs.take(self.theirs, self.default)
        if value not in self.values:
            raise ConfigError(f'{self.theirs} = {value!r} is not implemented; known are {_listed(self.values)}')
        return {self.ours: self.values[value]}

    def write(self, ours: Any) -> Mapping[str, Any]:
        wanted = getattr(ours, self.ours)
        names = [name for name, value in self.values.items() if value == wanted]
        if not names:
            raise ConfigError(f'{self.ours} = {wanted!r} has no {self.theirs}')
        return {self.theirs: names[0]}


@dataclasses.dataclass(frozen=True, slots=True)
class Must:
    """A key whose other values we do not implement. The first value is what is written; an absent key is fine."""

    theirs: str
    values: tuple[Any, ...]

    def read(self, theirs: Theirs) -> Mapping[str, Any]:
        value = theirs.take(self.theirs, self.values[0])
        if value not in self.values:
            raise ConfigError(f'{self.theirs} = {value!r} is not implemented; known are {_listed(self.values)}')
        return {}

    def write(self, ours: Any) -> Mapping[str, Any]:
        del ours
        return {self.theirs: self.values[0]}


@dataclasses.dataclass(frozen=True, slots=True)
class Unused:
    """Keys that change nothing in this family, and those of them that are written all the same."""

    theirs: tuple[str, ...]
    written: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def read(self, theirs: Theirs) -> Mapping[str, Any]:
        theirs.seen.update(self.theirs)
        return {}

    def write(self, ours: Any) -> Mapping[str, Any]:
        del ours
        return self.written


@dataclasses.dataclass(frozen=True, slots=True)
class Fixed:
    """What every model of the family has."""

    ours: Mapping[str, Any]

    def read(self, theirs: Theirs) -> Mapping[str, Any]:
        del theirs
        return self.ours

    def write(self, ours: Any) -> Mapping[str, Any]:
        del ours
        return {}


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """Anything else, as two functions."""

    reads: Callable[[Theirs], Mapping[str, Any]]
    writes: Callable[[Any], Mapping[str, Any]]

    def read(self, theirs: Theirs) -> Mapping[str, Any]:
        return self.reads(theirs)

    def write(self, ours: Any) -> Mapping[str, Any]:
        return self.writes(ours)


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """A node of our config, `make(**fields)`, whose items read the same config of theirs."""

    ours: str
    make: type[Any]
    items: tuple[Item, ...]

    def read(self, theirs: Theirs) -> Mapping[str, Any]:
        return {self.ours: self.make(**_fields(self.items, theirs))}

    def write(self, ours: Any) -> Mapping[str, Any]:
        node = getattr(ours, self.ours)
        if not isinstance(node, self.make):
            raise ConfigError(f'it needs {self.ours}, which is {node!r}')
        return _keys(self.items, node)


@dataclasses.dataclass(frozen=True, slots=True)
class Inside:
    """A config within theirs, whose items are of the same node of ours: `"ffn_config": {"moe_top_k": 4}`."""

    theirs: str
    items: tuple[Item, ...]

    def read(self, theirs: Theirs) -> Mapping[str, Any]:
        inside = Theirs(theirs.inside(self.theirs))
        fields = _fields(self.items, inside)
        _refuse(inside, f'{self.theirs}.')
        return fields

    def write(self, ours: Any) -> Mapping[str, Any]:
        return {self.theirs: _keys(self.items, ours)}


def read(items: Sequence[Item], theirs: Mapping[str, Any], make: Callable[..., Any]) -> Any:
    """Our config, `make(**fields)`. Raises ConfigError for what it does not know or implement."""
    taken = Theirs(theirs)
    fields = _fields(items, taken)
    _refuse(taken)
    return make(**fields)


def _fields(items: Sequence[Item], theirs: Theirs) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for item in items:
        fields |= item.read(theirs)
    return fields


def _refuse(theirs: Theirs, within: str = '') -> None:
    """Raises ConfigError for what no item has read."""
    if unread := theirs.unread():
        said = ', '.join(f'{within}{key} = {value!r}' for key, value in unread.items())
        raise ConfigError(f'the config says {said}, which is not implemented for this architecture')


def write(items: Sequence[Item], ours: Any) -> dict[str, Any]:
    """Their config. Raises ConfigError, naming the fields, for what theirs cannot say."""
    theirs = _keys(items, ours)
    if differ := list(_different(ours, read(items, theirs, type(ours)))):
        raise Lacking(differ)
    return theirs


class Lacking(ConfigError):
    """A config that comes back changed from theirs."""

    def __init__(self, fields: Sequence[str]):
        super().__init__(f'it has no {", ".join(fields)}')
        self.count = sum(field.count('=') for field in fields)  # a whole node is more than a number


def distance(items: Sequence[Item], ours: Any) -> int:
    """How many of the items a config does not fit: how far it is from their family."""
    far = 0
    for item in items:
        if isinstance(item, Fixed):
            far += sum(getattr(ours, name) != value for name, value in item.ours.items())
        try:
            item.write(ours)
        except (ConfigError, AttributeError, TypeError):  # what an item asks for, one before it may have missed
            far += 1
    return far


def _keys(items: Sequence[Item], ours: Any) -> dict[str, Any]:
    theirs: dict[str, Any] = {}
    for item in items:
        theirs |= item.write(ours)
    return theirs


def _different(ours: Any, again: Any, within: str = '') -> Iterator[str]:
    """Fields of a config, and of the nodes in it, that came back with another value."""
    for field in dataclasses.fields(ours):
        if field.metadata.get('mark') == 'machine' or field.name in _TRAINING:
            continue
        one, other = getattr(ours, field.name), getattr(again, field.name)
        if dataclasses.is_dataclass(one) and type(one) is type(other):
            yield from _different(one, other, f'{within}{field.name}.')
        elif field.name in _PRESENT and bool(one) == bool(other):
            continue
        elif one != other:
            yield f'{within}{field.name} = {one!r}'


def _listed(values: Any) -> str:
    return ', '.join(map(repr, values))

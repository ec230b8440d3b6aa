"""Configs are typed, mutable dataclasses. This file marks their fields, checks them and writes them down.

A config file is Python: `get_config(arg)` returns one run object, a tree of `@dataclass(kw_only=True,
slots=True)` nodes. Structure is chosen by the arg (`configs/pretrain.py:size=1b,mesh=v5e-256`), scalars by
flag (`--config.steps=20000`).

Every field carries a mark that says what may happen to it when a run continues in an existing workdir:

- *maths* (the default): it decides the numbers; a change is refused, with the difference.
- *machine*: mesh, hosts, workers: may change, since results do not depend on it.
- *schedule*: steps, every=N: may change, and the change is recorded.

A mark on a field that holds a config covers everything below it.
"""

import dataclasses
import difflib
import hashlib
import importlib
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

Mark = Literal['maths', 'machine', 'schedule']

_MISSING = dataclasses.MISSING


class ConfigError(ValueError):
    """What the user wrote cannot run; the message is one line that names the field and the mend."""


class RunError(RuntimeError):
    """A run cannot go on, though its config is sound; the message is one line that says why and what to do."""


def machine(default: Any = _MISSING, *, factory: Any = _MISSING) -> Any:
    """A dataclass field that may change between starts of one run, because no result depends on it."""
    return _field('machine', default, factory)


def schedule(default: Any = _MISSING, *, factory: Any = _MISSING) -> Any:
    """A dataclass field that may change between starts of one run; the change is recorded."""
    return _field('schedule', default, factory)


def _field(mark: Mark, default: Any, factory: Any) -> Any:
    if factory is not _MISSING:
        return dataclasses.field(default_factory=factory, metadata={'mark': mark})
    return dataclasses.field(default=default, metadata={'mark': mark})


@dataclasses.dataclass(kw_only=True, slots=True)
class Periodic:
    """A config of something done every so many steps (0: never) and, with `last`, after the last one."""

    every: int = schedule(0)
    last: bool = schedule(True)

    def due(self, step: int, steps: int) -> bool:
        return (self.every > 0 and step % self.every == 0) or (self.last and step == steps)


# ------------------------------------------------------------------------------------------------ the arg


def parse_arg(arg: str | None, **defaults: Any) -> types.SimpleNamespace:
    """Parses `'size=1b,smoke'` into the types of the defaults; a bare name sets a boolean to true.

    Raises ConfigError on a name that has no default, is given twice, or has a value of the wrong type.
    """
    values, given = dict(defaults), set()
    for item in (arg or '').split(','):
        if not item.strip():
            continue
        name, equals, text = (part.strip() for part in item.partition('='))
        if name not in defaults:
            raise ConfigError(
                f'config arg {name!r} is unknown{nearest(name, defaults)}; this config takes '
                + ', '.join(f'{k}={v}' for k, v in defaults.items())
            )
        if name in given:
            raise ConfigError(f'config arg {name} is given twice in {arg!r}')
        if not equals and not isinstance(defaults[name], bool):
            raise ConfigError(f'config arg {name} needs a value: {name}=…')
        given.add(name)
        values[name] = _parse_value(name, text if equals else 'true', defaults[name])
    return types.SimpleNamespace(**values)


def _parse_value(name: str, text: str, default: Any) -> Any:
    if isinstance(default, bool):
        if text.lower() not in ('true', 'false', '1', '0'):
            raise ConfigError(f'config arg {name}={text!r} is not true or false')
        return text.lower() in ('true', '1')
    kind = str if default is None else type(default)
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f'config arg {name}={text!r} is not of type {kind.__name__}') from None


# What others call the axes of our mesh.
_ALIASES = {'model': 'tensor', 'tp': 'tensor', 'dp': 'data', 'ep': 'expert', 'sp': 'seq', 'cp': 'seq', 'context': 'seq'}
_ALIASES |= {'pp': 'stage', 'pipe': 'stage', 'pipeline': 'stage'}


def nearest(name: str, choices: Iterable[str], cutoff: float = 0.5) -> str:
    """` (did you mean 'x'?)` for the choice closest to `name`, or an empty string where none is as near as `cutoff`,
    the share of letters that two names have in common.
    """
    choices = list(choices)
    meant = [_ALIASES[name]] if _ALIASES.get(name) in choices else []
    close = meant or difflib.get_close_matches(str(name), choices, n=1, cutoff=cutoff)
    return f' (did you mean {close[0]!r}?)' if close else ''


def choose(kind: str, name: str, choices: Mapping[str, Any]) -> Any:
    """`choices[name]`, or a ConfigError that lists the names there are."""
    if name not in choices:
        raise ConfigError(f'unknown {kind} {name!r}{nearest(name, choices)}; there are {", ".join(choices)}')
    return choices[name]


# --------------------------------------------------------------------------------------------- validation


def validate(config: Any, path: str = 'config') -> None:
    """Checks every field's type, then calls each node's own `validate()`, children first.

    Raises ConfigError whose message starts with the path of the field at fault.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        where = f'{path}.{field.name}'
        if not _matches(value, hints[field.name]):
            raise ConfigError(f'{where} is {value!r}; expected {_describe(hints[field.name])}')
        for key, child in _children(value):
            validate(child, where + key)
    if hasattr(config, 'validate'):
        try:
            config.validate()
        except ValueError as error:
            message = str(error)
            named = message.startswith((f'{path}.', f'{path}[', f'{path}:', f'{path} '))
            raise ConfigError(message if named else f'{path}: {message}') from None


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    """The config nodes held by a field: itself, or those in its tuple or dict, however deep."""
    if is_config(value):
        yield '', value
        return
    for key, item in _items(value):
        yield from ((key + below, child) for below, child in _children(item))


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (tuple, list)):
        yield from ((f'[{i}]', item) for i, item in enumerate(value))
    elif isinstance(value, dict):
        yield from ((f'.{key}', item) for key, item in value.items())


def is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _matches(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, arg) for arg in args)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in args)  # True is not 1
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(_matches(item, args[0]) for item in value)
        return len(value) == len(args) and all(map(_matches, value, args))
    if origin is dict:
        return isinstance(value, dict) and all(_matches(k, args[0]) and _matches(v, args[1]) for k, v in value.items())
    if origin is list:
        return isinstance(value, list) and all(_matches(item, args[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(origin or hint, type):
        return isinstance(value, origin or hint)
    return True


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return 'one of ' + ', '.join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint).replace('typing.', '')


# ------------------------------------------------------------------------------------- dump, diff, digest


def dump(config: Any) -> dict[str, Any]:
    """The config as JSON-ready values; each node names its type, each function or class its place.

    Raises ConfigError on a value that no file could name again: a lambda, a local function, an array…
    """
    return _dump(config, 'config')


def _dump(value: Any, path: str) -> Any:
    if is_config(value):
        kind = f'{type(value).__module__}.{type(value).__qualname__}'
        fields = dataclasses.fields(value)
        return {'type': kind} | {f.name: _dump(getattr(value, f.name), f'{path}.{f.name}') for f in fields}
    if isinstance(value, (tuple, list)):
        return [_dump(item, path + key) for key, item in _items(value)]
    if isinstance(value, dict):
        return {str(key): _dump(item, f'{path}.{key}') for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    name = getattr(value, '__qualname__', '<')
    if '<' not in name:
        return f'{value.__module__}.{name}'
    raise ConfigError(f'{path} is {value!r}; a config holds numbers, strings and what is imported by name')


def to_json(config: Any) -> str:
    return json.dumps(dump(config), indent=2)


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """One leaf that differs between two configs; `None` where it is absent on a side."""

    path: str
    old: Any
    new: Any
    mark: Mark

    def __str__(self) -> str:
        return f'{self.path}: {self.old!r} → {self.new!r}'


def diff(old: dict[str, Any], config: Any) -> list[Change]:
    """The leaves in which a dumped config and a live one differ, with the live one's marks."""
    before, after, marks = flatten(old), flatten(dump(config)), _marks(config, 'config', 'maths')
    paths = [*after, *(path for path in before if path not in after)]
    return [
        Change(path, before.get(path), after.get(path), _nearest_mark(path, marks))
        for path in paths
        if before.get(path) != after.get(path)
    ]


def digest(config: Any) -> str:
    """Ten hex digits of the maths fields: equal digests give equal numbers."""
    marks = leaf_marks(config)
    leaves = {path: value for path, value in flatten(dump(config)).items() if marks[path] == 'maths'}
    for path, value in leaves.items():
        if isinstance(value, float) and value.is_integer():
            leaves[path] = int(value)  # 1.0 from the command line is the 1 of the file
    return hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()[:10]


def flatten(dumped: Any, path: str = 'config') -> dict[str, Any]:
    """`{'config.model.width': 256, …}`: one entry a leaf, the type of each node included."""
    if isinstance(dumped, dict):
        items = [(f'{path}.{key}', item) for key, item in dumped.items()]
    elif isinstance(dumped, list):
        items = [(f'{path}[{i}]', item) for i, item in enumerate(dumped)]
    else:
        return {path: dumped}
    return {name: leaf for where, item in items for name, leaf in flatten(item, where).items()}


def leaf_marks(config: Any) -> dict[str, Mark]:
    """The mark of every leaf of `flatten(dump(config))`."""
    marks = _marks(config, 'config', 'maths')
    return {path: marks[path] for path in flatten(dump(config))}


def _marks(value: Any, path: str, mark: Mark) -> dict[str, Mark]:
    """The marks of a value and of everything in it."""
    marks: dict[str, Mark] = {path: mark}
    if is_config(value):
        marks[f'{path}.type'] = mark
        for field in dataclasses.fields(value):
            below = field.metadata.get('mark', mark)
            marks |= _marks(getattr(value, field.name), f'{path}.{field.name}', below)
    for key, item in _items(value):
        marks |= _marks(item, path + key, mark)
    return marks


def _nearest_mark(path: str, marks: dict[str, Mark]) -> Mark:
    """The mark of a leaf; of one that the live config no longer has, that of what is left above it."""
    while path not in marks:
        path = path[: max(path.rfind('.'), path.rfind('['))]
    return marks[path]


def load(dumped: dict[str, Any]) -> Any:
    """The config that `dump` wrote down. Raises ConfigError where this version has no such type or field.

    Only types of this package are made: a config file is data, and may come from anywhere.
    """
    return _load(dumped)


def _load(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_load(item) for item in value)
    if not isinstance(value, dict):
        return value
    fields = {name: _load(item) for name, item in value.items() if name != 'type'}
    if 'type' not in value:
        return fields
    module, _, name = value['type'].rpartition('.')
    if not module.startswith('tpu_llm.'):
        raise ConfigError(f'{value["type"]} is not a config of tpu_llm; it cannot be loaded')
    try:
        kind = getattr(importlib.import_module(module), name)
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            raise TypeError('it is not a config')
        return kind(**fields)
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(f'this version of tpu_llm cannot load the config {value["type"]}: {error}') from None

"""From `--config=FILE.py:arg --config.a.b=value` to a checked config: what every launcher shares.

ml_collections' config_flags sets the fields. It answers a mistake with a raw KeyError, so each path is looked
up first, and whatever is wrong becomes a ConfigError of one line with the nearest name.
"""

import contextlib
import dataclasses
import importlib.util
import inspect
import re
import sys
import traceback
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags import config_path

from tpu_llm.config import ConfigError, is_config, nearest, validate

# Of launch/run.py.
FLAGS = ('--config', '--workdir', '--debug', '--help')


def load(spec: str, overrides: list[str], others: Sequence[str] = FLAGS, checked: bool = True) -> Any:
    """The config of `FILE.py` or `FILE.py:arg`, after overrides such as `--config.model.width=512`; validated, unless
    it is only looked at.

    `others` are the flags that the command has besides. Raises ConfigError on anything that the user may have written
    wrongly.
    """
    config = call(spec, 'get_config', 'returns the run')
    if not is_config(config):
        raise ConfigError(f'{spec.partition(":")[0]}: get_config returned {config!r}, not a config (a dataclass)')
    config = override(config, overrides, others)
    if checked:
        validate(config)
    return config


def call(spec: str, name: str, gives: str) -> Any:
    """What the function of that name in `FILE.py` or `FILE.py:arg` returns; of one that yields, the list.

    `gives` says what it is for. Raises ConfigError where there is no such function, and for mistakes in the file.
    """
    file, _, arg = spec.partition(':')
    module = _import(find(file))
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f'config file {file} has no function {name}(arg=None) that {gives}')
    args = (arg,) if arg else ()
    signature = inspect.signature(function)
    try:
        signature.bind(*args)
    except TypeError as error:
        raise ConfigError(f'{file}: {name}{signature}: {error}; write {name}(arg=None)') from None
    with _mistakes_in(module):
        made = function(*args)
        return list(made) if isinstance(made, Iterator) else made


def find(file: str) -> Path:
    """The config file: as named from the working directory, or else from a folder on Python's path."""
    places = [Path(place, file) for place in ('', *sys.path)]
    for place in places:
        if place.is_file():
            return place.resolve()
    roots = (Path(), Path(sys.path[0]))
    there = [path.relative_to(root) for root in roots for path in root.glob('configs/**/*.py')]
    raise ConfigError(f'config file {file} does not exist{nearest(file, map(str, there))}')


def _import(path: Path) -> Any:
    """Runs the file as the module that `import` would find it as, so that what it defines can be pickled."""
    homes = [Path(home).resolve() for home in sys.path]
    inside = [path.relative_to(home) for home in homes if path.is_relative_to(home)]
    name = '.'.join((inside[0] if inside else Path(path.name)).with_suffix('').parts)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f'config file {path} is not a Python file (.py)')
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    with _mistakes_in(module):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _mistakes_in(page: types.ModuleType) -> Iterator[None]:
    """What a config file itself does wrong, as a ConfigError that names the line."""
    try:
        yield
    except SyntaxError as error:
        raise ConfigError(f'{error.filename}:{error.lineno}: {error.msg}') from error
    except Exception as error:
        raised = traceback.extract_tb(error.__traceback__)[-1]
        if isinstance(error, ConfigError) or raised.filename != page.__file__:
            raise
        what = f'{type(error).__name__}: {error}{_meant(error, page)}'
        raise ConfigError(f'{raised.filename}:{raised.lineno}: {what}') from error


# What Python says of `Model(widht=64)` and of `model.widht = 64`.
_NO_FIELD = re.compile(
    r"(?:(\w+)\.__init__\(\) got an unexpected keyword argument|'(\w+)' object has no attribute) '(\w+)'"
)


def _meant(error: Exception, page: types.ModuleType) -> str:
    """The field nearest to one that a config does not have."""
    if not (match := _NO_FIELD.fullmatch(str(error))):
        return ''
    kind, name = getattr(page, match[1] or match[2], None), match[3]
    return nearest(name, [field.name for field in dataclasses.fields(kind)]) if dataclasses.is_dataclass(kind) else ''


# -------------------------------------------------------------------------------------------------- overrides


# What int() and float() say of text that is no number.
_NO_NUMBER = {r'invalid literal for int\(\).*': 'expects a whole number'}
_NO_NUMBER |= {r'could not convert string to float.*': 'expects a number'}


def override(config: Any, args: list[str], others: Sequence[str] = FLAGS) -> Any:
    """A copy of the config with each `--config.path=value`, `--config.flag` and `--noconfig.flag` applied."""
    for arg in args:
        match = re.fullmatch(r'--?(no)?config\.([^=]+)(?:=(.*))?', arg, re.DOTALL)
        if match is None:
            raise ConfigError(unknown(arg, config, others))
        _check(config, match[2], match[3])
    values = flags.FlagValues()
    argv = ['run', *args]
    try:
        config_flags.DEFINE_config_dataclass('config', config, flag_values=values, sys_argv=argv)
        values(argv)
    except (flags.Error, TypeError, ValueError, LookupError) as error:
        message = str(error).removeprefix('flag ')
        for theirs, ours in _NO_NUMBER.items():
            message = re.sub(theirs, ours, message)
        raise ConfigError(message) from None
    return values['config'].value


def unknown(arg: str, config: Any = None, others: Sequence[str] = FLAGS) -> str:
    """What to say of an argument that is no flag: the nearest one, or the field that was meant."""
    if not arg.startswith('-'):
        return f'unexpected argument {arg!r}; a value is joined to its flag by =, as in --config.steps=100'
    name = arg.partition('=')[0]
    fields = [f'--config.{field.name}' for field in dataclasses.fields(config)] if config else []
    meant = f'--config.{name.lstrip("-")}'
    return f'unknown flag {name}{nearest(meant if meant in fields else name, [*others, *fields])}'


def _check(config: Any, path: str, text: str | None) -> None:
    """Raises ConfigError unless `path` leads to a single value that a flag can set."""
    node, above, where = config, None, 'config'
    try:
        parts = config_path.split(path)
    except ValueError:
        raise ConfigError(f'--config.{path} is not the path of a field') from None
    for part in parts:
        if node is None:
            mend = f'the config arg chooses what there is, or the config file{_in_the_file(above, where)}'
            raise ConfigError(f'{where} is absent, so --config.{path} has nothing to set; {mend}')
        above, node = node, _step(node, part, where)
        where += f'.{part}' if isinstance(part, str) else f'[{part!r}]'
    if is_config(node):
        names = ', '.join(field.name for field in dataclasses.fields(node))
        raise ConfigError(f'{where} is a group of fields, not a value; set one of {names}')
    if text is not None and text.lower() == 'none' and not isinstance(node, str):  # remat has a value 'none'
        raise ConfigError(f'{where} cannot be None by flag; what may be absent is chosen by the config arg')
    if isinstance(above, tuple):
        raise ConfigError(f'{where} is one item of a tuple; set them all, as in --config.betas=(0.9,0.99)')
    if is_config(above) and not _settable(typing.get_type_hints(type(above))[parts[-1]]):
        mend = f'set it in the config file{_in_the_file(above, where)}'
        raise ConfigError(f'{where} is of a kind that no flag can set; {mend}')


def _settable(hint: Any) -> bool:
    """Whether config_flags can parse such a value; it is taught the choices of a Literal on the way."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return len(kinds) == 1 and _settable(kinds[0])
    if typing.get_origin(hint) is typing.Literal and all(isinstance(choice, str) for choice in kinds):
        config_flags.register_flag_parser_for_type(hint, flags.EnumParser(kinds))
        return True
    return (typing.get_origin(hint) or hint) in (bool, int, float, str, tuple)


def _in_the_file(above: Any, where: str) -> str:
    """How a config file would set the field of `above` at that place, if such a field is a config of its own."""
    hint = typing.get_type_hints(type(above))[where.rpartition('.')[2]] if is_config(above) else None
    kinds = [
        kind for kind in (hint, *typing.get_args(hint)) if isinstance(kind, type) and dataclasses.is_dataclass(kind)
    ]
    if not kinds:
        return ''
    kind = kinds[0]
    fields, none = dataclasses.fields(kind), dataclasses.MISSING
    needed = [field for field in fields if field.default is none and field.default_factory is none] or fields[:1]
    values = ', '.join(f'{field.name}=…' for field in needed)
    return f': run{where.removeprefix("config")} = {kind.__name__}({values}), of {kind.__module__}'


def _step(node: Any, part: Any, where: str) -> Any:
    if is_config(node):
        names = [field.name for field in dataclasses.fields(node)]
        if part not in names:
            raise ConfigError(f'{where} has no field {part!r}{nearest(part, names)}; it has {", ".join(names)}')
        return getattr(node, part)
    try:
        return node[part]
    except (LookupError, TypeError):
        raise ConfigError(f'{where} is {node!r} and has no {part!r}') from None

"""JSONL of judgements: an object a line, and an error that names the line where it is none."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from tpu_llm.config import ConfigError, nearest

Record = dict[str, Any]


def read(path: epath.PathLike) -> Iterator[tuple[str, Record]]:
    """('FILE, line N', object) of every line that is not empty. Raises ConfigError where one is no object."""
    file = epath.Path(path).expanduser()
    if not file.exists() or file.is_dir():
        raise ConfigError(f'there is no file {file}; give JSONL, an object a line')
    some = False
    with file.open() as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                some = True
                where = f'{file}, line {number}'
                yield where, _object(line, where)
    if not some:
        raise ConfigError(f'{file} holds no line; give JSONL, an object a line')


def _object(line: str, where: str) -> Record:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ConfigError(f'{where} is no JSON: {error}') from None
    if not isinstance(value, dict):
        raise ConfigError(f'{where} is no JSON object but {type(value).__name__}; write {{"field": …}}')
    return value


def value_of(record: Mapping[str, Any], field: str, where: str) -> Any:
    """Raises ConfigError where the record has no such field."""
    if field not in record:
        raise ConfigError(f'{where} has no {field!r}{nearest(field, record)}; its fields are {", ".join(record)}')
    return record[field]

"""A constitution: principles, a line each of a text file, and the questions that one of them is put into."""

import string
from collections.abc import Sequence

import numpy as np
from etils import epath

from tpu_llm.config import ConfigError


def read(path: str) -> tuple[str, ...]:
    """The lines that are not empty. Raises ConfigError where there are none."""
    file = epath.Path(path).expanduser()
    if not path or not file.is_file():
        raise ConfigError(f'there is no file {path!r}; give a text file with a principle a line as principles')
    found = tuple(line.strip() for line in file.read_text().splitlines() if line.strip())
    if not found:
        raise ConfigError(f'{path} holds no principle; write one a line')
    return found


def drawn(principles: Sequence[str], count: int, *seed: int) -> list[str]:
    """A principle for each of `count` questions."""
    rng = np.random.default_rng(seed)
    return [principles[int(i)] for i in rng.integers(len(principles), size=count)]


def check_form(name: str, form: str, fields: Sequence[str]) -> None:
    """Raises ConfigError where a question has other places in it than `fields`, or lacks one of them."""
    wanted = ', '.join(f'{{{field}}}' for field in fields)
    try:
        found = {field for _, field, _, _ in string.Formatter().parse(form) if field is not None}
    except ValueError as error:
        raise ConfigError(f'{name} is {form!r}: {error}; braces that are text are written twice') from None
    if found != set(fields):
        held = ', '.join(f'{{{field}}}' for field in sorted(found)) or 'none'
        raise ConfigError(f'{name} has the places {held}; it has to have {wanted}')

"""Finished runs as points of a scaling law: sizes, tokens, FLOPs and losses, from a sweep's table or any other."""

import csv
import dataclasses
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from etils import epath

from tpu_llm.config import ConfigError, nearest

# What a column may be called besides what `--columns` says; the first are those of a sweep's table.
_NAMES = {
    'name': ('name', 'run'),
    'N': ('parameters', 'N', 'params'),
    'D': ('tokens', 'D'),
    'C': ('flops', 'C', 'flop', 'compute'),
    'U': ('unique_tokens', 'U'),
    'budget': ('budget',),
    'loss': ('loss', 'heldout_loss'),
    'status': ('status',),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Points:
    """Runs, one an entry of each array.

    `parameters` is N, `tokens` D (with repeats), `flops` C, `loss` in nats a token. `unique` is how many different
    tokens there were: D where none was seen twice. `budget` is what C was to be, before steps and sizes were rounded.
    """

    names: tuple[str, ...]
    parameters: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray
    unique: np.ndarray
    budget: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def take(self, kept: np.ndarray) -> 'Points':
        """Those of a mask or of indices."""
        chosen = np.arange(len(self))[kept]
        arrays = {field.name: getattr(self, field.name)[chosen] for field in dataclasses.fields(self)[1:]}
        return Points(names=tuple(self.names[i] for i in chosen), **arrays)


def points(
    parameters: Sequence[float] | np.ndarray,
    tokens: Sequence[float] | np.ndarray,
    loss: Sequence[float] | np.ndarray,
    flops: Sequence[float] | np.ndarray | None = None,
    names: Sequence[str] = (),
) -> Points:
    """Runs that saw each token once; FLOPs are 6 N D where they are not given."""
    n, d, found = (np.asarray(each, float) for each in (parameters, tokens, loss))
    c = 6 * n * d if flops is None else np.asarray(flops, float)
    names = tuple(names) or tuple(f'run {i}' for i in range(1, len(n) + 1))
    return Points(names=names, parameters=n, tokens=d, flops=c, loss=found, unique=d, budget=c)


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """The points of a file, and how many runs were left out of them, by reason."""

    points: Points
    left_out: dict[str, int]
    budgets: bool  # whether it says which budget a run is of

    def __str__(self) -> str:
        said = ', '.join(f'{count} {reason}' for reason, count in self.left_out.items())
        return counted(len(self.points)) + (f' ({said} left out)' if said else '')


def counted(runs: int) -> str:
    return '1 run' if runs == 1 else f'{runs} runs'


def read(
    path: epath.PathLike, columns: Mapping[str, str] | None = None, at_least: Mapping[str, float] | None = None
) -> Table:
    """The runs of a CSV file. `columns` says what it calls N, D, C, loss, U, budget, name and status, if not so.

    Of N, D and C two are enough, by C = 6 N D. A run counts where its status, if there is that column, is `finished`,
    its loss is a finite number above 0 and the columns of `at_least` hold so much. Raises ConfigError for a missing
    file or column, or a number that is none.
    """
    if not epath.Path(path).exists():
        raise ConfigError(f'there is no file {path}')
    rows = csv.DictReader(io.StringIO(epath.Path(path).read_bytes().decode('utf-8-sig'), newline=''))
    there, lines = list(rows.fieldnames or ()), list(rows)
    where, limits = _places(Path(path).name, there, dict(columns or {})), dict(at_least or {})
    for name in limits:
        if name not in there:
            raise ConfigError(f'{Path(path).name} has no column {name!r}{nearest(name, there)}')
    kept, left_out = [], Counter()
    for number, line in enumerate(lines, 2):
        place = f'{Path(path).name} line {number}'
        reason = _reason(line, where, place) or _less(line, limits, place)
        if reason:
            left_out[reason] += 1
        else:
            kept.append((place, line))

    def column(letter: str) -> np.ndarray | None:
        if letter not in where:
            return None
        return np.array([_number(line[where[letter]], place, where[letter]) for place, line in kept], float)

    n, d, c = (column(letter) for letter in 'NDC')
    if n is None:
        assert d is not None
        assert c is not None
        n = c / (6 * d)
    if d is None:
        assert c is not None
        d = c / (6 * n)
    if c is None:
        c = 6 * n * d
    unique, budget, loss = column('U'), column('budget'), column('loss')
    assert loss is not None
    names = [line[where['name']] if 'name' in where else place for place, line in kept]
    made = Points(
        names=tuple(names),
        parameters=n,
        tokens=d,
        flops=c,
        loss=loss,
        unique=d if unique is None else np.minimum(unique, d),
        budget=c if budget is None else budget,
    )
    return Table(made, dict(left_out), budget is not None)


def _places(file: str, there: list[str], said: dict[str, str]) -> dict[str, str]:
    """The column of each letter."""
    for letter, name in said.items():
        if letter not in _NAMES:
            raise ConfigError(f'columns: {letter!r} is unknown{nearest(letter, _NAMES)}; there are {", ".join(_NAMES)}')
        if name not in there:
            raise ConfigError(f'{file} has no column {name!r}{nearest(name, there)}; it has {", ".join(there)}')
    where = {
        letter: found
        for letter, names in _NAMES.items()
        if (found := said.get(letter) or next((name for name in names if name in there), None))
    }
    missing = [letter for letter in ('loss',) if letter not in where]
    if len(where.keys() & {'N', 'D', 'C'}) < 2:
        missing += [letter for letter in 'NDC' if letter not in where]
    if missing:
        raise ConfigError(
            f'{file} has no column for {" and ".join(missing)} (two of N, D and C are needed); say which they are: '
            f'--columns {",".join(f"{letter}=…" for letter in missing)}; it has {", ".join(there) or "none"}'
        )
    return where


def _reason(line: dict[str, str], where: dict[str, str], place: str) -> str:
    """Why a run does not count; empty where it does."""
    status = (line[where['status']] or '').strip() if 'status' in where else 'finished'
    if status != 'finished':
        return status or 'without a status'
    text = (line[where['loss']] or '').strip()
    try:
        return '' if 0 < float(text) < math.inf else 'without a finite loss'
    except ValueError:
        if text:
            message = f'{place}: {text!r} in column {where["loss"]!r} is no loss; mend it, or name another column: '
            raise ConfigError(message + '--columns loss=…') from None
        return 'without a finite loss'


def _less(line: dict[str, str], limits: dict[str, float], place: str) -> str:
    """Which column holds too little; empty where none does."""
    less = (name for name, least in limits.items() if _number(line[name], place, name) < least)
    name = next(less, '')
    return f'with {name} below {limits[name]:g}' if name else ''


def _number(text: str | None, place: str, column: str) -> float:
    try:
        value = float(text or '')
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f'{place}: {column} is {text!r}; it is a number above 0')
    return value


def drop_highest(runs: Points, count: int) -> Points:
    """Without the `count` runs of highest loss."""
    if not 0 <= count < len(runs):
        raise ConfigError(f'{count} runs of highest loss cannot be dropped from {len(runs)}; drop fewer')
    return runs.take(np.sort(np.argsort(runs.loss, kind='stable')[: len(runs) - count]))


def hold_out(runs: Points, which: int | Sequence[str]) -> tuple[Points, Points]:
    """The runs to fit, and those that are kept from it: the `which` of most FLOPs, or those of these names."""
    if isinstance(which, int):
        if not 0 <= which < len(runs):
            raise ConfigError(f'{which} runs cannot be held out of {len(runs)}; hold out fewer')
        held = np.zeros(len(runs), bool)
        held[np.argsort(runs.flops, kind='stable')[len(runs) - which :]] = True
    else:
        unknown = [name for name in which if name not in runs.names]
        if unknown:
            raise ConfigError(f'there is no finished run {unknown[0]!r} to hold out{nearest(unknown[0], runs.names)}')
        held = np.isin(runs.names, list(which))
    return runs.take(~held), runs.take(held)

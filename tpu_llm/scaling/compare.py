"""Two runs side by side: what differs in their configs, their losses at common steps, and where they ended."""

import json
import math
from typing import Any

from etils import epath
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tpu_llm import config as configs
from tpu_llm.config import ConfigError, nearest
from tpu_llm.scaling import record
from tpu_llm.scaling.sweep import RUNS, TRIES
from tpu_llm.scaling.table import finals
from tpu_llm.train import metrics

STEPS = 12  # of a curve that are shown
CURVES = ('loss', 'heldout_loss')


def comparison(a: str, b: str, workdir: str | None = None) -> Group:
    """The tables for two runs: folders, or names of runs in the sweep of `workdir`.

    Raises ConfigError where there is no such run.
    """
    one, other = find(a, workdir), find(b, workdir)
    heads = Text(f'A  {one}\nB  {other}')
    parts = [heads, Text(), _configs(one, other)]
    for name in CURVES:
        if curve := _curve(name, one, other):
            parts += [Text(), curve]
    return Group(*parts, Text(), _ends(one, other))


def find(run: str, workdir: str | None) -> epath.Path:
    """The folder of a run that has begun."""
    for folder in (epath.Path(run), *((epath.Path(workdir) / RUNS / run,) if workdir else ())):
        if (folder / 'config.json').exists() or (folder / TRIES).exists():
            return folder
    if epath.Path(run).exists():
        raise ConfigError(f'{run} holds no run that has begun: it has no config.json')
    if not workdir:
        raise ConfigError(f'{run} is no folder of a run; of a sweep’s run give its folder, or --workdir=SWEEP')
    there = [*record.read(workdir)['runs']]
    begun = 'has not begun' if run in there else f'is not in the sweep{nearest(run, there)}'
    raise ConfigError(f'run {run} {begun}: {workdir}')


def _configs(one: epath.Path, other: epath.Path) -> Table | Text:
    a, b = _config(one), _config(other)
    paths = [path for path in [*a, *(path for path in b if path not in a)] if a.get(path) != b.get(path)]
    if not paths:
        return Text('their configs are the same')
    table = _table('configs', 'field', 'A', 'B')
    for path in paths:
        table.add_row(*(Text(str(each)) for each in (path, a.get(path, '–'), b.get(path, '–'))))
    return table


def _config(folder: epath.Path) -> dict[str, Any]:
    tried = folder / TRIES
    dumped = (
        json.loads(tried.read_text())['config'] if tried.exists() else json.loads((folder / 'config.json').read_text())
    )
    return configs.flatten(dumped)


def _curve(name: str, one: epath.Path, other: epath.Path) -> Table | Text | None:
    """A metric at steps that both logged, evenly spread, the first and the last among them."""
    a, b = _values(one, name), _values(other, name)
    if not a or not b:
        return None
    common = sorted(a.keys() & b.keys())
    if not common:
        return Text(f'{name}: the runs logged no common step')
    places = sorted({round(i * (len(common) - 1) / (STEPS - 1)) for i in range(STEPS)})
    table = _table(name, 'step', 'A', 'B', 'B − A')
    for step in (common[i] for i in places):
        table.add_row(f'{step:,}', *_numbers(a[step], b[step]))
    return table


def _values(folder: epath.Path, name: str) -> dict[int, float]:
    path = folder / 'metrics.jsonl'
    lines = metrics.read(path) if path.exists() else []
    return {line['step']: line[name] for line in lines if name in line}


def _ends(one: epath.Path, other: epath.Path) -> Table | Text:
    a, b = finals(one), finals(other)
    names = [
        name for name in a if name in b and isinstance(a[name], (int, float)) and isinstance(b[name], (int, float))
    ]
    if not names:
        return Text('they have no last value in common')
    table = _table('last values', 'metric', 'A', 'B', 'B − A')
    for name in names:
        table.add_row(name, *_numbers(a[name], b[name]))
    return table


def _numbers(a: float, b: float) -> tuple[str, str, str]:
    whole = isinstance(a, int) and isinstance(b, int)
    if whole:
        return f'{a:,}', f'{b:,}', f'{b - a:+,}'
    digits = 4 if max(abs(a), abs(b)) < 1000 or not math.isfinite(a + b) else 0
    small = 0 < max(abs(a), abs(b)) < 0.01
    shape = '.4g' if small else f',.{digits}f'
    return format(a, shape), format(b, shape), format(b - a, '+' + shape)


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, title=title, title_justify='left')
    for i, column in enumerate(columns):
        table.add_column(column, justify='left' if i == 0 or title == 'configs' else 'right')
    return table

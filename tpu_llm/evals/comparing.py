"""Two models on the same rows: what one scores above the other, and how sure that is."""

import argparse
from collections.abc import Sequence

from etils import epath
from rich.table import Table

from tpu_llm.config import ConfigError
from tpu_llm.evals.kept import Score, read_results
from tpu_llm.evals.measures import Difference, difference
from tpu_llm.evals.table import interval, number, show


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('first', help='the workdir of an evaluation')
    parser.add_argument('second', help='another, of the same tasks')


def run(options: argparse.Namespace) -> None:
    (first, ours), (second, theirs) = _read(options.first), _read(options.second)
    show(f'first:  {first}\nsecond: {second}', _table(compare(ours, theirs)))


def compare(first: Sequence[Score], second: Sequence[Score]) -> list[tuple[Score, Score, str, Difference]]:
    """Each metric of each task that both were asked. Raises ConfigError where there is none, or rows differ."""
    others = {score.task: score for score in second}
    both = [(score, others[score.task]) for score in first if score.task in others]
    if not both:
        raise ConfigError(
            f'no task is in both: {", ".join(score.task for score in first)} and {", ".join(others)}; evaluate both '
            'models on the same'
        )
    for ours, theirs in both:
        if ours.of_rows != theirs.of_rows:
            raise ConfigError(
                f'task {ours.task} has other rows in the second ({ours.rows} and {theirs.rows}); evaluate both models '
                'on the same file, with the same limit'
            )
    return [
        (ours, theirs, name, difference(ours.measured(name), theirs.measured(name)))
        for ours, theirs in both
        for name in ours.metrics
        if ours.forms[name] == theirs.forms.get(name)
    ]


def _read(path: str) -> tuple[str, list[Score]]:
    about, scores = read_results(epath.Path(path).expanduser())
    return f'{about["model"]} ({path})', scores


def _table(found: Sequence[tuple[Score, Score, str, Difference]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ('task', 'metric', 'first', 'second', 'first - second', '95 % interval', 'p', 'test'):
        right = name in ('first', 'second', 'first - second', 'p')
        table.add_column(name, justify='right' if right else 'left', no_wrap=True)
    said = ''
    for ours, theirs, name, each in found:
        values = (ours.metrics[name].value, theirs.metrics[name].value, each.estimate.value)
        task, said = '' if ours.task == said else ours.task, ours.task
        table.add_row(task, name, *map(number, values), interval(each.estimate), _chance(each.p), each.test)
    return table


def _chance(p: float) -> str:
    return '<0.001' if p < 0.001 else f'{p:.3f}'

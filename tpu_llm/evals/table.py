"""Scores as tables for a terminal."""

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tpu_llm.evals.intervals import Estimate
from tpu_llm.evals.kept import Score

_WIDTH = 120
_CAPTION = "intervals: Wilson's where each row is a hit or none, else of 2,000 bootstrap draws of the rows"


def of_scores(scores: Sequence[Score]) -> Table:
    """A line a metric; a task's own comes first."""
    table = Table(caption=_CAPTION, caption_justify='left', box=None, pad_edge=False)
    for name in ('task', 'rows', 'shots', 'metric', 'value', '95 % interval'):
        right = name in ('rows', 'shots', 'value')
        table.add_column(name, justify='right' if right else 'left', no_wrap=True)
    for score in scores:
        names = sorted(score.metrics, key=lambda name: name != score.metric)
        for place, name in enumerate(names):
            whose = ('', '', '') if place else (score.task, f'{score.rows:,}', str(score.shots))
            found = score.metrics[name]
            table.add_row(*whose, name, number(found.value), interval(found))
    return table


def number(value: float) -> str:
    return f'{value:,.4f}' if abs(value) < 100 else f'{value:,.2f}' if abs(value) < 1e6 else f'{value:.2e}'


def interval(estimate: Estimate) -> str:
    if math.isinf(estimate.low) and math.isinf(estimate.high):
        return '–'
    return f'{number(estimate.low)} – {number(estimate.high)}'


def show(*parts: Table | str) -> None:
    """On the standard output: a terminal is as wide as it is, anything else wide enough. Texts are not broken."""
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=_WIDTH)
    for part in parts:
        console.print(part, markup=False, soft_wrap=isinstance(part, str))

"""Scores as files: of each task a JSON of its metrics, and JSONL of its rows with what each adds to them."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from tpu_llm.config import ConfigError
from tpu_llm.data.documents import fingerprint
from tpu_llm.evals.intervals import Estimate
from tpu_llm.evals.measures import Measured, estimate
from tpu_llm.evals.task import Outcome, Task
from tpu_llm.train.metrics import replace_text

RESULTS = 'results.json'
_FORM = 2  # of these files and of how metrics are computed: what is kept under another is asked anew

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Of one model on one task."""

    task: str
    kind: str
    rows: int
    shots: int
    metric: str  # the one to look at
    metrics: dict[str, Estimate]
    intervals: dict[str, str]  # by metric, how its interval was found
    forms: dict[str, str]  # by metric, what `measures.FORMS` makes of its rows' sums
    of_rows: str  # of the rows that were scored: equal for scores that can be paired
    seconds: float
    samples: list[Record]

    def summary(self) -> Record:
        """All but the samples, JSON-ready; a number that is not finite is null."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields['samples']
        return fields | {
            'metrics': {
                name: {key: _finite(value) for key, value in dataclasses.asdict(each).items()}
                for name, each in self.metrics.items()
            }
        }

    def measured(self, metric: str) -> Measured:
        """What each row adds to it."""
        added = np.array([sample['adds'][metric] for sample in self.samples], np.float64)
        return Measured(added, self.forms[metric])


def score(task: Task, outcome: Outcome, shots: int, seconds: float) -> Score:
    metrics = outcome.metrics
    samples = [
        {'line': row.line, **sample, 'adds': {name: each.added[at].tolist() for name, each in metrics.items()}}
        for at, (row, sample) in enumerate(zip(task.rows, outcome.samples, strict=True))
    ]
    return Score(
        task=task.name,
        kind=task.form.kind,
        rows=len(task.rows),
        shots=shots,
        metric=task.form.metric or task.form.names()[0],
        metrics={name: estimate(each) for name, each in metrics.items()},
        intervals={name: 'Wilson' if each.proportion else 'bootstrap' for name, each in metrics.items()},
        forms={name: each.form for name, each in metrics.items()},
        of_rows=task.of_rows,
        seconds=seconds,
        samples=samples,
    )


def from_files(summary: Record, samples: list[Record]) -> Score:
    """What `summary` and the samples were of."""
    metrics = {
        name: Estimate(*(missing if each[key] is None else each[key] for key, missing in _MISSING.items()))
        for name, each in summary['metrics'].items()
    }
    return Score(**{**summary, 'metrics': metrics, 'samples': samples})


_MISSING = {'value': math.nan, 'low': -math.inf, 'high': math.inf}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class Kept:
    """A folder of scores by what they depend on. What is there under a key is whole."""

    def __init__(self, folder: epath.Path):
        self._folder = folder

    def find(self, task: str, key: Any) -> Score | None:
        """The score kept under the key; None where there is none, or none that can be read."""
        path = self._path(task, key)
        try:
            return from_files(json.loads(path.read_text()), read_lines(path.with_suffix('.jsonl')))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def keep(self, task: str, key: Any, score: Score) -> None:
        path = self._path(task, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lines(path.with_suffix('.jsonl'), score.samples)
        replace_text(path, json.dumps(score.summary()))  # last: with it the score is there

    def _path(self, task: str, key: Any) -> epath.Path:
        return self._folder / f'{task}-{fingerprint(_FORM, key)}.json'


def read_lines(path: epath.Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().split('\n') if line]


def write_lines(path: epath.Path, records: list[Record]) -> None:
    replace_text(path, ''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in records))


def write_results(folder: epath.Path, about: Mapping[str, Any], scores: list[Score]) -> None:
    """results.json, and the rows of the newest score in samples/."""
    (folder / 'samples').mkdir(parents=True, exist_ok=True)
    write_lines(folder / 'samples' / f'{scores[-1].task}.jsonl', scores[-1].samples)
    replace_text(folder / RESULTS, json.dumps({**about, 'scores': [each.summary() for each in scores]}, indent=2))


def read_results(folder: epath.Path) -> tuple[Record, list[Score]]:
    """What `write_results` wrote, score by score. Raises ConfigError where it is not there."""
    try:
        results = json.loads((folder / RESULTS).read_text())
        scores = [
            from_files(summary, read_lines(folder / 'samples' / f'{summary["task"]}.jsonl'))
            for summary in results.pop('scores')
        ]
    except FileNotFoundError as error:
        raise ConfigError(f'there is no file {error.filename}; give the workdir of a whole evaluation') from None
    return results, scores

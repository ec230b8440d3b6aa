"""A suite: a model asked many tasks, its scores in one table, and kept, so that what was asked once is not again.

A score is kept by what it depends on: the weights, the task and how it is asked. So a suite that was killed goes on
with the task it was at, and a changed file, model or number of shots is asked anew.
"""

import dataclasses
import time
from typing import ClassVar

from etils import epath
from rich.console import Console

from tpu_llm.config import ConfigError, machine, validate
from tpu_llm.evals import catalogue, table
from tpu_llm.evals.candidate import Candidate, Saved, Settings, Untrained
from tpu_llm.evals.kept import RESULTS, Kept, Score, score, write_results
from tpu_llm.evals.task import Task
from tpu_llm.infer.chat import busy


@dataclasses.dataclass(kw_only=True, slots=True)
class Suite:
    """What `launch/run.py` runs. Writes results.json and samples/<task>.jsonl in the workdir, task by task."""

    saves: ClassVar[bool] = False

    model: Saved | Untrained
    tasks: tuple[str, ...]  # names of `catalogue`, or files
    shots: int = -1  # examples before each question; -1: as many as each task's file says
    limit: int = 0  # only so many rows of each, the first; 0: all
    chat: bool = False  # what is to be answered in writing is what a user says, in the model's own template
    seed: int = 0  # of what is drawn
    rows: int = 16  # of a batch; what is drawn depends on it
    kept: str = machine('runs/scores')  # folder of scores, of all models and tasks

    def validate(self) -> None:
        if self.shots < -1 or self.limit < 0 or self.rows < 1:
            raise ConfigError(
                f'shots = {self.shots} must be -1 or more, limit = {self.limit} not negative and rows = {self.rows} at '
                'least 1'
            )
        if not self.kept:
            raise ConfigError('kept is empty; give a folder')

    def main(self, workdir: str) -> None:
        validate(self)
        tasks = [task.head(self.limit) for task in catalogue.find(self.tasks)]
        for task in tasks:
            task.prompts(task.shots(self.shots))  # too few examples are told of before any weights are read
        candidate = self.model.open()
        settings = Settings(rows=self.rows, chat=self.chat, seed=self.seed)
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        folder, kept, scores = epath.Path(workdir), Kept(epath.Path(self.kept).expanduser()), []
        for task in tasks:
            scores.append(self._score(candidate, settings, task, kept, console))
            write_results(folder, {'model': candidate.name, 'identity': candidate.identity}, scores)
        table.show(candidate.name, table.of_scores(scores), str(folder / RESULTS))

    def _score(self, candidate: Candidate, settings: Settings, task: Task, kept: Kept, console: Console) -> Score:
        shots = task.shots(self.shots)
        how = dataclasses.asdict(settings) if task.form.writes else {}
        key = (candidate.identity, task.fingerprint, shots, how)
        found = kept.find(task.name, key)
        if found is not None:
            console.print(f'{task.name}: kept from before')
            return found
        start = time.monotonic()
        with busy(console, f'{task.name}: {len(task.rows):,} rows, {shots} shots'):
            outcome = task.form.outcome(candidate.ask(settings), task, shots)
        made = score(task, outcome, shots, time.monotonic() - start)
        console.print(f'{task.name}: {len(task.rows):,} rows in {made.seconds:.1f} s')
        kept.keep(task.name, key, made)
        return made

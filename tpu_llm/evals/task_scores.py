"""Tasks while training: what a suite would say of the model at this step."""

import dataclasses
import math
from typing import Any

from tpu_llm.arrays import Array
from tpu_llm.config import ConfigError, Periodic, machine, schedule
from tpu_llm.evals import catalogue
from tpu_llm.evals.asked import Asked
from tpu_llm.evals.likelihood import Likelihoods
from tpu_llm.evals.measures import estimate
from tpu_llm.evals.table import interval, number
from tpu_llm.evals.task import Task
from tpu_llm.evals.writing import Writing
from tpu_llm.infer.hook import Surroundings
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.parallel.rules import BATCH


@dataclasses.dataclass(kw_only=True, slots=True)
class TaskScores(Periodic):
    """A hook that asks the model tasks; logs each of their metrics as heldout/<task>_<metric>.

    Its programs run on the run's own mesh, and are compiled once.
    """

    tasks: tuple[str, ...]  # as `suite.Suite` has them, as are the next four
    shots: int = schedule(-1)
    limit: int = schedule(0)
    chat: bool = False
    seed: int = 0
    rows: int = machine(16)  # of a batch

    def validate(self) -> None:
        if self.shots < -1 or self.limit < 0 or self.rows < 1:
            raise ConfigError(
                f'shots = {self.shots} must be -1 or more, limit = {self.limit} not negative and rows = {self.rows} at '
                'least 1'
            )
        for task in self.read():
            task.prompts(task.shots(self.shots))

    def read(self) -> list[Task]:
        return [task.head(self.limit) for task in catalogue.find(self.tasks)]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those that `checkpoints.best` may name, which keeps the lowest."""
        return tuple(f'heldout/{task.name}_{name}' for task in self.read() for name in task.form.falling)

    def open(self, session: Any) -> 'OpenTaskScores':
        return OpenTaskScores(self, session)


class OpenTaskScores:
    """The hook at work."""

    def __init__(self, config: TaskScores, session: Any):
        self.config, self.tasks = config, config.read()
        self.session: Surroundings = session
        if not isinstance(session.run.model, DecoderConfig):
            raise ConfigError(
                f'TaskScores asks a model that predicts next tokens, and model is {type(session.run.model).__name__}; '
                'take the hook out'
            )
        layout, graph, tokenizer = session.layout, session.graph, session.tokenizer
        parts = math.prod(layout.mesh.shape[axis] for axis in BATCH)
        rows = -(-config.rows // parts) * parts
        self.likelihoods = Likelihoods(graph.bind(graph.shapes()), tokenizer, rows=rows, layout=layout)
        self.writing = Writing(graph, tokenizer, rows=rows, layout=layout, chat=config.chat, seed=config.seed)

    def __call__(self, step: int, weights: dict[str, Array]) -> dict[str, float]:
        subject = Asked(self.likelihoods, lambda: lambda prompts, ask: self.writing(weights, prompts, ask), weights)
        values: dict[str, float] = {}
        for task in self.tasks:
            with self.session.busy('eval', f'asking {task.name}'):
                measured = task.form.outcome(subject, task, task.shots(self.config.shots)).metrics
            values |= {f'heldout/{task.name}_{name}': each.value for name, each in measured.items()}
            name = task.form.metric or task.form.names()[0]
            found = estimate(measured[name])
            said = f'{name} {number(found.value)} ({interval(found)})'
            self.session.print(f'step {step}: {task.name}, {len(task.rows):,} rows: {said}')
        return values

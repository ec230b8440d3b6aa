"""Held-out loss in a run's own terms: its objective, on documents packed and formed as in training."""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from tpu_llm.arrays import Array, Batch
from tpu_llm.config import ConfigError, Periodic, machine, schedule
from tpu_llm.data.documents import Documents, Head
from tpu_llm.data.evaluation import held_out_rows
from tpu_llm.data.forms import Tasks
from tpu_llm.data.taught import Taught
from tpu_llm.infer.hook import Surroundings
from tpu_llm.objectives.texts import check_kind
from tpu_llm.parallel import hosts, sharding
from tpu_llm.parallel.compile import Compiled
from tpu_llm.parallel.rules import BATCH
from tpu_llm.train.stored import reads_stored, with_reference


@dataclasses.dataclass(kw_only=True, slots=True)
class HeldOutObjective(Periodic):
    """A hook that scores the run's objective on the first `documents` of `source`, as the run would train on them.

    What is drawn at random (hidden tokens, prefixes) is the same each time. Logs heldout_loss, the objective's loss a
    unit of weight (without dropout), and heldout_<name> of each of its metrics: heldout_nll is nats a target.
    """

    metrics: ClassVar = ('heldout_loss',)

    source: Any
    documents: int = schedule(0)  # 0: all of them
    rows: int = machine(16)  # of a batch

    def validate(self) -> None:
        if self.rows < 1 or self.documents < 0:
            raise ConfigError(f'rows = {self.rows} must be at least 1 and documents = {self.documents} not negative')

    def check(self, session: Any) -> None:
        docs = self.read(session)
        if docs.kind != 'text':
            docs.encoded(session.tokenizer).read_first()

    def read(self, session: Any) -> Documents:
        """Raises ConfigError for a source that is empty, or of other examples than the run's."""
        docs, run = self.source.open(), session.run
        if isinstance(run.data.form, Taught):
            raise ConfigError(
                'HeldOutObjective: a teacher is stored of the data that is trained on alone; take the hook out, or let '
                'the teacher be there'
            )
        if isinstance(run.data.form, Tasks):
            raise ConfigError(
                'HeldOutObjective: it is not told which task held-out documents are of; take the hook out'
            )
        if not len(docs):
            raise ConfigError('the held-out source holds no document; check its paths')
        run.data.check_kind('held out', docs)
        check_kind(run.objective, 'held out', docs.kind)
        return Head(docs, self.documents) if 0 < self.documents < len(docs) else docs

    def open(self, session: Any) -> 'OpenHeldOutObjective':
        return OpenHeldOutObjective(self, session)


class OpenHeldOutObjective:
    """The hook at work."""

    def __init__(self, config: HeldOutObjective, session: Any):
        self.session: Surroundings = session
        run, layout, graph, reference = session.run, session.layout, session.graph, session.graphs.reference
        self.frozen = session.frozen
        documents = config.read(session)
        parts = math.prod(layout.mesh.shape[axis] for axis in BATCH)
        self.rows = -(-config.rows // parts) * parts
        if reads_stored(run):
            documents = documents.encoded(session.tokenizer)
            documents = with_reference(run, documents, session.tokenizer, session.graphs.bare, layout, session.workdir)
        self.batches = functools.partial(held_out_rows, run.data, documents, session.tokenizer, self.rows)

        def sums(weights: dict[str, Array], frozen: Any, batch: Batch) -> dict[str, Array]:
            with sharding.use(layout):
                model, other = graph.bind(weights), frozen.model(reference)
                zero = jnp.zeros((), jnp.int32)
                loss, weight, sums = run.objective(model, batch, frozen=other, key=None, step=zero)
                scalars = {name: value for name, value in sums.items() if value.ndim == 0}
                return {'weight': weight, 'loss': loss, **scalars}

        self._program = Compiled('evaluation step', sums, out_shardings=layout.replicated)

    def __call__(self, step: int, weights: dict[str, Array]) -> dict[str, float]:
        with self.session.busy('eval', 'evaluating'):
            placed = (jax.tree.map(self._global, batch) for batch in self.batches())
            parts = [self._program(weights, self.frozen, batch) for batch in placed]
            # Sums of a batch are float32, the sum over batches is float64; all are dispatched before any is read.
            totals: dict[str, float] = {}
            for part in parts:
                totals = {name: totals.get(name, 0.0) + float(value) for name, value in part.items()}
        weight = totals.pop('weight', 0.0)
        if not weight:
            raise ConfigError('the held-out documents give nothing to predict; check their paths and field')
        means = {f'heldout_{name}': total / weight for name, total in totals.items()}
        right = f', accuracy {means["heldout_accuracy"]:.3f}' if 'heldout_accuracy' in means else ''
        self.session.print(f'step {step}: held-out loss {means["heldout_loss"]:.4f}{right}')
        return means

    def _global(self, whole: np.ndarray) -> Array:
        layout = self.session.layout
        place = layout.named(layout.rules.activations, 'BT'[: whole.ndim], whole.shape, 'the evaluation batch')
        local = hosts.local_rows(place, self.rows)
        return hosts.assemble(np.asarray(whole)[local], local, self.rows, place)

"""Held-out loss: perplexity and bits per byte over any source, once or as a hook while training."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from tpu_llm.arrays import Array, Batch
from tpu_llm.config import ConfigError, Periodic, machine, schedule
from tpu_llm.data.documents import Documents, Head
from tpu_llm.data.evaluation import gzip_bits_per_byte, held_out
from tpu_llm.data.tokenizer import Tokenizer
from tpu_llm.infer.hook import Surroundings
from tpu_llm.kernels.cross_entropy import Options, cross_entropy
from tpu_llm.models.graph import ModelGraph
from tpu_llm.parallel import hosts, sharding
from tpu_llm.parallel.compile import Compiled
from tpu_llm.parallel.rules import BATCH
from tpu_llm.parallel.sharding import Layout


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Sums over a source: nats of −log p over all targets, how many targets, and the bytes of its documents."""

    nats: float
    tokens: int
    raw_bytes: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.raw_bytes

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


class Evaluator:
    """Scores documents under a model; compiled once for batches of [rows, seq_len]."""

    def __init__(self, graph: ModelGraph, tokenizer: Tokenizer, layout: Layout, *, rows: int, seq_len: int):
        self.tokenizer = tokenizer
        self.rows, self.seq_len = rows, seq_len
        self.sharding = layout.named(layout.rules.activations, 'BT', (rows, seq_len), 'the evaluation batch')
        self.local = hosts.local_rows(self.sharding, rows)

        def nats(weights: dict[str, Array], batch: Batch) -> Array:
            with sharding.use(layout):
                model = graph.bind(weights)
                hidden = model.hidden(batch.tokens, segments=batch.segments, positions=batch.positions)
                options = Options(vocab_size=model.vocab_size, softcap=model.logit_softcap)
                kernel = model.unembedding()
                return cross_entropy(hidden, kernel, batch.targets, batch.weights, options, model.dtype)[1]

        self._program = Compiled('evaluation step', nats, out_shardings=layout.replicated)

    def __call__(self, weights: dict[str, Array], documents: Documents) -> Score:
        batches, raw_bytes = held_out(documents, self.tokenizer, self.rows, self.seq_len)
        return self.score(weights, batches, raw_bytes)

    def score(self, weights: dict[str, Array], batches: Iterable[Batch], raw_bytes: int) -> Score:
        # Sums of a batch are float32, the sum over batches is float64; all are dispatched before any is read.
        sums, tokens = [], 0
        for batch in batches:
            tokens += int(batch.weights.sum())
            placed = jax.tree.map(
                lambda x: hosts.assemble(np.asarray(x)[self.local], self.local, self.rows, self.sharding),
                batch,
            )
            sums.append(self._program(weights, placed))
        return Score(nats=float(sum(map(float, sums))), tokens=tokens, raw_bytes=raw_bytes)


@dataclasses.dataclass(kw_only=True, slots=True)
class HeldOut(Periodic):
    """A hook that scores `source`: its first `documents` every so many steps, all of it after the last.

    Logs heldout_loss (nats a token), bits_per_byte and, once at the end, what gzip -9 needs for the same bytes.
    """

    source: Any
    documents: int = schedule(0)  # 0: all of them each time
    rows: int = machine(16)  # of a batch

    def validate(self) -> None:
        if self.rows < 1 or self.documents < 0:
            raise ConfigError(f'rows = {self.rows} must be at least 1 and documents = {self.documents} not negative')

    def open(self, session: Any) -> 'OpenHeldOut':
        return OpenHeldOut(self, session)


class OpenHeldOut:
    """The hook at work."""

    def __init__(self, config: HeldOut, session: Any):
        self.session: Surroundings = session
        self.steps = session.steps
        documents = config.source.open()
        if not len(documents):
            raise ConfigError('the held-out source holds no document; check its paths')
        self.all = documents
        self.some = Head(documents, config.documents) if config.documents else documents
        parts = math.prod(session.layout.mesh.shape[axis] for axis in BATCH)
        self.evaluator = Evaluator(
            session.graph,
            session.tokenizer,
            session.layout,
            rows=-(-config.rows // parts) * parts,
            seq_len=session.run.data.seq_len,
        )

    def __call__(self, step: int, weights: dict[str, Array]) -> dict[str, float]:
        last = step == self.steps
        with self.session.busy('eval', 'evaluating'):
            score = self.evaluator(weights, self.all if last else self.some)
            values = {'heldout_loss': score.loss, 'bits_per_byte': score.bits_per_byte}
            if last:
                values['gzip_bits_per_byte'] = gzip_bits_per_byte(self.all, self.session.tokenizer)
        text = f'step {step}: held-out {score.bits_per_byte:.4f} bits per byte, perplexity {score.perplexity:.2f}'
        if last:
            text += f' ({score.raw_bytes:,} bytes; gzip -9 needs {values["gzip_bits_per_byte"]:.4f})'
        self.session.print(text)
        return values

"""Held-out loss: perplexity and bits per byte over any source, once or as a hook while training."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import jax
import numpy as np

from tpu_llm.arrays import Array, Batch
from tpu_llm.config import ConfigError, Periodic, machine, schedule
from tpu_llm.data.documents import Documents, Head
from tpu_llm.data.evaluation import gzip_bits_per_byte, held_out
from tpu_llm.data.tokenizer import Tokenizer
from tpu_llm.infer.hook import Surroundings
from tpu_llm.kernels.cross_entropy import Options, cross_entropy
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.graph import ModelGraph
from tpu_llm.parallel import hosts, sharding
from tpu_llm.parallel.compile import Compiled
from tpu_llm.parallel.rules import BATCH
from tpu_llm.parallel.sharding import Layout

Heard = Callable[[Batch, int], None]
_AHEAD = 2  # batches are dispatched while one is computed: the device does not wait, and few are held


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
                kernel, bias = model.unembedding(), model.logit_bias()
                return cross_entropy(hidden, kernel, batch.targets, batch.weights, options, model.dtype, bias)[1]

        self._program = Compiled('evaluation step', nats, out_shardings=layout.replicated)

    def __call__(self, weights: dict[str, Array], documents: Documents, heard: Heard = lambda batch, of: None) -> Score:
        """`heard` is told of each batch that is scored, and of how many bytes the documents are."""
        batches, raw_bytes = held_out(documents, self.tokenizer, self.rows, self.seq_len)
        return self.score(weights, batches, raw_bytes, heard)

    def score(
        self,
        weights: dict[str, Array],
        batches: Iterable[Batch],
        raw_bytes: int,
        heard: Heard = lambda batch, of: None,
    ) -> Score:
        # Sums of a batch are float32, the sum over batches is float64.
        sums, tokens = [], 0
        for batch in batches:
            tokens += int(batch.weights.sum())
            placed = jax.tree.map(
                lambda x: hosts.assemble(np.asarray(x)[self.local], self.local, self.rows, self.sharding),
                batch,
            )
            sums.append(self._program(weights, placed))
            if len(sums) > _AHEAD:
                sums[-1 - _AHEAD].block_until_ready()
            heard(batch, raw_bytes)
        return Score(nats=float(sum(map(float, sums))), tokens=tokens, raw_bytes=raw_bytes)


@dataclasses.dataclass(kw_only=True, slots=True)
class HeldOut(Periodic):
    """A hook that scores the first `documents` of `source` every so many steps, and all of it after the last, too.

    Logs heldout_loss (nats a token) and bits_per_byte, each time of the same documents. Where these are a part,
    the last step adds the same of all, as heldout_loss_all and bits_per_byte_all; these are what summary.json holds
    under the plain names. It also adds gzip_bits_per_byte, what gzip -9 needs for all.
    """

    metrics: ClassVar = ('heldout_loss', 'bits_per_byte')

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
        if not isinstance(session.run.model, DecoderConfig):
            raise ConfigError(
                f'HeldOut scores next tokens, and model is {type(session.run.model).__name__}; use HeldOutObjective'
            )
        documents = config.source.open()
        if not len(documents):
            raise ConfigError('the held-out source holds no document; check its paths')
        self.all = documents
        self.some = Head(documents, config.documents) if 0 < config.documents < len(documents) else documents
        parts = math.prod(session.layout.mesh.shape[axis] for axis in BATCH)
        self.evaluator = Evaluator(
            session.graph,
            session.tokenizer,
            session.layout,
            rows=-(-config.rows // parts) * parts,
            seq_len=session.run.data.seq_len,
        )

    def __call__(self, step: int, weights: dict[str, Array]) -> dict[str, float]:
        with self.session.busy('eval', 'evaluating'):
            score = self.evaluator(weights, self.some)
        values = {'heldout_loss': score.loss, 'bits_per_byte': score.bits_per_byte}
        part = f' (first {len(self.some)} of {len(self.all)} documents)' if self.some is not self.all else ''
        if part or step < self.steps:
            self._print(step, score, part)
        return values | self._whole(step, weights, score) if step == self.steps else values

    def _whole(self, step: int, weights: dict[str, Array], score: Score) -> dict[str, float]:
        """Scores all documents, unless `score` is of all, beside gzip."""
        values = {}
        if self.some is not self.all:
            with self.session.busy('eval', 'evaluating all documents'):
                score = self.evaluator(weights, self.all)
            values = {'heldout_loss_all': score.loss, 'bits_per_byte_all': score.bits_per_byte}
        with self.session.busy('eval', 'compressing with gzip'):
            gzip = gzip_bits_per_byte(self.all, self.session.tokenizer)
        self._print(step, score, f' ({score.raw_bytes:,} bytes; gzip -9 needs {gzip:.4f})')
        return values | {'gzip_bits_per_byte': gzip}

    def _print(self, step: int, score: Score, of: str) -> None:
        bits = f'held-out {score.bits_per_byte:.4f} bits per byte'
        self.session.print(f'step {step}: {bits}, perplexity {score.perplexity:.2f}{of}')

"""On-policy distillation: the student writes, and learns what the teacher would have said at each of its tokens.

So it is corrected where it goes wrong by itself, which texts of others never show (GKD with λ = 1: Agarwal et al.,
2023, arXiv 2306.13649, algorithm 1). There are no rewards, and no gradient flows through the writing. Every step has
a rollout of its own: as many responses as the batch has rows.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath

from tpu_llm.arrays import Array, Batch
from tpu_llm.config import ConfigError
from tpu_llm.data.lanes import Table
from tpu_llm.data.loader import open_tokenizer, opened
from tpu_llm.data.prompts import Asker
from tpu_llm.objectives.distill import Distill
from tpu_llm.parallel import hosts
from tpu_llm.parallel.sharding import Layout
from tpu_llm.rl import weighing
from tpu_llm.rl.prompts import PromptOrder, of_prompts
from tpu_llm.rl.rewards import Judged
from tpu_llm.rl.sampler import Sampler
from tpu_llm.train.run import Run as TrainRun
from tpu_llm.train.session import Session
from tpu_llm.train.setup import batch_sharding
from tpu_llm.train.state import TrainState

_FIELDS = tuple(field.name for field in dataclasses.fields(Batch))


@dataclasses.dataclass(kw_only=True, slots=True)
class OnPolicy(TrainRun):
    """`data` gives the prompts; its `seq_len` holds prompt and response, its `global_batch` is of responses."""

    objective: Any = dataclasses.field(default_factory=Distill)
    max_new_tokens: int
    template: str = ''  # as in `data.conversations`: '' is the tokenizer's own
    system: str = ''  # what prompts without a system message begin with
    sampling: float = 1.0  # temperature at which the student writes; that of the objective is another

    @property
    def prompt_length(self) -> int:
        """The tokens that a prompt may have."""
        return self.data.seq_len - self.max_new_tokens

    def validate(self) -> None:
        TrainRun.validate(self)
        if not self.steps:
            raise ConfigError('the length of a run that learns from what it writes is given in steps')
        if self.max_new_tokens < 1 or self.prompt_length < 1:
            raise ConfigError(
                f'max_new_tokens = {self.max_new_tokens} must be at least 1 and leave data.seq_len = '
                f'{self.data.seq_len} room for a prompt'
            )
        if not self.sampling > 0:
            raise ConfigError(f'sampling is {self.sampling}; it is a temperature above 0')

    def other_programs(self, graphs: Any, layout: Layout, state: Any, frozen: Any) -> dict[str, tuple[Any, int]]:
        sampler = Sampler(
            graphs.model,
            layout,
            prompt_length=self.prompt_length,
            max_new_tokens=self.max_new_tokens,
            temperature=self.sampling,
            stops=(0,),  # which ids these are, only the tokenizer knows, and no shape depends on it
            pad=0,
            vocab_size=self.model.vocab_size,
        )
        lowered = sampler.lower({**frozen.base, **state.params}, self.data.global_batch)
        return {'rollout': (lowered, self.max_new_tokens)}

    def open_feed(self, layout: Layout, workdir: epath.Path) -> Any:
        return WrittenFeed(self, layout, workdir)


class WrittenFeed:
    """The feed of `OnPolicy`; see `train.setup.Feed`."""

    def __init__(self, run: OnPolicy, layout: Layout, workdir: epath.Path):
        self.run, self.layout = run, layout
        self.tokenizer = open_tokenizer(run.data, workdir)
        self.documents = [of_prompts(name, docs) for name, docs in opened(run.data.mixture).items()]
        asker = Asker(self.tokenizer, run.template, run.system)
        self.order = PromptOrder(run.data, self.documents, asker, seed=run.seed, room=run.prompt_length)
        self.drawn = np.zeros(len(self.documents), np.int64)  # prompts taken of each source
        self.written = 0  # batches
        self.sampler: Sampler | None = None

    def next(self, session: Session, state: TrainState) -> tuple[Batch, Table, dict[str, float]]:
        """What the student answers to the next prompts, on the devices; the place in the prompts; and metrics."""
        self.sampler = self.sampler or self._sampler(session)
        prompts, self.drawn = self.order.take(self.drawn, self.run.data.global_batch)
        key = jax.random.fold_in(jax.random.key(self.run.seed), self.written)
        with session.ledger.phase('rollout'):
            weights = {**session.frozen.base, **state.params}
            written = self.sampler(weights, [prompt.ids for prompt in prompts], key)
        self.written += 1
        unjudged = Judged(np.zeros(len(prompts)), {})
        rows = weighing.rows(prompts, written, unjudged, self.run.data.seq_len, self.tokenizer.pad)
        told = {'response_tokens': float(written.lengths.mean()), 'finished': float(written.finished.mean())}
        return Batch(**{name: self._global(rows[name]) for name in _FIELDS}), self._table(), told

    def restore(self, table: Table) -> None:
        self.drawn = table['drawn'][0].copy()
        self.written = int(table['step'][0])

    def close(self) -> None:
        """Nothing is held open."""

    def _sampler(self, session: Session) -> Sampler:
        tokenizer = self.tokenizer
        return Sampler(
            session.graph,
            session.layout,
            prompt_length=self.run.prompt_length,
            max_new_tokens=self.run.max_new_tokens,
            temperature=self.run.sampling,
            stops=sorted({tokenizer.eos, *tokenizer.stops}),
            pad=tokenizer.pad,
            vocab_size=tokenizer.vocab_size,
        )

    def _table(self) -> Table:
        """Every host knows all of it: one row a host."""
        return {
            'lane': np.array([jax.process_index()]),
            'step': np.array([self.written]),
            'drawn': self.drawn[None].copy(),
        }

    def _global(self, whole: np.ndarray) -> Array:
        place = batch_sharding(self.layout, whole.shape)
        own = hosts.local_rows(place, len(whole))
        return hosts.assemble(whole[own], own, len(whole), place)

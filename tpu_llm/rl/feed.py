"""Batches of what the policy has just written: prompts → responses → rewards → advantages → rows.

A rollout serves several steps. The rows that are left of it are part of the place in the data, so they are saved with
each checkpoint, and a run that was cut off goes on with the very responses that it had.
"""

import contextlib
import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from etils import epath

from tpu_llm.arrays import Array, Batch, RolloutBatch
from tpu_llm.checkpoint import agree
from tpu_llm.data.lanes import Table
from tpu_llm.data.loader import open_tokenizer, opened
from tpu_llm.data.prompts import Asker
from tpu_llm.parallel import hosts
from tpu_llm.parallel.sharding import Layout
from tpu_llm.rl import rewards, weighing
from tpu_llm.rl.prompts import Prompt, PromptOrder, of_prompts
from tpu_llm.rl.rewards import Judged, Panel
from tpu_llm.rl.run import Run
from tpu_llm.rl.sampler import Sampler, Written
from tpu_llm.rl.scorer import Scorer
from tpu_llm.train.session import Session
from tpu_llm.train.setup import batch_sharding
from tpu_llm.train.state import TrainState

_FIELDS = tuple(field.name for field in dataclasses.fields(RolloutBatch))


@dataclasses.dataclass(slots=True)
class _Hand:
    """A rollout in hand, and how many steps have used it."""

    rows: dict[str, np.ndarray]  # on the host, the fields of its batches that this run has
    number: int  # of the rollout, from 0: what its draws depend on
    used: int = 0


class RolloutFeed:
    """The feed of `rl.Run`; see `train.setup.Feed`."""

    def __init__(self, run: Run, layout: Layout, workdir: epath.Path):
        self.run, self.layout = run, layout
        self.tokenizer = open_tokenizer(run.data, workdir)
        self.documents = [of_prompts(name, docs) for name, docs in opened(run.data.mixture).items()]
        rewards.check(run.rewards, self.documents, run.rollout.on_error)
        asker = Asker(self.tokenizer, run.rollout.template, run.rollout.system)
        self.order = PromptOrder(run.data, self.documents, asker, seed=run.seed, room=run.prompt_length)
        self.drawn = np.zeros(len(self.documents), np.int64)  # prompts taken of each source
        self.kl_weight = run.rollout.kl_penalty
        self.steps = run.responses // run.data.global_batch * run.rollout.epochs  # that a rollout serves
        self.hand: _Hand | None = None
        self.coming: _Hand | None = None  # written ahead
        self.told: dict[str, float] = {}
        self.tools: _Tools | None = None

    def next(self, session: Session, state: TrainState) -> tuple[Batch, Table, dict[str, float]]:
        """The next batch on the devices; the rollout in hand as rows of a table; metrics where a rollout is new."""
        told: dict[str, float] = {}
        if self.hand is None or self.hand.used == self.steps:
            self.hand = self._take(session, state)
            told, self.told = self.told, {}
        chosen = self._chosen(self.hand)
        fields = {name: self._global(rows[chosen]) for name, rows in self.hand.rows.items()}
        batch = RolloutBatch(**fields)
        self.hand.used += 1
        return batch, self._table(), told

    def close(self) -> None:
        """Nothing is held open."""

    def restore(self, table: Table) -> None:
        """Goes on with the rollout in hand when the table was taken."""
        self.drawn = table['drawn'][0].copy()
        self.kl_weight = float(table['kl_weight'][0])
        self.hand = _unpacked(table, 'hand')
        self.coming = _unpacked(table, 'coming') if 'coming.number' in table else None

    # ------------------------------------------------------------------------------------------------- a rollout

    def _take(self, session: Session, state: TrainState) -> _Hand:
        number = 0 if self.hand is None else self.hand.number + 1
        if not self.run.rollout.ahead:
            return self._write(session, state, number)
        hand = self.coming or self._write(session, state, number)
        self.coming = self._write(session, state, number + 1)
        return hand

    def _write(self, session: Session, state: TrainState, number: int) -> _Hand:
        run = self.run
        tools = self.tools = self.tools or _Tools(run, session)
        weights = {**session.frozen.base, **state.params}
        count = run.rollout.prompts
        with self._busy(session, 'the first rollout'):
            prompts, written, judged = self._judged(tools, weights, number, count, again=0)
        for again in range(1, run.rollout.redraw + 1):
            flat = weighing.flat_groups(judged.total, run.rollout.group)
            if not flat.any():
                break
            with self._busy(session, 'the first rollout'):
                new = self._judged(tools, weights, number, count, again=again)
            prompts, written, judged = weighing.replace_groups((prompts, written, judged), new, flat, run.rollout.group)
        rows = weighing.rows(prompts, written, judged, run.data.seq_len, self.tokenizer.pad)
        with self._busy(session, 'scoring'):
            rows |= tools.scorer(weights, session.frozen, rows)
        rows, told = weighing.weigh(run, rows, judged, self.kl_weight)
        self.told |= told | weighing.about(written, judged, run.rollout.group)
        self._steer()
        return _Hand(rows, number)

    def _busy(self, session: Session, text: str) -> contextlib.AbstractContextManager[None]:
        """Says what takes so long while programs are compiled."""
        first = self.hand is None
        return session.busy('rollout', text) if first else session.ledger.phase('rollout')

    def _judged(
        self, tools: '_Tools', weights: Mapping[str, Array], number: int, count: int, again: int
    ) -> tuple[list[Prompt], Written, Judged]:
        """Fresh prompts, what the policy answers, and what that is worth."""
        prompts, self.drawn = self.order.take(self.drawn, count)
        prompts = [prompt for prompt in prompts for _ in range(self.run.rollout.group)]
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.run.seed), number), again)
        written = tools.sampler(weights, [prompt.ids for prompt in prompts], key)
        samples = [
            written.sample(row, prompt.document, prompt.ids, self.tokenizer, prompt.where)
            for row, prompt in enumerate(prompts)
        ]
        with tools.session.ledger.phase('reward'):
            return prompts, written, tools.panel(samples)

    def _steer(self) -> None:
        """Lets the penalty follow its target: up where the divergence is above it, by at most a fifth of the error."""
        target = self.run.rollout.kl_target
        if target and 'kl_written' in self.told:
            error = np.clip(self.told['kl_written'] / target - 1, -0.2, 0.2)
            self.kl_weight *= float(1 + 0.1 * error)
            self.told['kl_weight'] = self.kl_weight

    # ------------------------------------------------------------------------------------------------------ rows

    def _chosen(self, hand: _Hand) -> np.ndarray:
        """The rows of the hand's next step; each epoch has them in an order of its own."""
        batches = len(hand.rows['tokens']) // self.run.data.global_batch
        epoch, at = divmod(hand.used, batches)
        order = np.random.default_rng([self.run.seed, hand.number, epoch]).permutation(len(hand.rows['tokens']))
        return order[at * self.run.data.global_batch :][: self.run.data.global_batch]

    def _global(self, whole: np.ndarray) -> Array:
        place = batch_sharding(self.layout, whole.shape)
        own = hosts.local_rows(place, len(whole))
        return hosts.assemble(whole[own], own, len(whole), place)

    def _table(self) -> Table:
        """This host's part of the rows, with what all of them share repeated."""
        assert self.hand is not None
        own = np.arange(jax.process_index(), self.run.responses, jax.process_count())
        table = {
            'lane': own,
            'step': np.zeros(len(own), np.int64),
            'drawn': np.tile(self.drawn, (len(own), 1)),
            'kl_weight': np.full(len(own), self.kl_weight),
        }
        for name, hand in (('hand', self.hand), ('coming', self.coming)):
            if hand is not None:
                table |= {f'{name}.{field}': rows[own] for field, rows in hand.rows.items()}
                table |= {
                    f'{name}.number': np.full(len(own), hand.number),
                    f'{name}.used': np.full(len(own), hand.used),
                }
        return table


class _Tools:
    """The programs of a rollout, and its judges."""

    def __init__(self, run: Run, session: Session):
        tokenizer = session.tokenizer
        self.session = session
        self.sampler = Sampler(
            session.graph,
            session.layout,
            prompt_length=run.prompt_length,
            max_new_tokens=run.rollout.max_new_tokens,
            temperature=run.objective.temperature,
            stops=sorted({tokenizer.eos, *tokenizer.stops}),
            pad=tokenizer.pad,
            vocab_size=tokenizer.vocab_size,
        )
        self.scorer = Scorer(run, session.graphs, session.layout)
        first = agree.first if jax.process_count() > 1 else None
        self.panel = Panel(
            run.rewards,
            session,
            on_error=run.rollout.on_error,
            timeout=run.rollout.timeout,
            first=first,
            skips='--config.rollout.on_error=skip',
        )


def _unpacked(table: Table, name: str) -> _Hand:
    rows = {field: table[f'{name}.{field}'] for field in _FIELDS if f'{name}.{field}' in table}
    return _Hand(rows, int(table[f'{name}.number'][0]), int(table[f'{name}.used'][0]))

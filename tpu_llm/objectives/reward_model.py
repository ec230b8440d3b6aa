"""Reward models: a scalar head learns how good a response is, from pairs, scores, rankings or judged steps.

With r the score where a value is marked, at a text's last position or at each step's, and s the logistic function:

    pairs       -log s(r(chosen) - r(rejected) - m)        (Bradley & Terry, 1952; m: Llama 2, arXiv 2307.09288, eq. 2)
    scores      (r - score)²
    rankings    -log of Π over places k of exp r_k / (sum over j ≥ k of exp r_j)            (Plackett, 1975; Luce, 1959)
    steps       -y log s(r) - (1 - y) log s(-r), y the share of a step that is right (Lightman et al., 2023, 2305.20050)

The loss is a sum over pairs, texts, rankings or steps, and its weight their number.
"""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tpu_llm.arrays import Array, Batch, Bool, Float, Int, Key, ScoredBatch
from tpu_llm.config import ConfigError
from tpu_llm.models.scalar_head import ScalarConfig
from tpu_llm.objectives.base import Sums, routing_sums
from tpu_llm.objectives.texts import in_pairs, per_text, summed, text_values

Losses = Float[Array, 'B P']


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """What is learned from: of each thing whether it is there, its loss, what else to tell of it, and its scores."""

    there: Bool[Array, 'B P']
    losses: Losses
    told: dict[str, Losses]
    score: Losses  # the mean of its scores
    square: Losses  # and of their squares


@dataclasses.dataclass(kw_only=True, slots=True)
class Reward(abc.ABC):
    """What all have in common.

    Metrics: `score`, the mean, and `spread`, the standard deviation of the scores of a microbatch; others are means as
    the loss is.
    """

    reads: ClassVar = ScoredBatch
    trains: ClassVar[Any] = ScalarConfig
    needs_frozen: ClassVar[bool] = False

    @abc.abstractmethod
    def judge(self, scores: Float[Array, 'B T'], batch: ScoredBatch) -> Judged:
        """Scores are of every position."""

    def __call__(
        self,
        model: Any,
        batch: Batch,
        *,
        frozen: Any,
        key: Key[Array, ''] | None,
        step: Int[Array, ''],
    ) -> tuple[Float[Array, ''], Float[Array, ''], Sums]:
        assert isinstance(batch, ScoredBatch)
        hidden, routing = model.routed(batch.tokens, segments=batch.segments, positions=batch.positions, key=key)
        judged = self.judge(model.scores(hidden).astype(jnp.float32), batch)
        there = judged.there
        count = jnp.sum(there, dtype=jnp.float32)
        extra, routed = routing_sums(routing, count)
        told = {name: summed(there, x) for name, x in judged.told.items()}
        score, square = summed(there, judged.score), summed(there, judged.square)
        each = jnp.maximum(count, 1.0)
        told |= {'score': score, 'spread': count * jnp.sqrt(jnp.maximum(square / each - (score / each) ** 2, 0.0))}
        return jnp.sum(jnp.where(there, judged.losses, 0.0)) + extra, count, {**told, **routed}


def text_scores(scores: Float[Array, 'B T'], batch: ScoredBatch) -> tuple[Float[Array, 'B T'], Bool[Array, 'B T']]:
    """The score at each text's mark, and which texts there are."""
    marks = jnp.asarray(batch.marks)
    return per_text(scores * marks, batch.segments), per_text(marks, batch.segments) > 0


@dataclasses.dataclass(kw_only=True, slots=True)
class PairReward(Reward):
    """With `margins` the data's margin is what the scores must differ by. `centre` weighs (r(chosen) + r(rejected))²,
    which holds scores near 0 (Eisenstein et al., 2023, arXiv 2312.09244, section 2).

    Metrics: `accuracy`, `margin` (of scores), and `brier`, the calibration of sigmoid(margin) as a probability that the
    chosen one is better: the mean of (1 - sigmoid)², 0.25 for one that knows nothing.
    """

    kinds: ClassVar[tuple[str, ...]] = ('preference',)

    margins: bool = True
    centre: float = 0.0

    def validate(self) -> None:
        if self.centre < 0:
            raise ConfigError(f'centre is {self.centre}; it must not be negative')

    def judge(self, scores: Float[Array, 'B T'], batch: ScoredBatch) -> Judged:
        (chosen, there), (rejected, both) = in_pairs(text_scores(scores, batch))
        wanted, _ = in_pairs(text_values(batch))
        margin = chosen - rejected
        losses = jax.nn.softplus(wanted - margin if self.margins else -margin)
        told = {
            'margin': margin,
            'accuracy': (margin > 0).astype(jnp.float32),
            'brier': jnp.square(jax.nn.sigmoid(-margin)),
        }
        return Judged(
            there=there & both,
            losses=losses + self.centre * jnp.square(chosen + rejected),
            told=told,
            score=(chosen + rejected) / 2,
            square=(jnp.square(chosen) + jnp.square(rejected)) / 2,
        )


@dataclasses.dataclass(kw_only=True, slots=True)
class ScoreReward(Reward):
    """Metric `error` is the mean distance from the score. Give scores a mean near 0 and a spread near 1."""

    kinds: ClassVar[tuple[str, ...]] = ('rated',)

    def judge(self, scores: Float[Array, 'B T'], batch: ScoredBatch) -> Judged:
        found, there = text_scores(scores, batch)
        error = found - text_values(batch)
        return Judged(
            there=there,
            losses=jnp.square(error),
            told={'error': jnp.abs(error)},
            score=found,
            square=jnp.square(found),
        )


@dataclasses.dataclass(kw_only=True, slots=True)
class RankReward(Reward):
    """Metric `accuracy` is the share of a ranking's neighbours that are in order. A pair is a ranking of two."""

    kinds: ClassVar[tuple[str, ...]] = ('ranked', 'preference')

    def judge(self, scores: Float[Array, 'B T'], batch: ScoredBatch) -> Judged:
        found, there = text_scores(scores, batch)
        # Every number of a ranking stands in the column of its first text.
        lists = jnp.round(per_text(jnp.asarray(batch.marks) * batch.examples, batch.segments)).astype(jnp.int32)
        following = jnp.roll(lists, -1, axis=1).at[:, -1].set(0)
        neighbours = there & (following == lists)
        behind = jnp.where(neighbours, jnp.roll(found, -1, axis=1), found)
        rest = jax.vmap(_log_sums_behind)(found, lists)
        losses = per_text(jnp.where(neighbours, rest - found, 0.0), lists)
        size = per_text(there.astype(jnp.float32), lists)
        links = jnp.maximum(size - 1, 1)

        def mean(x: Array) -> Array:
            return per_text(jnp.where(there, x, 0.0), lists) / jnp.maximum(size, 1)

        right = per_text((neighbours & (found > behind)).astype(jnp.float32), lists)
        return Judged(
            there=size > 1,
            losses=losses,
            told={'accuracy': right / links},
            score=mean(found),
            square=mean(jnp.square(found)),
        )


def _log_sums_behind(scores: Float[Array, ' T'], lists: Int[Array, ' T']) -> Float[Array, ' T']:
    """log of the sum of exp of each score and those behind it in its list."""

    def join(behind: tuple[Array, Array], own: tuple[Array, Array]) -> tuple[Array, Array]:
        same = behind[1] == own[1]
        return jnp.where(same, jnp.logaddexp(behind[0], own[0]), own[0]), own[1]

    return jax.lax.associative_scan(join, (scores, lists), reverse=True)[0]


@dataclasses.dataclass(kw_only=True, slots=True)
class StepReward(Reward):
    """Metrics: `accuracy`, the share of steps of which the score's sign is the label's, and `brier` of sigmoid(r)."""

    kinds: ClassVar[tuple[str, ...]] = ('steps',)

    def judge(self, scores: Float[Array, 'B T'], batch: ScoredBatch) -> Judged:
        right = (1 + jnp.asarray(batch.values)) / 2
        return Judged(
            there=jnp.asarray(batch.marks) > 0,
            losses=jax.nn.softplus(scores) - right * scores,
            told={
                'accuracy': (scores * batch.values > 0).astype(jnp.float32),
                'brier': jnp.square(jax.nn.sigmoid(scores) - right),
            },
            score=scores,
            square=jnp.square(scores),
        )

"""Distillation: a student learns what a frozen teacher holds likely at each position, not only what stands there.

The formulas are those of `kernels/divergence.py`. The batch may be of any texts: those of a data set, of which the
weighted positions count (of conversations the responses), or what the student wrote itself (`rl/on_policy.py`).
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tpu_llm.arrays import Array, Batch, Float, Int, Key, TaughtBatch
from tpu_llm.config import ConfigError, machine
from tpu_llm.kernels.divergence import Head, Kind, Likely, Options, divergence, likely_divergence
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.projected import ProjectedConfig, ProjectedDecoder
from tpu_llm.objectives.base import Sums, routing_sums


@dataclasses.dataclass(kw_only=True, slots=True)
class Distill:
    """temperature² * divergence of student and teacher, and `labels` times −log p of the target, of weighted positions.

    With `hidden` above 0 the student's last hidden states h, or of another width W h, follow the teacher's t, too:
    `hidden` times |W h − t|² / |t|² is added (hints: Romero et al., 2014, arXiv 1412.6550; over |t|² it is 1 where the
    student knows nothing, whatever the teacher's scale). W is the map of `ProjectedConfig`.

    Metrics: `divergence` in nats, without temperature², `nll`, and with `hidden` that share, `hidden`.
    """

    reads: ClassVar[type[Batch]] = Batch
    trains: ClassVar[Any] = DecoderConfig
    needs_frozen: ClassVar[bool] = True  # the teacher

    divergence: Kind = 'forward'
    beta: float = 0.5  # of 'jensen_shannon': the teacher's share of the mean that both are compared with
    temperature: float = 1.0  # divides the logits of both
    labels: float = 0.0  # weight of `NextToken`'s loss beside it
    hidden: float = 0.0  # weight of how far the hidden states are apart
    chunk: int = machine(0)  # as NextToken's

    def validate(self) -> None:
        if not 0.0 < self.beta < 1.0:
            raise ConfigError(
                f"beta is {self.beta}; write a number between 0 and 1: at the ends are 'forward' and 'reverse'"
            )
        if not self.temperature > 0:
            raise ConfigError(f'temperature is {self.temperature}; it must be above 0')
        if min(self.labels, self.hidden, self.chunk) < 0:
            raise ConfigError(
                f'labels = {self.labels}, hidden = {self.hidden} and chunk = {self.chunk} must not be negative'
            )

    def check_models(self, student: Any, teacher: Any) -> None:
        """Of their configs. Raises ConfigError where hidden states that are to be compared have different widths."""
        maps = isinstance(student, ProjectedConfig)
        if maps and not self.hidden:
            raise ConfigError('model is a ProjectedConfig and objective.hidden = 0, so that its map would not learn')
        width = student.teacher_width if maps else student.width
        if self.hidden and width != teacher.width:
            raise ConfigError(
                f'objective.hidden = {self.hidden} compares hidden states, of width {width} and the '
                f"teacher's {teacher.width}; set model to ProjectedConfig.of(model, {teacher.width})"
            )

    def __call__(
        self,
        model: Any,
        batch: Batch,
        *,
        frozen: Any,
        key: Key[Array, ''] | None,
        step: Int[Array, ''],
    ) -> tuple[Float[Array, ''], Float[Array, ''], Sums]:
        assert model.vocab_size == frozen.vocab_size  # which the run checks
        hidden, routing = model.routed(batch.tokens, segments=batch.segments, positions=batch.positions, key=key)
        seen = jax.lax.stop_gradient(frozen.hidden(batch.tokens, segments=batch.segments, positions=batch.positions))
        loss, apart, nll = divergence(
            head(model, hidden), head(frozen, seen), batch.targets, batch.weights, self.options(model, frozen)
        )
        weight = jnp.sum(batch.weights)
        extra, routed = routing_sums(routing, weight)
        sums = {'divergence': apart, 'nll': nll}
        if self.hidden:
            sums['hidden'] = jnp.sum(batch.weights * _apart(model, hidden, seen))
            loss = loss + self.hidden * sums['hidden']
            sums['hidden'] = jax.lax.stop_gradient(sums['hidden'])
        return loss + extra, weight, sums | routed

    def options(self, model: Any, teacher: Any) -> Options:
        return Options(
            kind=self.divergence,
            vocab_size=model.vocab_size,
            beta=self.beta,
            temperature=self.temperature,
            labels=self.labels,
            softcap=model.logit_softcap,
            teacher_softcap=teacher.logit_softcap,
            chunk=self.chunk,
        )


def _apart(model: Any, hidden: Float[Array, 'B T D'], seen: Float[Array, 'B T Y']) -> Float[Array, 'B T']:
    own = model.projected(hidden) if isinstance(model, ProjectedDecoder) else hidden
    scale = jnp.maximum(jnp.sum(jnp.square(seen), axis=-1), 1e-12)
    return jnp.sum(jnp.square(own - seen), axis=-1) / scale


def head(model: Any, hidden: Float[Array, 'B T D']) -> Head:
    return Head(hidden, model.unembedding(), model.logit_bias(), jnp.dtype(model.dtype))


@dataclasses.dataclass(kw_only=True, slots=True)
class DistillStored:
    """`Distill` from what was stored of a teacher, at temperature 1: its likeliest tokens, and all others as one."""

    reads: ClassVar[type[Batch]] = TaughtBatch
    trains: ClassVar[Any] = DecoderConfig
    needs_frozen: ClassVar[bool] = False

    divergence: Kind = 'forward'
    beta: float = 0.5
    labels: float = 0.0
    chunk: int = machine(0)

    def validate(self) -> None:
        Distill(beta=self.beta, labels=self.labels, chunk=self.chunk).validate()

    def __call__(
        self,
        model: Any,
        batch: Batch,
        *,
        frozen: Any,
        key: Key[Array, ''] | None,
        step: Int[Array, ''],
    ) -> tuple[Float[Array, ''], Float[Array, ''], Sums]:
        assert isinstance(batch, TaughtBatch)
        hidden, routing = model.routed(batch.tokens, segments=batch.segments, positions=batch.positions, key=key)
        options = Options(
            kind=self.divergence,
            vocab_size=model.vocab_size,
            beta=self.beta,
            labels=self.labels,
            softcap=model.logit_softcap,
            chunk=self.chunk,
        )
        likely = Likely(batch.likely, batch.likely_log_probs, batch.rest)
        loss, apart, nll = likely_divergence(head(model, hidden), likely, batch.targets, batch.weights, options)
        weight = jnp.sum(batch.weights)
        extra, routed = routing_sums(routing, weight)
        return loss + extra, weight, {'divergence': apart, 'nll': nll} | routed

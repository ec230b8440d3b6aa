"""Learning from responses that were each found good or bad, without pairs: KTO (Ethayarajh et al., 2024,
arXiv 2402.01306, section 4).

    z = max(0, mean over mismatched pairs (x, y') of log π/μ(y' | x))
    loss = good * (1 - sigmoid(β (log π/μ(y | x) - z)))    of a good response, π being the policy, μ the reference
           bad * (1 - sigmoid(β (z - log π/μ(y | x))))     of a bad one

The paper estimates z, the divergence of policy and reference, over a microbatch in which each prompt is given the
response of another. Here a row of the batch is that microbatch: each prompt gets the response of the row's next text,
the last one that of the first. What is in a row does not depend on mesh, hosts or accumulation, so neither does z; and
as prompts and responses are only put together anew, the mismatched row is as long as the row. In a row of one text
nothing is mismatched, and z is 0: let rows hold several. No gradient flows through z.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import Array, Batch, Bool, Float, Int, Key, ScoredBatch
from tpu_llm.config import ConfigError, machine
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.objectives.base import Sums, routing_sums
from tpu_llm.objectives.texts import Said, per_text, policy_log_probs, reference_log_probs, said, summed, text_values

Columns = Float[Array, 'B T']


@dataclasses.dataclass(kw_only=True, slots=True)
class KTO:
    """The loss is a sum over texts and its weight the number of texts.

    Metrics: `kl` (z) and `accuracy`, how often the reward β log π/μ has the sign of the label. `reward_chosen`,
    `reward_rejected`, `log_prob_chosen` and `log_prob_rejected` are means over the good and over the bad responses of a
    microbatch, 0 where it has none; `margin` is the difference of the first two.
    """

    reads: ClassVar = ScoredBatch
    trains: ClassVar[Any] = DecoderConfig
    kinds: ClassVar[tuple[str, ...]] = ('labelled',)
    needs_frozen: ClassVar[bool] = True

    beta: float = 0.1
    good: float = 1.0  # weight of good responses, and below of bad ones: alike in sum, though one kind be rarer
    bad: float = 1.0
    chunk: int = machine(0)  # as NextToken's

    def validate(self) -> None:
        for name in ('beta', 'good', 'bad'):
            if not getattr(self, name) > 0:
                raise ConfigError(f'{name} is {getattr(self, name)}; it must be above 0')

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
        log_probs, routing = policy_log_probs(model, batch, key, self.chunk)
        texts = said(log_probs, reference_log_probs(frozen, batch, self.chunk), batch, batch.weights > 0)
        there = texts.length > 0
        count = jnp.sum(there, dtype=jnp.float32)
        labels, kl = text_values(batch), self.divergence(model, frozen, batch)
        loss = jnp.sum(jnp.where(there, self.losses(texts, labels, kl), 0.0))
        extra, routed = routing_sums(routing, count)
        return loss + extra, count, {**self.told(texts, labels, kl, there), **routed}

    def losses(self, texts: Said, labels: Columns, kl: Float[Array, 'B 1']) -> Columns:
        """Of each text; labels are 1 or -1."""
        weights = jnp.where(labels > 0, self.good, self.bad)
        return weights * jax.nn.sigmoid(-self.beta * labels * (texts.ratio - kl))

    def divergence(self, model: Any, frozen: Any, batch: Batch) -> Float[Array, 'B 1']:
        """z of each row."""
        other = mismatched(batch)
        graph, weights = nnx.split(model)
        log_probs = reference_log_probs(nnx.merge(graph, jax.lax.stop_gradient(weights)), other, self.chunk)
        texts = said(log_probs, reference_log_probs(frozen, other, self.chunk), other, other.weights > 0)
        count = jnp.sum(texts.length > 0, axis=1, keepdims=True)
        mean = jnp.sum(texts.ratio, axis=1, keepdims=True) / jnp.maximum(count, 1)
        return jnp.where(count > 1, jnp.maximum(mean, 0.0), 0.0)

    def told(self, texts: Said, labels: Columns, kl: Float[Array, 'B 1'], there: Bool[Array, 'B T']) -> Sums:
        reward = self.beta * texts.ratio
        sums = {
            'kl': summed(there, jnp.broadcast_to(kl, there.shape)),
            'accuracy': summed(there, (reward * labels > 0).astype(jnp.float32)),
        }
        count = jnp.sum(there, dtype=jnp.float32)
        for name, kind in (('chosen', there & (labels > 0)), ('rejected', there & (labels < 0))):
            share = count / jnp.maximum(jnp.sum(kind), 1)
            sums[f'reward_{name}'] = share * summed(kind, reward)
            sums[f'log_prob_{name}'] = share * summed(kind, texts.log_prob)
        return sums | {'margin': sums['reward_chosen'] - sums['reward_rejected']}


def mismatched(batch: Batch) -> Batch:
    """The rows with every prompt before the response of the row's next text, the last one's before the first's.

    Prompt and response are a text's pairs before its first of weight above 0, and those from there on.
    """
    segments, weights = jnp.asarray(batch.segments), jnp.asarray(batch.weights)
    place = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    responding = per_text_so_far(weights, segments) > 0
    # Of each text: its pairs, those of its prompt, where it starts, and which text comes after it.
    size = per_text((segments > 0).astype(jnp.float32), segments).astype(jnp.int32)
    prompt = size - per_text(responding.astype(jnp.float32), segments).astype(jnp.int32)
    start = jnp.cumsum(size, axis=1) - size
    count = jnp.sum(size > 0, axis=1, keepdims=True)
    after = jnp.where(place + 1 < count, place + 1, 0)
    response = jnp.take_along_axis(size - prompt, after, axis=1)
    # Where each text of the new row ends, hence which one a position is of.
    made = jnp.where(place < count, prompt + response, 0)
    end = jnp.cumsum(made, axis=1)
    text = jax.vmap(lambda ends: jnp.cumsum(jnp.bincount(ends, length=len(ends) + 1))[:-1])(end)
    there = text < count
    text = jnp.minimum(text, jnp.maximum(count - 1, 0))

    def of(columns: Int[Array, 'B T']) -> Int[Array, 'B T']:
        return jnp.take_along_axis(columns, text, axis=1)

    offset = place - of(end - made)
    behind = offset - of(prompt)  # how far in the response; its first pair's input is the prompt's last token
    own = of(start) + offset
    follower = of(jnp.take_along_axis(start + prompt, after, axis=1)) + behind
    take = {'tokens': jnp.where(behind <= 0, own, follower), 'targets': jnp.where(behind < 0, own, follower)}
    take['weights'] = take['targets']
    found = {
        name: jnp.where(there, jnp.take_along_axis(jnp.asarray(getattr(batch, name)), jnp.where(there, at, 0), 1), 0)
        for name, at in take.items()
    }
    return Batch(**found, segments=jnp.where(there, text + 1, 0), positions=jnp.where(there, offset, 0))


def per_text_so_far(x: Float[Array, 'B T'], segments: Int[Array, 'B T']) -> Float[Array, 'B T']:
    """The sum over a position's own text, up to it."""
    total = jnp.cumsum(x, axis=1)
    before = jnp.pad(total, ((0, 0), (1, 0)))[:, :-1]
    first = segments != jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
    return total - jax.lax.cummax(jnp.where(first, before, 0.0), axis=1)

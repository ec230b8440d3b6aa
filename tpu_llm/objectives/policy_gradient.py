"""Policy gradients of responses that the policy wrote: PPO's clipped ratio and its kin.

One dataclass covers them, as they differ in few choices:

    PPO        clip 0.2 | 0.2, tokens, a value loss, advantages by GAE        (Schulman et al., 2017, arXiv 1707.06347)
    GRPO       clip 0.2 | 0.2, sequences, KL k3 in the loss                   (Shao et al., 2024, arXiv 2402.03300)
    Dr. GRPO   a constant length instead of each response's own               (Liu et al., 2025, arXiv 2503.20783)
    DAPO       clip 0.2 | 0.28, tokens, no KL                                 (Yu et al., 2025, arXiv 2503.14476)
    GSPO       the ratio of whole sequences, clip 3e-4 | 4e-4                 (Zheng et al., 2025, arXiv 2507.18071)
    RLOO       sequences, no clip: REINFORCE with a leave-one-out baseline    (Ahmadian et al., 2024, arXiv 2402.14740)

Advantages come with the batch (`rl/advantages.py`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from tpu_llm.arrays import AnyArray, Array, Batch, Float, Int, Key, RolloutBatch
from tpu_llm.config import ConfigError, machine
from tpu_llm.kernels.cross_entropy import Options
from tpu_llm.kernels.token_log_probs import token_log_probs
from tpu_llm.kernels.token_losses import OfTokens, token_losses
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.scalar_head import ScalarConfig
from tpu_llm.objectives.base import Sums, routing_sums

Estimator = Literal['k1', 'k2', 'k3']


@dataclasses.dataclass(kw_only=True, slots=True)
class PolicyGradient:
    """-min(r A, clip(r) A) for each token of a response, r being its probability now over that when it was written.

    Metrics, all means over tokens: `kl` to the reference (k3), `clipped` (the share of tokens whose gradient the clip
    cut off), `ratio`, `moved` (k3 between the policy now and the one that wrote), `sampler_gap` (how far sampler and
    trainer are apart in the log-probs of the policy that wrote), `value_loss`.
    """

    reads: ClassVar = RolloutBatch
    trains: ClassVar[Any] = DecoderConfig
    needs_frozen: ClassVar[bool] = False  # the reference's log-probs come with the batch

    clip_low: float = 0.2  # the ratio stays above 1 - this …
    clip_high: float = 0.2  # … and below 1 + this; both 0: no clip
    ratio: Literal['token', 'sequence'] = 'token'
    average: Literal['tokens', 'sequences', 'length'] = 'sequences'  # what the loss is a mean over
    length: int = 0  # for 'length': what every response's sum is divided by
    kl: float = 0.0  # weight of the divergence from the reference
    estimator: Estimator = 'k3'
    correction: float = 0.0  # where above 0: ratios of trainer to sampler at writing time, cut at this, weigh tokens
    value: float = 0.0  # weight of the critic's loss; above 0 the model has a scalar head
    value_clip: float = 0.2  # how far a value may move from what it was; 0: as far as it likes
    temperature: float = 1.0  # at which the policy writes
    chunk: int = machine(0)  # as NextToken's

    def validate(self) -> None:
        if not 0 <= self.clip_low < 1 or self.clip_high < 0 or (self.clip_low == 0) != (self.clip_high == 0):
            raise ConfigError(
                f'clip_low = {self.clip_low} must be from 0 to below 1 and clip_high = {self.clip_high} above 0, or '
                'both be 0 for no clip'
            )
        if (self.average == 'length') != (self.length > 0):
            raise ConfigError(f"average = {self.average!r} and length = {self.length}: 'length' takes a length above 0")
        for name in ('kl', 'correction', 'value', 'value_clip'):
            if getattr(self, name) < 0:
                raise ConfigError(f'{name} is {getattr(self, name)}; it must not be negative')
        if not self.temperature > 0:
            raise ConfigError(f'temperature is {self.temperature}; it must be above 0')

    def __call__(
        self,
        model: Any,
        batch: Batch,
        *,
        frozen: Any,
        key: Key[Array, ''] | None,
        step: Int[Array, ''],
    ) -> tuple[Float[Array, ''], Float[Array, ''], Sums]:
        assert isinstance(batch, RolloutBatch)
        hidden, routing = model.routed(batch.tokens, segments=batch.segments, positions=batch.positions, key=key)
        count = batch.advantages.shape[1]  # the last columns hold the responses, and nothing else is looked at
        hidden, targets, mask = (jnp.asarray(x)[:, -count:] for x in (hidden, batch.targets, batch.weights))
        told, weights = self._told(batch), self.weigh(mask)
        present = [name for name in _OF_TOKENS if getattr(batch, name) is not None]

        def of_tokens(log_probs: Array, weights: Array, mask: Array, *rows: Array) -> tuple[Array, ...]:
            loss, means = self.policy_loss(log_probs, mask, Tokens(**dict(zip(present, rows, strict=True))))
            return weights * loss, *(mask * means[name] for name in told)

        rows = weights, mask, *(getattr(batch, name) for name in present)
        total, *sums = self._summed(model, hidden, targets, rows, of_tokens)
        sums = dict(zip(told, sums, strict=True))
        if self.value:
            error = self.value_loss(model.scores(hidden), mask, batch)
            total += self.value * jnp.sum(weights * error)
            sums['value_loss'] = jnp.sum(mask * error)
        weight = jnp.sum(mask) if self.average == 'tokens' else jnp.sum(jnp.any(mask > 0, axis=1), dtype='f')
        extra, routed = routing_sums(routing, weight)
        # Means over tokens of each kind of number, whatever the loss is a mean of.
        share = weight / jnp.maximum(jnp.sum(mask), 1.0)
        sums = {name: share * jax.lax.stop_gradient(total) for name, total in sums.items()}
        return total + extra, weight, sums | routed

    def _summed(
        self, model: Any, hidden: Array, targets: Array, rows: Sequence[AnyArray], of_tokens: OfTokens
    ) -> Sequence[Array]:
        """The sums of what is known of each token."""
        if self.ratio == 'token':
            head = model.unembedding(), targets, rows, of_tokens, _options(model, self.chunk), jnp.dtype(model.dtype)
            return token_losses(hidden, *head, model.logit_bias(), self.temperature)
        own = response_log_probs(model, hidden, targets, temperature=self.temperature, chunk=self.chunk)
        return [each.sum() for each in of_tokens(own, *rows)]

    def _told(self, batch: RolloutBatch) -> tuple[str, ...]:
        return 'ratio', 'clipped', 'moved', 'sampler_gap', *(['kl'] if batch.reference is not None else [])

    def weigh(self, mask: Float[Array, 'B T']) -> Float[Array, 'B T']:
        """What each token's loss counts for; the sum is divided by tokens or by sequences."""
        if self.average == 'tokens':
            return mask
        if self.average == 'length':
            return mask / self.length
        return mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0)

    def policy_loss(
        self, log_probs: Float[Array, 'B T'], mask: Float[AnyArray, 'B T'], tokens: 'Tokens'
    ) -> tuple[Float[Array, 'B T'], Sums]:
        """Each token's loss, and what is told of it; 0 where the mask is."""
        real = jnp.asarray(mask) > 0
        old = jax.lax.stop_gradient(log_probs) if tokens.old is None else tokens.old
        log_ratio = jnp.where(real, log_probs - old, 0.0)
        moved = jnp.exp(-log_ratio) - 1 + log_ratio
        if self.ratio == 'sequence':
            lengths = jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1)
            log_ratio = jnp.broadcast_to(jnp.sum(log_ratio, axis=1, keepdims=True) / lengths, real.shape)
        ratio = jnp.exp(log_ratio)
        gain = ratio * tokens.advantages
        clipped = jnp.zeros_like(gain)
        if self.clip_high:
            bounded = jnp.clip(ratio, 1 - self.clip_low, 1 + self.clip_high) * tokens.advantages
            clipped = (bounded < gain).astype(gain.dtype)
            gain = jnp.minimum(gain, bounded)
        gap = jnp.where(real, old - tokens.sampled, 0.0)
        if self.correction:
            gain = gain * jnp.minimum(jnp.exp(gap), self.correction)
        loss, told = -gain, {'ratio': ratio, 'clipped': clipped, 'moved': moved, 'sampler_gap': jnp.abs(gap)}
        if tokens.reference is not None:
            away = jnp.where(real, tokens.reference - log_probs, 0.0)
            told['kl'] = divergence(away, 'k3')
            if self.kl:
                loss = loss + self.kl * divergence(away, self.estimator)
        return jnp.where(real, loss, 0.0), told

    def value_loss(
        self, values: Float[Array, 'B T'], mask: Float[AnyArray, 'B T'], batch: RolloutBatch
    ) -> Float[Array, 'B T']:
        """Half the squared error, the larger of that and of a value that stays near what it was."""
        assert batch.values is not None
        assert batch.returns is not None
        error = jnp.square(values - batch.returns)
        if self.value_clip:
            near = batch.values + jnp.clip(values - batch.values, -self.value_clip, self.value_clip)
            error = jnp.maximum(error, jnp.square(near - batch.returns))
        return jnp.where(jnp.asarray(mask) > 0, 0.5 * error, 0.0)

    def check_model(self, model: Any) -> None:
        """Raises ConfigError where the critic has no head, or the temperature cannot be kept apart."""
        if self.temperature != 1.0 and model.logit_softcap:
            raise ConfigError(
                f'temperature = {self.temperature} and model.logit_softcap = {model.logit_softcap}: log-probs of '
                'capped logits are taken at temperature 1; set objective.temperature=1.0'
            )
        if (self.value > 0) != isinstance(model, ScalarConfig):
            raise ConfigError(
                f'objective.value = {self.value} and model is {type(model).__name__}: a critic is a ScalarConfig, and '
                'what has one trains it'
            )


@dataclasses.dataclass(frozen=True, slots=True)
class Tokens:
    """What a token's loss depends on besides its log p: fields of `RolloutBatch`, or some positions of these."""

    advantages: Float[AnyArray, 'B T']
    sampled: Float[AnyArray, 'B T']
    old: Float[AnyArray, 'B T'] | None = None
    reference: Float[AnyArray, 'B T'] | None = None


_OF_TOKENS = tuple(field.name for field in dataclasses.fields(Tokens))


def response_log_probs(
    model: Any,
    hidden: Float[Array, 'B T D'],
    targets: Int[AnyArray, 'B T'],
    *,
    temperature: float = 1.0,
    chunk: int = 0,
) -> Float[Array, 'B T']:
    """log p of the targets at a temperature, by the trainer's numerics."""
    head = model.unembedding(), targets, _options(model, chunk), jnp.dtype(model.dtype), model.logit_bias()
    return token_log_probs(hidden, *head, temperature)


def _options(model: Any, chunk: int) -> Options:
    return Options(vocab_size=model.vocab_size, softcap=model.logit_softcap, chunk=chunk)


def divergence(log_ratio: Array, estimator: Estimator) -> Array:
    """An estimate of KL(policy ‖ reference) from log(reference / policy) of what the policy drew (Schulman, 2020,
    'Approximating KL divergence'): k1 = -log r is unbiased, k2 = (log r)² / 2 is not and varies less, k3 = r - 1 -
    log r is and does.
    """
    if estimator == 'k1':
        return -log_ratio
    if estimator == 'k2':
        return 0.5 * jnp.square(log_ratio)
    return jnp.exp(log_ratio) - 1 - log_ratio

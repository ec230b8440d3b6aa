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
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from tpu_llm.arrays import Array, Batch, Float, Int, Key, RolloutBatch
from tpu_llm.config import ConfigError, machine
from tpu_llm.kernels.cross_entropy import Options
from tpu_llm.kernels.token_log_probs import token_log_probs
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.scalar_head import ScalarConfig
from tpu_llm.objectives.base import Sums, routing_sums

Estimator = Literal['k1', 'k2', 'k3']


@dataclasses.dataclass(kw_only=True, slots=True)
class PolicyGradient:
    """-min(r A, clip(r) A) for each token of a response, r being its probability now over that when it was written.

    Metrics, all means as the loss is: `kl` to the reference (k3), `clipped` (the share of tokens whose gradient the
    clip cut off), `ratio`, `moved` (k3 between the policy now and the one that wrote), `value_loss`.
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
        log_probs = response_log_probs(model, hidden, batch, temperature=self.temperature, chunk=self.chunk)
        weights = self.weigh(jnp.asarray(batch.weights))
        loss, sums = self.policy_loss(log_probs, batch)
        if self.value:
            error = self.value_loss(model.scores(hidden), batch)
            loss, sums = loss + self.value * error, sums | {'value_loss': error}
        total = jnp.sum(weights * loss)
        count = jnp.sum(weights) if self.average == 'tokens' else jnp.sum(jnp.any(batch.weights > 0, axis=1), dtype='f')
        extra, routed = routing_sums(routing, count)
        # Means over tokens of each kind of number, whatever the loss is a mean of.
        share = count / jnp.maximum(jnp.sum(batch.weights), 1.0)
        told = {name: jax.lax.stop_gradient(share * jnp.sum(batch.weights * x)) for name, x in sums.items()}
        return total + extra, count, told | routed

    def weigh(self, mask: Float[Array, 'B T']) -> Float[Array, 'B T']:
        """What each token's loss counts for; the sum is divided by tokens or by sequences."""
        if self.average == 'tokens':
            return mask
        if self.average == 'length':
            return mask / self.length
        return mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0)

    def policy_loss(self, log_probs: Float[Array, 'B T'], batch: RolloutBatch) -> tuple[Float[Array, 'B T'], Sums]:
        mask, advantages = jnp.asarray(batch.weights) > 0, jnp.asarray(batch.advantages)
        log_ratio = jnp.where(mask, log_probs - batch.old, 0.0)
        moved = jnp.exp(-log_ratio) - 1 + log_ratio
        if self.ratio == 'sequence':
            lengths = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
            log_ratio = jnp.broadcast_to(jnp.sum(log_ratio, axis=1, keepdims=True) / lengths, mask.shape)
        ratio = jnp.exp(log_ratio)
        gain = ratio * advantages
        clipped = jnp.zeros_like(gain)
        if self.clip_high:
            bounded = jnp.clip(ratio, 1 - self.clip_low, 1 + self.clip_high) * advantages
            clipped = (bounded < gain).astype(gain.dtype)
            gain = jnp.minimum(gain, bounded)
        if self.correction:
            written = jnp.exp(jnp.where(mask, jnp.asarray(batch.old) - batch.sampled, 0.0))
            gain = gain * jnp.minimum(written, self.correction)
        away = jnp.where(mask, batch.reference - log_probs, 0.0)
        loss = -gain if not self.kl else -gain + self.kl * divergence(away, self.estimator)
        sums = {'ratio': ratio, 'clipped': clipped, 'moved': moved, 'kl': divergence(away, 'k3')}
        return jnp.where(mask, loss, 0.0), sums

    def value_loss(self, values: Float[Array, 'B T'], batch: RolloutBatch) -> Float[Array, 'B T']:
        """Half the squared error, the larger of that and of a value that stays near what it was."""
        error = jnp.square(values - batch.returns)
        if self.value_clip:
            near = batch.values + jnp.clip(values - batch.values, -self.value_clip, self.value_clip)
            error = jnp.maximum(error, jnp.square(near - batch.returns))
        return jnp.where(jnp.asarray(batch.weights) > 0, 0.5 * error, 0.0)

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


def response_log_probs(
    model: Any, hidden: Float[Array, 'B T D'], batch: Batch, *, temperature: float = 1.0, chunk: int = 0
) -> Float[Array, 'B T']:
    """log p of the targets at a temperature, by the trainer's numerics."""
    options = Options(vocab_size=model.vocab_size, softcap=model.logit_softcap, chunk=chunk)
    dtype = jnp.dtype(model.dtype)
    return token_log_probs(hidden, model.unembedding(), batch.targets, options, dtype, model.logit_bias(), temperature)


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

"""Learning from pairs of responses, one of which was preferred: each method is a formula of the two.

With w the chosen and l the rejected response, π the policy and μ the reference, all log-probs of whole responses,
|y| their tokens, s the logistic function:

    DPO     -log s(β (log π/μ(w) - log π/μ(l)))                     (Rafailov et al., 2023, arXiv 2305.18290, eq. 7)
    rDPO    the same, unbiased though some labels are wrong         (Ray Chowdhury et al., 2024, arXiv 2403.00409)
    hinge   max(0, 1 - β (log π/μ(w) - log π/μ(l)))                 (Zhao et al., 2023, arXiv 2305.10425)
    IPO     (log π/μ(w) / |w| - log π/μ(l) / |l| - 1 / (2 β))²      (Azar et al., 2023, arXiv 2310.12036, eq. 17)
    CPO     -log s(β (log π(w) - log π(l))) - log π(w) / |w|        (Xu et al., 2024, arXiv 2401.08417)
    SimPO   -log s(β (log π(w) / |w| - log π(l) / |l|) - gamma)     (Meng et al., 2024, arXiv 2405.14734, eq. 6)
    ORPO    -log π(w) / |w| - β log s(log odds(w) - log odds(l))    (Hong et al., 2024, arXiv 2403.07691, eq. 6 and 7)

The loss is a sum over pairs and its weight the number of pairs. A pair of which a response has no token that counts is
none.
"""

import abc
import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from tpu_llm.arrays import Array, Batch, Float, Int, Key, ScoredBatch
from tpu_llm.config import ConfigError, machine
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.objectives.base import Sums, routing_sums
from tpu_llm.objectives.texts import (
    Said,
    in_pairs,
    policy_log_probs,
    reference_log_probs,
    said,
    summed,
    text_values,
)

Pairs = Float[Array, 'B P']


@dataclasses.dataclass(kw_only=True, slots=True)
class Preference(abc.ABC):
    """What all have in common.

    Metrics, means over pairs: `reward_chosen` and `reward_rejected` (what the method takes for a response's reward),
    `margin` between them, `accuracy` (how often the chosen one has more; half for a tie), `log_prob_chosen` and
    `log_prob_rejected` (of whole responses: where both fall, the policy forgets what it could say).
    """

    reads: ClassVar = ScoredBatch
    trains: ClassVar[Any] = DecoderConfig
    kinds: ClassVar[tuple[str, ...]] = ('preference',)

    beta: float = 0.1
    chunk: int = machine(0)  # as NextToken's

    def validate(self) -> None:
        if not self.beta > 0:
            raise ConfigError(f'beta is {self.beta}; it must be above 0')

    @property
    def needs_frozen(self) -> bool:
        return False

    @abc.abstractmethod
    def losses(self, chosen: Said, rejected: Said, margin: Pairs) -> Pairs:
        """Of each pair; `margin` is what the data says of how much better the chosen one is."""

    @abc.abstractmethod
    def reward(self, text: Said) -> Pairs: ...

    def reference_of(self, frozen: Any, batch: ScoredBatch) -> Any:
        """log p of the targets under the reference [B, T]; None without one."""
        del frozen, batch
        return None

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
        texts = said(log_probs, self.reference_of(frozen, batch), batch, batch.weights > 0)
        chosen, rejected = in_pairs(texts)
        margin, _ = in_pairs(text_values(batch))
        there = (chosen.length > 0) & (rejected.length > 0)
        count = jnp.sum(there, dtype=jnp.float32)
        loss = jnp.sum(jnp.where(there, self.losses(chosen, rejected, margin), 0.0))
        extra, routed = routing_sums(routing, count)
        return loss + extra, count, {**self.told(chosen, rejected, there), **routed}

    def told(self, chosen: Said, rejected: Said, there: Array) -> Sums:
        better, worse = self.reward(chosen), self.reward(rejected)
        each = {
            'reward_chosen': better,
            'reward_rejected': worse,
            'margin': better - worse,
            'accuracy': jnp.where(better == worse, 0.5, (better > worse).astype(jnp.float32)),
            'log_prob_chosen': chosen.log_prob,
            'log_prob_rejected': rejected.log_prob,
        }
        return {name: summed(there, x) for name, x in each.items()}


# ------------------------------------------------------------------------------------------------- with a reference


@dataclasses.dataclass(kw_only=True, slots=True)
class _Referenced(Preference):
    reference: Literal['model', 'stored'] = 'model'  # run beside the policy, or computed once and read from a file

    @property
    def needs_frozen(self) -> bool:
        return self.reference == 'model'

    def reference_of(self, frozen: Any, batch: ScoredBatch) -> Any:
        return batch.reference if self.reference == 'stored' else reference_log_probs(frozen, batch, self.chunk)

    def reward(self, text: Said) -> Pairs:
        return self.beta * text.ratio


@dataclasses.dataclass(kw_only=True, slots=True)
class DPO(_Referenced):
    """`label_smoothing` is the share of pairs that are taken to be the wrong way round (conservative DPO: Mitchell,
    2023, 'A note on DPO with noisy preferences'). With `offset` a the rewards are to differ by a times what
    the data has as margin (Amini et al., 2024, arXiv 2402.10571).
    """

    label_smoothing: float = 0.0
    offset: float = 0.0

    def validate(self) -> None:
        Preference.validate(self)
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f'label_smoothing is {self.label_smoothing}; write a share from 0 to below 0.5')
        if self.offset < 0:
            raise ConfigError(f'offset is {self.offset}; it must not be negative')

    def differences(self, chosen: Said, rejected: Said, margin: Pairs) -> Pairs:
        return self.reward(chosen) - self.reward(rejected) - self.offset * margin

    def losses(self, chosen: Said, rejected: Said, margin: Pairs) -> Pairs:
        h, wrong = self.differences(chosen, rejected, margin), self.label_smoothing
        return (1 - wrong) * jax.nn.softplus(-h) + wrong * jax.nn.softplus(h)


@dataclasses.dataclass(kw_only=True, slots=True)
class RobustDPO(DPO):
    """Its expectation over labels, of which the share `label_smoothing` is flipped, is DPO's loss with true labels."""

    label_smoothing: float = 0.1

    def losses(self, chosen: Said, rejected: Said, margin: Pairs) -> Pairs:
        h, wrong = self.differences(chosen, rejected, margin), self.label_smoothing
        return ((1 - wrong) * jax.nn.softplus(-h) - wrong * jax.nn.softplus(h)) / (1 - 2 * wrong)


@dataclasses.dataclass(kw_only=True, slots=True)
class Hinge(_Referenced):
    """SLiC's margin loss on DPO's rewards, as RSO has it (Liu et al., 2023, arXiv 2309.06657)."""

    def losses(self, chosen: Said, rejected: Said, margin: Pairs) -> Pairs:
        return jax.nn.relu(1 - (self.reward(chosen) - self.reward(rejected)))


@dataclasses.dataclass(kw_only=True, slots=True)
class IPO(_Referenced):
    """Log-ratios are a token's mean, which the paper leaves open and its authors use; `beta` is its τ."""

    def losses(self, chosen: Said, rejected: Said, margin: Pairs) -> Pairs:
        difference = chosen.per_token(chosen.ratio) - rejected.per_token(rejected.ratio)
        return jnp.square(difference - 1 / (2 * self.beta))

    def reward(self, text: Said) -> Pairs:
        return self.beta * text.per_token(text.ratio)


# ---------------------------------------------------------------------------------------------- without a reference


@dataclasses.dataclass(kw_only=True, slots=True)
class CPO(Preference):
    """`imitate` weighs -log p of the chosen response, a token's mean."""

    imitate: float = 1.0

    def validate(self) -> None:
        Preference.validate(self)
        if self.imitate < 0:
            raise ConfigError(f'imitate is {self.imitate}; it must not be negative')

    def losses(self, chosen: Said, rejected: Said, margin: Pairs) -> Pairs:
        h = self.reward(chosen) - self.reward(rejected)
        return jax.nn.softplus(-h) - self.imitate * chosen.per_token(chosen.log_prob)

    def reward(self, text: Said) -> Pairs:
        return self.beta * text.log_prob


@dataclasses.dataclass(kw_only=True, slots=True)
class SimPO(Preference):
    """The reward is a token's mean log-prob, and `gamma` how much more of it the chosen response is to have."""

    beta: float = 2.0
    gamma: float = 1.0

    def validate(self) -> None:
        Preference.validate(self)
        if self.gamma < 0:
            raise ConfigError(f'gamma is {self.gamma}; it must not be negative')

    def losses(self, chosen: Said, rejected: Said, margin: Pairs) -> Pairs:
        return jax.nn.softplus(self.gamma - (self.reward(chosen) - self.reward(rejected)))

    def reward(self, text: Said) -> Pairs:
        return self.beta * text.per_token(text.log_prob)


_CERTAIN = -1e-6  # mean log p of a token above which the odds would be infinite


@dataclasses.dataclass(kw_only=True, slots=True)
class ORPO(Preference):
    """The odds are p / (1 - p) of a token's mean log p; `beta` is the paper's λ."""

    def losses(self, chosen: Said, rejected: Said, margin: Pairs) -> Pairs:
        odds = _log_odds(chosen) - _log_odds(rejected)
        return self.beta * jax.nn.softplus(-odds) - chosen.per_token(chosen.log_prob)

    def reward(self, text: Said) -> Pairs:
        return self.beta * text.per_token(text.log_prob)


def _log_odds(text: Said) -> Pairs:
    mean = jnp.minimum(text.per_token(text.log_prob), _CERTAIN)
    return mean - jnp.log(-jnp.expm1(mean))

"""Which experts a token goes to, with what weight, and the losses that keep the experts busy alike."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import Array, Bool, Float, Int
from tpu_llm.config import ConfigError
from tpu_llm.nn.context import Context, Routing
from tpu_llm.nn.dropout import site_keys
from tpu_llm.nn.einsum import Einsum
from tpu_llm.nn.param import Constant, param


@dataclasses.dataclass(kw_only=True, slots=True)
class Router:
    """How tokens find experts.

    `choice`:
    'softmax_then_topk'  the k most probable of a softmax over all experts (Shazeer et al., 2017; Switch, DeepSeek-V2);
                         `normalise` makes their weights sum to 1 (Qwen3)
    'topk_then_softmax'  a softmax over the k largest logits (Mixtral)
    'sigmoid'            the k largest sigmoids, their weights divided by their sum (DeepSeek-V3, arXiv 2412.19437)
    'expert_choice'      each expert takes its most probable tokens of the row (Zhou et al., 2022, arXiv 2202.09368);
                         a token then depends on later ones, so this is for encoders and for study, not for decoding

    With `groups` > 1 a token first chooses `chosen_groups` groups of experts by their best expert (DeepSeek-V2) or,
    for 'sigmoid', by the sum of their best two (DeepSeek-V3), and then experts within them.

    `balance_loss` weighs E * sum over e of (share of choices e) * (mean probability e), which is 1 when balanced
    (Switch: Fedus et al., 2021, arXiv 2101.03961, eq. 4), taken over the whole batch or, with `balance_over='row'`,
    over each row and averaged (where every token counts alike, microbatches then change nothing). `z_loss` weighs the
    mean of log(sum of exp logits)² (ST-MoE: Zoph et al., 2022, arXiv 2202.08906). `bias_rate` balances without a
    loss: a bias joins the choice but not the weights, and moves by that much a step against each expert's excess load
    (DeepSeek-V3, §2.1.2).
    """

    choice: Literal['softmax_then_topk', 'topk_then_softmax', 'sigmoid', 'expert_choice'] = 'topk_then_softmax'
    normalise: bool = False
    scale: float = 1.0  # of the weights
    groups: int = 1
    chosen_groups: int = 1
    jitter: float = 0.0  # the router's input is multiplied by uniform(1 - jitter, 1 + jitter) in training (Switch)
    balance_loss: float = 0.01
    balance_over: Literal['batch', 'row'] = 'batch'
    z_loss: float = 0.0
    bias_rate: float = 0.0

    def check(self, experts: int, chosen: int) -> None:
        """Raises ConfigError where the fields do not go together, or not with so many experts."""
        if not 1 <= self.chosen_groups <= self.groups:
            raise ConfigError(f'router.chosen_groups = {self.chosen_groups} must be from 1 to groups = {self.groups}')
        if experts % self.groups:
            raise ConfigError(f'router.groups = {self.groups} does not divide experts = {experts}')
        within = experts // self.groups * self.chosen_groups
        if chosen > within:
            raise ConfigError(
                f'chosen = {chosen} experts a token, but {self.chosen_groups} of {self.groups} groups hold {within}'
            )
        if not 0.0 <= self.jitter < 1.0:
            raise ConfigError(f'router.jitter is {self.jitter}; write a number from 0 to below 1')
        for name in ('balance_loss', 'z_loss', 'bias_rate'):
            if getattr(self, name) < 0:
                raise ConfigError(f'router.{name} is {getattr(self, name)}; it must not be negative')
        if self.normalise and self.choice != 'softmax_then_topk':
            raise ConfigError(f"router.normalise is for 'softmax_then_topk'; with {self.choice!r} leave it out")
        if self.choice == 'expert_choice' and (self.groups > 1 or self.bias_rate or self.scale != 1.0):
            raise ConfigError(
                "router.choice = 'expert_choice' balances by itself and weighs by probability: leave out groups, "
                'bias_rate and scale'
            )
        if chosen == 1 and (self.normalise or self.choice in ('topk_then_softmax', 'sigmoid')):
            raise ConfigError(
                f'router.choice = {self.choice!r} gives a single expert weight 1, which teaches the router nothing; '
                "with chosen = 1 take 'softmax_then_topk' without normalise, as Switch does"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Where the tokens go. Padding has weight 0."""

    experts: Int[Array, 'B T X']  # each token's experts, best first
    weights: Float[Array, 'B T X']
    logits: Float[Array, 'B T E']
    probabilities: Float[Array, 'B T E']  # of the balance loss and the entropy; they sum to 1


class RouterLayer(nnx.Module):
    """The router's map and, for balancing without a loss, its bias. All of it is float32, whatever the model is."""

    def __init__(self, config: Router, width: int, experts: int, chosen: int):
        config.check(experts, chosen)
        self.map = Einsum('BTD,DE->BTE', {'D': width, 'E': experts})
        self.bias = param('E', (experts,), Constant(0.0), nudge=config.bias_rate) if config.bias_rate else None
        self.experts, self.chosen = experts, chosen
        self.choice: str = config.choice
        self.normalise, self.scale = config.normalise, config.scale
        self.groups, self.chosen_groups = config.groups, config.chosen_groups
        self.jitter = config.jitter
        # Experts that choose are as busy as one another.
        self.balance_loss = 0.0 if config.choice == 'expert_choice' else config.balance_loss
        self.z_loss = config.z_loss
        self.balance_over: str = config.balance_over

    def __call__(self, x: Float[Array, 'B T D'], context: Context, layer: Int[Array, ''] | int) -> Choice:
        logits = self.logits(x, context, layer)
        scores = jax.nn.sigmoid(logits) if self.choice == 'sigmoid' else jax.nn.softmax(logits)
        ranked = scores if self.bias is None else scores + jax.lax.stop_gradient(self.bias[...][None, None])
        _, experts = jax.lax.top_k(self._within_groups(ranked), self.chosen)
        if self.choice == 'topk_then_softmax':
            weights = jax.nn.softmax(jnp.take_along_axis(logits, experts, axis=-1))
        else:
            weights = jnp.take_along_axis(scores, experts, axis=-1)
            if self.normalise or self.choice == 'sigmoid':
                weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        weights = jnp.where(context.real[..., None], weights * self.scale, 0.0)
        total = scores.sum(axis=-1, keepdims=True)
        return Choice(experts=experts, weights=weights, logits=logits, probabilities=scores / total)

    def logits(self, x: Float[Array, 'B T D'], context: Context, layer: Int[Array, ''] | int) -> Float[Array, 'B T E']:
        x = x.astype(jnp.float32)
        if self.jitter and context.keys is not None:
            low, high, keys = 1 - self.jitter, 1 + self.jitter, site_keys(context.keys, 'router', layer)
            x = x * jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:], minval=low, maxval=high))(keys)
        # A TPU would round both sides to bfloat16, enough to change choices.
        with jax.default_matmul_precision('highest'):
            return self.map(x)

    def _within_groups(self, ranked: Float[Array, 'B T E']) -> Float[Array, 'B T E']:
        """Experts outside the token's best groups are out of the choice."""
        if self.chosen_groups == self.groups:
            return ranked
        grouped = ranked.reshape(*ranked.shape[:-1], self.groups, -1)
        best = jax.lax.top_k(grouped, min(2 if self.choice == 'sigmoid' else 1, grouped.shape[-1]))[0].sum(axis=-1)
        _, groups = jax.lax.top_k(best, self.chosen_groups)
        chosen = jax.nn.one_hot(groups, self.groups, dtype=bool).any(axis=-2)
        return jnp.where(chosen[..., None], grouped, -jnp.inf).reshape(ranked.shape)

    def routing(self, choice: Choice, real: Bool[Array, 'B T'], dropped: Float[Array, '']) -> Routing:
        """The losses and statistics of a choice."""
        hits = jax.nn.one_hot(choice.experts, self.experts, dtype=jnp.float32).mean(axis=-2)
        return self.statistics(hits, choice.logits, choice.probabilities, real, dropped)

    def statistics(
        self,
        hits: Float[Array, 'B T E'],
        logits: Float[Array, 'B T E'],
        probabilities: Float[Array, 'B T E'],
        real: Bool[Array, 'B T'],
        dropped: Float[Array, ''],
    ) -> Routing:
        """`hits` is each token's share of choices by expert; means are over real tokens."""
        mask = real.astype(jnp.float32)
        tokens = jnp.maximum(mask.sum(), 1.0)
        load = jnp.einsum('BTE,BT->E', hits, mask) / tokens
        entropy = (jax.scipy.special.entr(probabilities).sum(axis=-1) * mask).sum() / tokens
        loss = jnp.zeros(())
        if self.balance_loss:
            loss += self.balance_loss * self._imbalance(hits, probabilities, mask)
        if self.z_loss:
            loss += self.z_loss * (jax.nn.logsumexp(logits, axis=-1) ** 2 * mask).sum() / tokens
        if self.bias is not None:
            # Worth nothing, but its gradient is each expert's excess load: what the bias moves against.
            bias = self.bias[...]
            loss += jnp.sum((bias - jax.lax.stop_gradient(bias)) * jax.lax.stop_gradient(load - 1 / self.experts))
        return Routing(loss=loss, load=load, entropy=entropy, dropped=dropped)

    def _imbalance(
        self, hits: Float[Array, 'B T E'], probabilities: Float[Array, 'B T E'], mask: Float[Array, 'B T']
    ) -> Float[Array, '']:
        """E * sum over e of (share of choices) * (mean probability): 1 where all experts get the same."""
        over = (0, 1) if self.balance_over == 'batch' else (1,)
        tokens = mask.sum(axis=over)
        some = jnp.maximum(tokens, 1.0)[..., None]
        share = (hits * mask[..., None]).sum(axis=over) / some
        mean = (probabilities * mask[..., None]).sum(axis=over) / some
        each = self.experts * (jax.lax.stop_gradient(share) * mean).sum(axis=-1)
        return (each * tokens).sum() / jnp.maximum(tokens.sum(), 1.0)

"""From logits to the next token."""

import dataclasses

import jax
import jax.numpy as jnp

from tpu_llm.arrays import Array, Float, Int, Key
from tpu_llm.config import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class Greedy:
    """The likeliest token."""

    def __call__(self, logits: Float[Array, 'B V'], keys: Key[Array, ' B']) -> Int[Array, ' B']:
        return jnp.argmax(logits, axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A draw from softmax(logits / temperature), cut to the `top_k` likeliest tokens and then to the fewest whose
    probability reaches `top_p` (nucleus sampling: Holtzman et al., 2019, arXiv 1904.09751). 0 and 1 do not cut.
    Tokens exactly as likely as the last one kept stay too.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:  # nor NaN
            raise ConfigError(
                f'temperature is {self.temperature}; it must be above 0 (for the likeliest token use Greedy())'
            )
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f'top_k = {self.top_k} must not be negative, top_p = {self.top_p} be above 0 and at most 1'
            )

    def __call__(self, logits: Float[Array, 'B V'], keys: Key[Array, ' B']) -> Int[Array, ' B']:
        return jax.vmap(jax.random.categorical)(keys, self.cut(logits / self.temperature))

    def cut(self, logits: Float[Array, 'B V']) -> Float[Array, 'B V']:
        """Logits with −inf wherever a token cannot be drawn."""
        if self.top_k and self.top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.top_p < 1.0:
            ranked = jnp.sort(logits, axis=-1, descending=True)
            probabilities = jax.nn.softmax(ranked, axis=-1)
            # A token stays while the tokens before it have not yet reached top_p; the first always stays.
            stays = jnp.cumsum(probabilities, axis=-1) - probabilities < self.top_p
            least = jnp.min(jnp.where(stays, ranked, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return logits


@dataclasses.dataclass(frozen=True, slots=True)
class Until:
    """Draws as `drawing` does, but `end` in place of any of `ends`: for what ends a text in more ways than one."""

    drawing: Greedy | Sample
    ends: tuple[int, ...]
    end: int

    def __call__(self, logits: Float[Array, 'B V'], keys: Key[Array, ' B']) -> Int[Array, ' B']:
        drawn = self.drawing(logits, keys)
        return jnp.where(jnp.isin(drawn, jnp.asarray(self.ends, drawn.dtype)), self.end, drawn)


Sampling = Greedy | Sample | Until

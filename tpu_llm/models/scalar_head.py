"""A decoder that also gives a number for each position: what a reward model judges, and a critic expects."""

import dataclasses

import jax.numpy as jnp

from tpu_llm.arrays import Array, Float
from tpu_llm.config import validate
from tpu_llm.models.decoder import Decoder
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.nn.param import Normal, param
from tpu_llm.parallel.pipeline import Pipeline
from tpu_llm.parallel.sharding import constrain


@dataclasses.dataclass(kw_only=True, slots=True)
class ScalarConfig(DecoderConfig):
    """A decoder with a scalar head beside its vocabulary's. Weights of a plain decoder fit; the head is then drawn."""

    @classmethod
    def of(cls, config: DecoderConfig) -> 'ScalarConfig':
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(DecoderConfig)})

    def plain(self) -> DecoderConfig:
        """The same without the head."""
        return DecoderConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(DecoderConfig)})

    def make(self, *, vocab_multiple: int = 128, stages: int = 1, schedule: Pipeline | None = None) -> 'ScalarDecoder':
        validate(self, 'model')
        return ScalarDecoder(self, vocab_multiple=vocab_multiple, stages=stages, schedule=schedule)


class ScalarDecoder(Decoder):
    """`scores(hidden)` is one number a position (Stiennon et al., 2020, arXiv 2009.01325, section 3.4)."""

    def __init__(
        self, config: ScalarConfig, *, vocab_multiple: int = 128, stages: int = 1, schedule: Pipeline | None = None
    ):
        super().__init__(config, vocab_multiple=vocab_multiple, stages=stages, schedule=schedule)
        # As small as theirs: scores start near 0, and what is below learns before they grow.
        self.score = param('D', (config.width,), Normal((config.width + 1) ** -0.5), added=True)

    def scores(self, hidden: Float[Array, 'B T D']) -> Float[Array, 'B T']:
        """float32. Without a bias, which no difference of scores would notice."""
        return constrain(jnp.einsum('BTD,D->BT', hidden, self.score[...]), 'BT')

"""A decoder with a linear map to another width: a student whose hidden states are compared with its teacher's."""

import dataclasses

import jax.numpy as jnp

from tpu_llm.arrays import Array, Float
from tpu_llm.config import ConfigError, validate
from tpu_llm.models.decoder import Decoder
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.nn.param import Normal, param
from tpu_llm.parallel.pipeline import Pipeline
from tpu_llm.parallel.sharding import constrain


@dataclasses.dataclass(kw_only=True, slots=True)
class ProjectedConfig(DecoderConfig):
    """A decoder with a linear map to another width. Weights of a plain decoder fit, and the map is then drawn; and its
    weights fit a plain decoder, which leaves the map out.
    """

    teacher_width: int

    @classmethod
    def of(cls, config: DecoderConfig, teacher_width: int) -> 'ProjectedConfig':
        own = {field.name: getattr(config, field.name) for field in dataclasses.fields(DecoderConfig)}
        return cls(**own, teacher_width=teacher_width)

    def validate(self) -> None:
        DecoderConfig.validate(self)
        if self.teacher_width < 1:
            raise ConfigError(f'teacher_width is {self.teacher_width}; it is the width of the teacher')

    def make(
        self, *, vocab_multiple: int = 128, stages: int = 1, schedule: Pipeline | None = None
    ) -> 'ProjectedDecoder':
        validate(self, 'model')
        return ProjectedDecoder(self, vocab_multiple=vocab_multiple, stages=stages, schedule=schedule)


class ProjectedDecoder(Decoder):
    """`projected(hidden)` has the teacher's width (FitNets' regressor: Romero et al., 2014, arXiv 1412.6550)."""

    def __init__(
        self, config: ProjectedConfig, *, vocab_multiple: int = 128, stages: int = 1, schedule: Pipeline | None = None
    ):
        super().__init__(config, vocab_multiple=vocab_multiple, stages=stages, schedule=schedule)
        self.project = param('DY', (config.width, config.teacher_width), Normal(config.width**-0.5), added=True)

    def projected(self, hidden: Float[Array, 'B T D']) -> Float[Array, 'B T Y']:
        """float32."""
        return constrain(jnp.einsum('BTD,DY->BTY', hidden, self.project[...]), 'BTY')

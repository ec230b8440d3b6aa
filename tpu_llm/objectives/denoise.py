"""Denoising: −log p of each token of what was hidden, given what was left."""

import dataclasses
from typing import Any, ClassVar

from tpu_llm.arrays import Array, Batch, Float, Key, SourceBatch
from tpu_llm.models.encoder_decoder import EncoderDecoderConfig
from tpu_llm.nn.context import Routing
from tpu_llm.objectives.next_token import NextToken


@dataclasses.dataclass(kw_only=True, slots=True)
class Denoise(NextToken):
    """`NextToken` of the targets of an encoder-decoder, given their sources."""

    reads: ClassVar = SourceBatch
    trains: ClassVar = EncoderDecoderConfig

    def read(
        self, model: Any, batch: Batch, key: Key[Array, ''] | None
    ) -> tuple[Float[Array, 'B T D'], Routing | None]:
        assert isinstance(batch, SourceBatch)
        hidden = model.hidden(
            batch.source,
            batch.tokens,
            source_segments=batch.source_segments,
            target_segments=batch.segments,
            key=key,
        )
        return hidden, None

"""Prefix language modelling: −log p of each next token after a beginning that is given, and seen whole."""

import dataclasses
from typing import Any, ClassVar

from tpu_llm.arrays import Array, Batch, Float, Key, PrefixBatch
from tpu_llm.nn.context import Routing
from tpu_llm.objectives.next_token import NextToken


@dataclasses.dataclass(kw_only=True, slots=True)
class PrefixLM(NextToken):
    """`NextToken` of a decoder whose tokens all see the prefix (Raffel et al., 2019, arXiv 1910.10683, section 3.2)."""

    reads: ClassVar = PrefixBatch

    def read(
        self, model: Any, batch: Batch, key: Key[Array, ''] | None
    ) -> tuple[Float[Array, 'B T D'], Routing | None]:
        assert isinstance(batch, PrefixBatch)
        return model.routed(
            batch.tokens, segments=batch.segments, positions=batch.positions, prefix=batch.prefix, key=key
        )

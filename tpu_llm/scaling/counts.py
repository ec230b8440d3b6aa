"""What a model is and costs, by two counts: exactly, and as 6 N D has it."""

import dataclasses
from typing import Any

from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.encoder_decoder import EncoderDecoderConfig
from tpu_llm.models.flops_encoder import ModelConfig, active_parameters, train_flops
from tpu_llm.nn.param import count_parameters


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Parameters; FLOPs are of training, a token in a full row of `seq_len`."""

    parameters: int
    active: int  # without the experts that a token does not choose
    embeddings: int  # of tokens, and the head's where it has its own
    seq_len: int
    flops: float
    attention: float | None  # of these, the products of queries, keys and values; None for an encoder-decoder

    @property
    def six(self) -> float:
        """6 N, of active parameters: it counts embeddings that are only looked up, and leaves out attention."""
        return 6.0 * self.active


def count(model: ModelConfig, seq_len: int, target_len: int = 0) -> Counts:
    """Of any model that trains; `target_len` is of an encoder-decoder's rows."""
    return Counts(
        parameters=count_parameters(model.make()),
        active=active_parameters(model),
        embeddings=_embeddings(model),
        seq_len=seq_len,
        flops=train_flops(model, seq_len, target_len),
        attention=_attention(model, seq_len),
    )


def _embeddings(model: Any) -> int:
    """Only decoders may have a head of its own."""
    separate = isinstance(model, DecoderConfig) and not model.tied_embeddings
    width = (model.embed_width if isinstance(model, DecoderConfig) else 0) or model.width
    return (2 if separate else 1) * width * model.vocab_size


def _attention(model: ModelConfig, seq_len: int) -> float | None:
    """The rest is what a row of one token takes, without what it takes to see itself. A second token tells that: of
    two, a query sees one and a half keys in a decoder, two in an encoder.
    """
    if isinstance(model, EncoderDecoderConfig):
        return None
    each = train_flops(model, 1)
    if isinstance(model, DecoderConfig):
        itself = 2 * (train_flops(dataclasses.replace(model, windows=(0,)), 2) - each)
    else:
        itself = train_flops(model, 2) - each
    return train_flops(model, seq_len) - (each - itself)

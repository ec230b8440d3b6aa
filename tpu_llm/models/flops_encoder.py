"""How much encoders and encoder-decoders compute, counted as `flops` counts decoders; and the one that fits a model."""

from tpu_llm.models import flops
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.encoder import EncoderConfig
from tpu_llm.models.encoder_decoder import EncoderDecoderConfig
from tpu_llm.nn.param import count_parameters

ModelConfig = DecoderConfig | EncoderConfig | EncoderDecoderConfig


def train_flops(config: ModelConfig, seq_len: int, target_len: int = 0) -> float:
    """FLOPs of a training step by each of a row's `seq_len` tokens; an encoder-decoder's targets are of `target_len`.

    Rows are taken to be full, of one text.
    """
    if isinstance(config, DecoderConfig):
        return flops.train_flops(config, seq_len)
    if isinstance(config, EncoderConfig):
        return 3.0 * encoder_flops(config, seq_len)
    return 3.0 * encoder_decoder_flops(config, seq_len, target_len) / seq_len


def active_parameters(config: ModelConfig) -> int:
    """The parameters that a token meets."""
    return flops.active_parameters(config) if isinstance(config, DecoderConfig) else count_parameters(config.make())


def encoder_flops(config: EncoderConfig, seq_len: int) -> float:
    """FLOPs of one forward pass a token; with a head for masked tokens, of each."""
    head = config.width * (config.width + config.vocab_size) if config.masked_head else 0
    return _layer(config.tower(), seq_len) * config.layers + 2.0 * head


def encoder_decoder_flops(config: EncoderDecoderConfig, seq_len: int, target_len: int) -> float:
    """FLOPs of one forward pass a row: of `seq_len` tokens of source and `target_len` of target."""
    reading = seq_len * config.encoder_layers * _layer(config.tower(config.encoder_layers), seq_len)
    visible = flops.visible_keys(target_len, 0)
    writing = target_len * config.decoder_layers * _layer(config.tower(config.decoder_layers), visible)
    heads = config.heads * config.head_dim
    looking = 4.0 * heads * (config.width * (seq_len + target_len) + seq_len * target_len)
    head = 2.0 * target_len * config.width * config.vocab_size
    return reading + writing + config.decoder_layers * looking + head


def _layer(tower: DecoderConfig, keys: float) -> float:
    """FLOPs of a layer a token that sees so many keys."""
    maps = flops.attention_maps(tower) + flops.feed_forward_maps(tower, 0)
    return 2.0 * maps + 4.0 * tower.heads * tower.head_dim * keys

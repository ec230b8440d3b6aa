"""How much a model computes: the floating-point operations of its matmuls, exactly, and the parameters a token meets.

A multiply and an add are two operations. Counted are the linear maps, the head and the attention products over the
pairs that the mask allows (one more where distances score, as in Transformer-XL; the map of distances themselves, made
once for a whole batch, is not); norms, activations and softmax are not (they are not matmul work, and utilisation is
measured against the matmul peak). Of a state space they are those of its recurrence, which writes each number of the
state once and reads it once, however it is cut into chunks. Of a layer's experts a token meets those it chooses, the
shared ones and the router. What predicts further tokens than the next counts where it is trained only.
"""

import dataclasses

from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.nn.mlp import GATED, MLPKind
from tpu_llm.nn.param import count_parameters


def forward_flops(config: DecoderConfig, seq_len: int) -> float:
    """FLOPs of one forward pass a token, averaged over a row of `seq_len` tokens of one document."""
    ends = 2.0 * (config.embed_width or config.width) * config.vocab_size + 4.0 * config.embed_width * config.width
    return ends + sum(_layer_flops(config, layer, seq_len) for layer in range(config.layers))


def ahead_flops(config: DecoderConfig, seq_len: int) -> float:
    """The same, of what predicts further tokens: a depth has two maps of the width, a layer like the last, the head."""
    ends = 2.0 * config.width * (2 * config.width + config.vocab_size)
    return config.predict_ahead * (ends + _layer_flops(config, config.layers - 1, seq_len))


def _layer_flops(config: DecoderConfig, layer: int, seq_len: int) -> float:
    mla, ssm = config.mla, config.ssm
    if ssm and config.mixer(layer) == 'ssm':
        maps = ssm.maps(config.width) + feed_forward_maps(config, layer)
        return 2.0 * maps + 4.0 * ssm.expand * config.width * ssm.state
    key_and_value = config.head_dim + (mla.rope_dim + mla.value_dim if mla else config.head_dim)
    if config.position == 'transformer_xl':
        key_and_value += config.head_dim
    maps = attention_maps(config) + feed_forward_maps(config, layer)
    window = config.windows[layer % len(config.windows)]
    return 2.0 * maps + 2.0 * config.heads * key_and_value * visible_keys(seq_len, window)


def attention_maps(config: DecoderConfig) -> int:
    """Entries of the matrices that a token meets in a layer's attention."""
    mla = config.mla
    if mla is None:
        return config.width * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    source = mla.query_rank or config.width
    queries = config.width * mla.query_rank + source * config.heads * (config.head_dim + mla.rope_dim)
    keys_and_values = config.width * (mla.kv_rank + mla.rope_dim)
    keys_and_values += mla.kv_rank * config.heads * (config.head_dim + mla.value_dim)
    return queries + keys_and_values + config.heads * mla.value_dim * config.width


def feed_forward_maps(config: DecoderConfig, layer: int) -> int:
    """Entries of the matrices that a token meets in a layer's MLP, or in its router and experts."""
    moe = config.moe
    if moe is None or not moe.at(layer):
        return config.width * config.mlp_width * _maps(config.mlp)
    return config.width * (
        moe.experts + moe.shared_gate + (moe.chosen + moe.shared) * moe.expert_width * _maps(moe.mlp or config.mlp)
    )


def _maps(kind: MLPKind) -> int:
    return 3 if kind in GATED else 2


def active_parameters(config: DecoderConfig) -> int:
    """The model's parameters without the experts that a token does not choose."""
    total, moe = count_parameters(dataclasses.replace(config, predict_ahead=0).make()), config.moe
    if moe is None:
        return total
    idle = (moe.experts - moe.chosen) * config.width * moe.expert_width * _maps(moe.mlp or config.mlp)
    return total - idle * sum(map(moe.at, range(config.layers)))


def train_flops(config: DecoderConfig, seq_len: int) -> float:
    """FLOPs of a training step a token: the backward pass does twice the forward's work. Remat is not counted."""
    return 3.0 * (forward_flops(config, seq_len) + ahead_flops(config, seq_len))


def visible_keys(seq_len: int, window: int) -> float:
    """Keys a causal query sees, averaged over a row; `window` 0 is no limit."""
    if not window or window >= seq_len:
        return (seq_len + 1) / 2
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len

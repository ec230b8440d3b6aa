"""How much a model computes: the floating-point operations of its matmuls, exactly.

A multiply and an add are two operations. Counted are the linear maps, the head and the attention products over the
pairs that the mask allows; norms, activations and softmax are not (they are not matmul work, and utilisation is
measured against the matmul peak).
"""

from tpu_llm.models.decoder import DecoderConfig


def forward_flops(config: DecoderConfig, seq_len: int) -> float:
    """FLOPs of one forward pass a token, averaged over a row of `seq_len` tokens of one document."""
    attention_maps = config.width * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    mlp_maps = config.width * config.mlp_width * (3 if config.mlp in ('swiglu', 'geglu') else 2)
    flops = 2.0 * (config.layers * (attention_maps + mlp_maps) + config.width * config.vocab_size)
    for layer in range(config.layers):
        window = config.windows[layer % len(config.windows)]
        flops += 4.0 * config.heads * config.head_dim * visible_keys(seq_len, window)
    return flops


def train_flops(config: DecoderConfig, seq_len: int) -> float:
    """FLOPs of a training step a token: the backward pass does twice the forward's work. Remat is not counted."""
    return 3.0 * forward_flops(config, seq_len)


def visible_keys(seq_len: int, window: int) -> float:
    """Keys a causal query sees, averaged over a row; `window` 0 is no limit."""
    if not window or window >= seq_len:
        return (seq_len + 1) / 2
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len

"""What mixes the tokens of a decoder's layer, made of its config: attention, latent attention or a state space;
and what positions add.
"""

from collections.abc import Callable

from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.nn.attention import Attention
from tpu_llm.nn.mamba import Mamba, MambaLayer
from tpu_llm.nn.mamba2 import Mamba2, Mamba2Layer
from tpu_llm.nn.mla import LatentAttention
from tpu_llm.nn.norm import HeadNorm
from tpu_llm.nn.param import Init
from tpu_llm.nn.position import DistancePositions, LearnedPositions, RelativePositions, SinusoidalPositions


def make_attention(
    config: DecoderConfig, index: int, dropout: float, out_init: Callable[[int], Init]
) -> Attention | LatentAttention:
    """Of that layer; `out_init` draws the map back to the stream, given its fan-in."""
    window = config.windows[index % len(config.windows)]
    if config.mla:
        return LatentAttention(
            config.mla,
            config.width,
            config.heads,
            config.head_dim,
            window=window,
            scale=config.attention_scale,
            softcap=config.attention_softcap,
            eps=config.norm_eps,
            dropout=dropout,
            out_init=out_init(config.heads * config.mla.value_dim),
            impl=config.attention,
            sequence=config.sequence,
        )
    return Attention(
        config.width,
        config.heads,
        config.kv_heads,
        config.head_dim,
        window=window,
        scale=config.attention_scale,
        softcap=config.attention_softcap,
        clip=config.qkv_clip,
        norms=_head_norms(config),
        positions=_positions(config),
        turns=config.rope_layers[index % len(config.rope_layers)],
        dropout=dropout,
        bias=config.bias,
        out_init=out_init(config.heads * config.head_dim),
        impl=config.attention,
        sequence=config.sequence,
    )


def position_embed(config: DecoderConfig) -> LearnedPositions | SinusoidalPositions | None:
    """What is added to embeddings by position, or None."""
    if config.position == 'learned':
        return LearnedPositions(config.max_length, config.width, offset=config.position_offset)
    return SinusoidalPositions(config.width) if config.position == 'sinusoidal' else None


def make_state_space(config: DecoderConfig, out_init: Callable[[int], Init]) -> MambaLayer | Mamba2Layer:
    init = out_init((config.ssm.expand if config.ssm else 1) * config.width)
    if isinstance(config.ssm, Mamba2):
        return Mamba2Layer(config.ssm, config.width, eps=config.norm_eps, out_init=init)
    assert isinstance(config.ssm, Mamba)
    return MambaLayer(config.ssm, config.width, eps=config.norm_eps, out_init=init)


def _positions(config: DecoderConfig) -> DistancePositions | RelativePositions | None:
    """What a layer knows of distances by itself."""
    if config.position == 'transformer_xl':
        return DistancePositions(config.width, config.heads, config.head_dim)
    return RelativePositions(config.heads, std=config.width**-0.5) if config.position == 'relative_each' else None


def _head_norms(config: DecoderConfig) -> tuple[HeadNorm, HeadNorm] | None:
    """Of queries and of keys."""
    if config.qk_norm == 'none':
        return None
    heads = {'NH': config.heads, 'KH': config.kv_heads}
    query, key = (
        HeadNorm(config.norm, config.qk_norm, dims, (count, config.head_dim), eps=config.norm_eps)
        for dims, count in heads.items()
    )
    return query, key

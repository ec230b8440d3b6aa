"""The encoder-decoder: the encoder reads the source, the decoder writes the target and looks at what was read.

The 2017 Transformer (Vaswani et al., arXiv 1706.03762), T5 and its descendants (Raffel et al., 2019, arXiv 1910.10683),
BART (Lewis et al., 2019, arXiv 1910.13461). A target sees the source of its own segment, so that packed rows hold
several pairs.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import AnyArray, Array, Float, Int, Key
from tpu_llm.config import ConfigError, machine, to_json, validate
from tpu_llm.models.decoder import Block
from tpu_llm.models.decoder_config import Biased, DecoderConfig, Dropout
from tpu_llm.models.tower import Tower, as_rows
from tpu_llm.nn.cache import Cache, LayerCache
from tpu_llm.nn.context import Context, LayerOut, Source
from tpu_llm.nn.cross_attention import CrossAttention
from tpu_llm.nn.einsum import add_trailing
from tpu_llm.nn.embed import Embed, Head
from tpu_llm.nn.mlp import MLPKind
from tpu_llm.nn.norm import NORMS, NormKind
from tpu_llm.nn.param import Normal
from tpu_llm.nn.position import from_segments
from tpu_llm.parallel import sharding
from tpu_llm.parallel.sharding import constrain


@dataclasses.dataclass(kw_only=True, slots=True)
class EncoderDecoderConfig:
    """Both sides have the same shapes, each its own depth; `make()` builds the (abstract) module."""

    vocab_size: int
    width: int
    encoder_layers: int
    decoder_layers: int
    heads: int
    head_dim: int
    mlp_width: int
    mlp: MLPKind = 'relu'
    norm: NormKind = 'layer'
    norm_place: Literal['pre', 'post'] = 'post'
    norm_eps: float = 1e-6
    position: Literal['sinusoidal', 'learned', 'relative'] = 'sinusoidal'
    max_length: int = 0  # learned positions: how many there are, on each side
    position_offset: int = 0  # rows before the first in the tables of positions; no position uses them
    embed_norm: bool = False
    embed_scale: float = 1.0  # what embeddings of tokens are multiplied by
    bias: tuple[Biased, ...] = ()  # which linear maps have one
    attention_scale: float = 0.0  # what scores are multiplied by; 0: 1 / sqrt(head_dim)
    tied_embeddings: bool = True  # the embedding, of both sides, is the head's matrix too
    logit_scale: float = 1.0  # what logits are multiplied by
    start_token: int = 0  # what every target starts with
    dropout: Dropout | None = None
    dtype: Literal['float32', 'bfloat16'] = 'bfloat16'  # of activations; parameters are float32
    attention: str = machine('auto')  # of kernels.attention.IMPLS, or what suits device and length
    remat: str = machine('none')
    unroll: int = machine(1)  # layers a scan step runs; 0: all of them, no loop

    def tower(self, layers: int) -> DecoderConfig:
        """One side, in a decoder's words."""
        return DecoderConfig(
            vocab_size=self.vocab_size,
            width=self.width,
            layers=layers,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.head_dim,
            mlp_width=self.mlp_width,
            mlp=self.mlp,
            norm=self.norm,
            norm_place=self.norm_place,
            norm_eps=self.norm_eps,
            position=self.position,
            max_length=self.max_length,
            position_offset=self.position_offset,
            embed_norm=self.embed_norm,
            embed_scale=self.embed_scale,
            bias=self.bias,
            attention_scale=self.attention_scale,
            logit_scale=self.logit_scale,
            dropout=self.dropout,
            dtype=self.dtype,
            attention=self.attention,
            remat=self.remat,
            unroll=self.unroll,
        )

    def validate(self) -> None:
        for name in ('encoder_layers', 'decoder_layers'):
            if getattr(self, name) < 1:
                raise ConfigError(f'{name} is {getattr(self, name)}; it must be at least 1')
        self.tower(self.encoder_layers).validate()
        if not 0 <= self.start_token < self.vocab_size:
            raise ConfigError(f'start_token = {self.start_token} is no token: vocab_size is {self.vocab_size}')

    def make(self, *, vocab_multiple: int = 128) -> 'EncoderDecoder':
        """The abstract module; `nn.param.initialise(model, seed)` draws its parameters.

        Raises ConfigError for a config that cannot be.
        """
        validate(self, 'model')
        return EncoderDecoder(self, vocab_multiple=vocab_multiple)


class CrossBlock(Block):
    """One layer of the decoder: attention, attention to the source, MLP, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, index: int):
        super().__init__(config, index)
        self.cross_norm = NORMS[config.norm](config.width, eps=config.norm_eps)
        self.cross = CrossAttention(
            config.width,
            config.heads,
            config.head_dim,
            scale=config.attention_scale,
            dropout=(config.dropout or Dropout()).attention,
            bias=config.bias,
            out_init=Normal((2 * config.layers * config.heads * config.head_dim) ** -0.5),
            impl=config.attention,
        )

    def __call__(
        self,
        x: Float[Array, 'B T D'],
        context: Context,
        layer: Int[Array, ''] | int,
        cache: LayerCache | None,
    ) -> tuple[Float[Array, 'B T D'], LayerOut]:
        assert self.attention is not None
        y, kept = self.attention(self._before(self.attention_norm, x), context, layer, cache)
        x = self._joined(x, y, self.attention_norm, context, 'attention_out', layer)
        y = self.cross(self._before(self.cross_norm, x), context, layer, cache)
        x = self._joined(x, y, self.cross_norm, context, 'cross_out', layer)
        y, _ = self._feed_forward(self._before(self.mlp_norm, x), context, layer)
        return self._joined(x, y, self.mlp_norm, context, 'mlp_out', layer), LayerOut(cache=kept)

    def _joined(
        self, x: Array, y: Array, norm: nnx.Module | None, context: Context, site: str, layer: Int[Array, ''] | int
    ) -> Array:
        return constrain(self._behind(norm, x + self._added(y, None, context, site, layer)), 'BTD')


class EncoderDecoder(nnx.Module):
    """source, target → logits. Build it with `EncoderDecoderConfig(...).make()`."""

    def __init__(self, config: EncoderDecoderConfig, *, vocab_multiple: int):
        self.vocab_size = config.vocab_size
        self.described = to_json(config)  # what `save_pretrained` asks; no config object, which would not hash
        self.max_length = config.max_length if config.position == 'learned' else 0
        self.start_token = config.start_token
        self.embed_scale, self.logit_scale = config.embed_scale, config.logit_scale
        self.cached = (config.heads, config.head_dim)
        self.dtype: str = config.dtype
        self.logit_softcap = 0.0
        # Where logits are scaled down, embeddings start that much larger.
        std = config.width**-0.5 / config.logit_scale
        self.embed = Embed(config.vocab_size, config.width, multiple=vocab_multiple, std=std)
        self.encoder = Tower(config.tower(config.encoder_layers), Block, causal=False)
        self.decoder = Tower(config.tower(config.decoder_layers), CrossBlock, causal=True)
        tied, bias = config.tied_embeddings, 'head' in config.bias
        self.head = None
        if bias or not tied:
            head = Head(config.vocab_size, config.width, multiple=vocab_multiple, tied=tied, bias=bias)
            self.head = nnx.data(head)

    def __call__(
        self,
        source: Int[AnyArray, '*B S'],
        target: Int[AnyArray, '*B T'],
        *,
        source_segments: Int[AnyArray, 'B S'] | None = None,
        target_segments: Int[AnyArray, 'B T'] | None = None,
    ) -> Float[Array, 'B T V']:
        """Logits of the target's next tokens, float32; the target is already shifted right, and starts with
        `start_token`. Segment 0 is padding; tokens of equal segments see each other, and the source of that segment.

        Raises ValueError for tokens that are not in rows, and rows longer than the learned positions.
        """
        hidden = self.hidden(source, target, source_segments=source_segments, target_segments=target_segments)
        return self.logits(hidden)

    def hidden(
        self,
        source: Int[AnyArray, '*B S'],
        target: Int[AnyArray, '*B T'],
        *,
        source_segments: Int[AnyArray, 'B S'] | None = None,
        target_segments: Int[AnyArray, 'B T'] | None = None,
        key: Key[Array, ''] | None = None,
    ) -> Float[Array, 'B T D']:
        """The target's last hidden states, float32. Only where a key is given is anything drawn (dropout)."""
        source, source_segments = as_rows(source, source_segments)
        target, target_segments = as_rows(target, target_segments)
        # What each side draws is its own.
        reading, writing = (None, None) if key is None else jax.random.split(key)
        encoded = self.encode(source, segments=source_segments, key=reading)
        x, _ = self.decoder(
            self._embedded(target),
            target_segments,
            from_segments(target_segments),
            source=Source(segments=source_segments, hidden=encoded),
            key=writing,
        )
        return x

    def encode(
        self,
        source: Int[AnyArray, '*B S'],
        *,
        segments: Int[AnyArray, 'B S'] | None = None,
        key: Key[Array, ''] | None = None,
    ) -> Float[Array, 'B S D']:
        """The source's last hidden states, float32."""
        source, segments = as_rows(source, segments)
        return self.encoder(self._embedded(source), segments, from_segments(segments), key=key)[0]

    def start_cache(
        self, encoded: Float[Array, 'B S D'], length: int, *, segments: Int[AnyArray, 'B S'] | None = None
    ) -> Cache:
        """A cache of `length` slots for targets of these sources (`segments` are theirs), in the compute dtype.

        The source's keys and values are computed here, once.
        """
        batch, rows = encoded.shape[:2]
        segments = jnp.ones((batch, rows), jnp.int32) if segments is None else jnp.asarray(segments)
        x = encoded.astype(self.dtype)
        sources = self.decoder.stack.each(lambda block: block.cross.look_at(x))
        layers = []
        for stacked, source in zip(self.decoder.stack.cache_shapes(), sources, strict=True):
            lead, (heads, width) = (stacked, batch) if stacked else (batch,), self.cached
            keys, values = (jnp.zeros((*lead, heads, length, width), self.dtype) for _ in range(2))
            layers.append(LayerCache(keys=keys, values=values, source=_placed(source)))
        seen = [jnp.zeros((batch, length), jnp.int32) for _ in range(2)]
        return Cache(
            layers=layers,
            segments=seen[0],
            positions=seen[1],
            index=jnp.zeros((), jnp.int32),
            source_segments=segments,
        )

    def extend(
        self,
        tokens: Int[Array, 'B T'],
        cache: Cache,
        *,
        segments: Int[Array, 'B T'],
        positions: Int[Array, 'B T'],
    ) -> tuple[Float[Array, 'B T D'], Cache]:
        """Hidden states of T tokens of the target that follow what `cache` holds, and the cache with them in it.

        Raises ValueError for more tokens than it has slots left; where a traced index hides that, they come out as NaN.
        """
        assert cache.source_segments is not None
        source = Source(segments=cache.source_segments)
        room = cache.has_room(tokens.shape[1])
        cache = cache.append(segments, positions)
        hidden, outs = self.decoder(self._embedded(tokens), segments, positions, source=source, cache=cache)
        layers = [
            dataclasses.replace(out.cache, source=old.source)
            for out, old in zip(outs, cache.layers, strict=True)
            if isinstance(out.cache, LayerCache) and isinstance(old, LayerCache)
        ]
        hidden = jnp.where(room, hidden, jnp.nan)
        return hidden, dataclasses.replace(cache, layers=layers, index=cache.index + tokens.shape[1])

    def logits(self, hidden: Float[Array, 'B T D']) -> Float[Array, 'B T V']:
        """float32 logits over the real vocabulary."""
        kernel = self.unembedding().astype(self.dtype)
        logits = jnp.einsum('BTD,DV->BTV', hidden.astype(self.dtype), kernel, preferred_element_type=jnp.float32)
        bias = self.logit_bias()
        logits = logits if bias is None else add_trailing(logits, bias)
        return constrain(logits, 'BTV')[..., : self.vocab_size]

    def unembedding(self) -> Float[Array, 'D V']:
        """The matrix from hidden states to logits, scaled, its vocabulary padded."""
        own = None if self.head is None else self.head.kernel
        return self._scaled(self.embed.table[...].T if own is None else own[...])

    def logit_bias(self) -> Float[Array, ' V'] | None:
        """What is added to them, scaled as they are, its vocabulary padded; None for nothing."""
        return None if self.head is None or self.head.bias is None else self._scaled(self.head.bias[...])

    def _scaled(self, weights: Float[Array, '... V']) -> Float[Array, '... V']:
        return weights if self.logit_scale == 1.0 else weights * self.logit_scale

    def unstacked(self) -> 'EncoderDecoder':
        """The same model (sharing its arrays) with its layers one by one instead of scanned."""
        graph, state = nnx.split(self)
        model = nnx.merge(graph, state)
        model.encoder.stack, model.decoder.stack = self.encoder.stack.unstacked(), self.decoder.stack.unstacked()
        return model

    def _embedded(self, tokens: Int[Array, 'B T']) -> Float[Array, 'B T D']:
        x = self.embed(tokens, jnp.dtype(self.dtype))
        return x if self.embed_scale == 1.0 else x * self.embed_scale


def _placed(source: LayerCache) -> LayerCache:
    """By the layout's rules of caches."""
    layout = sharding.current()
    if layout is None:
        return source
    dims = 'LBKSH' if source.keys.ndim == 5 else 'BKSH'
    keys, values = (sharding.constrain(x, dims, layout.rules.cache) for x in (source.keys, source.values))
    return LayerCache(keys=keys, values=values)

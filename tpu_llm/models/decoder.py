"""The decoder: embed, stack, head. One class covers the open dense families by composition."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import AnyArray, Array, Float, Int, Key
from tpu_llm.config import ConfigError, machine
from tpu_llm.kernels.attention import IMPLS
from tpu_llm.nn.attention import Attention, Context
from tpu_llm.nn.cache import Cache, LayerCache
from tpu_llm.nn.dropout import dropout, site_key
from tpu_llm.nn.embed import Embed, Head
from tpu_llm.nn.mlp import MLP, MLPKind
from tpu_llm.nn.norm import NORMS, NormKind
from tpu_llm.nn.param import Init, Normal
from tpu_llm.nn.position import LearnedPositions, SinusoidalPositions, from_segments, rotary_angles
from tpu_llm.nn.stack import check_remat, make_stack
from tpu_llm.parallel.sharding import constrain


@dataclasses.dataclass(kw_only=True, slots=True)
class Dropout:
    """Probabilities of zeroing: what a block adds to the residual stream, attention weights, embeddings."""

    residual: float = 0.0
    attention: float = 0.0
    embedding: float = 0.0

    def validate(self) -> None:
        for field in dataclasses.fields(self):
            rate = getattr(self, field.name)
            if not 0.0 <= rate < 1.0:
                raise ConfigError(f'dropout.{field.name} is {rate}; write a probability from 0 to below 1')


@dataclasses.dataclass(kw_only=True, slots=True)
class DecoderConfig:
    """The decoder's config; `make()` builds the (abstract) module."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    mlp: MLPKind = 'swiglu'
    norm: NormKind = 'rms'
    norm_place: Literal['pre', 'post'] = 'pre'
    norm_eps: float = 1e-6
    position: Literal['rope', 'learned', 'sinusoidal', 'none'] = 'rope'
    rope_theta: float = 10_000.0
    max_length: int = 0  # learned positions only: how many there are
    windows: tuple[int, ...] = (0,)  # one a layer, repeating; 0 sees everything before
    tied_embeddings: bool = False
    bias: bool = False
    logit_softcap: float = 0.0
    attention_softcap: float = 0.0
    dropout: Dropout | None = None
    dtype: Literal['float32', 'bfloat16'] = 'bfloat16'  # of activations; parameters are float32
    attention: str = machine('xla')
    remat: str = machine('none')
    unroll: int = machine(1)  # layers a scan step runs; 0: all of them, no loop

    def validate(self) -> None:
        for name in ('vocab_size', 'width', 'layers', 'heads', 'kv_heads', 'head_dim', 'mlp_width'):
            if getattr(self, name) < 1:
                raise ConfigError(f'{name} is {getattr(self, name)}; it must be at least 1')
        if self.heads % self.kv_heads:
            raise ConfigError(
                f'heads = {self.heads} is not divisible by kv_heads = {self.kv_heads}; each key-value head serves '
                'heads / kv_heads query heads'
            )
        if self.position == 'rope' and self.head_dim % 2:
            raise ConfigError(f'head_dim = {self.head_dim} is odd; rope turns pairs, so make it even')
        if self.position == 'sinusoidal' and self.width % 2:
            raise ConfigError(f'width = {self.width} is odd; sinusoidal positions need it even')
        if (self.position == 'learned') != (self.max_length > 0):
            raise ConfigError(
                f'max_length = {self.max_length} with position = {self.position!r}; it is the number of learned '
                'positions, and 0 for every other scheme'
            )
        if not self.windows or min(self.windows) < 0:
            raise ConfigError(f'windows = {self.windows}; write one window a layer of the period, 0 for none')
        if self.attention not in IMPLS:
            raise ConfigError(f'attention = {self.attention!r}; there are {", ".join(IMPLS)}')
        if self.unroll < 0:
            raise ConfigError(f'unroll = {self.unroll}; it must be at least 0')
        check_remat(self.remat)

    def make(self, *, vocab_multiple: int = 128) -> 'Decoder':
        """The abstract module; `nn.param.initialise(model, seed)` draws its parameters."""
        self.validate()
        return Decoder(self, vocab_multiple=vocab_multiple)


class Block(nnx.Module):
    """One layer: attention and MLP, each added to the residual stream.

    With norm_place 'pre', x + f(norm(x)); with 'post', norm(x + f(x)) as in Vaswani et al. (2017).
    """

    def __init__(self, config: DecoderConfig, index: int):
        # Each layer adds twice to the stream: scaled down, its variance stays put (GPT-2, §2.3).
        def out_init(fan_in: int) -> Init:
            return Normal((2 * config.layers * fan_in) ** -0.5)

        rates = config.dropout or Dropout()
        make_norm = NORMS[config.norm]
        self.attention_norm = make_norm(config.width, eps=config.norm_eps)
        self.attention = Attention(
            config.width,
            config.heads,
            config.kv_heads,
            config.head_dim,
            window=config.windows[index % len(config.windows)],
            softcap=config.attention_softcap,
            dropout=rates.attention,
            bias=config.bias,
            out_init=out_init(config.heads * config.head_dim),
            impl=config.attention,
        )
        self.mlp_norm = make_norm(config.width, eps=config.norm_eps)
        self.mlp = MLP(
            config.mlp, config.width, config.mlp_width, bias=config.bias, out_init=out_init(config.mlp_width)
        )
        self.norm_place: str = config.norm_place
        self.dropout = rates.residual

    def __call__(
        self,
        x: Float[Array, 'B T D'],
        context: Context,
        layer: Int[Array, ''] | int,
        cache: LayerCache | None,
    ) -> tuple[Float[Array, 'B T D'], LayerCache | None]:
        pre = self.norm_place == 'pre'
        y, cache = self.attention(self.attention_norm(x) if pre else x, context, layer, cache)
        x = x + self._drop(y, context, 'attention_out', layer)
        x = constrain(x if pre else self.attention_norm(x), 'BTD')
        y = self.mlp(self.mlp_norm(x) if pre else x)
        x = x + self._drop(y, context, 'mlp_out', layer)
        return constrain(x if pre else self.mlp_norm(x), 'BTD'), cache

    def _drop(self, y: Array, context: Context, site: str, layer: Int[Array, ''] | int) -> Array:
        if context.dropout_key is None or self.dropout == 0.0:
            return y
        return dropout(y, self.dropout, site_key(context.dropout_key, site, layer))


class Decoder(nnx.Module):
    """tokens → logits. Build it with `DecoderConfig(...).make()`."""

    def __init__(self, config: DecoderConfig, *, vocab_multiple: int):
        self.vocab_size = config.vocab_size
        self.head_dim = config.head_dim
        self.kv_heads = config.kv_heads
        self.max_length = config.max_length
        self.rope_theta = config.rope_theta if config.position == 'rope' else 0.0
        self.logit_softcap = config.logit_softcap
        self.dtype: str = config.dtype
        self.embedding_dropout = (config.dropout or Dropout()).embedding
        self.embed = Embed(config.vocab_size, config.width, multiple=vocab_multiple, std=config.width**-0.5)
        self.position_embed = _position_embed(config)
        self.stack = make_stack(
            lambda index: Block(config, index),
            config.layers,
            period=len(config.windows),
            remat=config.remat,
            unroll=config.unroll,
        )
        # Post-norm blocks end in a norm already.
        self.norm = NORMS[config.norm](config.width, eps=config.norm_eps) if config.norm_place == 'pre' else None
        tied = config.tied_embeddings
        self.head = None if tied else Head(config.vocab_size, config.width, multiple=vocab_multiple)

    def __call__(
        self,
        tokens: Int[AnyArray, 'B T'],
        *,
        segments: Int[AnyArray, 'B T'] | None = None,
        positions: Int[AnyArray, 'B T'] | None = None,
    ) -> Float[Array, 'B T V']:
        """Logits of the next token, float32. Segment 0 is padding; tokens of equal segments see each other."""
        return self.logits(self.hidden(tokens, segments=segments, positions=positions))

    def hidden(
        self,
        tokens: Int[AnyArray, 'B T'],
        *,
        segments: Int[AnyArray, 'B T'] | None = None,
        positions: Int[AnyArray, 'B T'] | None = None,
        dropout_key: Key[Array, ''] | None = None,
    ) -> Float[Array, 'B T D']:
        """The last hidden states after the final norm, float32. Dropout only happens where a key is given.

        Raises ValueError for rows longer than the learned positions.
        """
        if 0 < self.max_length < tokens.shape[1]:
            raise ValueError(
                f'rows of {tokens.shape[1]} tokens are longer than the {self.max_length} learned positions'
            )
        tokens = jnp.asarray(tokens)
        segments = jnp.ones_like(tokens) if segments is None else jnp.asarray(segments)
        positions = from_segments(segments) if positions is None else jnp.asarray(positions)
        context = self._context(segments, positions, dropout_key=dropout_key)
        return self._run(tokens, context)[0]

    def extend(
        self,
        tokens: Int[Array, 'B T'],
        cache: Cache,
        *,
        segments: Int[Array, 'B T'],
        positions: Int[Array, 'B T'],
    ) -> tuple[Float[Array, 'B T D'], Cache]:
        """Hidden states of T tokens that follow what `cache` holds, and the cache with them in it."""
        cache = cache.append(segments, positions)
        hidden, layers = self._run(tokens, self._context(segments, positions, cache=cache))
        assert layers is not None
        return hidden, dataclasses.replace(cache, layers=layers, index=cache.index + tokens.shape[1])

    def logits(self, hidden: Float[Array, 'B T D']) -> Float[Array, 'B T V']:
        """float32 logits over the real vocabulary."""
        kernel = self.unembedding().astype(self.dtype)
        logits = jnp.einsum('BTD,DV->BTV', hidden.astype(self.dtype), kernel, preferred_element_type=jnp.float32)
        logits = constrain(logits, 'BTV')[..., : self.vocab_size]
        return self.logit_softcap * jnp.tanh(logits / self.logit_softcap) if self.logit_softcap else logits

    def unembedding(self) -> Float[Array, 'D V']:
        """The matrix from hidden states to logits, its vocabulary padded."""
        return self.embed.table[...].T if self.head is None else self.head.kernel[...]

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache of `length` slots for `batch` rows, in the compute dtype."""
        shape = (batch, length, self.kv_heads, self.head_dim)
        layers = []
        for stacked in self.stack.cache_shapes():
            zeros = jnp.zeros((stacked, *shape) if stacked else shape, self.dtype)
            layers.append(LayerCache(keys=zeros, values=zeros))
        slots = jnp.zeros((batch, length), jnp.int32)
        return Cache(layers=layers, segments=slots, positions=slots, index=jnp.zeros((), jnp.int32))

    def unstacked(self) -> 'Decoder':
        """The same model (sharing its arrays) with its layers one by one instead of scanned."""
        graph, state = nnx.split(self)
        model = nnx.merge(graph, state)
        model.stack = self.stack.unstacked()
        return model

    def _context(
        self,
        segments: Int[Array, 'B T'],
        positions: Int[Array, 'B T'],
        *,
        cache: Cache | None = None,
        dropout_key: Key[Array, ''] | None = None,
    ) -> Context:
        angles = rotary_angles(positions, self.head_dim, self.rope_theta) if self.rope_theta else None
        return Context(segments=segments, positions=positions, angles=angles, cache=cache, dropout_key=dropout_key)

    def _run(
        self, tokens: Int[Array, 'B T'], context: Context
    ) -> tuple[Float[Array, 'B T D'], list[LayerCache] | None]:
        x = self.embed(tokens, jnp.dtype(self.dtype))
        if self.position_embed is not None:
            x = x + self.position_embed(context.positions).astype(x.dtype)
        if context.dropout_key is not None:
            x = dropout(x, self.embedding_dropout, site_key(context.dropout_key, 'embedding'))
        x, layers = self.stack(constrain(x, 'BTD'), context)
        if self.norm is not None:
            x = self.norm(x)
        return x.astype(jnp.float32), layers


def _position_embed(config: DecoderConfig) -> LearnedPositions | SinusoidalPositions | None:
    if config.position == 'learned':
        return LearnedPositions(config.max_length, config.width)
    return SinusoidalPositions(config.width) if config.position == 'sinusoidal' else None

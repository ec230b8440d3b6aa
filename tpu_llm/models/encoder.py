"""The encoder: every token sees the whole of its segment. BERT and RoBERTa, with the heads they were trained with.

BERT: Devlin et al., 2018, arXiv 1810.04805. RoBERTa: Liu et al., 2019, arXiv 1907.11692.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import AnyArray, Array, Float, Int, Key
from tpu_llm.config import ConfigError, machine, to_json, validate
from tpu_llm.models.decoder import Block
from tpu_llm.models.decoder_config import DecoderConfig, Dropout
from tpu_llm.models.tower import Tower, as_rows
from tpu_llm.nn.einsum import Einsum, add_trailing
from tpu_llm.nn.embed import Embed, Head
from tpu_llm.nn.mlp import ACTIVATIONS
from tpu_llm.nn.norm import LayerNorm
from tpu_llm.nn.param import Normal, param
from tpu_llm.nn.position import from_segments
from tpu_llm.parallel.sharding import constrain


@dataclasses.dataclass(kw_only=True, slots=True)
class EncoderConfig:
    """The encoder's config; `make()` builds the (abstract) module. Norms stand behind, positions are learned."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    mlp: Literal['gelu', 'gelu_exact', 'relu'] = 'gelu_exact'
    norm_eps: float = 1e-12
    max_length: int  # how many positions there are
    position_offset: int = 0  # rows before the first in the table of positions; no position uses them
    token_types: int = 2  # kinds of token: the first and the second of two texts
    masked_head: bool = True  # predicts the tokens that were masked; its matrix is the embedding
    pooler: bool = False  # makes one vector of a row, from its first token
    next_sentence: bool = False  # tells from it whether the second text follows the first
    dropout: Dropout | None = None
    dtype: Literal['float32', 'bfloat16'] = 'bfloat16'  # of activations; parameters are float32
    attention: str = machine('auto')  # of kernels.attention.IMPLS, or what suits device and length
    remat: str = machine('none')
    unroll: int = machine(1)  # layers a scan step runs; 0: all of them, no loop

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def tower(self) -> DecoderConfig:
        """Its layers, in a decoder's words."""
        return DecoderConfig(
            vocab_size=self.vocab_size,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.head_dim,
            mlp_width=self.mlp_width,
            mlp=self.mlp,
            norm='layer',
            norm_place='post',
            norm_eps=self.norm_eps,
            position='learned',
            max_length=self.max_length,
            position_offset=self.position_offset,
            embed_norm=True,
            bias=('qkv', 'out', 'mlp'),
            dropout=self.dropout,
            dtype=self.dtype,
            attention=self.attention,
            remat=self.remat,
            unroll=self.unroll,
        )

    def validate(self) -> None:
        if self.heads < 1 or self.width % self.heads:
            raise ConfigError(f'width = {self.width} is not divisible by heads = {self.heads}; heads share the width')
        self.tower().validate()
        if self.token_types < 1:
            raise ConfigError(f'token_types is {self.token_types}; it must be at least 1')
        if self.next_sentence and not self.pooler:
            raise ConfigError('next_sentence looks at what the pooler makes; set pooler = True')

    def make(self, *, vocab_multiple: int = 128) -> 'Encoder':
        """The abstract module; `nn.param.initialise(model, seed)` draws its parameters.

        Raises ConfigError for a config that cannot be.
        """
        validate(self, 'model')
        return Encoder(self, vocab_multiple=vocab_multiple)


class Encoder(nnx.Module):
    """tokens → hidden states; by the head for masked tokens → logits. Build it with `EncoderConfig(...).make()`."""

    def __init__(self, config: EncoderConfig, *, vocab_multiple: int):
        self.vocab_size = config.vocab_size
        self.described = to_json(config)  # what `save_pretrained` asks; no config object, which would not hash
        self.max_length = config.max_length
        self.dtype: str = config.dtype
        self.logit_softcap = 0.0
        sizes = {'D': config.width, 'Y': config.width, 'I': 2}
        self.embed = Embed(config.vocab_size, config.width, multiple=vocab_multiple, std=config.width**-0.5)
        self.token_types = param('ID', (config.token_types, config.width), Normal(0.02))
        self.tower = Tower(config.tower(), Block, causal=False)
        self.masked = nnx.data(MaskedHead(config, multiple=vocab_multiple)) if config.masked_head else None
        self.pooler = nnx.data(Einsum('BD,DY->BY', sizes, bias=True)) if config.pooler else None
        self.pair = nnx.data(Einsum('BD,DI->BI', sizes, bias=True)) if config.next_sentence else None

    def __call__(
        self,
        tokens: Int[AnyArray, '*B T'],
        *,
        segments: Int[AnyArray, 'B T'] | None = None,
        positions: Int[AnyArray, 'B T'] | None = None,
        token_types: Int[AnyArray, 'B T'] | None = None,
    ) -> Float[Array, 'B T V']:
        """Logits of the token that stands at each place, float32. Segment 0 is padding; tokens of equal segments see
        each other; tokens of no type given are of type 0.

        Raises ValueError for tokens that are not in rows, rows longer than the positions, and without that head.
        """
        hidden = self.hidden(tokens, segments=segments, positions=positions, token_types=token_types)
        return self.logits(self.transformed(hidden))

    def hidden(
        self,
        tokens: Int[AnyArray, '*B T'],
        *,
        segments: Int[AnyArray, 'B T'] | None = None,
        positions: Int[AnyArray, 'B T'] | None = None,
        token_types: Int[AnyArray, 'B T'] | None = None,
        key: Key[Array, ''] | None = None,
    ) -> Float[Array, 'B T D']:
        """The last hidden states, float32. Only where a key is given is anything drawn (dropout)."""
        tokens, segments = as_rows(tokens, segments)
        positions = from_segments(segments) if positions is None else jnp.asarray(positions)
        x = self.embed(tokens, jnp.dtype(self.dtype))
        types = self.token_types[...].astype(x.dtype)
        x = x + (types[:1][None] if token_types is None else types[jnp.asarray(token_types)])
        return self.tower(x, segments, positions, key=key)[0]

    def pooled(
        self,
        tokens: Int[AnyArray, '*B T'],
        *,
        segments: Int[AnyArray, 'B T'] | None = None,
        token_types: Int[AnyArray, 'B T'] | None = None,
    ) -> Float[Array, 'B D']:
        """A vector a row, float32: `pool` of its hidden states."""
        tokens, segments = as_rows(tokens, segments)
        return self.pool(self.hidden(tokens, segments=segments, token_types=token_types), segments)

    def sentences(
        self,
        tokens: Int[AnyArray, '*B T'],
        *,
        segments: Int[AnyArray, 'B T'] | None = None,
        token_types: Int[AnyArray, 'B T'] | None = None,
    ) -> Float[Array, 'B D']:
        """A vector of length 1 a row, float32: the mean of the hidden states of its tokens, padding left out
        (Reimers and Gurevych, 2019, arXiv 1908.10084). Their products are how alike rows are.
        """
        tokens, segments = as_rows(tokens, segments)
        real = (segments > 0).astype(jnp.float32)[:, :, None]
        hidden = self.hidden(tokens, segments=segments, token_types=token_types)
        # The mean's direction is that of the sum.
        total = jnp.sum(hidden * real, axis=1)
        return total / jnp.maximum(jnp.linalg.norm(total, axis=-1, keepdims=True), 1e-12)

    def pool(self, hidden: Float[Array, 'B T D'], segments: Int[Array, 'B T']) -> Float[Array, 'B D']:
        """tanh of a linear map of the first token's hidden state, padding on the left passed over, float32.

        Raises ValueError without a pooler.
        """
        if self.pooler is None:
            raise ValueError('this encoder has no pooler; build it with pooler = True')
        first = jnp.argmax(segments > 0, axis=1)
        x = jnp.take_along_axis(hidden, first[:, None, None], axis=1)[:, 0]
        return jnp.tanh(self.pooler(x.astype(self.dtype)).astype(jnp.float32))

    def next_sentence(self, pooled: Float[Array, 'B D']) -> Float[Array, 'B I']:
        """Logits, float32: the second text follows the first, it does not.

        Raises ValueError without that head.
        """
        if self.pair is None:
            raise ValueError('this encoder has no head for pairs of texts; build it with next_sentence = True')
        return self.pair(pooled.astype(self.dtype)).astype(jnp.float32)

    def transformed(self, hidden: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
        """What the unembedding takes. Raises ValueError without a head for masked tokens."""
        return self._head()(hidden.astype(self.dtype)).astype(jnp.float32)

    def logits(self, transformed: Float[Array, 'B T D']) -> Float[Array, 'B T V']:
        """float32 logits over the real vocabulary, of what `transformed` gives."""
        kernel = self.unembedding().astype(self.dtype)
        x = transformed.astype(self.dtype)
        logits = jnp.einsum('BTD,DV->BTV', x, kernel, preferred_element_type=jnp.float32)
        return constrain(add_trailing(logits, self.logit_bias()), 'BTV')[..., : self.vocab_size]

    def unembedding(self) -> Float[Array, 'D V']:
        """The matrix from `transformed` to logits, its vocabulary padded."""
        return self.embed.table[...].T

    def logit_bias(self) -> Float[Array, ' V']:
        """What is added to them, its vocabulary padded. Raises ValueError without a head for masked tokens."""
        bias = self._head().out.bias
        assert bias is not None
        return bias[...]

    def _head(self) -> 'MaskedHead':
        if self.masked is None:
            raise ValueError('this encoder has no head for masked tokens; build it with masked_head = True')
        return self.masked


class MaskedHead(nnx.Module):
    """norm(act(map(x))), and the bias of the logits that the embedding then makes of it."""

    def __init__(self, config: EncoderConfig, *, multiple: int):
        self.map = Einsum('BTD,DY->BTY', {'D': config.width, 'Y': config.width}, bias=True)
        self.kind: Literal['gelu', 'gelu_exact', 'relu'] = config.mlp
        self.norm = LayerNorm(config.width, eps=config.norm_eps)
        self.out = Head(config.vocab_size, config.width, multiple=multiple, tied=True, bias=True)

    @jax.named_scope('head')
    def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
        return self.norm(ACTIVATIONS[self.kind](self.map(x)))

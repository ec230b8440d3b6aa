"""The decoder: embed, stack, head. One class covers the open families by composition."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from tpu_llm.arrays import AnyArray, Array, Bool, Float, Int, Key
from tpu_llm.config import dump, load, to_json
from tpu_llm.kernels.attention import in_zigzag
from tpu_llm.kernels.mask import alibi_slopes
from tpu_llm.models.decoder_config import DecoderConfig, Dropout
from tpu_llm.models.mixers import make_attention, make_state_space, position_embed
from tpu_llm.nn.ahead import Depth, shifted
from tpu_llm.nn.cache import Cache, LayerCache, StateCache
from tpu_llm.nn.context import Context, LayerOut, Routing
from tpu_llm.nn.dropout import dropout, row_keys, site_keys
from tpu_llm.nn.einsum import Einsum, add_trailing
from tpu_llm.nn.embed import Embed, Head
from tpu_llm.nn.mlp import MLP
from tpu_llm.nn.moe import MoELayer
from tpu_llm.nn.norm import NORMS
from tpu_llm.nn.param import Init, Normal
from tpu_llm.nn.position import (
    Angles,
    RelativePositions,
    from_segments,
    rotary_angles,
    scaled_angles,
)
from tpu_llm.nn.stack import Stack, make_stack
from tpu_llm.parallel.pipeline import Pipeline
from tpu_llm.parallel.sequence import natural, zigzag
from tpu_llm.parallel.sharding import constrain


class Block(nnx.Module):
    """One layer: attention (or a state space in its place) and MLP, each added to the residual stream.

    With norm_place 'pre', x + f(norm(x)); with 'post', norm(x + f(x)) as in Vaswani et al. (2017); with 'both',
    x + norm(f(norm(x))) as in Gemma-2; with 'out', x + norm(f(x)) as in OLMo 2. In parallel, f is attention and MLP of
    the same input, their sum (Wang and Komatsuzaki, 2021, GPT-J; for 'both' and 'out' each with a norm of its own
    behind it), or each of its own norm of that input (GPT-NeoX).
    """

    def __init__(self, config: DecoderConfig, index: int):
        # Each layer adds twice to the stream: scaled down, its variance stays put (GPT-2, §2.3).
        def out_init(fan_in: int) -> Init:
            return Normal((2 * config.layers * fan_in) ** -0.5)

        def norm(there: bool) -> nnx.Module | None:
            return nnx.data(NORMS[config.norm](config.width, eps=config.norm_eps)) if there else None

        rates, place = config.dropout or Dropout(), config.norm_place
        self.attention_norm = norm(place != 'out')
        self.attention = self.ssm = None
        if config.mixer(index) == 'ssm':
            self.ssm = nnx.data(make_state_space(config, out_init))
        else:
            self.attention = nnx.data(make_attention(config, index, rates.attention, out_init))
        self.mlp_norm = norm(config.mlp_width > 0 and place != 'out' and config.residual != 'parallel')
        self.attention_out_norm = norm(place in ('both', 'out'))
        self.mlp_out_norm = norm(place in ('both', 'out'))
        self.mlp = self.moe = None
        if config.moe and config.moe.at(index):
            self.moe = nnx.data(MoELayer(config.moe, config.moe.mlp or config.mlp, config.width, out_init=out_init))
        elif config.mlp_width:
            bias, init = 'mlp' in config.bias, out_init(config.mlp_width)
            self.mlp = nnx.data(MLP(config.mlp, config.width, config.mlp_width, bias=bias, out_init=init))
        self.parallel = config.residual != 'serial'
        self.norm_place: str = place
        self.dropout = rates.residual

    def __call__(
        self,
        x: Float[Array, 'B T D'],
        context: Context,
        layer: Int[Array, ''] | int,
        cache: LayerCache | StateCache | None,
    ) -> tuple[Float[Array, 'B T D'], LayerOut]:
        seen = self._before(self.attention_norm, x)
        y, cache = self._mix(seen, context, layer, cache)
        added = self._added(y, self.attention_out_norm, context, 'attention_out', layer)
        if self.parallel:
            y, routing = self._feed_forward(seen if self.mlp_norm is None else self.mlp_norm(x), context, layer)
            # Added to each other first: what a device has of them is summed over `tensor` at once.
            x = x + (added + self._added(y, self.mlp_out_norm, context, 'mlp_out', layer))
            x = self._behind(self.attention_norm, x)
        else:
            x = constrain(self._behind(self.attention_norm, x + added), 'BTD')
            if self.mlp is None and self.moe is None:
                return x, LayerOut(cache=cache)
            y, routing = self._feed_forward(self._before(self.mlp_norm, x), context, layer)
            x = self._behind(self.mlp_norm, x + self._added(y, self.mlp_out_norm, context, 'mlp_out', layer))
        return constrain(x, 'BTD'), LayerOut(cache=cache, routing=routing)

    def _mix(
        self, x: Array, context: Context, layer: Int[Array, ''] | int, cache: LayerCache | StateCache | None
    ) -> tuple[Array, LayerCache | StateCache | None]:
        if self.ssm is not None:
            assert not isinstance(cache, LayerCache)
            return self.ssm(x, context, layer, cache)
        assert self.attention is not None
        assert not isinstance(cache, StateCache)
        return self.attention(x, context, layer, cache)

    def _before(self, norm: nnx.Module | None, x: Array) -> Array:
        return norm(x) if norm is not None and self.norm_place != 'post' else x

    def _behind(self, norm: nnx.Module | None, x: Array) -> Array:
        return norm(x) if norm is not None and self.norm_place == 'post' else x

    def _added(
        self, y: Array, norm: nnx.Module | None, context: Context, site: str, layer: Int[Array, ''] | int
    ) -> Array:
        return self._drop(y if norm is None else norm(checkpoint_name(y, site)), context, site, layer)

    def _feed_forward(self, x: Array, context: Context, layer: Int[Array, ''] | int) -> tuple[Array, Routing | None]:
        if self.moe is not None:
            return self.moe(x, context, layer)
        assert self.mlp is not None
        return self.mlp(x), None

    def _drop(self, y: Array, context: Context, site: str, layer: Int[Array, ''] | int) -> Array:
        if context.keys is None or self.dropout == 0.0:
            return y
        return dropout(y, self.dropout, site_keys(context.keys, site, layer))


class Decoder(nnx.Module):
    """tokens → logits. Build it with `DecoderConfig(...).make()`."""

    def __init__(self, config: DecoderConfig, *, vocab_multiple: int, stages: int, schedule: Pipeline | None):
        self.vocab_size = config.vocab_size
        self.turned = config.turned
        # Heads that a cache holds of a token, and the widths of their keys and values.
        self.cached = (
            (1, config.mla.kv_rank + config.mla.rope_dim, 0)
            if config.mla
            else (config.kv_heads, *2 * (config.head_dim,))
        )
        self.mixers = config.mixers
        self.states = config.ssm and config.ssm.cached(config.width)
        self.described = to_json(config)  # what `save_pretrained` asks; no config object, which would not hash
        self.max_length = config.max_length if config.position == 'learned' else 0
        self.rope_theta, self.local_rope_theta = config.rope_theta, config.local_rope_theta
        self.rope_scaling = load(dump(config.rope_scaling))  # its own, with tuples for lists
        alibi = config.position == 'alibi'
        self.slopes = alibi_slopes(config.heads, config.alibi_max, config.alibi_scale) if alibi else ()
        self.logit_scale = config.logit_scale
        self.logit_softcap = config.logit_softcap
        self.embed_scale = config.embed_scale
        self.dtype: str = config.dtype
        self.zigzag = in_zigzag(config.sequence, config.attention)
        self.embedding_dropout = (config.dropout or Dropout()).embedding
        sizes, shape = {'D': config.width, 'Y': config.embed_width}, {'multiple': vocab_multiple}
        self.embed = Embed(config.vocab_size, config.width, narrow=config.embed_width, std=config.width**-0.5, **shape)
        self.narrow = nnx.data(Einsum('BTD,DY->BTY', sizes)) if config.embed_width else None
        self.position_embed = position_embed(config)
        relative = config.position == 'relative'
        self.position_bias = RelativePositions(config.heads, std=config.width**-0.5) if relative else None
        make_norm = functools.partial(NORMS[config.norm], config.width, eps=config.norm_eps)
        self.embed_norm = make_norm() if config.embed_norm else None
        self.stack = make_stack(
            lambda index: Block(config, index),
            config.layers,
            prefix=config.moe.first_dense if config.moe else 0,
            period=config.period,
            remat=config.remat,
            unroll=config.unroll,
            stages=stages,
            schedule=schedule,
        )
        # Post-norm blocks end in a norm already.
        normed = config.norm_place == 'post'
        self.norm = None if normed else make_norm()
        depth = functools.partial(Depth, config.width, lambda _: Block(config, config.layers - 1), make_norm)
        self.ahead = nnx.List([depth(normed=normed, remat=config.remat) for _ in range(config.predict_ahead)])
        tied, bias = config.tied_embeddings, 'head' in config.bias
        self.head = None
        if bias or not tied:
            head = Head(config.vocab_size, config.embed_width or config.width, tied=tied, bias=bias, **shape)
            self.head = nnx.data(head)

    def __call__(
        self,
        tokens: Int[AnyArray, 'B T'],
        *,
        segments: Int[AnyArray, 'B T'] | None = None,
        positions: Int[AnyArray, 'B T'] | None = None,
    ) -> Float[Array, 'B T V']:
        """Logits of the next token, float32. Segment 0 is padding; tokens of equal segments see each other.

        Raises ValueError for what are no tokens, and for tokens that are not in rows.
        """
        if not hasattr(tokens, 'ndim'):
            raise ValueError(
                f"tokens is a {type(tokens).__name__}, not an array Int['B T'] of ids: give "
                'tokenizer.encode(text)[None]; tpu_llm.generate takes text'
            )
        if tokens.ndim != 2:
            raise ValueError(f'tokens of shape {list(tokens.shape)}: give rows, [batch, length]; one is tokens[None]')
        return self.logits(self.hidden(tokens, segments=segments, positions=positions))

    def hidden(
        self,
        tokens: Int[AnyArray, 'B T'],
        *,
        segments: Int[AnyArray, 'B T'] | None = None,
        positions: Int[AnyArray, 'B T'] | None = None,
        key: Key[Array, ''] | None = None,
    ) -> Float[Array, 'B T D']:
        """The last hidden states after the final norm, float32. Only where a key is given is anything drawn (dropout).

        Raises ValueError for rows longer than the learned positions.
        """
        return self.routed(tokens, segments=segments, positions=positions, key=key)[0]

    def routed(
        self,
        tokens: Int[AnyArray, 'B T'],
        *,
        segments: Int[AnyArray, 'B T'] | None = None,
        positions: Int[AnyArray, 'B T'] | None = None,
        prefix: Bool[AnyArray, 'B T'] | None = None,
        key: Key[Array, ''] | None = None,
    ) -> tuple[Float[Array, 'B T D'], Routing | None]:
        """`hidden`, and what the layers of experts did (L of them); None without experts. Tokens of a `prefix` are seen
        by those before them, too.
        """
        if 0 < self.max_length < tokens.shape[1]:
            raise ValueError(
                f'rows of {tokens.shape[1]} tokens are longer than the {self.max_length} learned positions'
            )
        tokens = jnp.asarray(tokens)
        segments = jnp.ones_like(tokens) if segments is None else jnp.asarray(segments)
        positions = from_segments(segments) if positions is None else jnp.asarray(positions)
        prefix = None if prefix is None else jnp.asarray(prefix)
        x, outs = self._run(tokens, self._context(segments, positions, prefix=prefix, key=key))
        return x, self.stack.routing(outs)

    def look_ahead(
        self,
        hidden: Float[Array, 'B T D'],
        tokens: Int[AnyArray, 'B T'],
        *,
        segments: Int[AnyArray, 'B T'],
        positions: Int[AnyArray, 'B T'],
        key: Key[Array, ''] | None = None,
    ) -> Iterator[tuple[Float[Array, 'B T D'], Int[Array, 'B T'], Routing | None]]:
        """Of each depth k = 1, 2, …: hidden states, float32, that predict the token k behind the next; the segments, 0
        where that one lies outside; and what experts did. The first `hidden` are those of `routed`.
        """
        tokens, segments, positions = (jnp.asarray(x) for x in (tokens, segments, positions))
        for k, depth in enumerate(self.ahead, 1):
            inside = jnp.where(shifted(segments, k) == segments, segments, 0)
            own = None if key is None else jax.random.fold_in(key, k)
            x = depth.join(hidden.astype(self.dtype), self._embedded(shifted(tokens, k)))
            x, outs = self._layers(constrain(x, 'BTD'), self._context(inside, positions, key=own), depth.stack)
            hidden = depth.last(x).astype(jnp.float32)
            yield hidden, inside, depth.stack.routing(outs)

    def extend(
        self,
        tokens: Int[Array, 'B T'],
        cache: Cache,
        *,
        segments: Int[Array, 'B T'],
        positions: Int[Array, 'B T'],
    ) -> tuple[Float[Array, 'B T D'], Cache]:
        """Hidden states of T tokens that follow what `cache` holds, and the cache with them in it.

        Raises ValueError for more tokens than it has slots left; where a traced index hides that, they come out as NaN.
        """
        room = cache.has_room(tokens.shape[1])
        cache = cache.append(segments, positions)
        hidden, outs = self._run(tokens, self._context(segments, positions, cache=cache))
        layers = [out.cache for out in outs if out.cache is not None]
        hidden = jnp.where(room, hidden, jnp.nan)
        return hidden, dataclasses.replace(cache, layers=layers, index=cache.index + tokens.shape[1])

    def logits(self, hidden: Float[Array, 'B T D']) -> Float[Array, 'B T V']:
        """float32 logits over the real vocabulary."""
        kernel = self.unembedding().astype(self.dtype)
        logits = jnp.einsum('BTD,DV->BTV', hidden.astype(self.dtype), kernel, preferred_element_type=jnp.float32)
        bias = self.logit_bias()
        logits = logits if bias is None else add_trailing(logits, bias)
        logits = constrain(logits, 'BTV')[..., : self.vocab_size]
        return self.logit_softcap * jnp.tanh(logits / self.logit_softcap) if self.logit_softcap else logits

    def unembedding(self) -> Float[Array, 'D V']:
        """The matrix from hidden states to logits, scaled, its vocabulary padded."""
        own = None if self.head is None else self.head.kernel
        return self._scaled(self.embed.table[...].T if own is None else own[...])

    def logit_bias(self) -> Float[Array, ' V'] | None:
        """What is added to them, scaled as they are, its vocabulary padded; None for nothing."""
        return None if self.head is None or self.head.bias is None else self._scaled(self.head.bias[...])

    def _scaled(self, weights: Float[Array, '... V']) -> Float[Array, '... V']:
        return weights if self.logit_scale == 1.0 else weights * self.logit_scale

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache of `length` slots for `batch` rows, in the compute dtype."""
        heads, *widths = self.cached
        layers: list[LayerCache | StateCache] = []
        for (first, *_), stacked in zip(self.stack.groups(), self.stack.cache_shapes(), strict=True):
            lead = (stacked, batch) if stacked else (batch,)
            if self.mixers[first % len(self.mixers)] == 'ssm':
                layers.append(self._empty_state(lead))
                continue
            keys, values = (jnp.zeros((*lead, heads, length, width), self.dtype) for width in widths)
            layers.append(LayerCache(keys=keys, values=values))
        segments, positions = (jnp.zeros((batch, length), jnp.int32) for _ in range(2))
        return Cache(layers=layers, segments=segments, positions=positions, index=jnp.zeros((), jnp.int32))

    def _empty_state(self, lead: tuple[int, ...]) -> StateCache:
        assert self.states is not None
        before, inputs, state = self.states
        return StateCache(
            inputs=tuple(jnp.zeros((*lead, before, *shape), self.dtype) for shape in inputs),
            segments=jnp.zeros((*lead, before), jnp.int32),
            state=jnp.zeros((*lead, *state), jnp.float32),
        )

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
        prefix: Bool[Array, 'B T'] | None = None,
        cache: Cache | None = None,
        key: Key[Array, ''] | None = None,
    ) -> Context:
        angles = local = relative = None
        if self.turned:
            angles = self._angles(segments, positions)
        if self.local_rope_theta:
            local = rotary_angles(positions, self.turned, self.local_rope_theta)
        if self.position_bias is not None:
            relative = self.position_bias.of_rows(segments.shape[0])
        return Context(
            segments=segments,
            positions=positions,
            prefix=prefix,
            angles=angles,
            local_angles=local,
            relative=relative,
            slopes=self.slopes,
            cache=cache,
            keys=None if key is None else row_keys(key, segments.shape[0]),
        )

    def _angles(self, segments: Int[Array, 'B T'], positions: Int[Array, 'B T']) -> Angles:
        if self.rope_scaling is None:
            return rotary_angles(positions, self.turned, self.rope_theta)
        return scaled_angles(positions, segments > 0, self.turned, self.rope_theta, self.rope_scaling)

    def _run(self, tokens: Int[Array, 'B T'], context: Context) -> tuple[Float[Array, 'B T D'], list[LayerOut]]:
        x = self._embedded(tokens)
        if self.position_embed is not None:
            x = x + self.position_embed(context.positions).astype(x.dtype)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        if context.keys is not None:
            x = dropout(x, self.embedding_dropout, site_keys(context.keys, 'embedding'))
        x, outs = self._layers(constrain(x, 'BTD'), context, self.stack)
        if self.norm is not None:
            x = self.norm(x)
        x = x if self.narrow is None else self.narrow(x)
        return x.astype(jnp.float32), outs

    def _embedded(self, tokens: Int[Array, 'B T']) -> Float[Array, 'B T D']:
        x = self.embed(tokens, jnp.dtype(self.dtype))
        return x if self.embed_scale == 1.0 else x * self.embed_scale

    def _layers(
        self, x: Float[Array, 'B T D'], context: Context, stack: Stack
    ) -> tuple[Float[Array, 'B T D'], list[LayerOut]]:
        """Only within a stack are split rows in zig-zag order, and nobody outside need know."""
        if not self.zigzag or context.cache is not None:
            return stack(x, context)
        segments, positions = zigzag(context.segments), zigzag(context.positions)
        inside = dataclasses.replace(self._context(segments, positions), keys=context.keys)
        x, outs = stack(zigzag(x), inside)
        return natural(x), outs

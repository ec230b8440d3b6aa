"""Bottlenecks, scales and soft prompts: formulas in float64, rows that have tasks, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
import tuned
from tuned import noisy, wrapped

from tpu_llm.config import ConfigError, validate
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.einsum import Einsum
from tpu_llm.nn.mla import MLA
from tpu_llm.peft import rows
from tpu_llm.peft.adapters import AdaptedEinsum, Adapters
from tpu_llm.peft.ia3 import IA3, ScaledEinsum
from tpu_llm.peft.lora import LoRA
from tpu_llm.peft.prefix import Prefix
from tpu_llm.peft.prompts import Room, SoftPrompts

pytestmark = pytest.mark.usefixtures('quick_compile')

SIZES = {'D': 6, 'N': 3, 'K': 3, 'H': 4, 'F': 5}


def drawn(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def linear(spec):
    einsum = Einsum(spec, SIZES, bias=True)
    einsum.kernel = einsum.kernel.replace(jnp.asarray(drawn(einsum.kernel.shape, 1)))
    einsum.bias = einsum.bias.replace(jnp.asarray(drawn(einsum.bias.shape, 2)))
    return einsum, np.float64(einsum.kernel[...]), np.float64(einsum.bias[...])


def test_a_bottleneck_in_float64():
    einsum, kernel, bias = linear('BTNH,NHD->BTD')
    map_ = AdaptedEinsum(einsum, Adapters(rank=2, activation='relu'), 'attention.out')
    shapes = {'down': (6, 2), 'down_bias': (2,), 'up': (2, 6), 'up_bias': (6,)}
    values = {name: drawn(shape, i) for i, (name, shape) in enumerate(shapes.items(), 3)}
    for name, value in values.items():
        leaf = getattr(map_, f'adapter_{name}')
        assert leaf.shape == value.shape
        setattr(map_, f'adapter_{name}', leaf.replace(jnp.asarray(value)))
    x = drawn((2, 3, 3, 4), 9)
    y = np.einsum('BTNH,NHD->BTD', np.float64(x), kernel) + bias
    inner = np.maximum(y @ np.float64(values['down']) + values['down_bias'], 0)
    want = y + inner @ np.float64(values['up']) + values['up_bias']
    np.testing.assert_allclose(map_(jnp.asarray(x)), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ('spec', 'takes'),
    [('BTD,DKH->BTKH', False), ('BTF,FD->BTD', True), ('BTNH,NHD->BTD', True), ('BTF,FD->BTD', False)],
)
def test_scales_in_float64(spec, takes):
    einsum, kernel, bias = linear(spec)
    map_ = ScaledEinsum(einsum, takes=takes)
    inputs, dims = spec.split('->')[0].split(',')
    scaled = ''.join(letter for letter in dims if (letter in inputs) == takes)
    scale = drawn(map_.ia3_scale.shape, 3)
    assert scale.shape == tuple(SIZES[letter] for letter in scaled)
    map_.ia3_scale = map_.ia3_scale.replace(jnp.asarray(scale))
    x = drawn([SIZES.get(letter, 2) for letter in inputs], 4)
    if takes:
        want = np.einsum(spec, np.float64(x) * scale, kernel) + bias
    else:
        want = (np.einsum(spec, np.float64(x), kernel) + bias) * scale
    np.testing.assert_allclose(map_(jnp.asarray(x)), want, rtol=2e-5, atol=2e-5)


def test_room_before_every_text():
    segments = jnp.asarray([[1, 1, 2, 0], [0, 1, 1, 1]])  # padded behind, and before
    room = Room.of(segments, size=2, most=2)
    put = room.put(jnp.asarray([[5, 6, 7, 9], [9, 5, 6, 7]]), jnp.asarray([101, 102]))
    np.testing.assert_array_equal(put, [[101, 102, 5, 6, 101, 102, 7, 9], [9, 101, 102, 5, 6, 7, 0, 0]])
    np.testing.assert_array_equal(room.put(segments, None), [[1, 1, 1, 1, 2, 2, 2, 0], [0, 1, 1, 1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(room.texts, [[2, 3, 6, 7], [0, 3, 4, 5]])


def test_a_soft_prompt_is_as_tokens_with_those_vectors():
    """Vectors of the table itself, then: the same as the text with these tokens before it."""
    kind = SoftPrompts(length=3)
    model, plain = wrapped(kind), tuned.base()
    model.embed.prompts = model.embed.prompts.replace(plain.embed.table[...][jnp.asarray([[4, 9, 2]])])
    text = jnp.asarray([[7, 1, 8, 3]])
    longer = jnp.asarray([[4, 9, 2, 7, 1, 8, 3]])
    np.testing.assert_allclose(tuned.says(model, text), tuned.says(plain, longer)[:, 3:], rtol=1e-4, atol=1e-4)


def test_rows_choose_their_task():
    model = noisy(wrapped(SoftPrompts(length=2, tasks=3)))
    graph, weights, prompts = ModelGraph(model), tuned.weights(model), model.embed.prompts[...]
    tokens = jnp.asarray([[7, 1, 8], [7, 1, 8]])

    @jax.jit
    def mixed(weights, index):
        with rows.choose(index):
            return graph.bind(weights)(tokens)

    out = mixed(weights, jnp.asarray([2, 0]))
    for row, task in enumerate((2, 0)):
        alone = wrapped(SoftPrompts(length=2))
        alone.embed.prompts = alone.embed.prompts.replace(prompts[task : task + 1])
        np.testing.assert_allclose(out[row], tuned.says(alone, tokens)[row], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match='there are 3 soft prompts; say which each row takes'):
        model(tokens)


@pytest.mark.parametrize('kind', [SoftPrompts(length=2), Prefix(length=2)])
def test_more_texts_than_there_is_a_place_for_are_nan(kind):
    out = wrapped(kind).hidden(
        jnp.asarray(tuned.TOKENS), segments=jnp.asarray([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]])
    )
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()


def test_a_soft_prompt_has_ten_thousands_of_times_fewer_numbers():
    config = toy.config(vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64, mlp_width=1536)
    model = config.make(vocab_multiple=1)
    whole, kind = ModelGraph(model).count(), SoftPrompts(length=8)
    kind.wrap(model)
    assert whole / ModelGraph(model, kind.trains).count_trained() > 2e4


@pytest.mark.parametrize(
    ('kind', 'said'),
    [
        (Adapters(rank=0), 'rank = 0 must be at least 1'),
        (SoftPrompts(length=0), 'length = 0 must be at least 1'),
        (SoftPrompts(tasks=0), 'tasks = 0 must be at least 1'),
        (Prefix(most=0), 'most = 0 must be at least 1'),
        (IA3(targets=()), 'targets is empty'),
        (IA3(inputs=('(',)), 'inputs: .* is no regular expression'),
    ],
)
def test_what_cannot_be(kind, said):
    with pytest.raises(ConfigError, match=said):
        validate(kind)


def test_what_does_not_fit_a_model():
    with pytest.raises(ConfigError, match='does not give back to the stream'):
        wrapped(Adapters(targets=('query',)))
    with pytest.raises(ConfigError, match='a layer has LatentAttention'):
        wrapped(Prefix(), kv_heads=4, mla=MLA(kv_rank=8, rope_dim=4, value_dim=6))
    model = wrapped(SoftPrompts())
    with pytest.raises(ConfigError, match='has prompts or prefixes already'):
        Prefix().wrap(model)
    with pytest.raises(ConfigError, match='made for decoders; this model is Embed'):
        SoftPrompts().wrap(tuned.base().embed)
    with pytest.raises(ConfigError, match='has an adapter already'):
        IA3().wrap(wrapped(LoRA(targets=('value',))))
    with pytest.raises(ConfigError, match='has an adapter already'):
        LoRA(targets=('out',)).wrap(wrapped(Adapters()))

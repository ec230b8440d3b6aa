"""Matrices of codes: NF4 beside bitsandbytes' numbers, and models whose matrices are codes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from tpu_llm.config import ConfigError
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.einsum import Einsum
from tpu_llm.nn.mla import MLA
from tpu_llm.nn.moe import MoE
from tpu_llm.nn.param import named_params
from tpu_llm.quant import formats
from tpu_llm.quant.convert import dequantize, quantize
from tpu_llm.quant.formats import BOOKS, DYNAMIC, FourBit, product, quantized

pytestmark = pytest.mark.usefixtures('quick_compile')

GOLDEN = np.load(Path(__file__).parents[1] / 'golden/bitsandbytes/nf4.npz')
TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)


def weight():
    """[output, input], as make.py has it."""
    scales = (np.arange(1, 301) / 100).astype(np.float32)
    return np.random.default_rng(0).standard_normal((300, 128)).astype(np.float32) * scales[:, None]


@pytest.fixture(scope='module')
def matrix():
    einsum = Einsum('BTD,DF->BTF', {'D': 128, 'F': 300})
    return quantized(einsum.kernel.replace(jnp.asarray(weight().T)), 'nf4')


def test_the_code_books_are_the_published_ones_bit_for_bit():
    np.testing.assert_array_equal(formats.NF4.view(np.int32), GOLDEN['book'].view(np.int32))
    np.testing.assert_array_equal(DYNAMIC.view(np.int32), GOLDEN['dynamic'].view(np.int32))


def test_codes_are_those_of_bitsandbytes(matrix):
    """Two of ours along a column, where theirs lie along a row."""
    np.testing.assert_array_equal(np.asarray(matrix.codes[...]).T, GOLDEN['codes'])
    np.testing.assert_array_equal(np.asarray(matrix.scales[...]).T, GOLDEN['scales'])
    np.testing.assert_allclose(matrix.outer[...], GOLDEN['outer'], rtol=1e-6)
    np.testing.assert_allclose(matrix.offset[...], GOLDEN['offset'], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(matrix[...]).T[:8], GOLDEN['decoded'], rtol=1e-6)


def test_what_the_book_holds_comes_back_bit_for_bit():
    """A kernel of scale 1 whose numbers are in the book: its scales are equal, which their own 8 bits can say."""
    random = np.random.default_rng(1)
    kernel = formats.NF4[random.integers(0, 16, (64, 8))]
    kernel[0] = 1.0
    einsum = Einsum('BTD,DF->BTF', {'D': 64, 'F': 8})
    held = quantized(einsum.kernel.replace(jnp.asarray(kernel)), 'nf4')
    np.testing.assert_array_equal(np.asarray(held[...]), kernel)


@pytest.mark.parametrize('form', ['nf4', 'int4', 'int8'])
@pytest.mark.parametrize('spec', ['BTD,DNH->BTNH', 'BTNH,NHD->BTD', 'BECD,EDF->BECF'])
def test_any_linear_map_decodes_block_by_block(form, spec):
    """Against NumPy, with inputs that are no multiple of 64, nor of 2."""
    sizes = {'D': 71, 'N': 3, 'H': 23, 'E': 2, 'F': 5}
    einsum = Einsum(spec, sizes)
    kernel = np.random.default_rng(2).standard_normal(einsum.kernel.shape).astype(np.float32)
    held = quantized(einsum.kernel.replace(jnp.asarray(kernel)), form)
    dims, summed = spec.split('->')[0].split(',')[1], einsum.kernel.get_metadata('summed')
    axes = [dims.index(letter) for letter in summed]
    rows = np.moveaxis(kernel, axes, range(-len(axes), 0))
    kept, rows = rows.shape[: -len(axes)], rows.reshape(-1, np.prod([sizes[letter] for letter in summed]))
    near = np.empty_like(rows)
    width = rows.shape[1] if form == 'int8' else 64
    for start in range(0, rows.shape[1], width):
        block = rows[:, start : start + width].astype(np.float64)
        scale = np.abs(block).max(axis=1, keepdims=True)
        if form == 'int8':
            near[:, start : start + width] = np.round(block / scale * 127) / 127 * scale
        else:
            near[:, start : start + width] = (
                BOOKS[form][np.abs(block[..., None] / scale[..., None] - BOOKS[form]).argmin(-1)] * scale
            )
    want = np.moveaxis(near.reshape(*kept, *(sizes[letter] for letter in summed)), range(-len(axes), 0), axes)
    # The scales' own codes move them by less than 1/60.
    np.testing.assert_allclose(held[...], want, rtol=1e-5 if form == 'int8' else 1 / 60)
    x = np.random.default_rng(3).standard_normal([sizes.get(d, 2) for d in spec.split(',')[0]]).astype(np.float32)
    np.testing.assert_allclose(product(spec, jnp.asarray(x), held), np.einsum(spec, x, held[...]), rtol=1e-4, atol=1e-4)


def test_rows_of_a_table_are_those_of_all_of_it():
    graph = toy.graph(toy.config(vocab_size=99, width=130))
    table = graph.bind(toy.weights(graph)).embed.table
    index = jnp.asarray([[0, 98, 7]])
    for form in ('nf4', 'int4', 'int8'):
        held = quantized(table, form)
        np.testing.assert_array_equal(held.rows(index), held[...][index])


def says(model):
    graph = ModelGraph(model)
    weights = {path: leaf.get_value() for path, leaf in named_params(model)}
    return jax.jit(lambda weights: graph.bind(weights)(TOKENS))(weights)


@pytest.mark.parametrize(
    ('form', 'changes'),
    [
        ('nf4', {'bias': ('qkv', 'out', 'mlp')}),
        ('int8', {'tied_embeddings': True}),
        ('nf4', {'kv_heads': 4, 'mla': MLA(kv_rank=8, query_rank=6, rope_dim=4, value_dim=6)}),
        ('int4', {'moe': MoE(experts=4, chosen=2, expert_width=8, first_dense=1, shared=1)}),
    ],
    ids=['biased', 'tied', 'latent', 'experts'],
)
def test_a_stacked_model_of_codes_says_what_its_decoded_matrices_say(form, changes):
    graph = toy.graph(toy.config(**changes))
    model = graph.bind(toy.weights(graph))
    before = says(model)
    quantize(model, form)
    after = says(model)
    kinds = {leaf.dtype for path, leaf in named_params(model) if path.endswith('codes')}
    assert kinds == {jnp.dtype('int8' if form == 'int8' else 'uint8')}
    abstract = graph.bind(graph.shapes())
    quantize(abstract, form)
    assert ModelGraph(abstract).shapes() == ModelGraph(model).shapes()
    dequantize(model)
    assert {path for path, _ in named_params(model)} == set(graph.leaves)
    np.testing.assert_allclose(says(model), after, rtol=1e-4, atol=1e-4)
    assert 0 < jnp.abs(after - before).max() < (0.1 if form == 'int8' else 1.0) * jnp.abs(before).max()


def test_the_backward_pass_keeps_no_matrix():
    """What waits for it is the activations and the codes."""
    einsum = Einsum('BTD,DF->BTF', {'D': 64, 'F': 512})
    held = quantized(einsum.kernel.replace(jnp.ones((64, 512))), 'nf4')
    x = jnp.ones((1, 2, 64))

    def waits(kernel):
        _, vjp = jax.vjp(lambda x: product(einsum.spec, x, kernel), x)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))

    assert waits(einsum.kernel.replace(jnp.ones((64, 512)))) >= 4 * 64 * 512
    assert waits(held) < 64 * 512


def test_an_unknown_format_is_refused():
    einsum = Einsum('BTD,DF->BTF', {'D': 4, 'F': 4})
    with pytest.raises(ConfigError, match=r"unknown format 'nf5' .did you mean 'nf4'"):
        quantized(einsum.kernel, 'nf5')
    assert isinstance(quantized(einsum.kernel, 'int4'), FourBit)

"""Parameters are declared, then drawn: from the seed, their name and their layer, and from nothing else."""

import jax
import numpy as np
import pytest
import toy
from flax import nnx

from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.nn.einsum import Einsum
from tpu_llm.nn.embed import Embed, Head
from tpu_llm.nn.norm import LayerNorm
from tpu_llm.nn.param import Constant, Normal, count_parameters, initialise, named_params
from tpu_llm.nn.stack import make_stack


class Layer(nnx.Module):
    def __init__(self, *, gated):
        self.gate = Einsum('BTD,DF->BTF', {'D': 16, 'F': 20}) if gated else None
        self.up = Einsum('BTD,DF->BTF', {'D': 16, 'F': 20})


class Model(nnx.Module):
    """Every kind of parameter: padded on either side, stacked, constant."""

    def __init__(self, *, layers=3, gated=False, multiple=8):
        self.embed = Embed(19, 16, multiple=multiple, std=0.25)
        self.stack = make_stack(lambda index: Layer(gated=gated), layers)
        self.norm = LayerNorm(16, eps=1e-5)
        self.head = Head(19, 16, multiple=multiple)


def drawn(model, seed=0):
    return {name: np.asarray(leaf.get_value()) for name, leaf in named_params(initialise(model, seed))}


@pytest.fixture(scope='module')
def params():
    return drawn(Model())


def test_a_declared_parameter_is_a_shape():
    model = toy.config().make()
    assert all(isinstance(leaf.get_value(), jax.ShapeDtypeStruct) for _, leaf in named_params(model))


def test_a_model_of_405_billion_parameters_costs_nothing_to_make():
    config = DecoderConfig(
        vocab_size=128_256, width=16_384, layers=126, heads=128, kv_heads=8, head_dim=128, mlp_width=53_248
    )
    assert count_parameters(config.make()) == 405_853_388_800


def test_normal_has_its_standard_deviation_after_the_cut():
    x = np.asarray(Normal(0.3)(jax.random.key(0), (100_000,)))
    assert x.std() == pytest.approx(0.3, rel=0.01)
    assert x.mean() == pytest.approx(0.0, abs=0.005)
    assert np.abs(x).max() <= 2 * 0.3 / 0.8796


def test_constant_is_constant():
    assert (np.asarray(Constant(2.5)(jax.random.key(0), (3,))) == 2.5).all()


UP = 'stack.period.0.up.kernel'


def test_weights_are_a_function_of_the_seed(params):
    again, other = drawn(Model()), drawn(Model(), seed=1)
    for name, value in params.items():
        np.testing.assert_array_equal(again[name], value)
        assert (other[name] != value).any() == (not name.startswith('norm'))


def test_weights_do_not_depend_on_what_else_the_model_has(params):
    """Other layers, other parameters, another padding of the vocabulary."""
    other = drawn(Model(layers=2, gated=True, multiple=32))
    np.testing.assert_array_equal(other[UP], params[UP][:2])
    np.testing.assert_array_equal(other['embed.table'][:19], params['embed.table'][:19])
    np.testing.assert_array_equal(other['head.kernel'][:, :19], params['head.kernel'][:, :19])
    assert other['embed.table'].shape == (32, 16)


def test_no_two_weights_and_no_two_layers_are_drawn_alike(params):
    draws = [*params[UP], params['embed.table'], params['head.kernel'].T]
    scaled = [draw.ravel()[:300] / draw.ravel()[:300].std() for draw in draws]
    for i, one in enumerate(scaled):
        assert all(np.abs(one - other).max() > 1 for other in scaled[:i])


def test_padding_of_the_vocabulary_is_drawn_as_zero_and_not_counted(params):
    assert params['embed.table'].shape == (24, 16)
    assert not params['embed.table'][19:].any()
    assert not params['head.kernel'][:, 19:].any()
    assert {count_parameters(Model(multiple=multiple)) for multiple in (1, 8, 128)} == {2 * 19 * 16 + 3 * 320 + 32}


def test_kernels_are_drawn_by_their_fan_in():
    layer = initialise(Einsum('BTNH,NHD->BTD', {'N': 40, 'H': 50, 'D': 20}), 0)
    assert np.asarray(layer.kernel[...]).std() == pytest.approx(2000**-0.5, rel=0.02)


def test_norms_start_where_they_change_nothing(params):
    assert (params['norm.scale'] == 1).all()
    assert not params['norm.bias'].any()

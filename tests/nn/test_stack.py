"""Prefix, repeated period, suffix: in model order, with the weights and the noise of each layer its own."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tpu_llm.config import ConfigError
from tpu_llm.nn.context import Context, LayerOut, Routing
from tpu_llm.nn.einsum import Einsum
from tpu_llm.nn.param import Constant, initialise, named_params, param
from tpu_llm.nn.stack import REMAT_NAMES, check_remat, make_stack
from tpu_llm.parallel.pipeline import Pipeline

CONTEXT = Context(segments=jnp.ones((1, 1), jnp.int32), positions=jnp.zeros((1, 1), jnp.int32))

# layers, prefix, period: where each layer goes
SHAPES = {
    'all scanned': ((4, 0, 1), ['period.0'] * 4),
    'period 2': ((5, 0, 2), ['period.0', 'period.1'] * 2 + ['suffix.0']),
    'prefix and suffix': ((6, 1, 2), ['prefix.0', *['period.0', 'period.1'] * 2, 'suffix.0']),
    'no full period': ((2, 0, 3), ['suffix.0', 'suffix.1']),
}


class Digit(nnx.Module):
    """Writes its number behind the digits so far: the output tells the order of the layers."""

    def __init__(self, index):
        self.place = param('D', (1,), Constant(index))

    def __call__(self, x, context, layer, cache):
        return 10 * x + layer + 1, LayerOut(cache=cache)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('unroll', [0, 1, 3])
def test_layers_run_in_model_order(shape, unroll):
    (layers, prefix, period), _ = SHAPES[shape]
    stack = initialise(make_stack(Digit, layers, prefix=prefix, period=period, unroll=unroll), 0)
    x, outs = stack(jnp.zeros((1, 1, 1)), CONTEXT)
    assert int(x[0, 0, 0]) == int('123456'[:layers])
    assert [out.cache for out in outs] == [None] * len(stack.groups())
    assert int(stack.unstacked()(jnp.zeros((1, 1, 1)), CONTEXT)[0][0, 0, 0]) == int('123456'[:layers])


@pytest.mark.parametrize('shape', SHAPES)
def test_every_layer_is_in_its_place(shape):
    (layers, prefix, period), places = SHAPES[shape]
    stack = make_stack(Digit, layers, prefix=prefix, period=period)
    found = {}
    for name, leaf in named_params(stack):
        assert leaf.get_metadata('dims') == ('LD' if name.startswith('period') else 'D')
        found |= dict.fromkeys(leaf.get_metadata('layers'), name.removesuffix('.place'))
    assert [found[layer] for layer in range(layers)] == places


class Odd(nnx.Module):
    """Layers of odd index have two experts, and say in their load which layer they are."""

    def __init__(self, index):
        self.routes = index % 2 == 1

    def __call__(self, x, context, layer, cache):
        if not self.routes:
            return x, LayerOut()
        at = jnp.asarray(layer, jnp.float32)
        return x, LayerOut(routing=Routing(loss=at, load=jnp.stack([at, -at]), entropy=at, dropped=at))


@pytest.mark.parametrize(('layers', 'prefix'), [(7, 0), (8, 2), (2, 0), (9, 3)])
def test_routings_come_in_the_order_of_the_layers_that_have_experts(layers, prefix):
    stack = make_stack(Odd, layers, prefix=prefix, period=4)
    _, outs = stack(jnp.zeros((1, 1, 1)), CONTEXT)
    routing = stack.routing(outs)
    odd = list(range(1, layers, 2))
    assert routing.loss.tolist() == odd
    assert routing.load.tolist() == [[layer, -layer] for layer in odd]


class Linear(nnx.Module):
    def __init__(self, index):
        self.map = Einsum('BTD,DF->BTF', {'D': 33, 'F': 33})

    def __call__(self, x, context, layer, cache):
        return self.map(x), LayerOut(cache=cache)


def test_first_weights_are_bitwise_the_same_scanned_or_not():
    def weights(**shape):
        stack = initialise(make_stack(Linear, 5, **shape), 3).unstacked()
        return [np.asarray(block.map.kernel[...]) for block in stack.prefix]

    alone = weights(prefix=5)
    for shape in ({}, {'period': 2}, {'prefix': 1, 'period': 2}):
        for layer, (scanned, single) in enumerate(zip(weights(**shape), alone, strict=True)):
            np.testing.assert_array_equal(scanned, single, err_msg=f'layer {layer} of {shape}')


def test_what_is_made_of_each_layer_is_grouped_as_they_are():
    stack = initialise(make_stack(Linear, 10, prefix=1, period=2, stages=2, schedule=Pipeline(circles=2)), 3)
    kernels = {layer: block.map.kernel[...] for layer, block in enumerate(stack.unstacked().prefix)}
    assert stack.slots != tuple(range(stack.repeats))
    made = stack.each(lambda block: block.map.kernel[...] + 1)
    for layers, grouped in zip(stack.groups(), made, strict=True):
        expected = jnp.stack([kernels[layer] + 1 for layer in layers])
        np.testing.assert_array_equal(grouped, expected if len(layers) > 1 else expected[0])


class Experts(nnx.Module):
    def __init__(self, index):
        self.maps = nnx.List([Einsum('BTD,DF->BTF', {'D': 4, 'F': 4}) for _ in range(2)])


def test_modules_in_a_list_are_drawn_apart():
    stack = initialise(make_stack(Experts, 2), 0)
    first, second = (leaf.get_value() for _, leaf in named_params(stack))
    assert not np.isin(first, second).any()


@pytest.mark.parametrize('remat', ['none', 'full', 'dots', 'query', 'gate+up@host', '+'.join(REMAT_NAMES)])
def test_remat_policies_that_exist(remat):
    check_remat(remat)


@pytest.mark.parametrize('remat', ['', 'all', 'query+full', 'gates+up'])
def test_remat_policies_that_do_not(remat):
    with pytest.raises(ConfigError, match=r'remat .*: unknown name .*; write none, full, dots, or what to save joined'):
        check_remat(remat)


def test_remat_knows_no_other_place_than_the_host():
    with pytest.raises(ConfigError, match=r"'up@disk' is to be kept in 'disk'; write up, or up@host"):
        check_remat('gate+up@disk')

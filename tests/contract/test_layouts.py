"""On every layout, one step from the same weights is the step of one device, and so are the weights first drawn.
A new layout is one more preset or mesh.

Tolerance: 1e-6 of the loss and 1e-6 absolute of every gradient, whose largest entries are 0.05 to 0.3: the order of
float32 sums is all that differs.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from tpu_llm.config import ConfigError
from tpu_llm.models.decoder import Dropout
from tpu_llm.nn.param import initialise, named_params
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.optim.optimizer import SGD
from tpu_llm.optim.schedule import Schedule
from tpu_llm.parallel.compile import Compiled
from tpu_llm.parallel.rules import PRESETS
from tpu_llm.train.state import abstract_state
from tpu_llm.train.step import StepOptions, make_step

MESHES = {
    'data=8': {'data': 8},
    'fsdp=8': {'fsdp': 8},
    'tensor=4,data=2': {'tensor': 4, 'data': 2},
    'fsdp=2,tensor=2,data=2': {'fsdp': 2, 'tensor': 2, 'data': 2},
}


def layouts(*always):
    """Every preset on every mesh; all but the ones given only with -m full."""
    pairs = [(preset, mesh) for preset in PRESETS for mesh in MESHES]
    return [pytest.param(*pair, marks=() if pair in always else pytest.mark.full) for pair in pairs]


DRAWN = layouts(('zero1', 'tensor=4,data=2'), ('zero3', 'fsdp=2,tensor=2,data=2'))
STEPPED = layouts(
    ('zero1', 'data=8'), ('zero3', 'fsdp=8'), ('zero1', 'tensor=4,data=2'), ('zero2', 'fsdp=2,tensor=2,data=2')
)

CONFIG = toy.config(
    vocab_size=1000,
    layers=2,
    heads=8,
    kv_heads=4,
    mlp='relu',
    mlp_width=24,
    norm='layer',
    bias=True,
    position='learned',
    max_length=8,
    dropout=Dropout(residual=0.1, attention=0.2, embedding=0.1),
)
BATCH = toy.batch(np.array([[1, 1, 1, 2, 2, 2, 0, 0], [1] * 8] * 4), vocab_size=1000)


def make_graph(layout):
    """On one device the 1000 tokens are not padded; on several they are, as a run pads them."""
    return toy.graph(CONFIG, 128 * layout.mesh.shape['tensor'] if layout.mesh.size > 1 else 8)


def real(params):
    """Without the padding of the vocabulary."""
    arrays = {name: np.asarray(value) for name, value in params.items()}
    arrays['embed.table'], arrays['head.kernel'] = arrays['embed.table'][:1000], arrays['head.kernel'][:, :1000]
    return arrays


def padded(weights, graph):
    """Weights of the unpadded model, with noise where the vocabulary is padded."""
    noise = toy.weights(graph, seed=1)
    table, head = noise['embed.table'].at[:1000], noise['head.kernel'].at[:, :1000]
    return weights | {'embed.table': table.set(weights['embed.table']), 'head.kernel': head.set(weights['head.kernel'])}


def one_step(layout, weights):
    """Loss and gradients, the latter as the step of SGD at rate 1."""
    graph = make_graph(layout)
    tx = SGD(schedule=Schedule(peak=1.0, decay='constant'), clip=0.0, momentum=0.0).make(toy.infos(graph), 10)
    like = abstract_state(graph, tx, layout, ema=False)
    state = jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), like)
    params = {name: jax.device_put(w, like.params[name].sharding) for name, w in padded(weights, graph).items()}
    before = real(params)
    step = Compiled(
        'step',
        make_step(graph, NextToken(chunk=2), tx, layout, StepOptions(seed=0)),
        donate=(0,),
        out_shardings=(jax.tree.map(lambda x: x.sharding, like), None),
    )
    place = layout.named(layout.rules.activations, 'BT', (8, 8))
    batch = jax.tree.map(lambda x: jax.device_put(x, place), BATCH)
    new, metrics = step(dataclasses.replace(state, params=params), None, batch)
    after = real(new.params)
    return float(metrics['loss']), {name: before[name] - after[name] for name in before}


@pytest.fixture(scope='module')
def drawn():
    return real(draw(toy.layout()))


def draw(layout):
    graph = make_graph(layout)
    model = CONFIG.make(vocab_multiple=graph.leaves['embed.table'].shape[0])
    initialise(model, 7, layout)
    params = {name: leaf.get_value() for name, leaf in named_params(model)}
    for name, value in params.items():
        assert value.sharding.is_equivalent_to(
            layout.named(layout.rules.params, graph.leaves[name].get_metadata('dims'), value.shape), value.ndim
        )
    return params


# Before anything asks for quick compilation: the bits of production's own programs are meant.
@pytest.mark.parametrize(('preset', 'mesh'), DRAWN)
def test_first_weights_are_bitwise_those_of_one_device(drawn, preset, mesh):
    params = draw(toy.layout(preset, **MESHES[mesh]))
    assert not params['embed.table'][1000:].any()
    assert not params['head.kernel'][:, 1000:].any()
    for name, value in real(params).items():
        np.testing.assert_array_equal(value, drawn[name], err_msg=name)


@pytest.fixture(scope='module')
def alone(quick_compile):
    weights = toy.weights(make_graph(toy.layout()))
    return weights, *one_step(toy.layout(), weights)


@pytest.mark.parametrize(('preset', 'mesh'), STEPPED)
def test_a_step_is_that_of_one_device(alone, preset, mesh):
    weights, loss, gradients = alone
    sharded_loss, sharded = one_step(toy.layout(preset, **MESHES[mesh]), weights)
    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-6)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(sharded[name], gradient, atol=1e-6, err_msg=name)


def test_a_mesh_that_does_not_divide_a_weight_is_an_error_that_names_it():
    layout = toy.layout(tensor=8)
    graph = make_graph(layout)
    tx = SGD(schedule=Schedule(peak=1.0)).make(toy.infos(graph), 10)
    message = (
        r'stack.period.0.attention.key.\w+ \(LD?KH\): K = 4 is not divisible by tensor = 8; '
        'make K a multiple of 8 or the mesh axis a divisor of 4'
    )
    with pytest.raises(ConfigError, match=message):
        abstract_state(graph, tx, layout, ema=False)

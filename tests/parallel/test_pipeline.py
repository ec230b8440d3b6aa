"""The pipeline's order, its bubble, and what must not notice that there are stages: checkpoints and generation.
That losses and gradients are those of one device is in test_layouts.py.
"""

import jax
import jax.numpy as jnp
import matrix
import numpy as np
import pytest
import toy

from tpu_llm.config import ConfigError
from tpu_llm.infer.generate import decode
from tpu_llm.infer.sampling import Greedy
from tpu_llm.nn.param import param_sharding
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.parallel import sharding
from tpu_llm.parallel.pipeline import Pipeline, describe, order, overhead
from tpu_llm.train.saved import Saved
from tpu_llm.train.state import abstract_state, create_state

pytestmark = pytest.mark.usefixtures('quick_compile')


@pytest.mark.parametrize(
    ('layers', 'stages', 'circles', 'slots'),
    [
        (4, 1, 1, [0, 1, 2, 3]),
        (4, 2, 1, [0, 1, 2, 3]),
        (4, 2, 2, [0, 2, 1, 3]),
        (8, 2, 2, [0, 1, 4, 5, 2, 3, 6, 7]),
        (5, 2, 1, [0, 1, 2, 3, 4, -1]),
        (5, 2, 2, [0, 1, 4, -1, 2, 3, -1, -1]),
    ],
)
def test_each_stage_holds_the_layers_of_every_pth_virtual_stage(layers, stages, circles, slots):
    assert order(layers, stages, circles) == slots


def test_the_bubble_is_the_formulas():
    assert overhead(8, 4, 1, 8) == pytest.approx(11 / 8)  # (M + P - 1) / M
    assert overhead(8, 4, 2, 8) == pytest.approx(19 / 16)  # circular: (M R + P - 1) / (M R)
    assert overhead(6, 4, 1, 8) == pytest.approx(11 / 8 * 8 / 6)  # two slots without layers


def test_the_bubble_is_told():
    assert describe(6, 4, 1, 8) == (
        'pipeline: 4 stages, 8 microbatches, 1 circle(s): 45.5% bubble, 2 of its slots without layers'
    )
    assert describe(8, 4, 2, 8).endswith('2 circle(s): 15.8% bubble')


def test_more_virtual_stages_than_layers_are_an_error_with_what_would_hold():
    message = (
        r'3 layers \(repeats of the period\) are fewer than 2 stages x 2 circles = 4; the nearest that hold: '
        'mesh.stage = 2 with pipeline.circles = 1'
    )
    with pytest.raises(ConfigError, match=message):
        toy.config(layers=3).make(stages=2, schedule=Pipeline(circles=2))


@pytest.mark.parametrize(('count', 'near'), [(6, '4 or 8'), (3, '4')])
def test_microbatches_that_are_no_multiple_of_the_stages_are_an_error_with_the_nearest(count, near):
    message = f'pipeline.microbatches = {count} is not a multiple of the 4 stages; the nearest: {near}$'
    with pytest.raises(ConfigError, match=message):
        Pipeline(microbatches=count).count(4)


@pytest.fixture(scope='module')
def states():
    """The same new state on one device and on two stages of which one has a slot without layers, and their savers."""
    made = []
    for layout in (toy.layout(), toy.layout('zero3', stage=2, fsdp=2)):
        graph = matrix.make_graph('moe', layout)
        tx = AdamW(schedule=Schedule(peak=0.1)).make(toy.infos(graph), 10)
        model = graph.bind({name: leaf.get_value() for name, leaf in graph.leaves.items()})
        state = create_state(model, graph, tx, layout, seed=3, ema=True)
        made.append((state, Saved(graph, abstract_state(graph, tx, layout, ema=True))))
    return made


def test_what_is_saved_does_not_depend_on_the_stages(states):
    (one, saver), (staged, staged_saver) = states
    saved, staged_saved = saver.tree(one), staged_saver.tree(staged)
    assert jax.tree.structure(saved) == jax.tree.structure(staged_saved)
    for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(staged_saved), strict=True):
        np.testing.assert_array_equal(a, b)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), staged_saver.shapes())
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), staged_saved)


def test_what_one_device_saved_is_restored_onto_stages(states):
    (one, saver), (staged, staged_saver) = states
    tree = jax.tree.map(np.asarray, saver.tree(one))
    place = jax.tree.map(lambda x: x.sharding, staged_saver.shapes())
    restored = staged_saver.state(jax.tree.map(jax.device_put, tree, place))
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(staged), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('unstacked', [False, True])
def test_generation_under_stages_is_that_of_one_device(unstacked):
    """Token by token there are no microbatches to keep stages busy: each layer comes from its stage in turn."""
    config = toy.config(layers=5, vocab_size=128)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 128, (4, 6), np.int32))
    segments = jnp.array([[0] * 3 + [1] * 3, [1] * 6] * 2, jnp.int32)

    def run(layout, **stages):
        graph = toy.graph(config, **stages)
        weights = matrix.placed(alone, graph)

        def generate(weights):
            with sharding.use(layout):
                model = graph.bind(weights)
                model = model.unstacked() if unstacked else model
                options = {'max_new': 5, 'sampling': Greedy(), 'eos': 1, 'vocab_size': 128}
                return decode(model, tokens, segments, jax.random.key(0), **options)

        place = {name: param_sharding(layout, name, leaf) for name, leaf in graph.leaves.items()}
        return jax.jit(generate)(jax.device_put(weights, place))

    alone = {name: np.asarray(w) for name, w in toy.weights(toy.graph(config)).items()}
    staged = run(toy.layout(stage=2, tensor=2), stages=2, schedule=Pipeline(circles=2))
    np.testing.assert_array_equal(staged, run(toy.layout()))

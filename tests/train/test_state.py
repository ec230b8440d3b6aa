"""Where the state lies on the mesh, and that its abstract form is the real one's."""

import jax
import numpy as np
import pytest
import toy

from tpu_llm.nn.param import initialise, named_params
from tpu_llm.optim.optimizer import Adafactor, AdamW, Muon
from tpu_llm.optim.schedule import Schedule
from tpu_llm.train.state import abstract_state, create_state

pytestmark = pytest.mark.usefixtures('quick_compile')

FLAT = Schedule(peak=0.1)
CONFIG = toy.config(layers=2, mlp='relu')
GRAPH = toy.graph(CONFIG)


def make_layout():
    return toy.layout('zero3', fsdp=2, tensor=2)


def make_tx(optimizer):
    return optimizer.make(toy.infos(GRAPH), 10)


@pytest.fixture(scope='module')
def created():
    tx, layout = make_tx(AdamW(schedule=FLAT)), make_layout()
    state = create_state(CONFIG.make(vocab_multiple=8), GRAPH, tx, layout, seed=3, ema=True)
    return state, abstract_state(GRAPH, tx, layout, ema=True)


def test_the_abstract_state_has_the_real_ones_shapes_and_places(created):
    state, abstract = created
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for real, like in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (real.shape, real.dtype) == (like.shape, like.dtype)
        assert real.sharding.is_equivalent_to(like.sharding, real.ndim)


def test_it_starts_at_step_zero_from_the_seeds_weights(created):
    state, _ = created
    model = initialise(CONFIG.make(vocab_multiple=8), 3, make_layout())
    for name, leaf in named_params(model):
        np.testing.assert_array_equal(state.params[name], leaf.get_value())
        np.testing.assert_array_equal(state.ema[name], leaf.get_value())
    assert (state.step, state.skipped, state.bad_in_a_row, state.loss_mean, state.loss_variance) == (0, 0, 0, 0, 0)


def test_the_average_is_no_alias_of_the_parameters(created):
    """Both are donated, and a buffer can be given away only once."""
    state, _ = created
    name = 'stack.period.0.mlp.up.kernel'
    pointers = [
        [shard.data.unsafe_buffer_pointer() for shard in params[name].addressable_shards]
        for params in (state.params, state.ema)
    ]
    assert not set(pointers[0]) & set(pointers[1])


@pytest.mark.parametrize('optimizer', [AdamW(schedule=FLAT), Muon(schedule=FLAT), Adafactor(schedule=FLAT)])
@pytest.mark.parametrize('preset', ['zero1', 'zero2', 'zero3'])
def test_moments_are_sharded_whatever_the_parameters_are(optimizer, preset):
    layout = toy.layout(preset, fsdp=4, tensor=2)
    state = abstract_state(GRAPH, make_tx(optimizer), layout, ema=False)

    def share(leaf):
        """The part of an array that one device holds."""
        return np.prod(leaf.sharding.shard_shape(leaf.shape)) / np.prod(leaf.shape)

    names = ['stack.period.0.mlp.up.kernel', 'stack.period.0.attention.query.kernel', 'embed.table', 'head.kernel']
    moments = jax.tree_util.tree_leaves_with_path(state.optimizer)
    for name in names:
        assert share(state.params[name]) == (1 / 8 if preset == 'zero3' else 1 / 2)
        shape = state.params[name].shape
        found = [x for path, x in moments if jax.tree_util.DictKey(name) in path and x.shape == shape]
        assert found
        assert {share(moment) for moment in found} == {1 / 8}
    scale = state.params['stack.period.0.mlp_norm.scale']
    assert scale.sharding.is_fully_replicated


def test_factored_moments_lie_where_the_rows_and_columns_of_their_parameters_do():
    layout = toy.layout(fsdp=4, tensor=2)
    state = abstract_state(GRAPH, make_tx(Adafactor(schedule=FLAT, min_factored=4)), layout, ema=False)
    moments = {
        (path[-2].name, path[-1].key): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer)
        if isinstance(path[-1], jax.tree_util.DictKey)
    }
    for name, rows, columns in [
        ('stack.period.0.mlp.up.kernel', (2, 16, 1), (2, 1, 20)),
        ('stack.period.0.attention.out.kernel', (2, 4, 6, 1), (2, 1, 1, 16)),
        ('embed.table', (24, 1), (1, 16)),
    ]:
        for which, shape in [('rows', rows), ('columns', columns)]:
            moment = moments[which, name]
            assert moment.shape == shape
            split = state.params[name].sharding.shard_shape(state.params[name].shape)
            expected = tuple(min(pair) for pair in zip(split, shape, strict=True))
            assert moment.sharding.shard_shape(shape) == expected
    assert not any(which == 'full' and name.endswith('.kernel') for which, name in moments)

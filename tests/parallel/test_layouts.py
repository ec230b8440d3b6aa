"""On every layout, one step from the same weights is the step of one device, and so are the weights first drawn.
A new layout is one more preset or mesh (see matrix.py).

Tolerance: 1e-6 of the loss, and of every gradient 1e-5 of its largest entry: the order of float32 sums is all that
differs.
"""

import matrix
import numpy as np
import pytest
import toy

from tpu_llm.config import ConfigError
from tpu_llm.nn.param import initialise, named_params
from tpu_llm.optim.optimizer import SGD
from tpu_llm.optim.schedule import Schedule
from tpu_llm.parallel.rules import PRESETS
from tpu_llm.train.state import abstract_state

WIDE = ({'fsdp': 2, 'tensor': 4}, {'stage': 2, 'tensor': 4}, {'seq': 2, 'tensor': 4}, {'expert': 2, 'tensor': 4})
CASES = [
    pytest.param(
        model, preset, axes, marks=() if always else pytest.mark.full, id=f'{model}, {matrix.title(axes)}, {preset}'
    )
    for models, preset, meshes, always in (
        (matrix.EVERYWHERE, 'zero3', matrix.SINGLES, True),
        (matrix.EVERYWHERE, 'zero3', matrix.PAIRS + matrix.TRIPLES, False),
        (matrix.EVERYWHERE, 'zero1', ({'data': 2, 'tensor': 4}, {'fsdp': 8}), False),
        (matrix.EVERYWHERE, 'zero2', ({'data': 2, 'tensor': 4}, {'fsdp': 8}), False),
        (matrix.EVERYWHERE, 'zero3_stream', WIDE, False),
        (('parallel',), 'zero3', ({'tensor': 8},), True),
        (('parallel',), 'zero3', ({'stage': 2, 'tensor': 4}, {'seq': 2, 'tensor': 4}), False),
        (('parallel',), 'zero3_stream', WIDE[:1], True),
        (('alibi',), 'zero3', ({'tensor': 8},), True),
        (('relative',), 'zero3', ({'stage': 2, 'tensor': 4},), True),
        (('distances',), 'zero3', WIDE[2:3], True),
        (('alibi', 'relative', 'distances', 'two turns'), 'zero3', (*WIDE[:1], *WIDE[2:]), False),
        (('two turns',), 'zero3', WIDE[1:2], False),
        (('ahead',), 'zero3', ({'stage': 2, 'tensor': 4},), True),
        (('ahead',), 'zero3', (*matrix.SINGLES, *WIDE[2:]), False),
        (('ahead',), 'zero3_stream', WIDE[:1], False),
    )
    for model in models
    for axes in meshes
]
DRAWN = [
    pytest.param('dense', 'zero1', {'data': 2, 'tensor': 4}),
    pytest.param('moe', 'zero3', {'stage': 2, 'fsdp': 2, 'expert': 2}),
    *(pytest.param(*case.values, marks=pytest.mark.full) for case in CASES),
]


def draw(model, layout):
    graph = matrix.make_graph(model, layout)
    made = graph.bind({name: leaf.get_value() for name, leaf in graph.leaves.items()})
    initialise(made, 7, layout)
    params = {name: leaf.get_value() for name, leaf in named_params(made)}
    for name, value in params.items():
        dims = graph.leaves[name].get_metadata('dims')
        wanted = layout.named(layout.rules.params, dims, value.shape)
        assert value.sharding.is_equivalent_to(wanted, value.ndim), name
    return params, graph


# Before anything asks for quick compilation: the bits of production's own programs are meant.
@pytest.mark.parametrize(('model', 'preset', 'axes'), DRAWN)
def test_first_weights_are_bitwise_those_of_one_device(model, preset, axes):
    params, graph = draw(model, toy.layout(preset, **axes))
    assert not params['embed.table'][1000:].any()
    assert not params['head.kernel'][:, 1000:].any()
    alone = matrix.real(*draw(model, toy.layout()))
    for name, value in matrix.real(params, graph).items():
        np.testing.assert_array_equal(value, alone[name], err_msg=name)


@pytest.mark.usefixtures('quick_compile')
@pytest.mark.parametrize(('model', 'preset', 'axes'), CASES)
def test_a_step_is_that_of_one_device(model, preset, axes):
    loss, gradient, name = matrix.errors(model, preset, axes)
    assert loss < 1e-6
    assert gradient < 1e-5, name


def test_a_mesh_that_does_not_divide_a_weight_is_an_error_that_names_it():
    layout = toy.layout(tensor=8)
    graph = toy.graph(toy.config(heads=8, kv_heads=4), 1024)
    tx = SGD(schedule=Schedule(peak=1.0)).make(toy.infos(graph), 10)
    message = (
        r'stack.period.0.attention.key.\w+ \(LD?KH\): K = 4 is not divisible by tensor = 8; '
        'make config.model.kv_heads a multiple of 8 or the mesh axis a divisor of 4'
    )
    with pytest.raises(ConfigError, match=message):
        abstract_state(graph, tx, layout, ema=False)


def test_every_preset_is_in_the_matrix():
    assert {case.values[1] for case in CASES} == set(PRESETS)

"""From dims to shardings: the longest match, what the mesh cannot hold, and activations while tracing."""

import jax
import jax.numpy as jnp
import pytest
import toy
from jax.sharding import PartitionSpec as P

from tpu_llm.config import ConfigError
from tpu_llm.parallel import sharding
from tpu_llm.parallel.rules import PRESETS
from tpu_llm.parallel.sharding import constrain, partition

TABLE = {
    'B': ('data', 'fsdp'),
    'T': 'seq',
    'D': 'fsdp',
    'F': 'tensor',
    'L': 'stage',
    ' D': (None,),
    'BTD': (('data', 'fsdp'), ('seq', 'tensor'), None),
}

MATCHES = [
    ('DF', P('fsdp', 'tensor')),  # letter by letter
    ('D', P(None)),  # a vector has its own key
    ('BTD', P(('data', 'fsdp'), ('seq', 'tensor'), None)),  # so has a whole tensor
    ('BTF', P(('data', 'fsdp'), 'seq', 'tensor')),
    ('LDF', P('stage', 'fsdp', 'tensor')),
    ('LD', P('stage', None)),  # a stacked vector is a vector
    ('LBTD', P('stage', ('data', 'fsdp'), ('seq', 'tensor'), None)),
    ('XF', P(None, 'tensor')),  # what no key names is replicated
    ('', P()),
]


@pytest.mark.parametrize(('dims', 'spec'), MATCHES)
def test_the_longest_match_wins(dims, spec):
    assert partition(TABLE, dims) == spec


def test_a_rule_of_a_whole_tensor_has_an_entry_for_each_dim():
    with pytest.raises(AssertionError, match="rule ' D': a whole tensor has one entry a dim, not 'fsdp'"):
        partition({' D': 'fsdp'}, 'D')


@pytest.mark.parametrize('preset', PRESETS)
def test_presets_differ_in_what_the_fsdp_axis_splits(preset):
    rules = PRESETS[preset]
    split = {kind: partition(getattr(rules, kind), 'LDF')[1] == 'fsdp' for kind in ('params', 'gradients', 'optimizer')}
    stage = int(preset.removeprefix('zero')[0])
    assert split == {'params': stage >= 3, 'gradients': stage >= 2, 'optimizer': stage >= 1}


def test_a_dim_that_its_axes_do_not_divide_is_an_error_that_says_the_mend():
    layout = toy.layout(fsdp=4, tensor=2)
    message = (
        r'mlp.up \(DF\): D = 6 is not divisible by fsdp = 4; make config.model.width a multiple of 4 '
        'or the mesh axis a divisor of 6'
    )
    with pytest.raises(ConfigError, match=message):
        layout.named(TABLE, 'DF', (6, 4), 'mlp.up')
    with pytest.raises(ConfigError, match=r'F = 3 .* make config.model.mlp_width a multiple of 2 or'):
        layout.named(TABLE, 'DF', (4, 3), 'mlp.up')
    with pytest.raises(ConfigError, match=r'F = 3 .* make config.model.moe.expert_width a multiple of 2'):
        layout.named(TABLE, 'EDF', (4, 4, 3), 'experts.up')
    with pytest.raises(ConfigError, match=r'the batch \(BT\): B = 6 is not divisible by data x fsdp = 4'):
        toy.layout(data=2, fsdp=2).named(TABLE, 'BT', (6, 3), 'the batch')


def test_a_mesh_axis_that_would_split_two_dims_is_an_error():
    message = r"scores \(BD\): mesh axis 'fsdp' would split both B and D; change one of the two in the rule table"
    with pytest.raises(ConfigError, match=message):
        toy.layout(fsdp=2).named(TABLE, 'BD', (2, 2), 'scores')


def test_activations_are_placed_by_the_layout_in_use():
    layout = toy.layout(data=2, fsdp=2, tensor=2)

    @jax.jit
    def place(x):
        return constrain(x, 'BTF')

    x = jnp.zeros((4, 3, 8))
    with sharding.use(layout):
        assert sharding.current() is layout
        assert place(x).sharding.shard_shape(x.shape) == (1, 3, 4)
    assert sharding.current() is None
    assert constrain(x, 'BTF') is x


def test_one_device_needs_no_marks():
    x = jnp.zeros((3, 3, 3))
    with sharding.use(toy.layout()):
        assert constrain(x, 'BTF') is x


def test_an_activation_that_does_not_fit_is_an_error():
    with sharding.use(toy.layout(data=2)), pytest.raises(ConfigError, match=r'an activation \(BTF\): B = 3 is not div'):
        constrain(jnp.zeros((3, 2, 4)), 'BTF')


def test_axes_that_are_manual_where_it_is_traced_are_dropped():
    layout = toy.layout(data=2, tensor=2)
    shapes = []

    def local(x):
        shapes.append(x.shape)
        return constrain(2 * x, 'BTF')

    mapped = jax.shard_map(local, mesh=layout.mesh, in_specs=P('data'), out_specs=P('data'), axis_names={'data'})
    with sharding.use(layout):
        out = jax.jit(mapped)(jnp.ones((4, 3, 8)))
    assert shapes == [(2, 3, 8)]
    assert out.sharding.shard_shape(out.shape) == (2, 3, 4)
    assert (out == 2).all()

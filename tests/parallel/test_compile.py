"""The recompile sentry: how many programs there are, and what made each new one."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from tpu_llm.parallel.compile import Compiled


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, 'tpu_llm')
    return lambda: [record.getMessage() for record in caplog.records if record.name == 'tpu_llm']


def place(x, **axes):
    layout = toy.layout(**axes)
    return jax.device_put(x, layout.named({'B': ('data', 'fsdp')}, 'BT', x.shape))


def test_equal_arguments_compile_once(warnings):
    double = Compiled('double', lambda tree: jax.tree.map(lambda x: 2 * x, tree))
    for value in (1.0, 2.0):
        assert double({'a': jnp.full(3, value), 'b': None})['a'].tolist() == [2 * value] * 3
    assert double.compiles == 1
    assert warnings() == []


X = np.ones((4, 2), np.float32)

CHANGES = [
    ({'x': jnp.asarray(X[:2])}, r"f is compiled again: [0]['x']: (4, 2) → (2, 2)"),
    ({'x': jnp.asarray(X, jnp.bfloat16)}, r"f is compiled again: [0]['x']: float32 → bfloat16"),
    ({'x': place(X, data=2)}, r"f is compiled again: [0]['x']: SingleDeviceSharding"),
    ({'x': jnp.asarray(X), 'y': jnp.ones(1)}, 'f is compiled again: the arguments have another structure'),
]


@pytest.mark.parametrize(('argument', 'message'), CHANGES)
def test_a_second_program_is_reported_with_what_changed(warnings, argument, message):
    f = Compiled('f', lambda tree: tree['x'].sum())
    f({'x': jnp.asarray(X)})
    f(argument)
    assert f.compiles == 2
    assert len(warnings()) == 1
    assert warnings()[0].startswith(message)
    f({'x': jnp.asarray(X)})  # the first program is still there
    assert f.compiles == 2


def test_a_changed_layout_is_told_by_its_specs(warnings):
    f = Compiled('f', lambda x: x.sum())
    f(place(X, data=2, fsdp=2))
    f(jax.device_put(X, toy.layout(data=2, fsdp=2).replicated))
    assert "[0]: P(('data', 'fsdp'), None) → P()" in warnings()[0]


def test_many_changes_are_counted(warnings):
    f = Compiled('f', lambda xs: sum(x.sum() for x in xs))
    f([jnp.ones(2)] * 6)
    f([jnp.ones(3)] * 6)
    assert warnings()[0].count('(2,) → (3,)') == 4
    assert warnings()[0].endswith('; and 2 more')


def test_donated_arguments_are_given_away():
    f = Compiled('f', lambda x, y: x + y, donate=(0,))
    x, y = jnp.ones(1000), jnp.ones(1000)
    assert f(x, y).sum() == 2000
    assert x.is_deleted()
    assert not y.is_deleted()


def test_programs_can_be_made_ahead_of_the_first_call():
    f = Compiled('f', lambda x: x + 1, out_shardings=toy.layout(data=2).replicated)
    x = place(X, data=2)
    f.program(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding))
    assert f(x).sharding.is_fully_replicated
    assert f.compiles == 1


def test_compiler_options_reach_the_compiler():
    with pytest.raises(Exception, match='no_such_option'):
        Compiled('f', lambda x: x, options={'no_such_option': 'true'})(jnp.ones(1))

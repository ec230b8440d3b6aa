"""Frequencies for longer rows equal those of transformers, stored with the script that made them.

Tolerance: 1e-6 of each frequency; theirs are float32 all the way.
"""

import copy
import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tpu_llm.config import ConfigError, dump, load, validate
from tpu_llm.nn.position import rotary_angles, rotate, scaled_angles
from tpu_llm.nn.rope_scaling import NTK, DynamicNTK, Linear, Llama3, LongRope, YaRN

THEIRS = json.loads((Path(__file__).parents[1] / 'golden/positions/frequencies.json').read_text())
LONGROPE = LongRope(
    short=tuple(1 + i / 10 for i in range(16)),
    long=tuple(1 + 0.7 * i for i in range(16)),
    original_length=4096,
    attention_factor=math.sqrt(1 + math.log(32) / math.log(4096)),
)
OURS = {
    'Linear': Linear(factor=4.0),
    'NTK': NTK(factor=4.0),
    'DynamicNTK, short': DynamicNTK(factor=2.0, original_length=2048),
    'DynamicNTK, long': DynamicNTK(factor=2.0, original_length=2048),
    'YaRN': YaRN(factor=16.0, original_length=4096),
    'YaRN, DeepSeek': YaRN(factor=40.0, original_length=4096, attention_factor=1.0),
    'YaRN, ends within pairs': YaRN(factor=32.0, original_length=4096, truncate=False),
    'Llama3': Llama3(factor=8.0, original_length=8192),
    'LongRope, short': LONGROPE,
    'LongRope, long': LONGROPE,
}
EACH = [pytest.param(scaling, id=name) for name, scaling in OURS.items()]


@pytest.mark.parametrize('name', OURS)
def test_frequencies_are_those_of_transformers(name):
    theirs = THEIRS[name]
    rows = jnp.array([theirs['length'], theirs['length']])
    found, factor = OURS[name].frequencies(32, theirs['theta'], rows)
    for row in np.asarray(found).reshape(-1, 16):
        np.testing.assert_allclose(row, theirs['frequencies'], rtol=1e-6)
    assert factor == pytest.approx(theirs['factor'], rel=1e-6)
    assert set(OURS) == set(THEIRS)


@pytest.mark.parametrize('scaling', EACH)
def test_angles_are_positions_times_frequencies_and_both_sin_and_cos_grow(scaling):
    positions = jnp.array([[0, 1, 7, 5000], [3, 2, 1, 0]])
    frequencies, factor = scaling.frequencies(32, 10_000.0, jnp.array([5001, 4]))
    angles = np.asarray(positions)[..., None] * np.broadcast_to(np.asarray(frequencies), (2, 16))[:, None]
    sin, cos = scaled_angles(positions, positions >= 0, 32, 10_000.0, scaling)
    np.testing.assert_allclose(sin, factor * np.sin(angles), atol=1e-3)  # of angles up to 5000, in float32
    np.testing.assert_allclose(cos, factor * np.cos(angles), atol=1e-3)


@pytest.mark.parametrize('scaling', [OURS['DynamicNTK, long'], LONGROPE], ids=['DynamicNTK', 'LongRope'])
def test_a_row_is_as_long_as_its_last_real_position(scaling):
    rows = jnp.array([[0, 1, 2, 4999], [0, 1, 2, 4999], [0, 1, 2, 3]])
    real = jnp.array([[True] * 4, [True] * 3 + [False], [True] * 4])
    sin, _ = scaled_angles(rows, real, 32, 10_000.0, scaling)
    np.testing.assert_array_equal(sin[1, :3], sin[2, :3])
    assert (np.asarray(sin[0, 1] != sin[1, 1])).any()


def test_a_part_of_a_head_turns_and_the_rest_stays():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 10)), jnp.float32)
    turns = rotary_angles(jnp.array([[0, 1, 2], [5, 6, 7]]), 6, 100.0)
    turned = rotate(x, turns)
    np.testing.assert_array_equal(turned[..., :6], rotate(x[..., :6], turns))
    np.testing.assert_array_equal(turned[..., 6:], x[..., 6:])
    assert turned.dtype == x.dtype


@pytest.mark.parametrize('scaling', EACH)
def test_it_is_a_config_and_a_hashable_value(scaling):
    validate(scaling)
    assert load(dump(scaling)) == scaling
    assert hash(copy.copy(scaling)) == hash(scaling)


WRONG = [
    (Linear(factor=0.5), 'Linear.factor is 0.5; it is how many times longer rows become, 1 or more'),
    (NTK(factor=0.0), 'NTK.factor is 0.0; it is how many'),
    (DynamicNTK(factor=2.0, original_length=0), 'DynamicNTK.original_length is 0; it must be above 0'),
    (YaRN(factor=2.0, original_length=-1), 'YaRN.original_length is -1; it must be above 0'),
    (YaRN(factor=2.0, original_length=8, beta_fast=1.0), 'YaRN.beta_fast = 1.0 must be above beta_slow = 1.0'),
    (YaRN(factor=2.0, original_length=8, attention_factor=-1.0), 'YaRN.attention_factor is -1.0; .* 0 for 0.1 ln'),
    (
        Llama3(factor=2.0, original_length=8, high_freq_factor=1.0),
        'Llama3.high_freq_factor = 1.0 must be above low_freq_factor = 1.0',
    ),
    (Llama3(factor=2.0, original_length=8, low_freq_factor=0.0), 'Llama3.low_freq_factor is 0.0; it must be above 0'),
    (
        LongRope(short=(1.0,), long=(1.0, 2.0), original_length=8, attention_factor=1.0),
        'LongRope.short has 1 factors and long 2; write one above 0 for each pair in both',
    ),
    (
        LongRope(short=(1.0,), long=(0.0,), original_length=8, attention_factor=1.0),
        'LongRope.short has 1 factors and long 1; write one above 0',
    ),
    (
        LongRope(short=(1.0,), long=(1.0,), original_length=8, attention_factor=0.0),
        'LongRope.attention_factor is 0.0; it must be above 0',
    ),
]


@pytest.mark.parametrize(('scaling', 'message'), WRONG)
def test_what_cannot_be_says_why(scaling, message):
    with pytest.raises(ConfigError, match=message):
        scaling.validate()

"""Losses of whole texts are those of one device under every layout, though their sums run along rows that are split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from tpu_llm.arrays import ScoredBatch
from tpu_llm.models.scalar_head import ScalarConfig
from tpu_llm.objectives.kto import KTO
from tpu_llm.objectives.preference import DPO
from tpu_llm.objectives.reward_model import RankReward
from tpu_llm.parallel import sharding

pytestmark = pytest.mark.usefixtures('quick_compile')

CONFIG = toy.config(vocab_size=64, heads=4, kv_heads=4, head_dim=8, mlp_width=32, layers=1)
OBJECTIVES = {'kto': KTO(beta=0.5), 'dpo': DPO(beta=0.5), 'rankings': RankReward()}
MESHES = ({'fsdp': 2, 'tensor': 4}, {'data': 2, 'seq': 4})
SIZES = (5, 3, 6, 2, 4, 1, 7, 4)  # of a row's texts, alternately turned; a response is all but the first


def batch():
    rows = [np.repeat(np.arange(8), np.roll(SIZES, row)) + 1 for row in range(8)]
    segments = np.stack(rows)
    first = np.diff(segments, prepend=0, axis=1) > 0
    last = np.diff(segments, append=0, axis=1) != 0
    weights = np.where(first & ~last, 0.0, 1.0)
    plain = toy.batch(segments, vocab_size=64)
    numbers = {'values': np.where(segments % 3 == 0, -1.0, 1.0) * last, 'marks': last, 'reference': 0.0 * last}
    numbers = {name: jnp.asarray(x, jnp.float32) for name, x in numbers.items()}
    return ScoredBatch(
        tokens=plain.tokens,
        targets=plain.targets,
        weights=jnp.asarray(weights, jnp.float32),
        segments=plain.segments,
        positions=plain.positions,
        examples=jnp.asarray((segments + 1) // 2, jnp.int32),
        **numbers,
    )


def gradient(name, **axes):
    objective, layout = OBJECTIVES[name], toy.layout(**axes)
    graph = toy.graph(ScalarConfig.of(CONFIG) if name == 'rankings' else CONFIG)
    reference = toy.weights(graph, seed=1)

    @functools.partial(jax.jit, out_shardings=layout.replicated)
    def run(weights, batch):
        def loss(weights):
            with sharding.use(layout):
                found = objective(graph.bind(weights), batch, frozen=graph.bind(reference), key=None, step=jnp.int32(0))
            return found[0], found[1:]

        return jax.value_and_grad(loss, has_aux=True)(weights)

    return run(toy.weights(graph), batch())


@functools.cache
def alone(name):
    return jax.device_get(gradient(name))


@pytest.mark.parametrize(
    ('name', 'axes'),
    [
        pytest.param(name, axes, marks=() if name == 'kto' else pytest.mark.full)
        for name in OBJECTIVES
        for axes in MESHES
    ],
)
def test_it_is_that_of_one_device(name, axes):
    (loss, (weight, told)), gradients = gradient(name, **axes)
    (expected, (whole, metrics)), slopes = alone(name)
    assert weight == whole > 0
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for metric, value in metrics.items():
        np.testing.assert_allclose(told[metric], value, rtol=1e-4, atol=1e-5, err_msg=metric)
    for path, slope in slopes.items():
        np.testing.assert_allclose(gradients[path], slope, atol=1e-5 * np.abs(slope).max() + 1e-7, err_msg=path)

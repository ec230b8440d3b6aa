"""Teacher and student on one mesh: loss and gradients are those of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from tpu_llm.models.projected import ProjectedConfig
from tpu_llm.objectives.distill import Distill
from tpu_llm.parallel import sharding

pytestmark = pytest.mark.usefixtures('quick_compile')

VOCAB = 96
TEACHER = toy.config(vocab_size=VOCAB, width=24, layers=1, heads=4, kv_heads=4)
STUDENT = ProjectedConfig.of(toy.config(vocab_size=VOCAB, layers=1, kv_heads=4), 24)
BATCH = toy.batch(np.array([[1, 1, 1, 2, 2, 2, 0, 0], [1] * 8] * 4), vocab_size=VOCAB)
OBJECTIVE = Distill(divergence='jensen_shannon', beta=0.3, temperature=2.0, labels=0.5, hidden=0.7)


@pytest.fixture(scope='module')
def run():
    """The losses and gradients, on whatever layout is in use."""
    student, teacher = (toy.graph(config, vocab_multiple=8) for config in (STUDENT, TEACHER))
    weights, frozen = toy.weights(student), toy.weights(teacher, seed=1)

    def loss(weights, frozen):
        found, weight, sums = OBJECTIVE(
            student.bind(weights), BATCH, frozen=teacher.bind(frozen), key=None, step=jnp.int32(0)
        )
        return found, (weight, sums)

    return lambda: jax.jit(lambda *args: jax.value_and_grad(loss, has_aux=True)(*args))(weights, frozen)


@pytest.fixture(scope='module')
def alone(run):
    return run()


@pytest.mark.parametrize('axes', [{'fsdp': 8}, {'fsdp': 4, 'tensor': 2}, {'data': 2, 'fsdp': 2, 'tensor': 2}])
def test_on_a_mesh_it_is_what_one_device_gives(run, alone, axes):
    with sharding.use(toy.layout(**axes)):
        found = run()
    flat, _ = jax.tree_util.tree_flatten_with_path(alone)
    for (path, expected), value in zip(flat, jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path))

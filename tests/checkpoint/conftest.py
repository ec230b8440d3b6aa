"""A small state, and runs that save it."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_llm.checkpoint import fence
from tpu_llm.checkpoint.files import CheckpointError
from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.checkpoint.store import Store


class Run:
    """One start of a run that saves `state(step)` at the steps it is told to."""

    MANIFEST: ClassVar = {'config': {'type': 'none'}, 'tokenizer': 'abc'}

    def __init__(self, workdir: Any, **checkpoints: Any):
        self.fence = fence.start(workdir)
        self.store = Store(Checkpoints(**checkpoints), self.fence, {'tokenizer/pieces.model': b'pieces'})

    @staticmethod
    def state(step: int) -> dict[str, Any]:
        """Every kind of leaf a run may hold; its values depend on the step."""
        odd = np.array([0x7FC00001, 0xFF800001, 0x80000000, 0x7F800000, 1], np.uint32).view(np.float32)
        return {
            'params': {
                'decoder': {
                    'embed': jnp.arange(12.0).reshape(3, 4) + step,
                    'scale': jnp.ones(3, jnp.bfloat16),
                },
                'head': jax.random.normal(jax.random.key(step), (5, 2)),
            },
            'optimizer': (jnp.asarray(step), [jnp.zeros(4), -jnp.zeros(4)]),
            'odd': jnp.asarray(odd),
            'mask': jnp.asarray([True, False]),
            'rng': jax.random.key(step),
        }

    @classmethod
    def like(cls) -> dict[str, Any]:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), cls.state(0))

    @staticmethod
    def lanes(step: int) -> dict[str, np.ndarray]:
        return {'lane': np.array([2, 0, 1]), 'document': step + np.array([20, 0, 10]), 'done': np.eye(3)}

    def save(self, *steps: int, **kwargs: Any) -> 'Run':
        for step in steps:
            arguments: dict[str, Any] = {'lanes': self.lanes(step), 'manifest': self.MANIFEST} | kwargs
            self.store.save(step, self.state(step), **arguments)
        self.store.wait()
        return self

    def folder(self, step: int) -> pathlib.Path:
        """The newest checkpoint of a step."""
        return sorted(pathlib.Path(self.fence.workdir, 'checkpoints').glob(f'{step:08d}.*'))[-1]

    @staticmethod
    def bits(tree: Any) -> list[bytes]:
        """Every leaf's dtype, shape and bytes."""

        def leaf_bits(x: jax.Array) -> bytes:
            data = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
            return f'{x.dtype}{x.shape}'.encode() + np.asarray(data).tobytes()

        return [leaf_bits(x) for x in jax.tree.leaves(tree)]


@pytest.fixture
def start() -> Iterator[Any]:
    """`start(workdir, keep=2, …)` starts a run; its background thread ends with the test."""
    runs: list[Run] = []

    def make(workdir: Any, **checkpoints: Any) -> Run:
        runs.append(Run(workdir, **checkpoints))
        return runs[-1]

    yield make
    for run in runs:
        with contextlib.suppress(CheckpointError):
            run.store.close()

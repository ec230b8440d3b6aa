"""A run that only saves, until it is killed; prints the step it starts from and each one committed.

Usage: saver.py WORKDIR. Its state at step k is an array full of k, large enough that a save takes a while.
"""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from tpu_llm.checkpoint import fence
from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.checkpoint.store import Store

SHAPE = (64, 4096)


def like():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {'params': {f'w{i}': jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=sharding) for i in range(4)}}


def main(workdir: str) -> None:
    store = Store(Checkpoints(keep=2), fence.start(workdir))
    restored = store.restore(like())
    first = restored.step if restored else 0
    print(first, flush=True)
    for step in itertools.count(first + 1):
        arrays = {'params': {f'w{i}': jnp.full(SHAPE, step, jnp.float32) for i in range(4)}}
        store.save(step, arrays, lanes={'lane': np.arange(2)}, manifest={})
        store.wait()
        print(step, flush=True)


if __name__ == '__main__':
    main(sys.argv[1])

"""How the processes of one run agree: words passed around, and barriers for a background thread.

With one process everything here is trivial. `gather` and `first` are collectives of the devices: call them
from the main thread, in the same order everywhere. `barrier` goes through the coordination service instead,
so it may run beside a training step.
"""

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from tpu_llm.checkpoint import files

BARRIER_SECONDS = 1800


def barrier(name: str) -> None:
    """Waits for every process to come to the barrier of this name, which is never used again."""
    try:
        ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=1000 * BARRIER_SECONDS)
    except jax.errors.JaxRuntimeError as error:
        raise files.CheckpointError(f'a process did not come to {name!r}: {files.one_line(error)}') from error


def gather(text: str) -> list[str]:
    """What each process said, in process order."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(data.size)).ravel()
    padded = np.zeros(max(1, sizes.max()), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def first(text: str) -> str:
    """What process 0 said."""
    return gather(text)[0]

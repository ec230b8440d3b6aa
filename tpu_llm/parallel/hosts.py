"""The hosts of a run: joining them, agreeing among them, and which rows of the batch each one feeds."""

import os

import jax
import numpy as np
from jax.sharding import NamedSharding

from tpu_llm.arrays import Array
from tpu_llm.config import ConfigError

_COORDINATES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')


def join() -> None:
    """Connects this process to the others of the run; does nothing on a single host.

    A TPU pod, GKE and Slurm are recognised by what they put into the environment. Anywhere else, set
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID for every process.
    """
    given = [name for name in _COORDINATES if name in os.environ]
    if given and len(given) < len(_COORDINATES):
        missing = ', '.join(name for name in _COORDINATES if name not in os.environ)
        raise ConfigError(f'{", ".join(given)} is set but not {missing}; set all three, or none for one host')
    if given:
        if os.environ.get('JAX_PLATFORMS', '') == 'cpu':
            jax.config.update('jax_cpu_collectives_implementation', 'gloo')
        address, count, index = (os.environ[name] for name in _COORDINATES)
        jax.distributed.initialize(address, int(count), int(index))
    elif len(os.environ.get('TPU_WORKER_HOSTNAMES', '').split(',')) > 1 or 'MEGASCALE_NUM_SLICES' in os.environ:
        jax.distributed.initialize()


def any_host(flag: bool) -> bool:
    """Whether any host says yes. Every host must call it at the same point."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def local_rows(sharding: NamedSharding, rows: int) -> np.ndarray:
    """The sorted rows of a global batch that this host's devices hold: int64[rows / hosts] unless hosts share rows."""
    first = NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[:1]))
    slices = first.addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in slices]))


def assemble(local: np.ndarray, rows: np.ndarray, total: int, sharding: NamedSharding) -> Array:
    """The global array of `total` rows of which this host holds `local` (its sorted `rows`)."""

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        first, *rest = index
        start, stop, _ = first.indices(total)
        at = int(np.searchsorted(rows, start))
        return local[(slice(at, at + stop - start), *rest)]

    return jax.make_array_from_callback((total, *local.shape[1:]), sharding, shard)

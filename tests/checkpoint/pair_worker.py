"""One process of a run of one or two: restores, then saves, and prints what came of it.

Usage: pair_worker.py PORT PROCESSES INDEX JSON, the last of {'workdir', 'steps', 'blocked'}. At the blocked
step the second process cannot at first write its lane table. Each process has two devices. The state at step k is
`whole + k` in three shardings.
"""

import json
import pathlib
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tpu_llm.checkpoint import commit, fence
from tpu_llm.checkpoint.files import CheckpointError
from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.checkpoint.store import Store

WHOLE = np.arange(64, dtype=np.float32).reshape(8, 8)


def main(port: str, processes: int, index: int, workdir: str, steps: list[int], blocked: int) -> None:
    jax.config.update('jax_num_cpu_devices', 2)
    if processes > 1:
        jax.config.update('jax_cpu_collectives_implementation', 'gloo')
        jax.distributed.initialize(f'127.0.0.1:{port}', processes, index)
    shardings = make_shardings(processes)
    like = {name: jax.ShapeDtypeStruct((8, 8), np.float32, sharding=s) for name, s in shardings.items()}
    held = fence.start(workdir)
    store = Store(Checkpoints(keep=2), held)
    said = {'token': held.token, 'errors': []}
    if restored := store.restore(like):
        said |= {'step': restored.step, 'lanes': {k: v.tolist() for k, v in restored.lanes.items()}}
        said['equal'] = all(
            np.array_equal(shard.data, (WHOLE + restored.step)[shard.index])
            for array in restored.arrays.values()
            for shard in array.addressable_shards
        )
    for step in steps:
        if step == blocked and index == 1 and not said['errors']:
            folder = pathlib.Path(workdir, 'checkpoints', commit.folder_name(step, held.token))
            (folder / 'data' / 'lanes-1.npz').mkdir(parents=True)
        values = WHOLE + step
        arrays = {
            name: jax.make_array_from_callback((8, 8), s, lambda at, values=values: values[at])
            for name, s in shardings.items()
        }
        lanes = np.array([3, 1, 4]) if index else np.array([0, 2, 4])  # both feed lane 4
        try:
            rows = {'lane': lanes, 'document': 10 * lanes + step}
            store.save(step, arrays, lanes=rows, manifest={}, wait=True)
        except CheckpointError as error:
            said['errors'].append(str(error))
    said['steps'] = store.steps()
    store.close()
    print(json.dumps(said))


def make_shardings(processes: int) -> dict[str, NamedSharding]:
    """Not the same ones for one process as for two."""
    mesh = jax.make_mesh((2, processes), ('x', 'y'), axis_types=(AxisType.Auto,) * 2)
    split = PartitionSpec('y', 'x') if processes == 2 else PartitionSpec('x')
    specs = {'split': split, 'replicated': PartitionSpec(), 'half': PartitionSpec('x')}
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


if __name__ == '__main__':
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), **json.loads(sys.argv[4]))

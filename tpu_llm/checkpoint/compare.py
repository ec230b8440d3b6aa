"""How two checkpoints differ: tensor by tensor, bit for bit, and in their configs."""

import numpy as np

from tpu_llm import config as config_lib
from tpu_llm.checkpoint import lanes, tensors
from tpu_llm.checkpoint.commit import Checkpoint


def config_differences(a: Checkpoint, b: Checkpoint) -> dict[str, str]:
    """`{field: 'old → new'}`."""
    before, after = (config_lib.flatten(c.manifest()['config']) for c in (a, b))
    return {
        path: f'{before.get(path)!r} → {after.get(path)!r}'
        for path in before | after
        if before.get(path) != after.get(path)
    }


def tensor_differences(a: Checkpoint, b: Checkpoint) -> dict[str, str]:
    """`{name: how it differs}`, empty where all are bitwise equal; holds two tensors in memory at a time."""
    first, second = a.manifest()['tensors'], b.manifest()['tensors']
    found = {}
    for name in first | second:
        if name not in second:
            found[name] = 'only in the first'
        elif name not in first:
            found[name] = 'only in the second'
        elif first[name] != second[name]:
            found[name] = f'{tensors.show(first[name])} → {tensors.show(second[name])}'
        elif how := _values_differ(tensors.read_to_host(a.folder, name), tensors.read_to_host(b.folder, name)):
            found[name] = how
    return found


def lane_differences(a: Checkpoint, b: Checkpoint) -> list[str]:
    """The columns of the lane table that differ."""
    first, second = (lanes.read(c.folder, c.processes) for c in (a, b))
    return [
        name
        for name in first | second
        if name not in first or name not in second or not np.array_equal(first[name], second[name])
    ]


def _values_differ(a: np.ndarray, b: np.ndarray) -> str:
    if a.tobytes() == b.tobytes():
        return ''
    a, b = a.ravel(), b.ravel()
    bits = f'u{a.dtype.itemsize}'
    where = a.view(bits) != b.view(bits)
    with np.errstate(invalid='ignore'):  # of infinities, and of NaNs
        distance = np.abs(a[where].astype(np.float64) - b[where].astype(np.float64))
    return f'{where.sum()} of {a.size} values differ, by at most {distance.max():.3g}'

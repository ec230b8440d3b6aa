"""A tree of jax arrays on disk: written by Orbax in the background, restored onto any mesh, bit for bit.

The tree is flattened to dotted names (`params.decoder.embed`): the names in the checkpoint, in the manifest
and in every message. Orbax's own temporary folders and marks are left out, as our commit mark does their
work.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from tpu_llm.checkpoint import files
from tpu_llm.config import ConfigError

FOLDER = 'arrays'

Described = dict[str, dict[str, Any]]  # {name: {'shape': [4, 8], 'dtype': 'float32'}}


def named(tree: Any) -> dict[str, Any]:
    """`{'params.decoder.embed': leaf, …}`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in leaves}
    assert len(flat) == len(leaves), 'two leaves have the same name'
    return flat


def describe(tree: Any) -> Described:
    """Shape and dtype of every array, as the manifest keeps them."""
    return {name: {'shape': list(x.shape), 'dtype': str(x.dtype)} for name, x in named(tree).items()}


def begin_write(folder: epath.Path, tree: Any) -> list[Any]:  # of futures
    """Copies the arrays to the host and starts writing; every process then waits for the futures.

    The arrays may be donated or overwritten as soon as it returns. Once every process has waited, one of them
    calls `finish_write`.
    """
    _tame_orbax()
    target = _place(folder)
    if not files.is_cloud(target):
        target.mkdir(parents=True, exist_ok=True)
    writing = ocp.PyTreeCheckpointHandler().async_save(target, args=ocp.args.PyTreeSave(named(tree)))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # A notebook's main thread has an event loop already.
        return pool.submit(asyncio.run, writing).result() or []


@functools.cache
def _tame_orbax() -> None:
    """A failed write is the store's to report, in one line; Orbax would print a traceback for each of its parts."""
    logging.getLogger('absl').addFilter(lambda record: not (record.exc_info and 'orbax' in record.pathname))
    # It closes the event loop under the writes that still run, and each complains; asyncio.run cancels them first.
    with contextlib.suppress(ImportError):  # A private name, and no harm where it is gone.
        from orbax.checkpoint._src import asyncio_utils

        asyncio_utils._run_sync_via_new_loop = lambda coroutine: asyncio.run(coroutine)
    # Of several parts that fail at once, asyncio raises the first and logs the others.
    logging.getLogger('asyncio').addFilter(
        lambda record: not (record.exc_info and 'asyncio.run() shutdown' in record.getMessage())
    )


def finish_write(folder: epath.Path) -> None:
    """Joins what the processes wrote. Orbax only warns where it finds nothing to join."""
    ocp.PyTreeCheckpointHandler().finalize(_place(folder))
    assert files.exists(_place(folder) / 'manifest.ocdbt'), 'Orbax has not joined what the processes wrote'


def read(folder: epath.Path, like: Any) -> Any:
    """The arrays named by `like` (ShapeDtypeStructs with shardings), all or a part of those saved."""
    wanted = named(like)
    shardings = ocp.checkpoint_utils.construct_restore_args(wanted)
    restored = _restore(folder, wanted, shardings)
    return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in wanted])


def read_to_host(folder: epath.Path, name: str) -> np.ndarray:
    """One array, whole, in this process's memory."""
    return _restore(folder, {name: 0}, {name: ocp.RestoreArgs(restore_type=np.ndarray)})[name]


def _restore(folder: epath.Path, item: dict[str, Any], restore_args: dict[str, Any]) -> dict[str, Any]:
    args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
    return ocp.PyTreeCheckpointHandler().restore(_place(folder), args=args)


def _place(folder: epath.Path) -> epath.Path:
    """Where Orbax reads and writes; it takes absolute paths only."""
    return (folder if files.is_cloud(folder) else folder.resolve()) / FOLDER


def check_fit(folder: epath.Path, saved: Described, wanted: Described, part: bool) -> None:
    """Raises ConfigError, naming the tensors, unless what is wanted is what was saved, or a part of it."""
    problems = [f'{name} is only here' for name in wanted if name not in saved]
    problems += [f'{name} is only there' for name in saved if name not in wanted and not part]
    problems += [
        f'{name} is {show(saved[name])} there and {show(wanted[name])} here'
        for name in wanted
        if name in saved and saved[name] != wanted[name]
    ]
    if problems:
        more = f' (and {len(problems) - 3} more)' if len(problems) > 3 else ''
        raise ConfigError(
            f'{folder} does not fit this model and optimizer: {"; ".join(problems[:3])}{more}; '
            'make the config as it was there'
        )


def show(tensor: dict[str, Any]) -> str:
    """`float32[4,8]`."""
    return f'{tensor["dtype"]}[{",".join(map(str, tensor["shape"]))}]'

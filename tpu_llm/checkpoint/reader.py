"""Finds checkpoints, verifies every file of one, and loads it; writes nothing.

A damaged or uncommitted checkpoint is named in one line and passed over for the next older one. Where
checkpoints were committed and none is whole, that is an error: a run never starts from scratch because its
past is unreadable.
"""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from tpu_llm.checkpoint import agree, checksums, commit, files, tensors
from tpu_llm.checkpoint import lanes as lane_table
from tpu_llm.checkpoint.commit import Checkpoint
from tpu_llm.checkpoint.files import CheckpointError, logger
from tpu_llm.checkpoint.lanes import Table

UNCOMMITTED = f'{commit.MARK} is missing, so it was never finished'


@dataclasses.dataclass(frozen=True, slots=True)
class Restored:
    """A checkpoint in memory."""

    checkpoint: Checkpoint
    arrays: Any  # as the `like` they were restored for
    lanes: Table  # the whole lane table, sorted by its column 'lane'
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.checkpoint.step


def find(path: epath.PathLike, step: int | None = None) -> Checkpoint | None:
    """The newest whole checkpoint of a workdir (or of one step there), or the one in the folder given.

    None where nothing was ever committed. All processes of a run call it together and hear the same. Raises
    CheckpointError where what was committed is damaged or cannot be read.
    """
    found = folders(path)
    if step is not None:
        steps = {commit.parse(folder)[0] for folder in found}
        if step not in steps:
            there = ', '.join(map(str, sorted(steps))) or 'none'
            raise CheckpointError(f'{path} has no checkpoint of step {step}; there are: {there}')
        found = [folder for folder in found if commit.parse(folder)[0] == step]
    return newest_whole(path, found)


def folders(path: epath.PathLike) -> list[epath.Path]:
    """The checkpoint folders of a workdir, newest first, as process 0 sees them, or the one given."""
    path = epath.Path(path)
    if commit.is_folder_name(path.name) or files.exists(path / commit.MARK):
        return [path] if files.listing(path) else []
    seen = json.dumps([folder.name for folder in commit.folders(path)])
    return [commit.root(path) / name for name in json.loads(agree.first(seen))]


def committed(workdir: epath.Path) -> list[Checkpoint]:
    """All checkpoints with an undamaged mark, newest first; their other files are not looked at."""
    marks = []
    for folder in commit.folders(workdir):
        with contextlib.suppress(checksums.Damaged):
            marks.append(commit.read_mark(folder))
    return [mark for mark in marks if mark]


def newest_whole(path: epath.PathLike, found: Sequence[epath.Path]) -> Checkpoint | None:
    """The first of the folders found at `path` that is whole, every file verified; None where none was committed."""
    damaged = []
    for folder in found:
        problems = check(folder)
        if not problems:
            return commit.read_mark(folder)
        logger.warning('passing over %s: %s', folder, '; '.join(problems))
        if problems != [UNCOMMITTED]:
            damaged.append(f'{folder.name}: {problems[0]}')
    if damaged and found[0] == epath.Path(path):
        raise CheckpointError(f'{path} is not whole ({problems[0]}); bring it back, or give another checkpoint')
    if damaged:
        raise CheckpointError(
            f'no checkpoint in {found[0].parent} is whole ({"; ".join(damaged)}); '
            'bring one back, or remove that folder to start from scratch'
        )
    return None


def check(folder: epath.Path) -> list[str]:
    """What is wrong with a checkpoint, one line a file; processes share the files and hear one verdict.

    Raises CheckpointError where a file cannot be read at all, which says nothing about what is in it.
    """
    said: dict[str, Any] = {'problems': [], 'failure': ''}
    try:
        said['problems'] = _problems(folder)
    except (OSError, CheckpointError) as error:
        said['failure'] = files.one_line(error)
    heard = [json.loads(word) for word in agree.gather(json.dumps(said))]
    for word in heard:
        if word['failure']:
            raise CheckpointError(f'{folder} could not be read: {word["failure"]}')
    return list(dict.fromkeys(problem for word in heard for problem in word['problems']))


def _problems(folder: epath.Path) -> list[str]:
    try:
        checkpoint = commit.read_mark(folder)
        if checkpoint is None:
            return [UNCOMMITTED]
        sums = checksums.load(folder, checkpoint.checksums)
    except checksums.Damaged as error:
        return [str(error)]
    return checksums.verify(folder, sums, jax.process_index(), jax.process_count())


def load(checkpoint: Checkpoint, like: Any, part: bool = False) -> Restored:
    """Reads a verified checkpoint as `like` asks, a tree of ShapeDtypeStruct with shardings.

    Raises ConfigError where `like` is not what was saved, or with `part` not a part of it.
    """
    manifest = checkpoint.manifest()
    tensors.check_fit(checkpoint.folder, manifest['tensors'], tensors.describe(like), part)
    try:
        arrays = tensors.read(checkpoint.folder, like)
    except ValueError as error:  # TensorStore's only kind; verified as it is, the store has gone away since.
        raise CheckpointError(f'{checkpoint.folder} could not be read: {files.one_line(error)}') from error
    return Restored(checkpoint, arrays, lane_table.read(checkpoint.folder, checkpoint.processes), manifest)

"""What a checkpoint is on disk: a folder with a commit mark.

`checkpoints/<step>.<start>/` holds what one start of a run (its fencing token) saved at one step.
`COMMIT.json` is written last and removed first: a folder without it is no checkpoint. A later start's
checkpoints count as newer than an earlier start's whatever their step, since it began from the newest whole
one it found.
"""

import dataclasses
import datetime
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from tpu_llm.checkpoint import checksums, fence, files

MARK = 'COMMIT.json'
_NAME = re.compile(r'(\d+)\.(\d+-[0-9a-f]+)')


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint, as its mark describes it."""

    folder: epath.Path
    step: int
    token: str  # of the start that wrote it
    processes: int
    time: str  # of the commit, ISO, UTC
    metrics: dict[str, float]
    checksums: dict[str, str]  # sha256 of each process's checksums file

    def manifest(self) -> dict[str, Any]:
        return json.loads(files.read(self.folder / 'manifest.json'))


def root(workdir: epath.Path) -> epath.Path:
    return workdir / 'checkpoints'


def folder_name(step: int, token: str) -> str:
    return f'{step:08d}.{token}'


def is_folder_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def parse(folder: epath.Path) -> tuple[int, str]:
    """(step, token), from the folder's name."""
    match = _NAME.fullmatch(folder.name)
    assert match, folder
    return int(match[1]), match[2]


def newness(step: int, token: str) -> tuple[tuple[int, str], int]:
    """Sorts checkpoints, oldest first."""
    return fence.order(token), step


def folders(workdir: epath.Path) -> list[epath.Path]:
    """The folders of all checkpoints, committed or not, newest first."""
    found = [root(workdir) / name for name in files.listing(root(workdir)) if is_folder_name(name)]
    return sorted(found, key=lambda folder: newness(*parse(folder)), reverse=True)


def write_mark(folder: epath.Path, metrics: Mapping[str, float], processes: int) -> None:
    """Commits a checkpoint whose files and checksums are all written."""
    step, token = parse(folder)
    fields = {
        'step': step,
        'token': token,
        'processes': processes,
        'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        'metrics': dict(metrics),
        'checksums': checksums.digests(folder, processes),
    }
    files.write(folder / MARK, _render(fields))


def read_mark(folder: epath.Path) -> Checkpoint | None:
    """The checkpoint in a folder; None where it was never committed. Raises checksums.Damaged."""
    try:
        data = files.read(folder / MARK)
    except FileNotFoundError:
        return None
    damaged = checksums.Damaged(f'{MARK} is not what was written')
    try:
        fields = json.loads(data)
        del fields['sha256']
    except (ValueError, KeyError, TypeError):
        raise damaged from None
    if _render(fields) != data:
        raise damaged
    return Checkpoint(folder=folder, **fields)


def _render(fields: dict[str, Any]) -> bytes:
    """The one text a mark can have; it ends in a sha256 of the rest, so that every changed byte shows."""
    digest = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
    return json.dumps(fields | {'sha256': digest}, indent=1).encode()

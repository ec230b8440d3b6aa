"""A sha256 of every file: taken by reading back what was written, checked before every restore.

Orbax restores flipped bits without a word, so these sums are all that tells a whole checkpoint from a damaged
one. Each process sums the files it wrote into `checksums-<process>.json`; the commit mark holds the sums of
those, and of itself, so no byte of a checkpoint can change unnoticed.
"""

import concurrent.futures
import hashlib
import json
import re

from etils import epath

from tpu_llm.checkpoint import files

# Orbax's per-process folders and files, and our lane tables; all other files belong to process 0.
_OWNED = re.compile(r'(?:^|/)(?:ocdbt\.process_|process_|lanes-)(\d+)(?:/|\.npz$|$)')
_THREADS = 8

Sums = dict[str, dict[str, str | int]]  # {file: {'sha256': hex digest, 'bytes': size}}


class Damaged(Exception):
    """A file of a checkpoint is missing or is not what was written; the message names it and says which."""


def file_name(process: int) -> str:
    return f'checksums-{process}.json'


def write(folder: epath.Path, process: int) -> None:
    """Sums the files that this process wrote into the checkpoint."""
    mine = [name for name in files.walk(folder) if _owner(name) == process]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: files.sha256(folder / name), mine)
    sums = {name: {'sha256': digest, 'bytes': size} for name, (digest, size) in zip(mine, found, strict=True)}
    files.write(folder / file_name(process), json.dumps(sums, indent=1).encode())


def _owner(name: str) -> int | None:
    if name.lstrip('.').startswith('checksums-'):  # with a dot, those that another process is writing right now
        return None
    match = _OWNED.search(name)
    return int(match[1]) if match else 0


def digests(folder: epath.Path, processes: int) -> dict[str, str]:
    """The sha256 of every process's sums. Raises FileNotFoundError where a process has not written them."""
    return {file_name(i): files.sha256(folder / file_name(i))[0] for i in range(processes)}


def load(folder: epath.Path, expected: dict[str, str]) -> Sums:
    """The sums of all files. Raises Damaged where the sums themselves are not what was committed."""
    sums: Sums = {}
    for name, digest in expected.items():
        try:
            data = files.read(folder / name)
        except FileNotFoundError:
            raise Damaged(f'{name} is missing') from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise Damaged(f'{name} is not what was written')
        sums |= json.loads(data)
    return sums


def verify(folder: epath.Path, sums: Sums, share: int = 0, shares: int = 1) -> list[str]:
    """What is wrong with the share-th part of the files, one line a file; empty where all are whole."""
    largest_first = sorted(sums, key=lambda name: (-int(sums[name]['bytes']), name))
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        said = pool.map(lambda name: _problem(folder, name, sums[name]), largest_first[share::shares])
    return [problem for problem in said if problem]


def _problem(folder: epath.Path, name: str, expected: dict[str, str | int]) -> str:
    try:
        digest, size = files.sha256(folder / name)
    except FileNotFoundError:
        return f'{name} is missing'
    if size != expected['bytes']:
        return f'{name} has {size} of {expected["bytes"]} bytes'
    return '' if digest == expected['sha256'] else f'{name} is not what was written'

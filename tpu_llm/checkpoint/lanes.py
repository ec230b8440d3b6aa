"""The lane table on disk: where in the data every lane of the global batch stands, one file a process.

Each process saves the rows of its own lanes. A restore gives every process the whole table in lane order, so
that another number of processes can share it out anew.
"""

import io
from collections.abc import Mapping

import numpy as np
from etils import epath

from tpu_llm.checkpoint import files

Table = dict[str, np.ndarray]


def file_name(process: int) -> str:
    return f'data/lanes-{process}.npz'


def encode(rows: Mapping[str, np.ndarray]) -> bytes:
    """Rows of the table as an npz; the column 'lane' says which lane each row is of."""
    assert all(len(column) == len(rows['lane']) for column in rows.values())
    assert all(column.dtype != object for column in rows.values())
    buffer = io.BytesIO()
    np.savez(buffer, **rows)  # pyright: ignore[reportArgumentType]
    return buffer.getvalue()


def read(folder: epath.Path, processes: int) -> Table:
    """The whole table, sorted by lane. Processes that share a lane have saved the same row of it."""
    parts: list[Table] = []
    for process in range(processes):
        with np.load(io.BytesIO(files.read(folder / file_name(process)))) as part:
            parts.append(dict(part))
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    _, first, back = np.unique(joined['lane'], return_index=True, return_inverse=True)
    whole = {name: column[first] for name, column in joined.items()}
    assert all(np.array_equal(whole[name][back], column) for name, column in joined.items())
    return whole

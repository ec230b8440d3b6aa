"""What was compiled or planned once, kept in a folder by the hash of what it was made from."""

import gzip
import json
import os
import zlib
from pathlib import Path
from typing import Any


class Cache:
    """JSON values by key. Losing it costs time, and nothing else."""

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, key: str) -> Any:
        """None where there is none, or none that can be read."""
        try:
            return json.loads(gzip.decompress(self._path(key).read_bytes()))
        except (OSError, EOFError, ValueError, zlib.error):
            return None

    def put(self, key: str, value: Any) -> None:
        """Whole or not at all, whoever else writes it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self._path(f'{key}.{os.getpid()}.part')
        part.write_bytes(gzip.compress(json.dumps(value).encode(), compresslevel=5))
        part.replace(self._path(key))

    def _path(self, key: str) -> Path:
        return self.folder / f'{key}.json.gz'


def default() -> Cache:
    """In the user's folder for such things."""
    home = os.environ.get('XDG_CACHE_HOME') or str(Path.home() / '.cache')
    return Cache(Path(home, 'tpu_llm', 'plans'))

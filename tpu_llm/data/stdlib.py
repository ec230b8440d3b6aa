"""Text that every Python has: the standard library's sources and the reference prose of `pydoc_data.topics`.

About 580 documents and 9.7 MB on Python 3.11: enough for a first language model, with nothing to download. Left out is
what only some machines have (test suites, packages that distributions split off, generated files), so that the
corpora of two machines with one Python version differ by little.
"""

import dataclasses
import functools
import hashlib
import sysconfig
from pathlib import Path
from typing import Literal

from tpu_llm.config import ConfigError
from tpu_llm.data import documents

# Test suites are absent from slim images; Debian ships the other packages (and macholib) apart or not at all;
# pydoc_data/topics.py repeats the topics as one literal.
_ABSENT_SOMEWHERE = frozenset(
    {'site-packages', 'dist-packages', 'lib-dynload', '__pycache__', 'test', 'tests', 'idle_test'}
    | {'idlelib', 'tkinter', 'turtledemo', 'lib2to3', 'distutils', 'ensurepip', 'macholib', 'pydoc_data'}
)
_MADE_ON_THE_MACHINE = ('config-', '_sysconfigdata', '_distutils_system_mod', 'sitecustomize')


@dataclasses.dataclass(kw_only=True, slots=True)
class Stdlib:
    """One document a source file or topic. The split goes by a hash of the document's name, so it is the same
    everywhere; 3 % is about 215 kB of held-out text."""

    split: Literal['train', 'heldout'] = 'train'
    heldout: float = 0.03

    def validate(self) -> None:
        if not 0 < self.heldout < 1:
            raise ConfigError(f'heldout is {self.heldout}; it is a fraction between 0 and 1')

    def open(self) -> documents.Documents:
        return StdlibDocuments(sysconfig.get_path('stdlib'), self.split, self.heldout)


class StdlibDocuments(documents.Documents):
    """One part of the library that lies in the folder `root`."""

    def __init__(self, root: str, split: str, heldout: float):
        self._root = root
        self._names = [name for name in _corpus(root) if (_uniform(name) < heldout) == (split == 'heldout')]
        if not self._names:
            raise ConfigError(f'the {split} part of the standard library is empty with heldout={heldout}')
        content = hashlib.sha256()
        for name in self._names:
            content.update(f'{name}\0{_text(root, name)}\0'.encode())
        self.fingerprint = documents.fingerprint('stdlib', content.hexdigest())

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> documents.Document:
        return documents.Document(text=_text(self._root, self._names[index]))


@functools.cache
def _corpus(root: str) -> tuple[str, ...]:
    """The names of all documents that hold UTF-8 text, sorted."""
    files = (file.relative_to(root) for file in Path(root).rglob('*.py'))
    kept = [
        file.as_posix()
        for file in files
        if not _ABSENT_SOMEWHERE & set(file.parts) and not file.parts[0].startswith(_MADE_ON_THE_MACHINE)
    ]
    names = sorted([*kept, *(f'topics/{topic}' for topic in _topics())])
    return tuple(name for name in names if _text(root, name))


@functools.cache
def _text(root: str, name: str) -> str:
    """The document, byte for byte; empty where a file is not UTF-8."""
    if name.startswith('topics/'):
        return _topics()[name.removeprefix('topics/')]
    try:
        return Path(root, name).read_bytes().decode('utf-8')
    except UnicodeDecodeError:
        return ''


def _topics() -> dict[str, str]:
    from pydoc_data import topics

    return topics.topics


def _uniform(name: str) -> float:
    """A number in [0, 1) from the document's name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], 'big') / 2**64

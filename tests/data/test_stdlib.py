"""The quickstart corpus: every byte of files that every Python has, split by the documents' names."""

import hashlib
import pickle
import sysconfig
from pathlib import Path
from pydoc_data import topics

import pytest

from tpu_llm.config import ConfigError, validate
from tpu_llm.data.documents import Documents
from tpu_llm.data.stdlib import Stdlib, StdlibDocuments


def names(docs: Documents) -> list[str]:
    return [docs.name(i) for i in range(len(docs))]


def test_every_document_is_in_one_part(stdlib: dict[str, Documents]) -> None:
    train, heldout = names(stdlib['train']), names(stdlib['heldout'])
    assert not set(train) & set(heldout)
    assert {f'topics/{topic}' for topic in topics.topics} <= {*train, *heldout}
    assert {'json/decoder.py', 'typing.py', 'asyncio/tasks.py'} <= {*train, *heldout}
    assert train == sorted(train)


def test_the_split_is_a_hash_of_the_name(stdlib: dict[str, Documents]) -> None:
    for split, docs in stdlib.items():
        for name in names(docs):
            number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], 'big') / 2**64
            assert (number < 0.03) == (split == 'heldout')
    more = names(Stdlib(split='heldout', heldout=0.1).open())
    assert set(names(stdlib['heldout'])) < set(more)


def test_documents_are_the_files_byte_for_byte(stdlib: dict[str, Documents]) -> None:
    size = dict.fromkeys(stdlib, 0)
    for split, docs in stdlib.items():
        for i in range(len(docs)):
            name, text = docs.name(i), docs.read(i).text
            assert text
            topic = name.removeprefix('topics/')
            file = Path(sysconfig.get_path('stdlib'), name)
            assert text.encode() == (topics.topics[topic].encode() if topic != name else file.read_bytes())
            size[split] += len(text.encode())
    assert 8e6 < size['train'] + size['heldout'] < 12e6
    assert 150e3 < size['heldout'] < 400e3


def test_what_only_some_machines_have_is_left_out(stdlib: dict[str, Documents]) -> None:
    for name in names(stdlib['train']) + names(stdlib['heldout']):
        assert not {'test', 'tests', 'site-packages', 'idlelib', 'pydoc_data', 'lib2to3'} & set(name.split('/'))
        assert not name.startswith('_sysconfigdata')


def test_what_is_taken_from_a_library(tmp_path: Path) -> None:
    taken = {'a.py': b'x\r\ny\r', 'json/b.py': b'\xef\xbb\xbf# mark', 'json/c.py': 'λ\0'.encode()}
    left = {'latin.py': b'\xe9', 'empty.py': b'', 'json/test/d.py': b'x', 'idlelib/e.py': b'x', 'f.txt': b'x'}
    left |= {'_sysconfigdata__linux.py': b'x', 'config-3.11/g.py': b'x', 'sitecustomize.py': b'x'}
    for name, content in {**taken, **left}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    docs = [StdlibDocuments(str(tmp_path), split, 0.5) for split in ('train', 'heldout')]
    found = {part.name(i): (part.read(i).text or '').encode() for part in docs for i in range(len(part))}
    assert {name: text for name, text in found.items() if not name.startswith('topics/')} == taken


def test_fingerprint_and_pickle(stdlib: dict[str, Documents]) -> None:
    train, heldout = stdlib['train'], stdlib['heldout']
    assert train.fingerprint != heldout.fingerprint
    assert Stdlib(split='train').open().fingerprint == train.fingerprint
    sent = pickle.dumps(train)
    assert len(sent) < 50_000  # names, no text
    assert pickle.loads(sent).read(3) == train.read(3)


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match=r'heldout is 1\.5; it is a fraction'):
        validate(Stdlib(heldout=1.5))
    with pytest.raises(ConfigError, match='the heldout part of the standard library is empty with heldout=1e-09'):
        Stdlib(split='heldout', heldout=1e-9).open()

"""Files of every kind give the same documents by random access, in order, and name what is wrong in them."""

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from pyarrow import parquet

from tpu_llm.config import ConfigError, validate
from tpu_llm.data import files
from tpu_llm.data.documents import Document, Documents, Head, Source, tokens_of
from tpu_llm.data.loader import Data, Loader, open_documents
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import ArrayRecord, Jsonl, Parquet, Stdlib, Text, Tokens
from tpu_llm.data.streams import in_order, shuffled
from tpu_llm.data.tokenizer import Bytes, ByteTokenizer, Ids

TEXTS = ['first', 'zwei λ ▁\r', ' three\t\0 ', '\ufefffour', 'five']


def write_text(folder: Path) -> Source:
    for i, text in enumerate(TEXTS):
        (folder / f'{i}.txt').write_bytes(text.encode())
    return Text(paths=(f'{folder}/*.txt',))


def write_lines(folder: Path) -> Source:
    (folder / 'a.txt').write_bytes('\n'.join(TEXTS[:2]).encode())  # no line feed at the end
    (folder / 'b.txt').write_bytes(('\n' + '\n\n'.join(TEXTS[2:]) + '\n').encode())  # empty lines are none
    return Text(paths=(f'{folder}/[ab].txt',), per='line')


def write_jsonl(folder: Path) -> Source:
    lines = [json.dumps({'body': text, 'n': 1}) for text in TEXTS]
    (folder / 'a.jsonl').write_text('\n'.join(lines[:3]) + '\n')
    (folder / 'b.jsonl').write_text('\n'.join(lines[3:]))
    return Jsonl(paths=(f'{folder}/a.jsonl', f'{folder}/b.*'), field='body')


def write_parquet(folder: Path) -> Source:
    for name, texts in (('a', TEXTS[:3]), ('b', TEXTS[3:])):
        table = pyarrow.table({'n': list(range(len(texts))), 'body': texts})
        parquet.write_table(table, folder / f'{name}.parquet', row_group_size=2)
    return Parquet(paths=(f'{folder}/*.parquet',), column='body')


def write_arrayrecord(folder: Path) -> Source:
    for name, texts in (('a', TEXTS[:3]), ('b', TEXTS[3:])):
        writer = ArrayRecordWriter(str(folder / f'{name}.arrayrecord'), 'group_size:1')
        for text in texts:
            writer.write(text.encode())
        writer.close()
    return ArrayRecord(paths=(f'{folder}/*.arrayrecord',))


WRITERS = [write_text, write_lines, write_jsonl, write_parquet, write_arrayrecord]
IDS = [[5, 6, 7], [8], [9, 300], [70_000, 1]]


def write_bin(folder: Path) -> Source:
    flat = [*IDS[0], 0, *IDS[1], 0, 0], [*IDS[2], 0, *IDS[3]]  # two ends in a row hold no document between them
    for name, ids in zip('ab', flat, strict=True):
        np.asarray(ids, '<u4').tofile(folder / f'{name}.bin')
    return Tokens(paths=(f'{folder}/*.bin',), end=0, dtype='uint32')


def write_npy(folder: Path) -> Source:
    np.save(folder / 'a.npy', np.asarray([*IDS[0], -1, *IDS[1], -1, *IDS[2], -1, *IDS[3]], np.int64))
    return Tokens(paths=(f'{folder}/*.npy',), end=-1)


def write_ids_jsonl(folder: Path) -> Source:
    (folder / 'ids.jsonl').write_text('\n'.join(json.dumps({'text': ids}) for ids in IDS))
    return Jsonl(paths=(f'{folder}/ids.jsonl',))


def write_ids_parquet(folder: Path) -> Source:
    parquet.write_table(pyarrow.table({'ids': IDS}), folder / 'ids.parquet')
    return Parquet(paths=(f'{folder}/ids.parquet',), column='ids')


ID_WRITERS = [write_bin, write_npy, write_ids_jsonl, write_ids_parquet]


def texts(docs: Documents) -> list[str | None]:
    return [docs.read(i).text for i in range(len(docs))]


@pytest.mark.parametrize('write', WRITERS)
def test_text_is_read_at_random_and_in_order(tmp_path: Path, write: Callable[[Path], Source]) -> None:
    docs = write(tmp_path).open()
    assert texts(docs) == TEXTS
    assert [docs.read(i).text for i in (4, 0, 3, 3)] == [TEXTS[i] for i in (4, 0, 3, 3)]
    assert [(i, document.text) for i, document in in_order(docs)] == list(enumerate(TEXTS))
    assert sorted(document.text or '' for document in shuffled(docs)) == sorted(TEXTS)
    assert len({docs.name(i) for i in range(5)}) == 5
    for beyond in (-1, 5):
        with pytest.raises(IndexError):
            docs.read(beyond)


@pytest.mark.parametrize('write', ID_WRITERS)
def test_ids_are_read_as_they_are(tmp_path: Path, write: Callable[[Path], Source]) -> None:
    docs = write(tmp_path).open()
    assert [list(docs.read(i).tokens if docs.read(i).tokens is not None else ()) for i in range(len(docs))] == IDS
    assert len({docs.name(i) for i in range(4)}) == 4


@pytest.mark.parametrize('write', WRITERS + ID_WRITERS)
def test_fingerprint_tells_of_change_and_pickles_go_to_workers(tmp_path: Path, write: Callable[[Path], Source]) -> None:
    source = write(tmp_path)
    docs = source.open()
    before = docs.fingerprint
    assert source.open().fingerprint == before
    copy = pickle.loads(pickle.dumps(docs))
    assert len(copy) == len(docs)
    assert docs.name(len(docs) - 1) == pickle.loads(pickle.dumps(docs)).name(len(docs) - 1)
    file = max(file for file in tmp_path.iterdir())
    os.utime(file, (1, 1))
    assert source.open().fingerprint != before


def test_options_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    write_text(tmp_path)
    paths = (f'{tmp_path}/*.txt',)
    sources = [Text(paths=paths), Text(paths=paths, per='line'), Text(paths=paths, on_bad='skip')]
    sources += [Jsonl(paths=paths), Jsonl(paths=paths, field='x')]
    assert len({source.open().fingerprint for source in sources}) == 5


def test_lengths_are_known_for_flat_tokens_only(tmp_path: Path) -> None:
    assert write_bin(tmp_path).open().lengths().tolist() == [3, 1, 2, 2]
    assert write_text(tmp_path).open().lengths() is None


def test_names_say_where_to_look(tmp_path: Path) -> None:
    assert write_lines(tmp_path).open().name(3) == f'{tmp_path}/b.txt, line 4'  # blank lines count
    assert write_jsonl(tmp_path).open().name(4) == f'{tmp_path}/b.jsonl, line 2'
    assert write_parquet(tmp_path).open().name(2) == f'{tmp_path}/a.parquet, row 2'
    assert write_arrayrecord(tmp_path).open().name(4) == f'{tmp_path}/b.arrayrecord, record 1'
    assert write_bin(tmp_path).open().name(1) == f'{tmp_path}/a.bin, ids 4 to 5'


def test_only_offsets_are_indexed_over_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path)
    monkeypatch.setattr(files, '_BLOCK', 3)  # lines lie across blocks
    docs = Text(paths=(f'{tmp_path}/[ab].txt',), per='line').open()
    assert texts(docs) == TEXTS
    assert docs.name(4) == f'{tmp_path}/b.txt, line 6'


def test_the_first_documents_of_a_source(tmp_path: Path) -> None:
    docs = Head(write_text(tmp_path).open(), 2)
    assert [document.text for _, document in in_order(docs)] == TEXTS[:2]
    assert len(Head(docs, 9)) == 2


# ----------------------------------------------------------------------------------------------------- paths


def test_globs_are_sorted_and_recursive(tmp_path: Path) -> None:
    for name in ('b/2.txt', 'a/1.txt', 'a/deep/0.txt'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(Text(paths=(f'{tmp_path}/**/*.txt',)).open()) == ['a/1.txt', 'a/deep/0.txt', 'b/2.txt']
    assert texts(Text(paths=(f'{tmp_path}/b/2.txt', f'{tmp_path}/a/*.txt')).open()) == ['b/2.txt', 'a/1.txt']


@pytest.mark.parametrize(
    ('paths', 'message'),
    [
        ((), 'paths is empty'),
        (('{}/none.txt',), "no file matches '.*none.txt'; check the path"),
        (('{}/none/*.txt',), 'no file matches'),
        (('{}/*.md',), 'no file matches'),
        (('{}',), 'is a folder; name its files with a glob, such as .*/\\*'),
    ],
)
def test_paths_that_name_nothing(tmp_path: Path, paths: tuple[str, ...], message: str) -> None:
    (tmp_path / 'a.txt').write_text('a')
    with pytest.raises(ConfigError, match=message):
        Text(paths=tuple(path.format(tmp_path) for path in paths)).open()


# --------------------------------------------------------------------------------------------------- bad records


def jsonl(folder: Path, *lines: bytes) -> str:
    (folder / 'bad.jsonl').write_bytes(b'{"text": "good"}\n\n' + b'\n'.join(lines) + b'\n{"text": "last"}\n')
    return f'{folder}/bad.jsonl'


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        (b'{"text": "x"', r"bad.jsonl, line 3: not JSON \(Expecting ',' delimiter at character 13\)"),
        (b'{"text": "\xff"}', r'bad.jsonl, line 3: byte 0xff is not UTF-8; convert the file'),
        (b'["text"]', r"bad.jsonl, line 3: no field 'text' \(the record is no object\); set field="),
        (b'{"body": "x", "n": 1}', r"line 3: no field 'text' \(the record has 'body', 'n'\); set field="),
        (b'{"text": 5}', r"line 3: 'text' is neither text nor a list of token ids"),
        (b'{"text": [1, -2]}', r"line 3: 'text' is neither text nor a list of token ids"),
        (b'{"text": [1, true]}', r"line 3: 'text' is neither text nor a list of token ids"),
        (b'{"text": "\\ud800"}', r"line 3: 'text' holds half of a surrogate pair"),
    ],
)
def test_a_bad_line_of_jsonl_is_named_or_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: bytes, message: str
) -> None:
    path = jsonl(tmp_path, line)
    docs = Jsonl(paths=(path,)).open()
    assert docs[0] == Document(text='good')
    with pytest.raises(ConfigError, match=message) as error:
        docs[1]
    assert "(on_bad='skip' passes over such records)" in str(error.value)
    assert '\n' not in str(error.value)
    with caplog.at_level(logging.WARNING):
        found = [document.text for _, document in in_order(Jsonl(paths=(path,), on_bad='skip').open())]
    assert found == ['good', 'last']
    assert 'bad.jsonl, line 3' in caplog.text


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / 'bad.txt').write_bytes(b'one\ntwo\nthr\xe9e\n')
    paths = (f'{tmp_path}/bad.txt',)
    with pytest.raises(ConfigError, match=r'bad.txt, line 3: byte 0xe9 is not UTF-8; convert the file'):
        Text(paths=paths).open()[0]
    with pytest.raises(ConfigError, match=r'bad.txt, line 3: byte 0xe9 is not UTF-8'):
        Text(paths=paths, per='line').open()[2]
    assert Text(paths=paths, per='line', on_bad='skip').open()[2] is None


def test_records_that_are_not_text(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({'text': ['a', None]}), tmp_path / 'a.parquet')
    with pytest.raises(ConfigError, match=r"a.parquet, row 1: 'text' is neither text nor a list of token ids"):
        Parquet(paths=(f'{tmp_path}/a.parquet',)).open()[1]
    writer = ArrayRecordWriter(str(tmp_path / 'a.arrayrecord'), 'group_size:1')
    writer.write(b'\xff')
    writer.close()
    with pytest.raises(ConfigError, match=r'a\.arrayrecord, record 0: byte 0xff is not UTF-8'):
        ArrayRecord(paths=(f'{tmp_path}/a.arrayrecord',)).open()[0]


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        (lambda p: Parquet(paths=(f'{p}/good.parquet',), column='body'), "has no column 'body'; it has n, text"),
        (lambda p: Parquet(paths=(f'{p}/junk',)), 'junk is not a Parquet file'),
        (lambda p: ArrayRecord(paths=(f'{p}/junk',)), 'junk is not an ArrayRecord file'),
        (lambda p: Tokens(paths=(f'{p}/odd.bin',), end=0), 'odd.bin has 3 bytes, no whole number of uint16 ids; set'),
        (lambda p: Tokens(paths=(f'{p}/junk.npy',), end=0), 'junk.npy is not a .npy file'),
        (lambda p: Tokens(paths=(f'{p}/float.npy',), end=0), r'float.npy holds float64 of shape \(2,\)'),
        (lambda p: Tokens(paths=(f'{p}/table.npy',), end=0), r'table.npy holds int64 of shape \(2, 2\)'),
    ],
)
def test_files_of_another_kind(tmp_path: Path, source: Callable[[Path], Source], message: str) -> None:
    parquet.write_table(pyarrow.table({'n': [1], 'text': ['a']}), tmp_path / 'good.parquet')
    for name in ('junk', 'junk.npy'):
        (tmp_path / name).write_bytes(b'junk, not what it should be')
    (tmp_path / 'odd.bin').write_bytes(b'abc')
    np.save(tmp_path / 'float.npy', np.zeros(2))
    np.save(tmp_path / 'table.npy', np.zeros((2, 2), np.int64))
    with pytest.raises(ConfigError, match=message):
        len(source(tmp_path).open())


def test_an_id_that_the_vocabulary_lacks() -> None:
    for wrong in (259, -1):
        document = Document(tokens=np.asarray([5, wrong, 7]))
        with pytest.raises(ConfigError, match=f'a.bin holds id {wrong}, but the vocabulary has 259; use the tokenizer'):
            tokens_of(document, ByteTokenizer(), lambda: 'a.bin')


# ------------------------------------------------------------------------------------------- as part of a mixture


@pytest.mark.parametrize('write', WRITERS + ID_WRITERS)
def test_a_run_over_any_source_goes_on_where_it_stopped(tmp_path: Path, write: Callable[[Path], Source]) -> None:
    data = Data(mixture=Mixture(sources={'a': write(tmp_path)}), tokenizer=Bytes(), global_batch=2, seq_len=7)
    validate(data)
    tokenizer = Ids(vocab_size=100_000, bos=1, eos=2).make(iter(()), '') if write in ID_WRITERS else ByteTokenizer()
    loader = Loader(data, open_documents(data, tokenizer, tmp_path), tokenizer, seed=0)
    with contextlib.closing(loader):
        read = [(batch.tokens.tolist(), table) for batch, table in itertools.islice(loader, 8)]
        for k, (_, table) in enumerate(read[:-1]):
            loader.restore(table)
            assert next(loader)[0].tokens.tolist() == read[k + 1][0]


def test_your_own_source_is_any_config_that_opens_documents() -> None:
    @dataclasses.dataclass(kw_only=True, slots=True)
    class Mine:
        def open(self) -> Documents:
            return Stdlib(split='heldout').open()

    validate(Mixture(sources={'mine': Mine()}))
    with pytest.raises(ConfigError, match=r'config\.sources is .*; expected dict\[str, .*Source\]'):
        validate(Mixture(sources={'mine': 'stdlib'}))  # type: ignore[dict-item]

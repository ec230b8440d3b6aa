"""The cache is an optimization: with it, without it, and after its deletion the batches are the same."""

import contextlib
import dataclasses
import itertools
import multiprocessing
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from tpu_llm.config import ConfigError
from tpu_llm.data import cache
from tpu_llm.data.cache import CachedDocuments, cached
from tpu_llm.data.documents import Documents
from tpu_llm.data.loader import Data, Loader, open_documents
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Jsonl, Text, Tokens
from tpu_llm.data.tokenizer import Bytes, ByteTokenizer, SentencePiece


def read(data: Data, workdir: Path) -> list[bytes]:
    docs = open_documents(data, ByteTokenizer(), workdir)
    with contextlib.closing(Loader(data, docs, ByteTokenizer(), seed=0)) as loader:
        return [batch.tokens.tobytes() + batch.targets.tobytes() for batch, _ in itertools.islice(loader, 20)]


def test_deleting_it_changes_nothing(data: Data, tmp_path: Path) -> None:
    plain = read(data, tmp_path)
    assert not list(tmp_path.iterdir())
    with_cache = dataclasses.replace(data, cache='cache')
    assert read(with_cache, tmp_path) == plain
    folders = sorted((tmp_path / 'cache').iterdir())
    assert [sorted(f.name for f in folder.iterdir()) for folder in folders] == [['spans.npy', 'tokens.bin']] * 2
    stamps = [(f, f.stat().st_mtime_ns) for folder in folders for f in folder.iterdir()]
    assert read(with_cache, tmp_path) == plain
    assert [(f, f.stat().st_mtime_ns) for f, _ in stamps] == stamps, 'it is written once'
    shutil.rmtree(tmp_path / 'cache')
    assert read(with_cache, tmp_path) == plain


def test_it_holds_the_ids_and_lengths(stdlib: dict[str, Documents], bpe: SentencePiece, tmp_path: Path) -> None:
    docs = stdlib['heldout']
    kept = cached(docs, bpe, tmp_path)
    assert len(kept) == len(docs)
    for i in range(len(docs)):
        tokens = kept.read(i).tokens
        assert tokens is not None
        assert tokens.dtype == np.uint16
        np.testing.assert_array_equal(tokens, bpe.encode(docs.read(i).text or ''))
        assert kept.lengths()[i] == len(tokens)
        assert kept.name(i) == docs.name(i)


def test_a_change_of_the_source_or_the_tokenizer_is_another_cache(tmp_path: Path, bpe: SentencePiece) -> None:
    (tmp_path / 'a.txt').write_text('one')
    source = Text(paths=(f'{tmp_path}/a.txt',))

    def ids(tokenizer: ByteTokenizer | SentencePiece) -> list[int]:
        tokens = cached(source.open(), tokenizer, tmp_path / 'cache').read(0).tokens
        assert tokens is not None
        return tokens.tolist()

    assert ids(ByteTokenizer()) == ByteTokenizer().encode('one').tolist()
    assert ids(bpe) == bpe.encode('one').tolist()
    (tmp_path / 'a.txt').write_text('two!')
    assert ids(ByteTokenizer()) == ByteTokenizer().encode('two!').tolist()
    assert len(list((tmp_path / 'cache').iterdir())) == 3


def test_skipped_records_stay_absent(tmp_path: Path) -> None:
    (tmp_path / 'a.jsonl').write_text('{"text": "first"}\nbad\n{"text": ""}\n{"text": [7, 8]}\n')
    docs = Jsonl(paths=(f'{tmp_path}/a.jsonl',), on_bad='skip').open()
    kept = cached(docs, ByteTokenizer(), tmp_path / 'cache')
    assert kept[1] is None
    found = [kept[i] for i in (0, 2, 3)]
    assert [d.tokens.tolist() for d in found if d and d.tokens is not None] == [
        ByteTokenizer().encode('first').tolist(),
        [],
        [7, 8],
    ]
    assert kept.lengths().tolist() == [5, 0, 2]


def test_a_cached_source_is_not_read_again(folder: Path, tmp_path: Path) -> None:
    source = Jsonl(paths=(f'{folder}/*.jsonl',))
    cached(source.open(), ByteTokenizer(), tmp_path)
    docs = source.open()
    kept = cached(docs, ByteTokenizer(), tmp_path)
    assert len(kept) == 30
    assert kept[29] is not None
    assert 'indexes' not in vars(docs)
    assert kept.name(29) == f'{folder}/records.jsonl, line 30'  # what a name needs is read for it


def test_files_of_ids_need_none(tmp_path: Path) -> None:
    np.save(tmp_path / 'a.npy', np.asarray([5, 6, 0]))
    mixture = Mixture(sources={'a': Tokens(paths=(f'{tmp_path}/a.npy',), end=0)})
    data = Data(mixture=mixture, tokenizer=Bytes(), global_batch=1, seq_len=4, cache='cache')
    open_documents(data, ByteTokenizer(), tmp_path)
    assert not (tmp_path / 'cache').exists()


def test_large_vocabularies_take_wider_ids(tmp_path: Path) -> None:
    np.save(tmp_path / 'a.npy', np.asarray([100_000, 70_000, 5]))

    class Wide(ByteTokenizer):
        vocab_size, fingerprint = 128_256, 'wide'

    docs = Tokens(paths=(f'{tmp_path}/a.npy',), end=5).open()
    tokens = cached(docs, Wide(), tmp_path / 'cache').read(0).tokens
    assert tokens is not None
    assert tokens.tolist() == [100_000, 70_000]


def test_documents_are_tokenized_in_chunks(stdlib: dict[str, Documents], tmp_path: Path) -> None:
    docs = stdlib['heldout']
    chunked = cached(docs, ByteTokenizer(), tmp_path / 'a')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, '_CHUNK', 1)
        single = cached(docs, ByteTokenizer(), tmp_path / 'b')
    for name in ('tokens.bin', 'spans.npy'):
        assert (chunked._folder / name).read_bytes() == (single._folder / name).read_bytes()


def test_it_pickles_as_a_path(stdlib: dict[str, Documents], tmp_path: Path) -> None:
    kept = cached(stdlib['heldout'], ByteTokenizer(), tmp_path)
    sent = pickle.dumps(kept)
    assert len(sent) < 5_000
    copy = pickle.loads(sent)
    np.testing.assert_array_equal(copy.read(3).tokens, kept.read(3).tokens)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / 'a.jsonl').write_text('{"text": "first"}\nbad\n')
    docs = Jsonl(paths=(f'{tmp_path}/a.jsonl',)).open()
    with pytest.raises(ConfigError, match=r'a\.jsonl, line 2'):
        cached(docs, ByteTokenizer(), tmp_path / 'cache')
    assert list((tmp_path / 'cache').iterdir()) == []


def _write(pattern: str, folder: str, start: multiprocessing.synchronize.Barrier) -> None:
    docs = Text(paths=(pattern,)).open()
    start.wait()
    cached(docs, ByteTokenizer(), folder)


def test_processes_that_write_at_once_agree(folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context('spawn')
    start = context.Barrier(3)
    writers = [context.Process(target=_write, args=(f'{folder}/*.txt', str(tmp_path), start)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(list(tmp_path.iterdir())) == 1
    assert isinstance(cached(Text(paths=(f'{folder}/*.txt',)).open(), ByteTokenizer(), tmp_path), CachedDocuments)

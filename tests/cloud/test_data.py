"""Sources, tokenizers and whole loaders on gs://, against a real GCS API server."""

import contextlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from etils import epath
from pyarrow import parquet

from tpu_llm.config import ConfigError
from tpu_llm.data.loader import Data, Loader, open_documents, open_tokenizer
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import ArrayRecord, Jsonl, Parquet, Text, Tokens
from tpu_llm.data.tokenizer import Bytes, Pretrained, TrainedBPE

TEXTS = [f'text {i} λ\n' * i for i in range(1, 6)]


@pytest.fixture
def files(bucket: str, tmp_path: Path) -> str:
    root = epath.Path(bucket)
    for folder in ('deep/a', 'deep/b'):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(TEXTS):
        (root / 'deep' / 'ab'[i % 2] / f'{i}.txt').write_bytes(text.encode())
    lines = [json.dumps({'text': text}) for text in TEXTS]
    (root / 'a.jsonl').write_bytes('\n'.join(lines).encode())
    (root / 'bad.jsonl').write_bytes(b'{"text": "good"}\n\n{}\n')
    parquet.write_table(pyarrow.table({'text': TEXTS}), tmp_path / 'a.parquet', row_group_size=2)
    np.save(tmp_path / 'a.npy', np.asarray([5, 6, 0, 7, 0, 8, 9, 10]))
    for name in ('a.parquet', 'a.npy'):
        (root / name).write_bytes((tmp_path / name).read_bytes())
    return bucket


def test_every_kind_of_file(files: str) -> None:
    for source in (Jsonl(paths=(f'{files}/a.jsonl',)), Parquet(paths=(f'{files}/*.parquet',))):
        docs = source.open()
        assert [docs.read(i).text for i in (4, 0, 2)] == [TEXTS[i] for i in (4, 0, 2)]
    docs = Text(paths=(f'{files}/**/*.txt',)).open()
    assert [docs.read(i).text for i in range(5)] == [TEXTS[i] for i in (0, 2, 4, 1, 3)]
    assert docs.name(0) == f'{files}/deep/a/0.txt'
    flat = Tokens(paths=(f'{files}/a.npy',), end=0).open()
    assert [flat.read(i).tokens.tolist() for i in range(3)] == [[5, 6], [7], [8, 9, 10]]


def test_mistakes(files: str) -> None:
    with pytest.raises(ConfigError, match=r"gs://bucket/.*/bad\.jsonl, line 3: no field 'text'"):
        Jsonl(paths=(f'{files}/bad.jsonl',)).open()[1]
    with pytest.raises(ConfigError, match=r"no file matches 'gs://bucket/.*/none\*'"):
        Text(paths=(f'{files}/none*',)).open()
    with pytest.raises(ConfigError, match=r'a\.npy: ArrayRecord files are read locally; copy them or mount'):
        len(ArrayRecord(paths=(f'{files}/a.npy',)).open())


def test_a_tokenizer_is_trained_and_kept_there(files: str) -> None:
    trained = TrainedBPE(vocab_size=272)
    tokenizer = trained.make(iter(TEXTS), files)
    assert trained.make(iter(()), files).fingerprint == tokenizer.fingerprint
    path = f'{files}/tokenizer/tokenizer.model'
    assert Pretrained(path=path).make(iter(()), '').fingerprint == tokenizer.fingerprint
    assert [p.name for p in epath.Path(files, 'tokenizer').iterdir()] == ['tokenizer.model']


def test_a_loader_reads_it_in_workers_and_with_a_cache(
    files: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    seen = []
    for workers, cache in ((0, ''), (2, ''), (0, 'cache')):
        mixture = Mixture(sources={'a': Jsonl(paths=(f'{files}/a.jsonl',))})
        data = Data(mixture=mixture, tokenizer=Bytes(), global_batch=2, seq_len=16, workers=workers, cache=cache)
        tokenizer = open_tokenizer(data, files)
        with contextlib.closing(Loader(data, open_documents(data, tokenizer, files), tokenizer, seed=0)) as loader:
            seen.append([next(loader)[0].tokens.tolist() for _ in range(5)])
    assert seen[0] == seen[1] == seen[2]
    assert len(list((tmp_path / 'tpu_llm-cache').iterdir())) == 1, 'the cache of a remote workdir is local'

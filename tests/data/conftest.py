"""Small real files, and one tokenizer that several tests share."""

import json
from pathlib import Path

import pytest

from tpu_llm.data.documents import Documents
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Jsonl, Stdlib, Text
from tpu_llm.data.tokenizer import Bytes, SentencePiece, train_bpe


@pytest.fixture(scope='session')
def stdlib() -> dict[str, Documents]:
    return {split: Stdlib(split=split).open() for split in ('train', 'heldout')}


@pytest.fixture(scope='session')
def bpe(stdlib: dict[str, Documents]) -> SentencePiece:
    """4,096 pieces, trained on the training part of the standard library."""
    docs = stdlib['train']
    return SentencePiece(train_bpe((docs.read(i).text or '' for i in range(len(docs))), 4096))


@pytest.fixture(scope='session')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve short text files and a JSONL file of thirty records, of lengths from 0 to 120."""
    folder = tmp_path_factory.mktemp('text')
    for i in range(12):
        (folder / f'{i:02}.txt').write_text(f'file {i} ' + 'abcdefghij' * i)
    lines = [json.dumps({'text': f'record {i} ' + 'x' * (i * 7 % 40)}) for i in range(29)] + ['{"text": ""}']
    (folder / 'records.jsonl').write_text('\n'.join(lines) + '\n')
    return folder


@pytest.fixture(scope='session')
def data(folder: Path) -> Data:
    """Two sources whose weights change at step 5, rows shorter than most documents, three lanes to each of six rows."""
    return Data(
        mixture=Mixture(
            sources={'files': Text(paths=(f'{folder}/*.txt',)), 'records': Jsonl(paths=(f'{folder}/*.jsonl',))},
            weights={0: {'files': 0.7, 'records': 0.3}, 5: {'files': 0.2, 'records': 0.8}},
        ),
        tokenizer=Bytes(),
        global_batch=6,
        seq_len=24,
        interleave=3,
        prefetch=1,
    )

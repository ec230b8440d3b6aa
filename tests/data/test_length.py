"""Steps, tokens and epochs come to steps; one epoch is what the lanes really read."""

import dataclasses
from pathlib import Path

import pytest

from tpu_llm.config import ConfigError
from tpu_llm.data.documents import Documents
from tpu_llm.data.length import epoch_positions, few_steps, run_steps
from tpu_llm.data.loader import Data, Loader, open_documents
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Text
from tpu_llm.data.tokenizer import Bytes, ByteTokenizer


@pytest.fixture
def small(tmp_path: Path) -> Data:
    """Documents of 4, 9 and 29 bytes: 5 + 10 + 30 pairs."""
    for size in (4, 9, 29):
        (tmp_path / f'{size}.txt').write_text('x' * size)
    mixture = Mixture(sources={'a': Text(paths=(f'{tmp_path}/*.txt',))})
    return Data(mixture=mixture, tokenizer=Bytes(), global_batch=1, seq_len=10, interleave=1, cache='cache')


def opened(data: Data, tmp_path: Path) -> list[Documents]:
    return open_documents(data, ByteTokenizer(), tmp_path)


def test_lengths_of_runs(small: Data, tmp_path: Path) -> None:
    docs = opened(small, tmp_path)
    assert run_steps(small, docs, steps=7) == 7
    assert run_steps(small, docs, tokens=100) == 10
    assert run_steps(small, docs, tokens=101) == 11
    assert run_steps(small, docs, epochs=1) == 5
    assert run_steps(small, docs, epochs=2.5) == 12


def test_few_steps_of_epochs_are_said(small: Data, tmp_path: Path) -> None:
    wide = dataclasses.replace(small, seq_len=1024, global_batch=8, whole=True, overlong='drop')
    docs = opened(wide, tmp_path)
    assert run_steps(wide, docs, epochs=3) == 1
    assert few_steps(wide, docs, steps=1, epochs=3).startswith(
        '3 epochs of 45 tokens are 1 step of 8,192, in which each document stands about 182 times; give smaller data.se'
    )
    assert few_steps(small, opened(small, tmp_path), steps=10, epochs=2) == ''
    assert few_steps(wide, docs, steps=1, epochs=0) == ''


@pytest.mark.parametrize(('overlong', 'positions'), [('split', 45), ('truncate', 25), ('drop', 15), ('stop', 45)])
def test_an_epoch_is_as_overlong_has_it(small: Data, tmp_path: Path, overlong: str, positions: int) -> None:
    data = dataclasses.replace(small, overlong=overlong)
    assert epoch_positions(data, opened(data, tmp_path)) == positions


@pytest.mark.parametrize('overlong', ['split', 'truncate', 'drop'])
def test_an_epoch_reads_every_document_once(small: Data, tmp_path: Path, overlong: str) -> None:
    data = dataclasses.replace(small, overlong=overlong, seq_len=1 if overlong == 'split' else 10)
    docs = opened(data, tmp_path)
    loader = Loader(data, docs, ByteTokenizer(), seed=0)
    positions = epoch_positions(data, docs)
    pieces = [piece for step in range(1, positions // data.seq_len + 1) for piece in loader.describe(step)[0]]
    read = {'split': {0, 1, 2}, 'truncate': {0, 1, 2}, 'drop': {1, 2}}[overlong]  # 29.txt, 4.txt, 9.txt
    assert {piece.document for piece in pieces} == read
    assert sum(piece.start == 0 for piece in pieces) <= len(read) + 1


def test_epochs_need_known_lengths(small: Data, tmp_path: Path) -> None:
    data = dataclasses.replace(small, cache='')
    with pytest.raises(
        ConfigError, match=r"the length of source 'a' is unknown; set data\.cache, or give steps or tok"
    ):
        run_steps(data, opened(data, tmp_path), epochs=1)

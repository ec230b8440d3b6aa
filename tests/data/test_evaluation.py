"""Held-out batches hold every document once, first token and end mark included, and gzip gets the same bytes."""

import gzip
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tpu_llm.data.documents import Documents
from tpu_llm.data.evaluation import gzip_bits_per_byte, held_out
from tpu_llm.data.sources import Jsonl, Tokens
from tpu_llm.data.tokenizer import ByteTokenizer, SentencePiece


def test_every_document_once_in_order(stdlib: dict[str, Documents], bpe: SentencePiece) -> None:
    docs = stdlib['heldout']
    batches, raw = held_out(docs, bpe, batch=16, seq_len=256)
    batches = list(batches)
    texts = [docs.read(i).text or '' for i in range(len(docs))]
    assert raw == sum(len(text.encode()) for text in texts)
    targets = np.concatenate([b.targets[b.weights > 0] for b in batches])
    expected = np.concatenate([[*bpe.encode(text), bpe.eos] for text in texts])
    np.testing.assert_array_equal(targets, expected)
    assert all(b.tokens.shape == (16, 256) for b in batches)
    assert all((b.weights == 1).all() for b in batches[:-1])
    padding = batches[-1].segments == 0
    assert (batches[-1].weights[padding] == 0).all()
    np.testing.assert_array_equal(batches[0].tokens[0, :2], [bpe.bos, expected[0]])


def test_gzip_is_the_programs(stdlib: dict[str, Documents], tmp_path: Path) -> None:
    docs = stdlib['heldout']
    raw = b''.join((docs.read(i).text or '').encode() for i in range(len(docs)))
    (tmp_path / 'raw').write_bytes(raw)
    packed = subprocess.run(['gzip', '-9', '-c', '-n', tmp_path / 'raw'], capture_output=True, check=True).stdout
    assert gzip.decompress(packed) == raw
    assert gzip_bits_per_byte(docs, ByteTokenizer()) == pytest.approx(8 * len(packed) / len(raw), rel=1e-3)


def test_ids_count_as_the_bytes_they_stand_for(tmp_path: Path) -> None:
    np.save(tmp_path / 'a.npy', np.asarray([*ByteTokenizer().encode('λx'), 0, *ByteTokenizer().encode('y'), 0]))
    docs = Tokens(paths=(f'{tmp_path}/a.npy',), end=0).open()
    batches, raw = held_out(docs, ByteTokenizer(), batch=2, seq_len=4)
    (batch,) = batches
    assert raw == 4
    assert int(batch.weights.sum()) == 4 + 2


def test_skipped_records_count_for_nothing(tmp_path: Path) -> None:
    (tmp_path / 'a.jsonl').write_text('{"text": "ab"}\nbad\n{"text": "c"}\n')
    docs = Jsonl(paths=(f'{tmp_path}/a.jsonl',), on_bad='skip').open()
    batches, raw = held_out(docs, ByteTokenizer(), batch=1, seq_len=8)
    (batch,) = batches
    assert raw == 3
    assert int(batch.weights.sum()) == 3 + 2

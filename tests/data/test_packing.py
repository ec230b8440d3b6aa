"""Every pair of input and target is in exactly one row, and the docstring's picture is what happens."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tpu_llm.data.packing import fill, frame, rows
from tpu_llm.data.tokenizer import ByteTokenizer

BOS, EOS = 1, 2


def test_the_picture() -> None:
    docs = [frame(np.asarray(ids), ByteTokenizer()) for ids in ([10, 11, 12], [20, 21, 22, 23], [30, 31, 32, 33])]
    batch = fill(list(rows(docs, 7)), 3, 7, pad=0)
    np.testing.assert_array_equal(
        batch.tokens, [[BOS, 10, 11, 12, BOS, 20, 21], [22, 23, BOS, 30, 31, 32, 33], [0] * 7]
    )
    np.testing.assert_array_equal(
        batch.targets, [[10, 11, 12, EOS, 20, 21, 22], [23, EOS, 30, 31, 32, 33, EOS], [0] * 7]
    )
    np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 2, 2, 2], [0] * 7])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4], [0] * 7])
    np.testing.assert_array_equal(batch.weights, [[1] * 7, [1] * 7, [0] * 7])
    assert {x.dtype for x in (batch.tokens, batch.targets, batch.segments, batch.positions)} == {np.dtype(np.int32)}
    assert batch.weights.dtype == np.float32


def test_padding_is_the_tokenizers() -> None:
    batch = fill([], 1, 3, pad=9)
    np.testing.assert_array_equal(batch.tokens, [[9, 9, 9]])
    np.testing.assert_array_equal(batch.targets, [[0, 0, 0]])


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 16))
def test_each_pair_is_in_one_row(lengths: list[int], seq_len: int) -> None:
    ids = itertools.count(10)
    docs = [np.asarray([BOS, *itertools.islice(ids, n), EOS], np.int32) for n in lengths]
    packed = list(rows(docs, seq_len))
    batch = fill(packed, len(packed), seq_len, pad=0)
    assert all(sum(piece.stop - piece.start for piece in row) == seq_len for row in packed[:-1])  # full but the last
    used = batch.segments > 0
    found = list(zip(batch.tokens[used].tolist(), batch.targets[used].tolist(), strict=True))
    assert found == [pair for doc in docs for pair in itertools.pairwise(doc.tolist())]
    assert not batch.weights[~used].any()
    # Positions count up inside a segment and start at 0 with each; segments count up inside a row.
    for segments, positions in zip(batch.segments, batch.positions, strict=True):
        new = np.diff(segments, prepend=0) != 0
        assert (positions[new] == 0).all()
        assert (np.diff(positions)[~new[1:] & (segments[1:] > 0)] == 1).all()
        assert segments[0] == 1
        assert set(np.diff(segments[segments > 0])) <= {0, 1}

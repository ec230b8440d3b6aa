"""What a lane reads: disjoint documents, token shares, stages, overlong documents, and a state that says it all."""

from collections import Counter

import numpy as np
import pytest

from tpu_llm.config import ConfigError
from tpu_llm.data import lanes
from tpu_llm.data.documents import Document, Documents
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Text
from tpu_llm.data.streams import Stream
from tpu_llm.data.tokenizer import ByteTokenizer


class Given(Documents):
    """Documents of the given lengths; None is a bad record."""

    on_bad = 'skip'
    fingerprint = 'given'

    def __init__(self, lengths: list[int | None]):
        self.given = lengths

    def __len__(self) -> int:
        return len(self.given)

    def name(self, index: int) -> str:
        return f'document {index}'

    def read(self, index: int) -> Document:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Document | None:
        length = self.given[index]
        return None if length is None else Document(tokens=np.full(length, 3 + index % 200, np.int32))


def walk(
    *sources: list[int | None],
    weights: dict[int, dict[str, float]] | None = None,
    total: int = 4,
    rows: range | None = None,
    interleave: int = 1,
    seq_len: int = 16,
    overlong: lanes.Overlong = 'split',
    seed: int = 0,
) -> lanes.Walk:
    names = [chr(ord('a') + i) for i in range(len(sources))]
    mixture = Mixture(sources={name: Text(paths=()) for name in names}, weights=weights or {})
    plan = lanes.Plan(mixture, seed, total, interleave, seq_len, overlong)
    streams = [
        Stream(name, Given(lengths), ByteTokenizer(), seed) for name, lengths in zip(names, sources, strict=True)
    ]
    return lanes.Walk(plan, streams, lanes.initial(plan.of_rows(rows or range(total)), len(sources)))


def test_lanes_share_each_epoch_without_gap_or_overlap() -> None:
    # Documents of 15 ids are 16 pairs: a row each, so that lanes go through the stream in step.
    epochs = walk([15] * 40)
    seen = [[row[0].document for row in epochs.step()] for _ in range(30)]
    for epoch in range(3):
        steps = seen[10 * epoch : 10 * epoch + 10]
        assert Counter(number for step in steps for number in step) == Counter(range(40))
    assert seen[:10] != seen[10:20], 'each epoch is another permutation'


def test_the_order_of_a_seed_is_what_it_was() -> None:
    # Pinned: if this changes, runs no longer go on from older checkpoints.
    w = walk([15] * 12)
    assert [[row[0].document for row in w.step()] for _ in range(6)] == [
        [7, 1, 3, 6],
        [8, 9, 10, 4],
        [0, 5, 11, 2],
        [7, 4, 3, 10],
        [0, 8, 6, 11],
        [2, 5, 9, 1],
    ]


def test_seeds_and_names_of_sources_decide_the_order() -> None:
    def first(name: str, seed: int) -> list[int]:
        stream = Stream(name, Given([1] * 100), ByteTokenizer(), seed)
        return [stream.number(i) for i in range(200)]

    assert first('a', 0) == first('a', 0)
    orders = [first('a', 0), first('a', 1), first('b', 0)]
    halves = [tuple(order[i : i + 100]) for order in orders for i in (0, 100)]
    assert len(set(halves)) == 6, 'no epoch of one is an epoch of another'


def test_shares_of_tokens_follow_the_weights_whatever_the_documents_lengths() -> None:
    rng = np.random.default_rng(0)
    sources = [rng.integers(low, high, 300).tolist() for low, high in ((1, 5), (50, 400), (10, 30))]
    w = walk(*sources, weights={0: {'a': 0.6, 'b': 0.3, 'c': 0.1}}, total=8, seq_len=64)
    for _ in range(100):
        w.step()
    emitted = w.state()['emitted']
    assert (emitted.sum(1) == 100 * 64).all()
    np.testing.assert_allclose(emitted.sum(0) / emitted.sum(), [0.6, 0.3, 0.1], atol=0.01)
    np.testing.assert_allclose(emitted / emitted.sum(1, keepdims=True), [[0.6, 0.3, 0.1]] * 8, atol=0.06)


def test_lanes_do_not_move_in_lockstep() -> None:
    # A rare source must not come to all lanes in the same steps, and its share is right from early on.
    w = walk([99] * 500, [99] * 500, weights={0: {'a': 0.9, 'b': 0.1}}, total=64, seq_len=100)
    rare = np.asarray([[row[0].source for row in w.step()] for _ in range(40)])
    assert rare[:10].sum(1).min() >= 2
    assert rare.sum(1).max() <= 16
    assert 0.05 < rare[:5].mean() < 0.16
    assert 0.09 < rare.mean() < 0.11


def test_a_stage_starts_at_its_step_and_forgets_the_last() -> None:
    stages = {0: {'a': 1.0}, 10: {'a': 0.25, 'b': 0.75}, 30: {'b': 1.0}}
    w = walk([7] * 50, [7] * 50, weights=stages, seq_len=16)
    sources = np.asarray([[[p.source for p in row] for row in w.step()] for _ in range(50)])
    assert (sources[:10] == 0).all()
    assert abs(sources[10:30].mean() - 0.75) < 0.05
    assert (sources[30:] == 1).all()
    assert w.state()['emitted'][:, 0].tolist() == [0] * 4
    assert (w.state()['emitted'][:, 1] == 20 * 16).all()


def test_overlong_documents_split() -> None:
    w = walk([40], total=1)
    rows = [w.step()[0] for _ in range(3)]
    assert [[(p.start, p.stop) for p in row] for row in rows] == [[(0, 16)], [(16, 32)], [(32, 41), (0, 7)]]


def test_overlong_documents_truncate() -> None:
    row = walk([40], total=1, overlong='truncate').step()[0]
    assert [(p.start, p.stop) for p in row] == [(0, 16)]
    assert len(row[0].ids) == 17  # no end mark: the document does not end here


def test_overlong_documents_drop() -> None:
    w = walk([40, 16, 15, 3], total=1, overlong='drop')
    pieces = [p for _ in range(20) for p in w.step()[0]]
    assert {p.document for p in pieces} == {2, 3}


def test_overlong_documents_stop() -> None:
    walk([15, 15], overlong='stop').step()
    with pytest.raises(
        ConfigError,
        match=r"document \d is 17 positions long, more than the context of 16; use overlong='split', 'truncate' or",
    ):
        walk([16, 16], overlong='stop').step()


@pytest.mark.parametrize(
    ('lengths', 'said'), [([40, 50], '41 to 51 positions long'), ([None, None], 'all bad'), ([None, 40], '41 to 41')]
)
def test_a_source_without_a_usable_document(lengths: list[int | None], said: str) -> None:
    message = f"draws in a row from source 'a' gave no document that fits seq_len = 16: it has 2, {said}"
    with pytest.raises(ConfigError, match=message):
        walk(lengths, overlong='drop').step()


def test_bad_records_are_passed_over() -> None:
    w = walk([None, 15, None, 15], total=2)
    assert {row[0].document for _ in range(10) for row in w.step()} == {1, 3}


def test_empty_documents_are_one_pair() -> None:
    row = walk([0, 0], total=1, seq_len=4).step()[0]
    assert [p.ids.tolist() for p in row] == [[1, 2]] * 4


@pytest.mark.parametrize('interleave', [1, 3])
def test_any_rows_give_what_they_give_among_all(interleave: int) -> None:
    sources, weights = ([5, 50, 20, None, 3], [9, 9, 30]), {0: {'a': 0.5, 'b': 0.5}, 4: {'a': 0.1, 'b': 0.9}}
    every = walk(*sources, weights=weights, total=6, interleave=interleave)
    some = walk(*sources, weights=weights, total=6, interleave=interleave, rows=range(2, 5))
    for _ in range(12):
        for row, expected in zip(some.step(), every.step()[2:5], strict=True):
            assert [p[1:] for p in row] == [p[1:] for p in expected]
    whole, part = every.state(), some.state()
    for key, column in lanes.select(whole, part['lane']).items():
        np.testing.assert_array_equal(part[key], column)


def test_interleaved_documents_take_turns() -> None:
    w = walk([63] * 50, total=2, interleave=4)  # 64 pairs: four rows
    steps = [[(row[0].document, row[0].start) for row in w.step()] for _ in range(16)]
    for place in range(2):
        opened = [step[place] for step in steps[:4]]
        assert len({document for document, _ in opened}) == 4
        for turn in range(1, 4):
            assert [step[place] for step in steps[4 * turn : 4 * turn + 4]] == [(d, 16 * turn) for d, _ in opened]
    assert len({document for step in steps for document, _ in step}) == 8
    assert (w.state()['step'] == 16).all()


def test_interleaved_lanes_share_each_epoch() -> None:
    w = walk([15] * 40, total=4, interleave=5)
    seen = [[row[0].document for row in w.step()] for _ in range(20)]
    for epoch in (seen[:10], seen[10:]):
        assert Counter(number for step in epoch for number in step) == Counter(range(40))


def test_a_stage_begins_for_all_lanes_at_once() -> None:
    w = walk([15] * 50, [15] * 50, weights={0: {'a': 1.0}, 3: {'b': 1.0}}, total=1, interleave=2)
    assert [w.step()[0][0].source for _ in range(6)] == [0, 0, 0, 1, 1, 1]
    assert w.state()['emitted'].tolist() == [[0, 16], [0, 32]]


# ---------------------------------------------------------------------------------------------------- tables


def test_tables_merge_and_select() -> None:
    table = lanes.initial([0, 1, 2, 3], 2)
    table['offset'][:] = [10, 11, 12, 13]
    parts = [lanes.select(table, chosen) for chosen in ([3, 1], [0], [2])]
    assert parts[0]['lane'].tolist() == [1, 3]
    merged = lanes.merge(parts)
    assert all(np.array_equal(merged[key], table[key]) for key in table)
    assert {column.dtype for column in merged.values()} == {np.dtype(np.int64)}


def test_tables_that_do_not_fit() -> None:
    table = lanes.initial([0, 1], 1)
    with pytest.raises(
        ConfigError, match='the lane table has no lane 2; go on with the global_batch and interleave it'
    ):
        lanes.select(table, [1, 2])
    with pytest.raises(AssertionError, match='two tables hold the same lane'):
        lanes.merge([table, table])
    later = lanes.initial([2], 1)
    later['step'][:] = 1
    with pytest.raises(AssertionError, match='of different steps'):
        lanes.merge([table, later])

"""The batch of a step is the same bytes whatever the hosts, the workers, the reading ahead and the interruptions."""

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpu_llm.arrays import Batch
from tpu_llm.config import ConfigError, leaf_marks, validate
from tpu_llm.data import lanes, pipeline
from tpu_llm.data.lanes import Table
from tpu_llm.data.loader import Data, Loader, make_walk, open_documents, open_tokenizer
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Jsonl, Text
from tpu_llm.data.tokenizer import Bytes, ByteTokenizer, TrainedBPE

STEPS, ROWS, INTERLEAVE = 12, 6, 3
LANES = ROWS * INTERLEAVE
COLUMNS = [field.name for field in dataclasses.fields(Batch)]


@contextlib.contextmanager
def loading(data: Data, owned: Sequence[int] | None = None, table: Table | None = None) -> Iterator[Loader]:
    loader = Loader(data, open_documents(data, ByteTokenizer(), ''), ByteTokenizer(), seed=1, owned=owned)
    if table is not None:
        loader.restore(table)
    with contextlib.closing(loader):
        yield loader


def rows_of(batch: Batch) -> list[bytes]:
    return [b''.join(getattr(batch, name)[i].tobytes() for name in COLUMNS) for i in range(len(batch.tokens))]


@pytest.fixture(scope='module')
def expected(data: Data) -> list[list[bytes]]:
    """The rows of an unbroken run on one host."""
    with loading(data) as loader:
        return [rows_of(batch) for batch, _ in itertools.islice(loader, STEPS)]


# -------------------------------------------------------------------------- any hosts, any workers, any kills


class InTurn:
    """Workers in this process, with the rows that Grain gives to its processes."""

    def __init__(self, rows: pipeline.Rows, workers: int):
        parts = [pipeline.Rows(rows.make, rows.table, plan=rows.plan, pad=rows.pad) for _ in range(workers)]
        for i, part in enumerate(parts):
            part.set_slice(slice(i, None, workers))
        self.turn = itertools.cycle([iter(part) for part in parts])

    def __next__(self) -> dict[str, Any]:
        return next(next(self.turn))

    def close(self) -> None:
        pass


def host(data: Data, table: Table, workers: int) -> pipeline.Closing:
    docs = open_documents(data, ByteTokenizer(), '')
    walk = functools.partial(make_walk, data, docs, ByteTokenizer(), 1)
    rows = pipeline.Rows(walk, table, plan=data.plan(1), pad=0)
    if workers == 0:
        return pipeline.read_ahead(rows, workers=0, prefetch=2)
    return pipeline.Joined(InTurn(rows, workers), workers, Path('/none'))


# One start of a run: which rows each host has and by how many workers it reads them (0 is the thread), the steps
# until the last checkpoint, and the steps after it that a kill throws away.
@st.composite
def starts(draw: st.DrawFn) -> tuple[list[tuple[list[int], int]], int, int]:
    order = draw(st.permutations(range(ROWS)))
    cuts = sorted(draw(st.sets(st.integers(1, ROWS - 1), max_size=3)))
    hosts = [(order[a:b], draw(st.integers(0, min(3, b - a)))) for a, b in itertools.pairwise([0, *cuts, ROWS])]
    return hosts, draw(st.integers(1, STEPS)), draw(st.integers(0, 2))


@settings(max_examples=50, deadline=None)
@given(run=st.lists(starts(), min_size=1, max_size=5))
def test_same_bytes_whatever_the_hosts_the_workers_and_the_kills(
    data: Data, expected: list[list[bytes]], run: list[Any]
) -> None:
    table, done = lanes.initial(range(LANES), 2), 0
    for hosts, steps, lost in run:
        saved: list[Table] = []
        for owned, workers in hosts:
            with contextlib.closing(host(data, lanes.select(table, data.plan(1).of_rows(owned)), workers)) as reader:
                for step, element in enumerate(itertools.islice(iter(reader.__next__, None), steps + lost), done + 1):
                    if step > STEPS:
                        break
                    batch = Batch(**{k: v for k, v in element.items() if k != 'state'})
                    assert rows_of(batch) == [expected[step - 1][lane] for lane in sorted(owned)]
                    if step == min(done + steps, STEPS):
                        saved.append(element['state'])
        if done == STEPS:
            return
        table, done = lanes.merge(saved), min(done + steps, STEPS)
        assert (table['step'] == done).all()
        assert table['lane'].tolist() == list(range(LANES))


def test_two_hosts_have_the_rows_of_one(data: Data, expected: list[list[bytes]]) -> None:
    for owned in ([0, 1, 2], [3, 4, 5], [4, 0]):
        with loading(data, owned) as loader:
            for step in range(STEPS):
                batch, _ = next(loader)
                assert rows_of(batch) == [expected[step][lane] for lane in sorted(owned)]


@pytest.mark.parametrize('workers', [0, 2])
def test_real_workers_give_the_same_and_go_on_from_a_table(
    data: Data, expected: list[list[bytes]], workers: int
) -> None:
    data = dataclasses.replace(data, workers=workers)
    with loading(data) as loader:
        assert len(multiprocessing.active_children()) == 0
        for step in range(5):
            batch, table = next(loader)
            assert rows_of(batch) == expected[step]
        assert len(multiprocessing.active_children()) == workers
        later, _ = next(loader)
        assert rows_of(later) == expected[5]
        loader.restore(table)  # back to step 5, with the same loader
        assert rows_of(next(loader)[0]) == expected[5]
    assert not multiprocessing.active_children()
    with loading(dataclasses.replace(data, workers=0), table=table) as loader:
        assert [rows_of(next(loader)[0]) for _ in range(STEPS - 5)] == expected[5:]


def test_more_workers_than_rows(data: Data, expected: list[list[bytes]]) -> None:
    with loading(dataclasses.replace(data, workers=9), owned=[2]) as loader:
        assert rows_of(next(loader)[0]) == [expected[0][2]]
        assert len(multiprocessing.active_children()) == 1


def test_a_worker_that_is_killed_is_an_error_and_no_wait(data: Data) -> None:
    with loading(dataclasses.replace(data, workers=2)) as loader:
        next(loader)
        for child in multiprocessing.active_children():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match='terminated unexpectedly with exit code -9'):
            list(itertools.islice(loader, 20))  # what the dead had made is read first


@pytest.mark.parametrize('workers', [0, 1])
def test_a_bad_record_is_the_same_error_in_a_worker(tmp_path: Path, workers: int) -> None:
    (tmp_path / 'bad.jsonl').write_text('{"text": "good"}\n{"text"\n')
    data = Data(
        mixture=Mixture(sources={'a': Jsonl(paths=(f'{tmp_path}/bad.jsonl',))}),
        tokenizer=Bytes(),
        global_batch=2,
        seq_len=8,
        workers=workers,
    )
    with loading(data) as loader, pytest.raises(ConfigError, match=r'bad\.jsonl, line 2: not JSON'):
        next(loader)


def test_tables_of_other_runs_are_refused(data: Data) -> None:
    with loading(data) as loader:
        with pytest.raises(ConfigError, match='the lane table has 21 lanes, global_batch x interleave is 18; go on'):
            loader.restore(lanes.initial(range(21), 2))
        with pytest.raises(ConfigError, match='the lane table has no lane 12; go on with the global_batch'):
            loader.restore(lanes.initial(range(12), 2))
        with pytest.raises(ConfigError, match='drawn from 3 sources, the mixture has 2; go on with the mixture'):
            loader.restore(lanes.initial(range(18), 3))


def test_it_is_a_grain_dataset_with_a_state(data: Data, expected: list[list[bytes]]) -> None:
    docs = open_documents(data, ByteTokenizer(), '')
    walk = functools.partial(make_walk, data, docs, ByteTokenizer(), 1)
    rows = pipeline.Rows(walk, lanes.initial(range(LANES), 2), plan=data.plan(1), pad=0)
    for dataset in (rows, grain.experimental.ThreadPrefetchIterDataset(rows, prefetch_buffer_size=2)):
        with contextlib.closing(iter(dataset)) as reader:
            start = reader.get_state()
            read = [next(reader)['tokens'].tolist() for _ in range(3)]
            state = reader.get_state()
            read += [next(reader)['tokens'].tolist() for _ in range(3)]
            for earlier, k in ((state, 3), (start, 0)):
                reader.set_state(earlier)
                assert [next(reader)['tokens'].tolist() for _ in range(3)] == read[k : k + 3]


# ------------------------------------------------------------------------------------------------ the batches


def test_batches_are_full_rows_of_int32(data: Data) -> None:
    with loading(data) as loader:
        for batch, _ in itertools.islice(loader, 3):
            for name in COLUMNS:
                column = getattr(batch, name)
                assert column.shape == (6, 24)
                assert column.dtype == (np.float32 if name == 'weights' else np.int32)
                assert isinstance(column, np.ndarray)
            assert (batch.segments > 0).all()
            assert (batch.weights == 1).all()


def test_tables_are_the_state_after_their_batch_and_stay_as_they_are(data: Data) -> None:
    with loading(dataclasses.replace(data, prefetch=4)) as loader:
        tables = [table for _, table in itertools.islice(loader, 6)]
    assert [table['step'].tolist() for table in tables] == [[i + 1] * LANES for i in range(6)]
    # The stage that begins after five steps counts its tokens anew.
    assert [int(table['emitted'].sum()) for table in tables] == [ROWS * 24 * n for n in (1, 2, 3, 4, 5, 1)]


def test_describe_says_what_is_in_a_batch(data: Data) -> None:
    docs = open_documents(data, ByteTokenizer(), '')
    with loading(data) as loader:
        batches = [batch for batch, _ in itertools.islice(loader, 7)]
        with pytest.raises(ConfigError, match='step 7 is behind the loader, which stands after step 7; steps count'):
            loader.describe(7)
    with loading(data) as loader:
        for row, pieces in enumerate(loader.describe(7)):
            tokens = []
            for piece in pieces:
                document = docs[piece.source][piece.document]
                assert document is not None
                ids = [1, *ByteTokenizer().encode(document.text or ''), 2]
                tokens += ids[piece.start : piece.stop]
            assert tokens == batches[6].tokens[row].tolist()
        assert rows_of(next(loader)[0]) == rows_of(batches[0]), 'it stays where it was'


def test_seeds_differ(data: Data) -> None:
    docs = open_documents(data, ByteTokenizer(), '')
    firsts = []
    for seed in (1, 2):
        with contextlib.closing(Loader(data, docs, ByteTokenizer(), seed=seed)) as loader:
            firsts.append(next(loader)[0].tokens.tolist())
    assert firsts[0] != firsts[1]


def test_closing_ends_the_thread(data: Data) -> None:
    before = threading.active_count()
    with loading(data) as loader:
        next(loader)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


# -------------------------------------------------------------------------------------------------- the config


def test_what_may_change_when_a_run_continues(data: Data) -> None:
    marks = leaf_marks(data)
    assert {path for path, mark in marks.items() if mark == 'machine'} == {
        'config.cache',
        'config.workers',
        'config.prefetch',
    }


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'global_batch': 0}, 'global_batch is 0; it is at least 1'),
        ({'interleave': 0}, 'interleave is 0; it is at least 1'),
        ({'seq_len': -1}, 'seq_len is -1; it is at least 1'),
        ({'prefetch': 0}, 'prefetch is 0; it is at least 1'),
        ({'workers': -2}, 'workers is -2; it is 0 for a thread'),
        ({'overlong': 'cut'}, "config.overlong is 'cut'; expected one of 'split', 'truncate', 'drop', 'stop'"),
    ],
)
def test_mistakes(data: Data, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(dataclasses.replace(data, **changes))


def test_an_empty_source_is_named(tmp_path: Path) -> None:
    (tmp_path / 'empty.txt').touch()
    sources = {'nothing': Text(paths=(f'{tmp_path}/*.txt',))}
    data = Data(mixture=Mixture(sources=sources), tokenizer=Bytes(), global_batch=2, seq_len=8)
    trained = dataclasses.replace(data, tokenizer=TrainedBPE(vocab_size=300))
    for opening in (
        lambda: open_documents(data, ByteTokenizer(), tmp_path),
        lambda: open_documents(dataclasses.replace(data, cache='cache'), ByteTokenizer(), tmp_path),
        lambda: open_tokenizer(trained, tmp_path),
    ):
        with pytest.raises(ConfigError, match="source 'nothing' holds no document; check its paths"):
            opening()


def test_a_tokenizer_learns_in_the_proportions_of_the_first_stage(tmp_path: Path) -> None:
    for name, count in (('a', 50), ('b', 50), ('c', 50)):
        for i in range(count):
            (tmp_path / f'{name}{i}.txt').write_text(f'{name}{i:02} ' * 25)
    sources = {name: Text(paths=(f'{tmp_path}/{name}*.txt',)) for name in 'abc'}
    data = Data(
        mixture=Mixture(sources=sources, weights={0: {'a': 0.75, 'b': 0.25}, 9: {'c': 1.0}}),
        tokenizer=TrainedBPE(vocab_size=300, sample_bytes=2400),
        global_batch=1,
        seq_len=8,
    )
    seen: list[str] = []

    @dataclasses.dataclass
    class Listening:
        def make(self, texts: Iterator[str], workdir: Any) -> ByteTokenizer:
            seen.extend(texts)
            return ByteTokenizer()

    open_tokenizer(dataclasses.replace(data, tokenizer=Listening()), tmp_path)
    assert [text[0] for text in seen[:24]].count('a') == 18
    assert len(set(seen)) == len(seen) == 100, 'each document of the stage once, none of another'
    assert open_tokenizer(data, tmp_path).vocab_size == 300

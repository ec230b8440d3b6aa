"""Numbers come back as they were written, once each, whatever killed the writer in between."""

import json
import math

import numpy as np
import pytest

from tpu_llm.config import ConfigError
from tpu_llm.train.metrics import JsonLines, TensorBoard, WandB, Writers, read


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'metrics.jsonl'


def write_steps(path, steps):
    writer = JsonLines(path)
    for step in steps:
        writer.write(step, {'loss': 1.0 / step})
    writer.close()


def test_a_line_is_on_disk_as_soon_as_it_is_written(path):
    writer = JsonLines(path)
    writer.write(7, {'loss': 2.5, 'tokens': 1024})
    assert path.read_text() == '{"step": 7, "loss": 2.5, "tokens": 1024}\n'
    writer.close()


def test_numbers_keep_their_exact_value_and_kind(path):
    loss = float(np.float32(0.1))
    writer = JsonLines(path)
    writer.write(1, {'loss': loss, 'tokens': 2**60 + 1})
    (record,) = read(path)
    assert record == {'step': 1, 'loss': loss, 'tokens': 2**60 + 1}
    assert isinstance(record['tokens'], int)


def test_numbers_that_are_not_finite_are_valid_json_and_come_back(path):
    writer = JsonLines(path)
    writer.write(1, {'a': math.nan, 'b': math.inf, 'c': -math.inf})

    def refuse(word):
        raise AssertionError(f'{word} is not JSON')

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line == {'step': 1, 'a': 'nan', 'b': 'inf', 'c': '-inf'}
    (record,) = read(path)
    assert math.isnan(record['a'])
    assert (record['b'], record['c']) == (math.inf, -math.inf)


def test_lists_come_back_too(path):
    writer = JsonLines(path)
    values = {'loss': 1.0, 'load': [[0.25, 0.75], [math.inf, 0.5]], 'dropped': [0.0, 1.0]}
    writer.write(1, values)
    assert read(path) == [{'step': 1} | values]


def test_cut_drops_what_came_after_the_restored_step_and_nothing_else(path):
    write_steps(path, [1, 2, 3, 4])
    whole = path.read_text().splitlines()
    writer = JsonLines(path)
    writer.cut(2)
    assert path.read_text().splitlines() == whole[:2]
    writer.write(3, {'loss': 9.0})
    assert [record['step'] for record in read(path)] == [1, 2, 3]


def test_cut_leaves_only_whole_files_behind(path):
    write_steps(path, [1, 2, 3])
    JsonLines(path).cut(0)
    assert path.read_text() == ''
    assert [file.name for file in path.parent.iterdir()] == ['metrics.jsonl']


def test_cut_without_a_file_makes_none(path):
    JsonLines(path).cut(0)
    assert not path.exists()


def test_a_half_line_left_by_a_kill_is_not_read_and_not_appended_to(path):
    write_steps(path, [1, 2])
    with path.open('a') as file:
        file.write('{"step": 3, "lo')
    assert [record['step'] for record in read(path)] == [1, 2]
    write_steps(path, [3])
    assert [record['step'] for record in read(path)] == [1, 2, 3]


def test_a_line_that_is_not_json_is_named(path):
    path.write_text('{"step": 1}\nloss 3\n')
    with pytest.raises(ValueError, match=r'metrics\.jsonl:2 is not JSON'):
        read(path)


def test_a_missing_file_is_named(path):
    with pytest.raises(FileNotFoundError, match=r'metrics\.jsonl does not exist'):
        read(path)


def events(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, round(event.value, 6)) for event in accumulator.Scalars(tag)]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    pytest.importorskip('tensorboard')
    first = TensorBoard(tmp_path)
    for step in (1, 2, 3):
        first.write(step, {'loss': float(step), 'a list, which it cannot show': [1.0, 2.0]})
    first.close()
    second = TensorBoard(tmp_path)
    second.cut(2)
    second.write(3, {'loss': 30.0})
    second.close()
    assert events(tmp_path, 'loss') == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_tensorboard_touches_nothing_before_the_first_number(tmp_path):
    TensorBoard(tmp_path / 'events').close()
    assert not (tmp_path / 'events').exists()


def test_writers_feed_all_and_none(tmp_path):
    paths = [tmp_path / 'a.jsonl', tmp_path / 'b.jsonl']
    for writers in (Writers(*map(JsonLines, paths)), Writers()):
        for step in (1, 2):
            writers.write(step, {'loss': 1.0})
        writers.flush()
        writers.cut(1)
        writers.close()
    assert [read(path) for path in paths] == [[{'step': 1, 'loss': 1.0}]] * 2


def test_asking_for_wandb_without_it_names_the_extra():
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match=r"pip install -e '\.\[wandb\]'"):
            WandB('project', name='run', config={})
    else:
        pytest.skip('wandb is installed')

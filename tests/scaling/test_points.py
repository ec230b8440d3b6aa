"""Tables of runs, ours and others'."""

import numpy as np
import pytest

from tpu_llm.config import ConfigError
from tpu_llm.scaling.points import drop_highest, hold_out, points, read

OURS = """name,parameters,tokens,flops,loss,status
a,100,1000,700000,4.0,finished
b,200,1000,1300000,3.5,finished
c,400,1000,,nan,diverged
d,400,1000,,,failed
e,800,1000,5000000,3.0,finished
f,800,1000,5000000,nan,finished
"""


@pytest.fixture
def table(tmp_path):
    path = tmp_path / 'table.csv'
    path.write_text(OURS)
    return path


def test_a_sweeps_table_is_read_by_its_own_names_and_flops_are_not_made_up(table):
    read_in = read(table)
    assert read_in.points.names == ('a', 'b', 'e')
    assert read_in.points.flops.tolist() == [700000, 1300000, 5000000]
    assert read_in.points.unique.tolist() == [1000, 1000, 1000]


def test_runs_that_failed_or_diverged_are_left_out_and_counted(table):
    assert read(table).left_out == {'diverged': 1, 'failed': 1, 'without a finite loss': 1}
    assert str(read(table)) == '3 runs (1 diverged, 1 failed, 1 without a finite loss left out)'


def test_runs_below_a_limit_are_left_out_and_counted(table):
    found = read(table, at_least={'flops': 1e6})
    assert found.points.names == ('b', 'e')
    assert found.left_out['with flops below 1e+06'] == 1
    with pytest.raises(ConfigError, match="no column 'flop' "):
        read(table, at_least={'flop': 1e6})


def test_tokens_come_from_flops_where_only_these_are_given(tmp_path):
    path = tmp_path / 'theirs.csv'
    path.write_text('Model Size,Training FLOP,loss\n2e6,1.2e15,3.5\n')
    runs = read(path, {'N': 'Model Size', 'C': 'Training FLOP'}).points
    np.testing.assert_allclose(runs.tokens, [1e8])


@pytest.mark.parametrize(
    ('text', 'columns', 'message'),
    [
        ('size,loss\n1,2\n', {}, r'no column for N and D and C .*--columns N=…,D=…,C=…; it has size, loss'),
        ('N,D\n1,2\n', {}, r'no column for loss .*--columns loss=…'),
        ('N,D,loss\n1,2,3\n', {'X': 'N'}, r"'X' is unknown"),
        ('N,D,loss\n1,2,3\n', {'N': 'Siz'}, r"no column 'Siz'"),
        ('N,D,loss\n1,2,3\n-4,2,3\n', {}, r"line 3: N is '-4'; it is a number above 0"),
        ('N,D,loss\n1,2,low\n', {}, r"runs.csv line 2: 'low' in column 'loss' is no loss"),
    ],
)
def test_what_is_missing_is_named(tmp_path, text, columns, message):
    path = tmp_path / 'runs.csv'
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read(path, columns)


def test_runs_are_kept_from_the_fit_by_flops_or_by_name():
    runs = points([1, 2, 3, 4], [10, 10, 10, 10], [4.0, 3.0, 2.0, 1.0], names='pqrs')
    fitted, held = hold_out(runs, 1)
    assert (fitted.names, held.names) == (('p', 'q', 'r'), ('s',))
    fitted, held = hold_out(runs, ['q'])
    assert (fitted.names, held.names) == (('p', 'r', 's'), ('q',))
    with pytest.raises(ConfigError, match="no finished run 'x'"):
        hold_out(runs, ['x'])
    with pytest.raises(ConfigError, match='4 runs cannot be held out of 4'):
        hold_out(runs, 4)


def test_the_highest_losses_are_dropped_and_the_order_stays():
    runs = points([1, 2, 3, 4], [1, 1, 1, 1], [4.0, 1.0, 5.0, 2.0], names='pqrs')
    assert drop_highest(runs, 2).names == ('q', 's')
    with pytest.raises(ConfigError, match='cannot be dropped from 4'):
        drop_highest(runs, 4)

"""A bar on a terminal, plain lines elsewhere, nothing on the other processes."""

import io
import re
import subprocess
import sys

import pytest
from rich.console import Console

from tpu_llm.train import progress as module
from tpu_llm.train.progress import Bar, Lines, Pace, clock, progress, short

VALUES = {'loss': 5.41234, 'tokens_per_second': 11_234.0}


@pytest.fixture(autouse=True)
def plain_surroundings(monkeypatch):
    """A real terminal is one wherever the tests run."""
    monkeypatch.delenv('COLAB_RELEASE_TAG', raising=False)
    monkeypatch.setenv('TERM', 'xterm')


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, force_jupyter=False, width=100)


def test_lines_show_the_first_and_the_last_step():
    out = console(terminal=False)
    with progress(1000, console=out) as reporter:
        for step in range(1, 1001):
            reporter.update(step, VALUES)
    lines = out.file.getvalue().splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r'\d\d:\d\d:\d\d  step 1/1,000  loss 5.412  11.2k tokens/s', lines[0])
    assert re.fullmatch(r'\d\d:\d\d:\d\d  step 1,000/1,000  loss 5.412  11.2k tokens/s  ETA 0:00', lines[1])


def test_lines_come_every_so_often(monkeypatch):
    monkeypatch.setattr(module, 'LINE_EVERY', 0.0)
    out = console(terminal=False)
    reporter = progress(10, console=out)
    for step in (1, 2, 3):
        reporter.update(step, {})
    assert [line.split()[2] for line in out.file.getvalue().splitlines()] == ['1/10', '2/10', '3/10']


def test_a_long_line_and_square_brackets_are_printed_as_they_are():
    for terminal in (False, True):
        out = console(terminal)
        with progress(10, console=out) as reporter:
            reporter.print('[bold]sample[/] ' + 'x' * 60)
        assert '[bold]sample[/] ' + 'x' * 60 in out.file.getvalue()
    out = console(terminal=False)
    progress(10, console=out).print('y' * 500)
    assert out.file.getvalue() == 'y' * 500 + '\n'


def test_status_is_a_line_or_the_bars_name():
    out = console(terminal=False)
    with progress(10, console=out) as reporter, reporter.status('compiling'):
        pass
    assert out.file.getvalue().endswith('compiling\n')
    out = console(terminal=True)
    reporter = progress(10, console=out)
    assert isinstance(reporter, Bar)
    with reporter.status('compiling'):
        out.print(reporter._progress)
        assert 'compiling' in out.file.getvalue()
    out.print(reporter._progress)
    assert 'training' in out.file.getvalue()


def test_the_bar_is_one_line_that_printing_does_not_break():
    out = console(terminal=True)
    with progress(100, start=20, console=out) as reporter:
        reporter.update(21, VALUES)
        reporter.print('held-out 1.72')
        reporter.update(22, VALUES)
    text = re.sub(r'\x1b\[[0-9;?]*[a-zA-Z]', '', out.file.getvalue())
    assert '\nheld-out 1.72\n' in text.replace('\r', '\n')
    assert '22/100  loss 5.412  11.2k tokens/s  ETA' in text
    assert '\x1b[1A' not in out.file.getvalue()  # one line: the cursor never has to move up


def test_other_processes_show_nothing(capfd):
    with progress(10, shown=False) as reporter, reporter.status('compiling'):
        reporter.update(10, VALUES)
        reporter.print('hello')
    assert capfd.readouterr() == ('', '')


PIPED = """
import sys
from tpu_llm.train.progress import progress
with progress(10) as reporter:
    reporter.print('first')
    sys.stdin.readline()
    for step in range(10):
        reporter.update(step, {})
        reporter.print('more')
print('other words')
print('done', file=sys.stderr)
"""


def test_a_run_goes_on_when_whoever_reads_it_leaves():
    pipes = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, '-c', PIPED], text=True, **pipes)
    assert process.stdout.readline() == 'first\n'
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate('go on\n')
    assert (process.returncode, err) == (0, 'done\n')


def test_colab_and_dumb_terminals_get_lines(monkeypatch):
    assert isinstance(progress(10, console=console(terminal=True)), Bar)
    monkeypatch.setenv('TERM', 'dumb')
    assert isinstance(progress(10, console=console(terminal=True)), Lines)
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.setenv('COLAB_RELEASE_TAG', 'release-colab-external')
    assert isinstance(progress(10, console=console(terminal=True)), Lines)


def test_the_time_left_follows_the_pace_after_the_first_step():
    pace = Pace(total=10)
    assert pace.remaining(1) is None
    pace._first = (1, pace._first[1] - 8.0)  # eight seconds for four steps
    assert pace.remaining(5) == pytest.approx(10.0, abs=0.1)
    assert pace.remaining(12) == 0.0


@pytest.mark.parametrize(
    ('number', 'text'),
    [
        (0, '0'),
        (812, '812'),
        (11_234, '11.2k'),
        (999_999, '1M'),
        (3.4e6, '3.4M'),
        (7e9, '7B'),
        (999_999e6, '1T'),
        (2e12, '2T'),
        (15.6e12, '15.6T'),
        (-2500, '-2.5k'),
    ],
)
def test_short(number, text):
    assert short(number) == text


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [(7, '0:07'), (201, '3:21'), (59.7, '1:00'), (3723, '1:02:03'), (2 * 86400 + 60, '2d 0:01:00')],
)
def test_clock(seconds, text):
    assert clock(seconds) == text

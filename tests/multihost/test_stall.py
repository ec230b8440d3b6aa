"""A step that takes ten times the median is told once, with the phase of each host and the stacks of its threads."""

import json
import re
import threading
import time

import pytest
from several import finish, start

from tpu_llm.parallel import board, stall
from tpu_llm.parallel.stall import Stall
from tpu_llm.train.ledger import Ledger

STEPS = 6


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A watch that is a hundred times as impatient, after six steps of a hundredth of a second."""
    monkeypatch.setattr(stall, 'SHORTEST', 0.05)
    monkeypatch.setattr(stall, 'POLL', 0.01)
    ledger, said = Ledger(), []
    watch = Stall(ledger, tmp_path, said.append)
    for step in range(STEPS):
        watch.begin(step)
        with ledger.phase('step'):
            time.sleep(0.01)
    watch.begin(STEPS)
    yield ledger, watch, said
    watch.close()


def until(condition):
    limit = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_it_is_told_once_with_the_stacks(watched, tmp_path):
    ledger, watch, said = watched
    with ledger.phase('data_wait'):
        until(lambda: said)
        time.sleep(0.3)
    (line,) = said
    found = re.fullmatch(
        r'step 6 has taken \d+ s, \d+x the median of 0\.0\d+ s: host 0 waits in data_wait; stacks are in (.*)', line
    )
    assert found, line
    (folder,) = (tmp_path / 'hosts').iterdir()
    assert found[1] == str(folder)
    text = (folder / 'stacks-0-step6.txt').read_text()
    assert text.startswith('host 0, data_wait, ')
    assert 'MainThread' in text
    assert 'in test_it_is_told_once_with_the_stacks' in text
    assert 'thread stall' not in text
    watch.begin(STEPS + 1)
    until(lambda: len(said) == 2)
    assert 'step 7 has taken' in said[1]
    assert 'host 0 waits in other code' in said[1], 'of no phase that has a name'


def test_other_phases_are_not_judged_by_the_time_of_a_step(watched):
    ledger, _, said = watched
    with ledger.phase('save'):
        time.sleep(0.4)
    assert said == []


def test_a_phase_is_judged_by_its_own_median(watched):
    ledger, watch, said = watched
    for step in range(STEPS, 2 * STEPS):
        with ledger.phase('eval'):
            time.sleep(0.01)
        watch.begin(step)
    with ledger.phase('eval'):
        until(lambda: said)
    assert said[0].startswith('eval at step 11 has taken')


def test_what_another_host_finds_is_told(watched):
    """Process 0 may itself be in a phase that is not judged."""
    ledger, _, said = watched
    with ledger.phase('save'):
        board.put('stall/found', 'step 6 has taken 7 s, 70x the median of 0.1 s')
        until(lambda: said)
    assert said[0].startswith('step 6 has taken 7 s, 70x the median of 0.1 s: host 0 waits in save; stacks are in ')


def test_nothing_is_said_of_the_first_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(stall, 'SHORTEST', 0.05)
    monkeypatch.setattr(stall, 'POLL', 0.01)
    said = []
    watch = Stall(Ledger(), tmp_path, said.append)
    for step in range(stall.KNOWN):
        watch.begin(step)
    time.sleep(0.3)
    watch.close()
    assert said == []


def test_hosts_are_grouped_by_phase_and_who_is_silent_is_named(watched, monkeypatch):
    """The answers of other hosts, as they would lie on the board."""
    ledger, _, said = watched
    monkeypatch.setattr(board, 'count', lambda: 5)
    monkeypatch.setattr(stall, 'ANSWER', 0.01)
    number = json.loads(board.get('stall') or '{"number": 0}')['number'] + 1
    for host, phase in {1: 'step', 2: 'data_wait', 3: 'step'}.items():
        board.put(f'stall/{number}/{host}', phase)
    with ledger.phase('step'):
        until(lambda: said)
    assert 'hosts 0, 1, 3 wait in step, host 2 waits in data_wait, host 4 does not answer; stacks' in said[0]


def test_it_leaves_no_thread_behind(tmp_path):
    before = threading.active_count()
    watch = Stall(Ledger(), tmp_path, print)
    assert threading.active_count() == before + 1
    watch.close()
    assert threading.active_count() == before


@pytest.mark.full
def test_of_two_hosts_the_one_that_sleeps_is_named(text, tmp_path):
    (out, _), _ = finish(start(2, tmp_path, text, stuck='1/9/10'))
    (line,) = [line for line in out.splitlines() if ' the median of ' in line]
    assert re.match(
        r'step \d+ has taken \d+ s, \d+x the median of .* s: host 0 waits in (step|save), host 1 waits in other code; ',
        line,
    )
    (folder,) = (tmp_path / 'hosts').iterdir()
    (file,) = folder.glob('stacks-1-step*.txt')
    assert 'tests/train/tiny.py' in file.read_text()
    assert 'time.sleep(seconds)' in file.read_text()

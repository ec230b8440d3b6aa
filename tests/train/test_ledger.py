"""The phases of a start add up to its wall time, and repeated steps are found and charged."""

import json
import subprocess
import sys
import time

import pytest
from rich.console import Console

from tpu_llm.train.ledger import PHASES, Ledger, load, render, summarize


def start(begin, end, **seconds):
    return {
        'start': f'2026-01-01T00:00:{begin % 60:02}.000',
        'host': 'h',
        'pid': 1,
        'token': None,
        'start_step': begin,
        'end_step': end,
        'seconds': seconds,
    }


def test_the_phases_add_up_to_the_wall_time():
    before = time.monotonic()
    ledger = Ledger()
    for name in ('init', 'compile', 'step'):
        with ledger.phase(name):
            time.sleep(0.01)
        time.sleep(0.01)
    seconds = ledger.record()['seconds']
    assert sum(seconds.values()) == pytest.approx(time.monotonic() - before, abs=5e-3)
    assert ledger.seconds() == pytest.approx(time.monotonic() - before, abs=5e-3)
    assert set(seconds) == {'init', 'compile', 'step', 'other'}
    assert seconds['other'] >= 0.03


def test_nested_time_is_charged_to_the_innermost_phase_only():
    ledger = Ledger()
    with ledger.phase('eval'):
        time.sleep(0.01)
        with ledger.phase('compile'):
            time.sleep(0.05)
        time.sleep(0.01)
    seconds = ledger.record()['seconds']
    assert seconds['compile'] >= 0.05
    assert 0.02 <= seconds['eval'] < 0.05


def test_a_phase_ends_when_its_block_raises():
    ledger = Ledger()
    with pytest.raises(KeyError), ledger.phase('save'):
        raise KeyError
    time.sleep(0.02)
    assert ledger.record()['seconds']['other'] >= 0.02


def test_an_unknown_phase_is_a_bug():
    with pytest.raises((AssertionError, TypeError), match='lunch'), Ledger().phase('lunch'):
        pass


def test_each_start_keeps_one_record(tmp_path):
    for token, (begin, end) in enumerate([(0, 50), (40, 90)]):
        ledger = Ledger(tmp_path, token=token)
        ledger.flush()  # before the step to resume from is known
        ledger.resumed(begin)
        for step in range(begin + 1, end + 1):
            ledger.finished(step)
            if step % 10 == 0:
                ledger.flush()
    records = load(tmp_path)
    assert [(r['token'], r['start_step'], r['end_step']) for r in records] == [(0, 0, 50), (1, 40, 90)]
    assert summarize(records).lost_steps == 10
    assert [file.name for file in tmp_path.iterdir()] == ['ledger.jsonl']


def test_a_killed_start_keeps_what_it_flushed(tmp_path):
    program = (
        'import os, signal, sys\n'
        'from tpu_llm.train.ledger import Ledger\n'
        'ledger = Ledger(sys.argv[1], token=3)\n'
        'ledger.resumed(5)\n'
        'ledger.finished(9)\n'
        'ledger.flush()\n'
        'ledger.finished(10)\n'
        'os.kill(os.getpid(), signal.SIGKILL)\n'
    )
    assert subprocess.run([sys.executable, '-c', program, tmp_path]).returncode == -9
    (record,) = load(tmp_path)
    assert (record['start_step'], record['end_step'], record['token']) == (5, 9, 3)


def test_lost_steps_are_charged_at_the_step_time_of_the_start_that_lost_them():
    summary = summarize([start(0, 100, step=50.0, compile=10.0), start(80, 120, step=40.0)])
    assert summary.lost_steps == 20
    assert summary.seconds['lost'] == pytest.approx(20 * 0.5)
    assert summary.seconds['step'] == pytest.approx(80 * 0.5 + 40.0)
    assert summary.wall == pytest.approx(100.0)
    assert summary.goodput == pytest.approx(0.8)


@pytest.mark.parametrize(
    ('starts', 'lost'),
    [
        ([(0, 100), (100, 150)], 0),
        ([(0, 100), (50, 70), (50, 120)], 50 + 20),  # the second start's own steps are lost as well
        ([(0, 100), (100, 150), (60, 160)], 40 + 50),  # the checkpoint at 100 turned out corrupt
        ([(0, 30), (0, 30), (0, 30)], 60),  # no checkpoint was ever written
        ([(0, 50), (None, None), (50, 60)], 0),  # killed before it had restored anything
        ([(0, 0)], 0),
        ([], 0),
    ],
)
def test_a_step_counts_once_however_often_it_was_done(starts, lost):
    records = [start(b, e, step=float(e - b)) if b is not None else UNBORN for b, e in starts]
    summary = summarize(records)
    assert summary.lost_steps == lost
    done = [(b, e) for b, e in starts if b is not None]
    assert sum(e - b for b, e in done) - summary.lost_steps == (done[-1][1] if done else 0)
    assert summary.seconds['lost'] == pytest.approx(lost)


UNBORN = start(0, 0, init=1.0) | {'start_step': None, 'end_step': None}


def test_the_table_names_every_phase_and_the_goodput():
    console = Console(width=100, record=True, file=open('/dev/null', 'w'))  # noqa: SIM115
    console.print(render([start(0, 10, step=6.0, save=2.0), UNBORN, start(5, 10, step=4.0, eval=7.0)]))
    text = console.export_text()
    assert all(phase in text for phase in PHASES)
    assert 'goodput 35.0%' in text
    assert '10 steps, 5 done twice' in text


def command(*args):
    return subprocess.run(
        [sys.executable, '-X', 'importtime', '-m', 'tpu_llm.train', *args], capture_output=True, text=True
    )


def test_the_command_prints_the_table_without_importing_jax(tmp_path):
    (tmp_path / 'ledger.jsonl').write_text(json.dumps(start(0, 10, step=5.0, eval=5.0)) + '\n')
    done = command('ledger', str(tmp_path))
    assert done.returncode == 0
    assert 'goodput 50.0%' in done.stdout
    assert ' jax' not in done.stderr


def test_the_command_names_a_folder_that_is_no_run(tmp_path):
    done = command('ledger', str(tmp_path))
    assert done.returncode == 2
    assert 'error: ' in done.stderr.splitlines()[-1]
    assert 'ledger.jsonl does not exist' in done.stderr.splitlines()[-1]

"""Kills: whatever ends a run, the same command continues it, and it ends bitwise where an unbroken run does.

Each start is a real process of `launch/run.py`.
"""

import os
import pathlib
import queue
import random
import signal
import subprocess
import sys
import time
from contextlib import closing

import numpy as np
import pytest

from tpu_llm.checkpoint import reader, tensors
from tpu_llm.parallel.preemption import Preemption
from tpu_llm.train import metrics

ROOT = pathlib.Path(__file__).parents[2]
TINY = pathlib.Path(__file__).parent / 'tiny.py'
STEPS = 40


def start(workdir, text, *flags, pause=0.05):
    command = [sys.executable, ROOT / 'launch/run.py', f'--config={TINY}:text={text},steps={STEPS},pause={pause}']
    env = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True, 'env': env}
    flags = (f'--workdir={workdir}', '--config.checkpoints.best=bits_per_byte', *flags)
    return subprocess.Popen([*map(str, command), *flags], **pipes, start_new_session=True)


def finish(workdir, text, *flags, pause=0.0):
    process = start(workdir, text, *flags, pause=pause)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def logged(workdir):
    path = workdir / 'metrics.jsonl'
    lines = metrics.read(path) if path.exists() else []
    return [{k: v for k, v in line.items() if k != 'tokens_per_second'} for line in lines]


def wait_for_step(workdir, step, process):
    while not any(line['step'] >= step for line in logged(workdir)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def final(workdir):
    """Every tensor of the newest checkpoint, as NumPy."""
    checkpoint = reader.find(workdir)
    assert checkpoint.step == STEPS
    return {name: tensors.read_to_host(checkpoint.folder, name) for name in checkpoint.manifest()['tensors']}


@pytest.fixture(scope='module')
def unbroken(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('unbroken')
    code, _, err = finish(workdir, text)
    assert code == 0, err
    return final(workdir), logged(workdir)


def assert_ends_like(unbroken, workdir):
    arrays, lines = unbroken
    assert logged(workdir) == lines
    got = final(workdir)
    assert got.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


@pytest.mark.parametrize('kills', [2, pytest.param(20, marks=pytest.mark.full)])
def test_killed_at_random_moments(unbroken, text, tmp_path, kills):
    """SIGKILL in a step, a save, an evaluation: moments are drawn from a window that spans several of each."""
    rng = random.Random(kills)
    for _ in range(kills):
        process = start(tmp_path, text)
        done = max((line['step'] for line in logged(tmp_path)), default=0)
        wait_for_step(tmp_path, min(done - done % 3 + 1, STEPS - 2), process)
        time.sleep(rng.uniform(0.0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    code, _, err = finish(tmp_path, text)
    assert code == 0, err
    assert_ends_like(unbroken, tmp_path)


@pytest.fixture
def hears_ctrl_c():
    """Where tests run in the background it is ignored, by the processes that they start as well."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures('hears_ctrl_c')
@pytest.mark.parametrize(
    ('sent', 'status', 'cause'), [(signal.SIGTERM, 0, 'preempted'), (signal.SIGINT, 130, 'interrupted')]
)
def test_a_signal_saves_and_stops(unbroken, text, tmp_path, sent, status, cause):
    process = start(tmp_path, text, '--config.data.workers=2', pause=0.2)
    wait_for_step(tmp_path, 7, process)
    os.killpg(process.pid, sent) if sent == signal.SIGINT else process.send_signal(sent)  # as a terminal does
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    saved = reader.find(tmp_path).step
    assert ('press Ctrl-C again to stop at once' in out) == (sent == signal.SIGINT)
    assert err.replace('error: interrupted; the same command continues from the last checkpoint\n', '') == ''
    assert f'{cause}: saved at step {saved}/{STEPS}; the same command continues' in out
    assert saved >= 7
    assert saved == logged(tmp_path)[-1]['step']
    code, out, err = finish(tmp_path, text)
    assert code == 0, err
    assert f'continuing at step {saved}' in out
    assert_ends_like(unbroken, tmp_path)


@pytest.mark.usefixtures('hears_ctrl_c')
def test_ctrl_c_stops_at_once_where_nothing_is_to_be_saved_and_the_second_time():
    said = queue.Queue()
    with closing(Preemption(said.put)) as preemption:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert not preemption.at(3)
        signal.raise_signal(signal.SIGINT)
        assert said.get(timeout=10) == 'interrupted: saving at step 4; press Ctrl-C again to stop at once'
        assert preemption.at(4)
        assert preemption.cause == 'interrupted'
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_start_takes_over(unbroken, text, tmp_path):
    """Two runs in one workdir: the older one stops with one line, the newer one ends as if alone."""
    older = start(tmp_path, text, pause=0.3)
    wait_for_step(tmp_path, 4, older)
    code, _, err = finish(tmp_path, text)
    out, older_err = older.communicate(timeout=60)
    assert code == 0, err
    assert older.returncode == 2, out
    assert older_err.count('error:') == 1
    assert 'a newer run took over' in older_err
    assert 'Traceback' not in older_err
    assert_ends_like(unbroken, tmp_path)

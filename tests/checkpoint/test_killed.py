"""SIGKILL at random moments of saving: what was committed is whole, and what was not is not there."""

import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import saver

from tpu_llm.checkpoint import reader


def kill_some_time(workdir, random_seconds: float) -> tuple[int, int]:
    """Starts a run, kills it while it saves; gives the step it started from and the last it committed."""
    command = [sys.executable, str(pathlib.Path(saver.__file__)), str(workdir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        first, _ = (int(run.stdout.readline()) for _ in range(2))
        time.sleep(random_seconds)
        run.send_signal(signal.SIGKILL)
        committed = run.stdout.read().split('\n')[:-1]
    return first, int(committed[-1]) if committed else first + 1


@pytest.mark.parametrize('kills', [3, pytest.param(20, marks=pytest.mark.full)])
def test_killed_while_saving(tmp_path, kills):
    rng = random.Random(0)
    whole = 0
    for _ in range(kills):
        first, last = kill_some_time(tmp_path, rng.uniform(0.0, 0.2))
        assert first == whole, 'each start goes on from the newest whole checkpoint'
        newest = reader.find(tmp_path)
        assert newest.step in (last, last + 1), 'nothing that was committed is lost'
        whole = newest.step
        restored = reader.load(newest, saver.like())
        for array in restored.arrays['params'].values():
            np.testing.assert_array_equal(array, whole)
    assert whole >= kills

"""A sweep on Ray: a real one, started on this machine for the test."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('ray', reason="needs Ray: pip install -e '.[ray]'")
pytestmark = pytest.mark.full  # starting Ray takes longer than all else of sweeps

ROOT = Path(__file__).parents[2]


def test_runs_are_tasks_and_what_dies_is_tried_again(tmp_path):
    command = [
        sys.executable,
        str(ROOT / 'launch/sweep.py'),
        f'--config={ROOT}/tests/scaling/toy_sweep.py:ends=well+diverged+killed once+killed,rates=1',
        f'--workdir={tmp_path}/sweep',
        '--ray=local',
        '--each=CPU=1',
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {'JAX_PLATFORMS': 'cpu'}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    rows = {row['config.ends']: row for row in csv.DictReader((tmp_path / 'sweep/table.csv').open())}
    assert {ends: (row['status'], row['tries']) for ends, row in rows.items()} == {
        'well': ('finished', '1'),
        'diverged': ('diverged', '1'),
        'killed once': ('finished', '2'),
        'killed': ('failed', '2'),
    }
    assert rows['killed']['reason'] == 'its process ended with exit -9'
    assert 'diverged begins' in (tmp_path / 'sweep/runs/ends=diverged,rate=1.0/log.txt').read_text()

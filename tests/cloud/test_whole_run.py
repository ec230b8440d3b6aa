"""A whole run whose workdir is a bucket: killed by SIGKILL, continued, and its final loss that of a local one."""

import os
import pathlib
import signal
import subprocess
import sys
import time

from etils import epath

from tpu_llm.checkpoint import reader
from tpu_llm.train.metrics import read

ROOT = pathlib.Path(__file__).parents[2]
TINY = ROOT / 'tests/train/tiny.py'


def start(workdir, text, pause=0.0):
    config = f'--config={TINY}:text={text},steps=12,pause={pause}'
    command = [sys.executable, str(ROOT / 'launch/run.py'), config, f'--workdir={workdir}']
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))


def finish(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, f'{out}\n{err}'
    return out


def test_killed_and_continued_in_a_bucket(bucket, tmp_path):
    text = tmp_path / 'text'
    text.mkdir()
    for i in range(4):
        (text / f'{i}.txt').write_text('\n'.join(f'{i} times {n} is {i * n}.' for n in range(40)))
    finish(start(tmp_path / 'local', text))

    workdir = f'{bucket}/run'
    process = start(workdir, text, pause=0.5)
    while reader.find(workdir) is None:
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()

    assert 'continuing at step' in finish(start(workdir, text))
    local, remote = (read(path / 'metrics.jsonl') for path in (tmp_path / 'local', epath.Path(workdir)))
    kept = ('step', 'loss', 'grad_norm', 'bits_per_byte')
    assert [{k: line.get(k) for k in kept} for line in remote] == [{k: line.get(k) for k in kept} for line in local]
    assert (epath.Path(workdir) / 'summary.json').exists()

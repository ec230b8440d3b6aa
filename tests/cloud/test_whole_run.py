"""A whole run whose workdir is a bucket: whatever ends or delays it, its final loss is that of a local run."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from tpu_llm.checkpoint import cloud, reader
from tpu_llm.train.metrics import read

ROOT = pathlib.Path(__file__).parents[2]
TINY = ROOT / 'tests/train/tiny.py'
# The entry with little patience: one second in all, and moments where gcsfs itself waits between its tries.
HASTY = """
import runpy, sys
import gcsfs.retry
from tpu_llm.checkpoint import cloud
cloud.PATIENCE_SECONDS = 1.0
gcsfs.retry.min = lambda *_: 0.05
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def start(workdir, text, pause=0.0, python=()):
    config = f'--config={TINY}:text={text},steps=12,pause={pause}'
    command = [sys.executable, *python, str(ROOT / 'launch/run.py'), config, f'--workdir={workdir}']
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))


def finish(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, f'{out}\n{err}'
    assert 'Traceback' not in err
    return out


def wait_for(gcs, bucket, name, process):
    """Until the run has such an object, by the server's own folder, which no outage hides."""
    while not any((gcs.root / bucket.removeprefix('gs://') / 'run').glob(name)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def logged(workdir):
    kept = ('step', 'loss', 'grad_norm', 'bits_per_byte')
    return [{name: line.get(name) for name in kept} for line in read(epath.Path(workdir) / 'metrics.jsonl')]


@pytest.fixture(scope='module')
def local(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('local')
    finish(start(workdir, text))
    return logged(workdir)


def test_killed_then_delayed_in_a_bucket(local, gcs, bucket, text):
    """SIGKILL ends the first start; to the second the store answers 503 for a while, beginning during a save."""
    workdir = f'{bucket}/run'
    process = start(workdir, text, pause=0.3)
    wait_for(gcs, bucket, 'checkpoints/*/COMMIT.json', process)
    process.send_signal(signal.SIGKILL)
    process.communicate()

    process = start(workdir, text)
    wait_for(gcs, bucket, 'checkpoints/*.0002-*', process)
    gcs.fail_for(1)
    assert 'continuing at step' in finish(process)
    assert gcs.refused > 0
    assert logged(workdir) == local
    assert (epath.Path(workdir) / 'summary.json').exists()
    assert [checkpoint.step for checkpoint in reader.committed(epath.Path(workdir))] == [12, 9]


@pytest.mark.full
def test_a_bucket_that_stays_away(local, gcs, bucket, text):
    """The run ends with one line once its patience does; when the bucket is back, the same command goes on."""
    workdir = f'{bucket}/run'
    process = start(workdir, text, pause=0.5, python=('-c', HASTY))
    wait_for(gcs, bucket, 'checkpoints/00000003.*/COMMIT.json', process)
    gcs.fail_for(1000)
    try:
        out, err = process.communicate(timeout=200)
    finally:
        gcs.fail_for(0)
    assert process.returncode == 2, f'{out}\n{err}'
    assert 'Traceback' not in err
    (said,) = [line for line in err.splitlines() if line.startswith('error:')]
    assert said.startswith('error: gs://bucket')
    assert said.endswith('(Service Unavailable, 503); start again when it is back')

    assert 'continuing at step' in finish(start(workdir, text))
    assert logged(workdir) == local


@pytest.mark.parametrize(
    ('path', 'args', 'place'),
    [
        ('b/{}/o/{}', ('bucket', 'run/COMMIT.json'), 'gs://bucket/run/COMMIT.json'),
        ('b/{}/o', ('bucket',), 'gs://bucket'),
        ('http://host/upload/storage/v1/b/bucket/o', (), 'gs://bucket'),
        ('http://host/upload/storage/v1/b/bucket/o?name=run%2Fmetrics.jsonl', (), 'gs://bucket/run/metrics.jsonl'),
    ],
)
def test_a_message_names_the_place_of_each_kind_of_request(path, args, place):
    assert cloud._place(path, *args) == place

"""Storage that breaks under a real run: one line says what and where, and the same command goes on from what is whole.

What becomes of each kind of damage is proven in tests/checkpoint; here it is met by `launch/run.py`. Two runs in one
workdir, and kills, are in tests/train/test_interrupted.py; a bucket that goes away is in tests/cloud/test_outage.py.
"""

import contextlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from entry import ROOT, one_line

from tpu_llm.checkpoint import reader, tensors
from tpu_llm.train import metrics

TINY = ROOT / 'tests/train/tiny.py'  # saves every 3 of 12 steps and keeps the newest 2, near 1 MB each


@pytest.fixture(scope='module')
def config(text):
    return f'--config={TINY}:text={text}'


@pytest.fixture(scope='module')
def unbroken(entry, config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('storage') / 'unbroken'
    assert entry(config, f'--workdir={workdir}') == 0
    return workdir


def final(workdir):
    """Every tensor of the newest whole checkpoint, and every logged line."""
    checkpoint = reader.find(workdir)
    arrays = {name: tensors.read_to_host(checkpoint.folder, name) for name in checkpoint.manifest()['tensors']}
    lines = metrics.read(workdir / 'metrics.jsonl')
    return arrays, [{k: v for k, v in line.items() if k != 'tokens_per_second'} for line in lines]


def assert_ends_like(unbroken, workdir):
    (arrays, lines), (expected_arrays, expected_lines) = final(workdir), final(unbroken)
    assert lines == expected_lines
    assert arrays.keys() == expected_arrays.keys()
    for name, array in expected_arrays.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)


def steps(workdir):
    return [checkpoint.step for checkpoint in reader.committed(workdir)]


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


# --------------------------------------------------------------------------------------------------- full disks


@contextlib.contextmanager
def mounted(folder, *options):
    """The folder with something mounted on it; skips where mounting is refused."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(['mount', *options, folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f'mounting is refused here: {done.stderr.strip()}')
    try:
        yield folder
    finally:
        subprocess.run(['umount', '--lazy', folder], check=True)


def start(*args):
    """The entry in a process of its own, on as many devices as this one has."""
    environment = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
    command = [sys.executable, ROOT / 'launch/run.py', *args]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def fill(disk, left):
    """A file that takes all of a disk but some bytes."""
    room = os.statvfs(disk)
    (disk / 'filler').write_bytes(bytes(room.f_bavail * room.f_frsize - left))


@pytest.mark.parametrize(
    'whole', [[], pytest.param([3], marks=pytest.mark.full)], ids=['the first save', 'a later save']
)
def test_a_disk_that_a_save_fills(entry, config, unbroken, tmp_path, whole, capsys):
    with mounted(tmp_path / 'disk', '-t', 'tmpfs', '-o', 'size=8m', 'tmpfs') as disk:
        workdir = disk / 'run'
        failed = 6 if whole else 3
        if not whole:
            fill(disk, left=300_000)
        with start(f'{config},pause={1.0 if whole else 0.0}', f'--workdir={workdir}') as running:
            if whole:
                until = time.monotonic() + 120
                while steps(workdir) != whole:
                    assert running.poll() is None
                    assert time.monotonic() < until
                    time.sleep(0.02)
                fill(disk, left=300_000)
            _, said = running.communicate(timeout=120)
        assert running.returncode == 2
        # The save fills the disk; whichever writes next, the save or the run's own files, is the first to notice.
        assert re.fullmatch(
            rf'{re.escape(str(workdir))}: the checkpoint of step {failed} was not saved: No space left on device; '
            'mend that and start again: those before it are untouched'
            rf'|{re.escape(str(workdir))}\S*: No space left on device; '
            'free some, and the same command goes on from the last checkpoint',
            one_line(said),
        )
        assert steps(workdir) == whole

        (disk / 'filler').unlink()
        assert entry(config, f'--workdir={workdir}') == 0
        assert (f'continuing at step {failed - 3}' if whole else 'from scratch') in capsys.readouterr().out
        assert_ends_like(unbroken, workdir)


@pytest.mark.parametrize(
    ('filled', 'flags', 'said'),
    [
        (4, [], 'run cannot be written (No space left on device); give another --workdir'),
        (0, [], 'run: No space left on device; free some, and the same command goes on from the last checkpoint'),
        (0, ['--config.data.cache=cache'], 'run/cache/'),
    ],
    ids=['nothing fits', 'the config does not fit', 'the cache does not fit'],
)
def test_a_disk_that_is_full_before_the_first_step(mistake, config, tmp_path, filled, flags, said):
    with mounted(tmp_path / 'disk', '-t', 'tmpfs', '-o', 'size=4k', 'tmpfs') as disk:
        (disk / 'filler').write_bytes(bytes(filled << 10))
        message = mistake(config, f'--workdir={disk}/run', *flags)
        assert message.startswith(f'{disk}/{said}')
        assert 'No space left on device' in message


def test_a_disk_that_the_metrics_fill(config, tmp_path):
    """In a process of its own, since what is still unwritten is tried again when it ends."""
    with mounted(tmp_path / 'disk', '-t', 'tmpfs', '-o', 'size=8k', 'tmpfs') as disk:
        with start(config, f'--workdir={disk}/run') as running:
            _, said = running.communicate(timeout=120)
        assert running.returncode == 2
        assert one_line(said).startswith(f'{disk}/run: No space left on device; free some, and the same command')


def test_a_workdir_that_is_read_only(mistake, config, unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / 'disk/run')
    before = contents(tmp_path / 'disk')
    with mounted(tmp_path / 'disk', '--bind', tmp_path / 'disk') as disk:
        subprocess.run(['mount', '-o', 'remount,bind,ro', disk], check=True)
        for name in ('run', 'new'):
            said = mistake(config, f'--workdir={disk}/{name}')
            assert said == f'{disk}/{name} cannot be written (Read-only file system); give another --workdir'
    assert contents(tmp_path / 'disk') == before


# --------------------------------------------------------------------------------------------------- bad files


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {'flip': flip, 'truncate': truncate, 'remove': pathlib.Path.unlink}


def test_damaged_checkpoints_are_passed_over(entry, config, unbroken, tmp_path, caplog, capsys):
    """Every file of a checkpoint flipped and truncated in turn, and its commit mark missing: a copy of it for each."""
    workdir = tmp_path / 'run'
    shutil.copytree(unbroken, workdir)
    (newest,) = (workdir / 'checkpoints').glob('00000012.*')
    names = sorted(path.relative_to(newest) for path in newest.rglob('*') if path.is_file())
    assert len(names) >= 12
    damages = [(kind, name) for kind in ('flip', 'truncate') for name in names]
    damages.append(('remove', pathlib.Path('COMMIT.json')))
    for start, (kind, name) in enumerate(damages, 2):  # as if each were of a later start
        copy = newest.with_name(f'00000012.{start:04d}-000000')
        shutil.copytree(newest, copy)
        DAMAGE[kind](copy / name)
        (workdir / 'fence' / f'{start:04d}-000000.json').write_text('{}')
    shutil.rmtree(newest)

    assert entry(config, f'--workdir={workdir}') == 0
    said = [record.getMessage() for record in caplog.records if record.name == 'tpu_llm.checkpoint']
    for line, (start, (_, name)) in zip(said, reversed(list(enumerate(damages, 2))), strict=True):
        assert line.startswith(f'passing over {newest.parent}/00000012.{start:04d}-000000: {name} '), line
    assert f'continuing at step 9 from {newest.parent}/00000009.' in capsys.readouterr().out
    assert_ends_like(unbroken, workdir)


def test_no_whole_checkpoint_stops_the_run_and_removes_nothing(mistake, config, unbroken, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(unbroken, workdir)
    for folder in (workdir / 'checkpoints').iterdir():
        flip(folder / 'manifest.json')
    before = contents(workdir / 'checkpoints')
    said = mistake(config, f'--workdir={workdir}')
    assert f'no checkpoint in {workdir}/checkpoints is whole (00000012.' in said
    assert said.endswith('; bring one back, or remove that folder to start from scratch')
    assert contents(workdir / 'checkpoints') == before

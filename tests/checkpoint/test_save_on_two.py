"""Two real processes save and restore one state; then one process alone, onto another mesh."""

import json
import pathlib
import re
import socket
import subprocess
import sys

import pair_worker
import pytest


def run(workdir: pathlib.Path, processes: int, steps: tuple[int, ...] = (), blocked: int = -1) -> list[dict]:
    """What each process has to say."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    job = json.dumps({'workdir': str(workdir), 'steps': steps, 'blocked': blocked})
    command = [sys.executable, str(pair_worker.__file__), str(port), str(processes)]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    workers = [subprocess.Popen([*command, str(i), job], **pipes) for i in range(processes)]
    try:
        outputs = [worker.communicate(timeout=90) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * processes, outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.fixture(scope='module')
def saved(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp('two')
    first, second = run(workdir, 2, steps=(1, 2, 3))
    assert first == second == {'token': first['token'], 'errors': [], 'steps': [2, 3]}
    return workdir


def test_each_process_sums_its_own_files(saved):
    (folder,) = (saved / 'checkpoints').glob('00000003.*')
    sums = [json.loads((folder / f'checksums-{i}.json').read_text()) for i in range(2)]
    assert not set(sums[0]) & set(sums[1])
    for process in range(2):
        assert f'data/lanes-{process}.npz' in sums[process]
        assert f'arrays/ocdbt.process_{process}/manifest.ocdbt' in sums[process]
    assert all(re.search(r'process_1|lanes-1', name) for name in sums[1])
    marks = {'COMMIT.json', 'checksums-0.json', 'checksums-1.json'}
    there = {str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()}
    assert set(sums[0]) | set(sums[1]) | marks == there


@pytest.mark.parametrize('processes', [1, 2])
def test_restores_on(saved, processes):
    for said in run(saved, processes):
        assert (said['step'], said['equal']) == (3, True)
        assert said['lanes'] == {'lane': [0, 1, 2, 3, 4], 'document': [3, 13, 23, 33, 43]}


def test_damage_is_heard_by_all(saved, tmp_path):
    """Only one of the two processes reads the damaged file."""
    (folder,) = (saved / 'checkpoints').glob('00000003.*')
    lanes = folder / 'data' / 'lanes-1.npz'
    whole = lanes.read_bytes()
    lanes.write_bytes(whole[:-1])
    assert [said['step'] for said in run(saved, 2)] == [2, 2]
    lanes.write_bytes(whole)


def test_what_fails_on_one_process_is_said_by_both_and_not_committed(saved):
    for said in run(saved, 2, steps=(4, 5, 4), blocked=4):
        (error,) = said['errors']
        assert 'the checkpoint of step 4 was not saved: ' in error
        assert 'Is a directory' in error
        assert said['steps'] == [4, 5], 'saved when tried again'

"""Several hosts, as real processes of `launch/run.py` joined by jax.distributed on loopback."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tpu_llm.checkpoint import reader, tensors
from tpu_llm.train import metrics

ROOT = pathlib.Path(__file__).parents[2]
TINY = ROOT / 'tests/train/tiny.py'
STEPS = 12


@pytest.fixture(scope='module')
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp('text')
    for i in range(6):
        lines = [f'{i} times {n} is {i * n}, and the next is {i * n + i}.' for n in range(10 + 7 * i)]
        (folder / f'{i}.txt').write_text('\n'.join(lines))
    return folder


def free_port():
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]


def start(hosts, workdir, text, *flags, pause=0.0):
    """One process a host, each with 4 / hosts devices: the mesh is the same whatever the number of hosts."""
    config = f'--config={TINY}:text={text},steps={STEPS},pause={pause}'
    command = [sys.executable, str(ROOT / 'launch/run.py'), config, f'--workdir={workdir}', *flags]
    address = f'127.0.0.1:{free_port()}'
    processes = []
    for index in range(hosts):
        env = os.environ | {
            'JAX_PLATFORMS': 'cpu',
            'XLA_FLAGS': f'--xla_force_host_platform_device_count={4 // hosts}',
            'JAX_COORDINATOR_ADDRESS': address,
            'JAX_NUM_PROCESSES': str(hosts),
            'JAX_PROCESS_ID': str(index),
        }
        pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True, 'env': env}
        processes.append(subprocess.Popen(command, **pipes))
    return processes


def finish(processes, seconds=240):
    ends = [process.communicate(timeout=seconds) for process in processes]
    for process, (out, err) in zip(processes, ends, strict=True):
        assert process.returncode == 0, f'{out}\n{err}'
    return ends


def final(workdir):
    checkpoint = reader.find(workdir)
    assert checkpoint.step == STEPS
    return {name: tensors.read_to_host(checkpoint.folder, name) for name in checkpoint.manifest()['tensors']}


def losses(workdir):
    return {line['step']: line['loss'] for line in metrics.read(workdir / 'metrics.jsonl') if 'loss' in line}


def wait_for_step(workdir, step, processes):
    path = workdir / 'metrics.jsonl'
    while not (path.exists() and any(line['step'] >= step for line in metrics.read(path))):
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        time.sleep(0.05)


@pytest.fixture(scope='module')
def one_host(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('one')
    finish(start(1, workdir, text))
    return final(workdir), losses(workdir)


def assert_close_to(one_host, workdir):
    """Reductions over hosts add in another order: float32 rounding, and no more, may differ."""
    arrays, curve = one_host
    got = losses(workdir)
    assert got.keys() == curve.keys()
    np.testing.assert_allclose(list(got.values()), list(curve.values()), rtol=1e-4)
    for name, array in final(workdir).items():
        np.testing.assert_allclose(array, arrays[name], rtol=2e-2, atol=2e-4, err_msg=name)


def test_two_hosts_train_like_one(one_host, text, tmp_path):
    ends = finish(start(2, tmp_path, text))
    assert_close_to(one_host, tmp_path)
    printed = [line for line in ends[1][0].splitlines() if 'Gloo' not in line]
    assert printed == [], 'only the first host prints'


def test_preempting_one_host_stops_both_at_one_step(one_host, text, tmp_path):
    processes = start(2, tmp_path, text, pause=0.5)
    wait_for_step(tmp_path, 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    ends = finish(processes)
    assert 'preempted' in ends[0][0]
    assert 3 <= reader.find(tmp_path).step < STEPS
    finish(start(2, tmp_path, text))
    assert_close_to(one_host, tmp_path)


@pytest.mark.full
def test_killing_one_of_four_then_going_on_with_two(one_host, text, tmp_path):
    processes = start(4, tmp_path, text, pause=0.5)
    wait_for_step(tmp_path, 5, processes)
    processes[2].send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate(timeout=240)
        assert process.returncode != 0
    saved = reader.find(tmp_path).step
    assert saved >= 3
    finish(start(2, tmp_path, text))
    assert_close_to(one_host, tmp_path)

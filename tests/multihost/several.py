"""Several hosts, as real processes of `launch/run.py` joined by jax.distributed on loopback."""

import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import numpy as np

from tpu_llm.checkpoint import reader, tensors
from tpu_llm.train import metrics

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 12
# Gloo's threads write '[Gloo] Rank 0 is connected to 1 peer ranks…' to the same stream a piece at a time.
GLOO = re.compile(r'Gloo|connected|^[\d\s]*$')


def free_port():
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]


def launch(commands, devices=4, **more):
    """One process a host, together with `devices` devices, so that the mesh is the same for any number of hosts."""
    address, processes = f'127.0.0.1:{free_port()}', []
    for index, command in enumerate(commands):
        env = os.environ | {
            'JAX_PLATFORMS': 'cpu',
            'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices // len(commands)}',
            'JAX_COORDINATOR_ADDRESS': address,
            'JAX_NUM_PROCESSES': str(len(commands)),
            'JAX_PROCESS_ID': str(index),
            'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',  # compiles in half the time
        }
        env |= {name: value.format(index) for name, value in more.items()}
        pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True, 'env': env}
        processes.append(subprocess.Popen([*map(str, command)], **pipes))
    return processes


def run(workdir, text, *flags, page='tests/train/tiny.py', **arg):
    """The command that starts one host."""
    said = ','.join(f'{name}={value}' for name, value in ({'text': text, 'steps': STEPS} | arg).items())
    return [sys.executable, ROOT / 'launch/run.py', f'--config={ROOT / page}:{said}', f'--workdir={workdir}', *flags]


def start(hosts, workdir, text, *flags, **arg):
    return launch([run(workdir, text, *flags, **arg)] * hosts)


def ends(processes, seconds=240):
    return [process.communicate(timeout=seconds) for process in processes]


def finish(processes):
    said = ends(processes)
    for process, (out, err) in zip(processes, said, strict=True):
        assert process.returncode == 0, f'{out}\n{err}'
    return said


def wait_for_step(workdir, step, processes):
    path = workdir / 'metrics.jsonl'
    while not (path.exists() and any(line['step'] >= step for line in metrics.read(path))):
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        time.sleep(0.05)


def final(workdir):
    checkpoint = reader.find(workdir)
    assert checkpoint.step == STEPS
    return {name: tensors.read_to_host(checkpoint.folder, name) for name in checkpoint.manifest()['tensors']}


def losses(workdir):
    return {line['step']: line['loss'] for line in metrics.read(workdir / 'metrics.jsonl') if 'loss' in line}


def assert_close(workdir, one):
    """Reductions over hosts add in another order: float32 rounding, and no more, may differ from the run `one`."""
    got, want = losses(workdir), losses(one)
    assert got.keys() == want.keys()
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-4)
    arrays = final(one)
    for name, array in final(workdir).items():
        np.testing.assert_allclose(array, arrays[name], rtol=2e-2, atol=2e-4, err_msg=name)

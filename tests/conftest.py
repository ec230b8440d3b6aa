"""Every test runs on 8 CPU devices, with shapes and types checked at run time, and no silent broadcasting of ranks.

JAX_PLATFORMS and XLA_FLAGS win where they are set. Compiled programs are kept in JAX_COMPILATION_CACHE_DIR, by default
`.jax_cache/` of this checkout, for later tests, later runs and the processes that tests start.
"""

import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(pathlib.Path(__file__).parents[1] / '.jax_cache'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')

import jax
import pytest
from jaxtyping import install_import_hook

# Not through XLA_FLAGS: processes that tests start would inherit it.
if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')

# Before the first import of the library, so it is here and not in a fixture.
install_import_hook('tpu_llm', 'typecheck.check')


@pytest.fixture(scope='module')
def quick_compile():
    """Compiles in half the time, to slower code; not for what claims equal bits of production's programs."""
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='session')
def text(tmp_path_factory):
    """A folder of small documents, ours: bytes of every kind of line."""
    folder = tmp_path_factory.mktemp('text')
    for i in range(6):
        lines = [f'{i} times {n} is {i * n}, and the next is {i * n + i}.' for n in range(10 + 7 * i)]
        (folder / f'{i}.txt').write_text('\n'.join(lines))
    return folder

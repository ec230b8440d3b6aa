"""The C heap of a process whose only device is the CPU: kept between steps instead of handed back to the kernel.

XLA:CPU allocates the temporaries of a step (hundreds of MB) afresh for every step. By default glibc maps and unmaps
them each time, and a step of the benchmark model then spends an eighth of its time in page faults.
"""

import ctypes
import importlib.util
import os

# Names from malloc.h, which Python has no binding for.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
_PLUGINS = ('libtpu', 'jax_plugins', 'jax_cuda12_plugin', 'jax_cuda13_plugin')


def keep() -> bool:
    """Makes glibc keep what it has, if this process can have no accelerator. Returns whether it did.

    Call it before anything starts threads (NumPy does when it is imported): an arena once made stays in use, and all
    but the first cannot grow past 64 MB and fall back to mapping. One arena for all threads is no loss on a CPU run;
    the many threads that feed an accelerator would contend for it.
    """
    alone = os.environ.get('JAX_PLATFORMS') == 'cpu' or not any(map(importlib.util.find_spec, _PLUGINS))
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)  # glibc only
    if not alone or mallopt is None:
        return False
    return all(mallopt(*setting) for setting in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)))

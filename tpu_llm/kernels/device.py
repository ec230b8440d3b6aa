"""Which device a program is traced for: one of the layout in use, or the first that JAX sees.

A layout may lie on TPUs that are not there: programs for a pod compile on a laptop.
"""

from typing import Any

import jax

from tpu_llm.parallel import sharding


def traced_for() -> Any:
    layout = sharding.current()
    return jax.devices()[0] if layout is None else layout.mesh.devices.flat[0]


def on_tpu() -> bool:
    return traced_for().platform == 'tpu'

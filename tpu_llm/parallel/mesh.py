"""The mesh: the same six axes for every run, slow network to fast."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

from tpu_llm.config import ConfigError, machine

AXES = ('stage', 'data', 'fsdp', 'expert', 'seq', 'tensor')


@dataclasses.dataclass(kw_only=True, slots=True)
class Mesh:
    """Devices along each axis; at most one axis may be -1, which takes all the devices that are left."""

    stage: int = machine(1)
    data: int = machine(1)
    fsdp: int = machine(-1)
    expert: int = machine(1)
    seq: int = machine(1)
    tensor: int = machine(1)

    def validate(self) -> None:
        sizes = {axis: getattr(self, axis) for axis in AXES}
        bad = {axis: size for axis, size in sizes.items() if size < 1 and size != -1}
        if bad:
            raise ConfigError(f'mesh axes {bad} must be positive, or -1 for all the devices that are left')
        if list(sizes.values()).count(-1) > 1:
            raise ConfigError(f'mesh {self} has more than one axis of -1; only one can take what is left')

    def make(self, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
        """The mesh over `devices` (default: all). Raises ConfigError where the sizes do not fit them."""
        self.validate()
        devices = list(jax.devices() if devices is None else devices)
        sizes = [getattr(self, axis) for axis in AXES]
        known = math.prod(size for size in sizes if size != -1)
        if -1 in sizes and len(devices) % known == 0:
            sizes[sizes.index(-1)] = len(devices) // known
        if math.prod(sizes) != len(devices):
            raise ConfigError(
                f'mesh {self} needs {_needs(sizes, known)} devices but there are {len(devices)} '
                f'({devices[0].device_kind}); change config.mesh so that its product is {len(devices)}'
            )
        return jax.sharding.Mesh(_arrange(devices, sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))

    def __str__(self) -> str:
        sizes = {axis: getattr(self, axis) for axis in AXES}
        return '(' + ', '.join(f'{axis}={size}' for axis, size in sizes.items() if size != 1) + ')'


def _needs(sizes: list[int], known: int) -> str:
    return f'a multiple of {known}' if -1 in sizes else str(math.prod(sizes))


def _arrange(devices: list[Any], sizes: list[int]) -> np.ndarray:
    """Devices in mesh order: on TPU by the physical torus, so that fast axes are neighbours."""
    if devices[0].platform == 'tpu':
        from jax.experimental import mesh_utils

        return mesh_utils.create_device_mesh(sizes, devices)
    return np.asarray(devices).reshape(sizes)

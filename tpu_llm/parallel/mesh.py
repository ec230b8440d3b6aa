"""The mesh: the same six axes for every run, slow network to fast.

Several slices are joined by the data-centre network only, tens of times slower than the links within one. So one axis
alone goes across them, in blocks: the slowest of stage, data and fsdp that the number of slices divides. A pipeline
then hands on activations across, and data parallelism sums gradients once a step. Hybrid sharding (weights whole in
each slice, sharded over its chips) is data=2, fsdp=-1.
"""

import collections
import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

from tpu_llm.config import ConfigError, machine

logger = logging.getLogger('tpu_llm')

AXES = ('stage', 'data', 'fsdp', 'expert', 'seq', 'tensor')

ACROSS = ('stage', 'data', 'fsdp')  # axes that may go over several slices


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
        bad = [f'{axis} = {size}' for axis, size in sizes.items() if size < 1 and size != -1]
        if bad:
            raise ConfigError(f'{" and ".join(bad)} must be positive, or -1 for all the devices that are left')
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
                f'{_mend(sizes, len(devices))}'
            )
        return jax.sharding.Mesh(_arrange(devices, sizes, str(self)), AXES, axis_types=(AxisType.Auto,) * len(AXES))

    def __str__(self) -> str:
        sizes = {axis: getattr(self, axis) for axis in AXES}
        return '(' + ', '.join(f'{axis}={size}' for axis, size in sizes.items() if size != 1) + ')'


def _needs(sizes: list[int], known: int) -> str:
    return f'a multiple of {known}' if -1 in sizes else str(math.prod(sizes))


def _mend(sizes: list[int], devices: int) -> str:
    """The flag that has the largest axis take what the others leave, where they leave anything."""
    largest = max(sizes)
    fits = -1 not in sizes and devices % (math.prod(sizes) // largest) == 0
    return f', as --config.mesh.{AXES[sizes.index(largest)]}=-1 does' if fits else ''


def _arrange(devices: list[Any], sizes: list[int], asked: str) -> np.ndarray:
    """Devices in mesh order, those of each slice a block along the axis that goes across."""
    slices = collections.defaultdict(list)
    for device in devices:
        slices[getattr(device, 'slice_index', 0)].append(device)
    if len(slices) == 1:
        return _within(devices, sizes)
    counts = [len(slices[index]) for index in sorted(slices)]
    if len(set(counts)) > 1:
        raise ConfigError(f'the slices have {", ".join(map(str, counts))} devices; a mesh needs slices of one size')
    across = _across(len(slices), sizes, asked)
    inner = [size // len(slices) if i == across else size for i, size in enumerate(sizes)]
    return np.concatenate([_within(slices[index], inner) for index in sorted(slices)], axis=across)


def _across(slices: int, sizes: list[int], asked: str) -> int:
    """The place in AXES of the axis that goes over the slices."""
    fit = [axis for axis in ACROSS if sizes[AXES.index(axis)] % slices == 0]
    if not fit:
        have = ', '.join(f'{axis} {sizes[AXES.index(axis)]}' for axis in ACROSS)
        raise ConfigError(
            f'mesh {asked} cannot go over {slices} slices: one of its axes stage, data and fsdp must be a multiple of '
            f'{slices} (here {have}); set config.mesh.data={slices} and divide another axis by {slices}'
        )
    if fit[0] == 'fsdp':
        logger.warning(
            f'mesh {asked} gathers the weights of every layer over the network between {slices} slices; '
            f'config.mesh.data={slices} with fsdp=-1 gathers them within a slice'
        )
    return AXES.index(fit[0])


def _within(devices: list[Any], sizes: list[int]) -> np.ndarray:
    """One slice's devices in mesh order: on TPU by the physical torus, so that fast axes are neighbours."""
    if devices[0].platform == 'tpu':
        from jax.experimental import mesh_utils

        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return np.asarray(devices).reshape(sizes)

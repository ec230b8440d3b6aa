"""The TPU generations: what a device of each can do, and the slices they come in.

A slice has three names. Ours count chips (`v5e-256`). Cloud's accelerator types count TensorCores where a chip has two
(`v5litepod-256`, but `v5p-1024` for 512 chips). A topology says how the chips lie (`v5e:16x16`), which is also how the
compiler knows a slice. Several equal ones, joined by the data-centre network, have their number first (`2xv4-3072`).
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from tpu_llm.config import ConfigError, choose, nearest

_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Chip:
    """A generation. Peaks are those of one jax device: a chip, or half a chip of tpu7x."""

    name: str
    kinds: tuple[str, ...]  # what jax calls the device
    flops: float  # dense bfloat16 FLOP/s
    clock: float  # Hz; XLA's estimated cycles are of this clock
    hbm: int  # bytes that a program may use, which is less than there are
    hbm_bandwidth: float  # bytes/s
    ici_bandwidth: float  # bytes/s that leave a device over all its links
    dcn_bandwidth: float  # bytes/s that leave a device for other slices
    pcie_bandwidth: float  # bytes/s between a device and its host's memory, each way
    cloud: str  # what accelerator types start with
    cores: int = 1  # TensorCores a chip, which accelerator types count
    devices: int = 1  # jax devices a chip
    small: tuple[str, ...] = ()  # topologies of less than a cube of 4x4x4
    largest: int = 0  # chips in the largest slice of cubes

    @property
    def grid(self) -> int:
        """Dims of the grid in which chips are linked."""
        return len(self.small[0].split('x'))


_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_PART_OF_A_CUBE = ('2x2x1', '2x2x2', '2x2x4', '2x4x4')

# Peaks, memory and links: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; of links, documents count both directions.
# v4's links and clock: Jouppi et al., 2023, arXiv 2304.01433. The other clocks: such that a cycle has the FLOPs of the
# matrix units (2^17 on v5e, 2^18 on v5p, 2^19 on v6e and a device of tpu7x). Usable memory is what libtpu 0.0.42 says
# there is when a program does not fit. Network and PCIe: the scaling book (jax-ml.github.io/scaling-book), chapter 2;
# tpu7x, which it does not hold, is taken to have v6e's.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name='v4',
            kinds=('TPU v4',),
            flops=275e12,
            clock=1.05e9,
            hbm=int(30.75 * _GIB),
            hbm_bandwidth=1200e9,
            ici_bandwidth=300e9,
            dcn_bandwidth=6.25e9,
            pcie_bandwidth=16e9,
            cloud='v4',
            cores=2,
            small=_PART_OF_A_CUBE,
            largest=4096,
        ),
        Chip(
            name='v5e',
            kinds=('TPU v5 lite', 'TPU v5e'),
            flops=197e12,
            clock=1.5e9,
            hbm=int(15.75 * _GIB),
            hbm_bandwidth=819e9,
            ici_bandwidth=200e9,
            dcn_bandwidth=3.125e9,
            pcie_bandwidth=16e9,
            cloud='v5litepod',
            small=_FLAT,
        ),
        Chip(
            name='v5p',
            kinds=('TPU v5', 'TPU v5p'),
            flops=459e12,
            clock=1.75e9,
            hbm=int(95.74 * _GIB),
            hbm_bandwidth=2765e9,
            ici_bandwidth=600e9,
            dcn_bandwidth=6.25e9,
            pcie_bandwidth=16e9,
            cloud='v5p',
            cores=2,
            small=_PART_OF_A_CUBE,
            largest=6144,
        ),
        Chip(
            name='v6e',
            kinds=('TPU v6 lite', 'TPU v6e'),
            flops=918e12,
            clock=1.75e9,
            hbm=int(31.25 * _GIB),
            hbm_bandwidth=1638e9,
            ici_bandwidth=400e9,
            dcn_bandwidth=12.5e9,
            pcie_bandwidth=32e9,
            cloud='v6e',
            small=_FLAT,
        ),
        Chip(
            name='tpu7x',
            kinds=('TPU7x',),
            flops=2307e12 / 2,
            clock=2.2e9,
            hbm=int(94.75 * _GIB),
            hbm_bandwidth=7380e9 / 2,
            ici_bandwidth=600e9 / 2,
            dcn_bandwidth=12.5e9 / 2,
            pcie_bandwidth=32e9 / 2,
            cloud='tpu7x',
            cores=2,
            devices=2,
            small=('1x1x1', *_PART_OF_A_CUBE),
            largest=9216,
        ),
    )
}


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of one jax device, or None for a device this table does not hold (a CPU, say)."""
    return next((chip.flops for chip in CHIPS.values() if device_kind in chip.kinds), None)


@dataclasses.dataclass(frozen=True, slots=True)
class Slice:
    """Chips that are wired together, `find('v5e-256')`, or several times as many: `find('2xv5e-256')`."""

    chip: Chip
    topology: str  # '16x16', of each
    count: int = 1

    @property
    def chips(self) -> int:
        """Of all of them."""
        return self.count * _count(self.topology)

    @property
    def devices(self) -> int:
        """jax devices."""
        return self.chips * self.chip.devices

    @property
    def single(self) -> 'Slice':
        """One of them."""
        return dataclasses.replace(self, count=1)

    @property
    def name(self) -> str:
        return f'{self._times}{self.chip.name}-{self.single.chips}'

    @property
    def accelerator_type(self) -> str:
        """Cloud's name of each, which does not say how its chips lie; other than as cubic as can be takes `--topology`,
        too.
        """
        return f'{self.chip.cloud}-{self.single.chips * self.chip.cores}'

    def __str__(self) -> str:
        return f'{self._times}{self.chip.name}:{self.topology}'

    @property
    def _times(self) -> str:
        return f'{self.count}x' if self.count > 1 else ''


def find(name: str) -> Slice:
    """The slice called `v5e-256` (so many chips, as cubic as can be) or `v5e:16x16`; two of them are `2xv5e-256`.

    Raises ConfigError for a slice that does not exist, naming the nearest that do.
    """
    several = re.fullmatch(r'(\d+)x([a-z].*)', name)
    if several is None:
        return _find(name)
    count, single = int(several[1]), _find(several[2])
    if count < 1:
        raise ConfigError(f'{name!r} is {count} slices; write 1 or more, as 2x{several[2]}')
    return dataclasses.replace(single, count=count)


def _find(name: str) -> Slice:
    match = re.fullmatch(r'([a-z0-9]+)(?:-(\d+)|:(\d+(?:x\d+)+))', name)
    if match is None:
        raise ConfigError(
            f'{name!r} is no slice; write generation-chips, as v5e-256, or generation:topology, as v5e:16x16, and for '
            'two of them 2xv5e-256'
        )
    generation, chips, topology = match.groups()
    if generation not in CHIPS and generation in {chip.cloud for chip in CHIPS.values()} and chips:
        raise ConfigError(f"{name!r} is Cloud's name of {from_accelerator_type(name).name}; slices are named by that")
    chip = choose('TPU generation', generation, CHIPS)
    if chips:
        return Slice(chip, _most_cubic(chip, int(chips), name))
    if topology not in topologies(chip):
        ordered = 'x'.join(map(str, sorted(map(int, topology.split('x')))))
        near = ordered if ordered in topologies(chip) else _nearest(chip, _count(topology))
        raise ConfigError(f'there is no {chip.name} slice of topology {topology}; the nearest: {near}')
    return Slice(chip, topology)


def from_accelerator_type(name: str) -> Slice:
    """The slice of one of Cloud's accelerator types, `v5litepod-256` or `v5p-1024`. Raises ConfigError."""
    prefixes = {chip.cloud: chip for chip in CHIPS.values()}
    prefix, _, number = name.rpartition('-')
    if prefix not in prefixes or not number.isdecimal():
        raise ConfigError(
            f'{name!r} is no accelerator type{nearest(prefix, prefixes)}; there are {", ".join(prefixes)}, each with -N'
        )
    chip = prefixes[prefix]
    chips, odd = divmod(int(number), chip.cores)
    if odd:
        raise ConfigError(f'{name} has an odd number of TensorCores, but a chip of {chip.name} has {chip.cores}')
    return Slice(chip, _most_cubic(chip, chips, name))


def of_devices(devices: Sequence[Any]) -> Slice:
    """The slice that jax's devices are. Raises ConfigError where they are no TPUs."""
    kind = devices[0].device_kind
    chip = next((chip for chip in CHIPS.values() if kind in chip.kinds), None)
    if chip is None:
        raise ConfigError(f'{kind} is no TPU that is known here; there are {", ".join(CHIPS)}')
    sides = [1 + max(device.coords[dim] for device in devices) for dim in range(chip.grid)]
    count = len({getattr(device, 'slice_index', 0) for device in devices})
    return Slice(chip, 'x'.join(map(str, sides)), count)


def topologies(chip: Chip) -> list[str]:
    """Every legal topology, small to large, of equal sizes the most cubic first.

    From a cube of 4x4x4 on, each side is a multiple of 4 and sides do not decrease.
    """
    cubes = [(a, b, c) for a in _sides(chip, 1) for b in _sides(chip, a, a) for c in _sides(chip, a * b, b)]
    ordered = sorted(cubes, key=lambda s: (math.prod(s), max(s) / min(s)))
    return [*chip.small, *('x'.join(map(str, s)) for s in ordered)]


def _sides(chip: Chip, area: int, least: int = 4) -> range:
    return range(least, chip.largest // area + 1, 4)


def _most_cubic(chip: Chip, chips: int, name: str) -> str:
    for topology in topologies(chip):
        if _count(topology) == chips:
            return topology
    raise ConfigError(f'there is no {chip.name} slice of {chips} chips ({name}); the nearest: {_nearest(chip, chips)}')


def _nearest(chip: Chip, chips: int) -> str:
    """The next smaller and the next larger slice."""
    counts = sorted({_count(topology) for topology in topologies(chip)})
    below, above = [n for n in counts if n <= chips][-1:], [n for n in counts if n > chips][:1]
    return ' and '.join(f'{chip.name}-{n}' for n in below + above)


def _count(topology: str) -> int:
    return math.prod(map(int, topology.split('x')))

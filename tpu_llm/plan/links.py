"""How long a collective takes, from where its devices lie: chips of a slice are a grid of links, often a torus.

A group of devices uses the links along the dims of the grid in which its members differ. A whole side closes to a ring:
one of 16 in two dims, any of a slice of whole cubes of 4x4x4 in three. A part of a side is a line, with half the
throughput. Members that lie `stride` chips apart share the links between them with the groups that lie there. The
formulas are those of the scaling book (jax-ml.github.io/scaling-book, chapters 2 and 3).
"""

import dataclasses
import itertools
from collections.abc import Sequence

from tpu_llm.parallel.chips import Chip

HOP = 1e-6  # seconds until the first byte of a neighbour arrives


@dataclasses.dataclass(frozen=True, slots=True)
class Torus:
    """Where each device of a mesh lies, in the order of the mesh; devices of other slices have their own grid."""

    chip: Chip
    sides: tuple[int, ...]
    coordinates: tuple[tuple[int, ...], ...]

    def seconds(self, kind: str, size: float, group: Sequence[int]) -> float:
        """Of a collective whose result has `size` bytes on one device, were it alone on its links.

        `group` are the devices that take part with the first of them, as places in the mesh; of a permutation, a
        sender and its receiver.
        """
        if kind.endswith('between slices'):
            return (2 if kind.startswith('all-reduce') else 1) * size / self.chip.dcn_bandwidth
        dims = [each for each in range(len(self.sides)) if self._span(group, each) > 1]
        if not dims:
            return size / self.chip.hbm_bandwidth  # the devices of one chip
        if kind == 'collective-permute':
            # All send in one direction, so that a link carries what passes it on a longer way, too.
            far = max(self._distance(group, each) for each in dims)
            return max(far * HOP, far * size / self._link)
        hops = sum(self._span(group, each) // 2 for each in dims)
        if kind in ('all-to-all', 'ragged-all-to-all'):
            # A byte passes on average a quarter of a ring in each dim on its way.
            slowest = max(self._span(group, each) / 4 / self._bandwidth(group, each) for each in dims)
            return max(hops * HOP, size * slowest)
        chips = len({self.coordinates[device] for device in group})
        # What devices of one chip need alike comes to it once.
        bandwidth = len(group) / chips * sum(self._bandwidth(group, each) for each in dims)
        whole = size * len(group) if kind == 'reduce-scatter' else size
        # What is summed goes round twice: once to add it up, once to tell everyone.
        passes = 2 if kind == 'all-reduce' else 1
        return max(hops * HOP, passes * whole * (chips - 1) / chips / bandwidth)

    @property
    def _link(self) -> float:
        """A device's bytes/s over one link in one direction."""
        return self.chip.ici_bandwidth / (2 * self.chip.grid)

    def _bandwidth(self, group: Sequence[int], dim: int) -> float:
        """Bytes/s that a device sends along a dim, both ways."""
        places = sorted({self.coordinates[device][dim] for device in group})
        stride = min(b - a for a, b in itertools.pairwise(places))
        whole = len(places) * stride == self.sides[dim]
        return self._link * (2 if whole and self._closes(dim) else 1) / stride

    def _closes(self, dim: int) -> bool:
        """Whether the ends of a side are linked."""
        return self.sides[dim] == 16 if self.chip.grid == 2 else all(side % 4 == 0 for side in self.sides)

    def _span(self, group: Sequence[int], dim: int) -> int:
        return len({self.coordinates[device][dim] for device in group})

    def _distance(self, pair: Sequence[int], dim: int) -> int:
        """From sender to receiver, the shorter way."""
        away = abs(self.coordinates[pair[0]][dim] - self.coordinates[pair[1]][dim])
        return min(away, self.sides[dim] - away) if self._closes(dim) else away


def torus(chip: Chip, topology: str, devices: Sequence[object]) -> Torus:
    """Of the devices of a mesh, in its order."""
    sides = tuple(map(int, topology.split('x')))
    coordinates = tuple(tuple(device.coords)[: len(sides)] for device in devices)  # type: ignore[attr-defined]
    return Torus(chip, sides, coordinates)

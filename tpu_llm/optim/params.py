"""What an optimizer may know of a parameter besides its value: how to read its shape.

Layers (a leading L) and experts (a leading E) are stacked in one array, but each is a parameter of its own: no step
depends on whether they are stacked.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Axes(NamedTuple):
    """The axes of an array that are its matrices' rows, and those that are their columns."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class ParamInfo:
    dims: str
    summed: str  # the dims a linear map sums over; empty for what is no linear map
    padding: int = 0  # so many last entries of the V dim are not real
    nudge: float = 0.0  # above 0: not optimised; each step moves it by that much against the sign of its gradient
    rate: float = 1.0  # times the learning rate; its weight decay takes as much a step whatever it is
    gain: float = 1.0  # what its gradient is multiplied by before the optimizer sees it

    @property
    def stack(self) -> int:
        """How many leading dims stack parameters."""
        own = self.dims.removeprefix('L')
        own = own.removeprefix('E') if len(own) > 1 else own  # 'E' alone is a vector over experts
        return len(self.dims) - len(own)

    @property
    def linear_map(self) -> Axes | None:
        """Rows are what a linear map sums over, columns what it gives; None for what is no linear map."""
        own = range(self.stack, len(self.dims))
        rows = tuple(i for i in own if self.dims[i] in self.summed)
        columns = tuple(i for i in own if self.dims[i] not in self.summed)
        return Axes(rows, columns) if rows and columns else None

    def count(self, shape: Sequence[int], axes: Iterable[int]) -> int:
        """How many entries lie along those axes, vocabulary padding not counted."""
        return math.prod(shape[i] - self.padding * (self.dims[i] == 'V') for i in axes)


def matrix(path: str, info: ParamInfo) -> Axes | None:
    """Rows and columns of linear maps and of tables; None for norms and biases.

    These may have two dims as well: one number for each head and place ('NH').
    """
    first, *rest = range(info.stack, len(info.dims))
    table = Axes((first,), tuple(rest)) if rest and not path.endswith(('.bias', '.scale')) else None
    return info.linear_map or table

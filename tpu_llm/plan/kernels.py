"""Pallas kernels in a compiled program, and what to charge for them.

To the compiler a kernel is opaque: it estimates no cycles for it. A kernel is charged max(FLOPs / peak, bytes /
bandwidth), from what `CHARGES` makes of its shapes, or else from the cost that it declares (`pl.CostEstimate`).
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tpu_llm.config import ConfigError
from tpu_llm.parallel.chips import Chip
from tpu_llm.plan.hlo import Instruction, Shape, Shapes, leaves

TARGET = 'tpu_custom_call'


@dataclasses.dataclass(frozen=True, slots=True)
class Charge:
    """What one call of a kernel does."""

    flops: float
    bytes: float

    def cycles(self, chip: Chip) -> float:
        return chip.clock * max(self.flops / chip.flops, self.bytes / chip.hbm_bandwidth)


@dataclasses.dataclass(frozen=True, slots=True)
class Kernel:
    """A call of a kernel, and how often it runs."""

    name: str
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    times: int
    declared: Charge | None
    metadata: Mapping[str, Any]  # what the kernel says of itself, such as its block sizes

    @property
    def charge(self) -> Charge:
        """Of one call. Raises ConfigError for a kernel that neither this table nor itself knows the cost of."""
        for name, charge in CHARGES.items():
            if self.name.startswith(name):
                return charge(self)
        if self.declared is None:
            raise ConfigError(
                f'the kernel {self.name} declares no cost; give its pallas_call a pl.CostEstimate, or plan/kernels.py '
                'an entry in CHARGES'
            )
        return self.declared


def read(instruction: Instruction, operands: Sequence[Shapes], times: int) -> Kernel:
    """From a custom call. The kernel's name is the instruction's without what the compiler appended."""
    cost = instruction.config('cost_estimate')
    metadata = instruction.config('kernel_metadata') or {}
    found = re.search(r'"xprof_metadata":("(?:[^"\\]|\\.)*")', instruction.attributes)
    return Kernel(
        name=re.sub(r'(\.\d+|\.clone)+$', '', instruction.name),
        operands=tuple(leaf for shape in operands for leaf in leaves(shape)),
        results=tuple(leaves(instruction.shape)),
        times=times,
        declared=Charge(float(cost['flops']), float(cost['bytes_accessed'])) if cost else None,
        metadata=json.loads(json.loads(found[1])) if found else metadata,
    )


def charged_cycles(kernels: Sequence[Kernel], chip: Chip) -> float:
    """Cycles of all calls on a device of that generation. Raises ConfigError for a kernel of unknown cost."""
    return sum(kernel.times * kernel.charge.cycles(chip) for kernel in kernels)


# ------------------------------------------------------------------------------------------------ splash attention


def _splash(maps: tuple[int, int], block_q: str, block_kv: str, *, queries_stay: bool) -> Callable[[Kernel], Charge]:
    """jax.experimental.pallas.ops.tpu.splash_attention, taken to be causal: its mask is data and does not show.

    A mask known when the program is traced is a row's: the blocks below and on its diagonal. The library keeps such a
    table in bytes or pairs of them. A table of whole words is computed as the program runs (`kernels/splash_part.py`),
    for a device's share of a row in zig-zag order, which sees half of each share that comes by and, of its own, half
    the blocks on the diagonal besides: charged is half, and not what a window or documents hide.

    Head by head, blocks of queries stay while the blocks of keys and values that they see pass by, or the other way
    round. Hidden blocks are skipped; one that is hidden in part is computed whole. The first operand is a table of the
    blocks to visit, which a window makes narrow. `maps` counts the matmuls of a block over the width of keys and over
    that of values.
    """

    def charge(kernel: Kernel) -> Charge:
        table = kernel.operands[0].dims
        query, key, value, *rest = (x for x in kernel.operands if x.dtype in ('bf16', 'f32') and len(x.dims) > 2)
        rows, columns = kernel.metadata[block_q], kernel.metadata[block_kv]
        of_row, of_column = query.dims[-2] // rows, key.dims[-2] // columns
        if kernel.operands[0].dtype == 's32':
            visits = of_row * of_column // 2
        elif queries_stay:
            visits = sum(min(-(-(i + 1) * rows // columns), of_column, table[-1]) for i in range(of_row))
        else:
            visits = sum(min(of_row - i * columns // rows, table[-2]) for i in range(of_column))
        heads = math.prod(query.dims[:-2])
        per_query = sum(x.bytes for x in (query, *rest)) / math.prod(query.dims[:-1])  # rest: log-sums, d_out, …
        per_key = (key.bytes + value.bytes) / math.prod(key.dims[:-1])
        staying = (query, *rest) if queries_stay else (key, value)
        moved = sum(x.bytes for x in (*staying, *kernel.results))
        moved += heads * visits * (columns * per_key if queries_stay else rows * per_query)
        widths = maps[0] * key.dims[-1] + maps[1] * value.dims[-1]
        return Charge(2.0 * heads * visits * rows * columns * widths, moved)

    return charge


# -------------------------------------------------------------------------------------------------- grouped matmul


def _grouped(kernel: Kernel) -> Charge:
    """jax.experimental.pallas.ops.tpu.megablox: what it declares, and the tiles in which a group ends besides.

    Its grid visits each pair of a tile of rows and a group that overlap; a table of them is its third operand, the
    groups' ends are its second. It declares the FLOPs of the tiles alone, in the bytes every operand as often as its
    blocks are read. Rows of nobody are not visited, but how many there are is data, so they are charged too.
    """
    assert kernel.declared is not None
    groups, pairs = kernel.operands[1].size - 1, kernel.operands[2].size
    tiles = pairs - groups + 1
    return Charge(kernel.declared.flops * pairs / tiles, kernel.declared.bytes)


# By the start of the kernel's name.
CHARGES: dict[str, Callable[[Kernel], Charge]] = {
    f'splash_{heads}_{phase}': charge
    for heads in ('mha', 'mqa')
    for phase, charge in (
        ('fwd', _splash((1, 1), 'block_q', 'block_kv', queries_stay=True)),
        ('dq', _splash((2, 1), 'block_q_dq', 'block_kv_dq', queries_stay=True)),
        ('dkv', _splash((2, 2), 'block_q_dkv', 'block_kv_dkv', queries_stay=False)),
    )
} | {'gmm': _grouped, 'tgmm': _grouped}

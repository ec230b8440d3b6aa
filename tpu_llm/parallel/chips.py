"""What each accelerator can do: the peaks that utilisation is measured against."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Chip:
    """One chip's peaks."""

    name: str
    flops: float  # dense bfloat16 FLOP/s
    devices: int = 1  # jax devices per chip


# cloud.google.com/tpu/docs: the "system architecture" page of each generation.
CHIPS = {
    'TPU v4': Chip('v4', 275e12),
    'TPU v5 lite': Chip('v5e', 197e12),
    'TPU v5': Chip('v5p', 459e12),
    'TPU v5p': Chip('v5p', 459e12),
    'TPU v6 lite': Chip('v6e', 918e12),
    'TPU7x': Chip('tpu7x', 2307e12, devices=2),
}


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of one jax device, or None for a device this table does not hold (a CPU, say)."""
    chip = CHIPS.get(device_kind)
    return chip.flops / chip.devices if chip else None

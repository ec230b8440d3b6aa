"""Meshes by name. Slices are named by generation and number of chips: v5e-16 is 16 chips of v5e."""

from tpu_llm.config import choose
from tpu_llm.parallel.mesh import Mesh

# Up to a few hundred chips, sharding everything over fsdp is the simplest layout and hard to beat: weights are
# gathered layer by layer while the layer before computes. `tensor` enters where a chip's share of the batch
# would fall below one row.
MESHES = {
    'auto': Mesh(),  # whatever devices there are, all on fsdp
    'data': Mesh(fsdp=1, data=-1),  # models that fit one chip: no gathers
    'v5e-8': Mesh(fsdp=8),
    'v5e-16': Mesh(fsdp=16),
    'v5e-64': Mesh(fsdp=64),
    'v5e-256': Mesh(fsdp=256),
    'v6e-8': Mesh(fsdp=8),
    'v6e-64': Mesh(fsdp=64),
    'v6e-256': Mesh(fsdp=256),
    # In two halves: over all of a torus of three dims the compiler gathers weights by all-reduces, which is twice the
    # traffic and on 512 chips 10 % more cycles.
    'v5p-128': Mesh(data=2, fsdp=64),
    'v5p-256': Mesh(data=2, fsdp=128),
    'v5p-512': Mesh(data=2, fsdp=256),
}


def mesh(name: str) -> Mesh:
    """Raises ConfigError on an unknown name, listing those there are."""
    return choose('mesh', name, MESHES)

"""Collectives of a compiled program: who takes part in one, and which axes of the mesh that makes.

XLA prints the groups of devices that work together in three forms:

    {{0,2},{1,3}}                                           a list
    [2,2]<=[2,2]T(1,0)                                      two rows of two, of an iota reshaped and transposed
    mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}       along axes of a mesh of XLA's own

and those of a permutation as pairs, {{0,1},{1,0}}. Numbers are places in the run's mesh, counted row by row.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from tpu_llm.plan.hlo import Computation, Instruction, Shapes, leaves

KINDS = (
    'all-gather',
    'all-reduce',
    'reduce-scatter',
    'all-to-all',
    'ragged-all-to-all',
    'collective-permute',
    'collective-broadcast',
)

Groups = list[tuple[int, ...]]


def kind(instruction: Instruction) -> str | None:
    """Of a collective, or of the start of one; None for anything else, the end of one included.

    What goes to other slices is handed to the network's runtime as a send: 'all-reduce between slices'.
    """
    if instruction.opcode == 'send' and meeting(instruction):
        match = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
        return f'{match[1].lower().replace("_", "-") if match else "send"} between slices'
    name = instruction.opcode.removesuffix('-start')
    return name if name in KINDS else None


def meeting(instruction: Instruction) -> str | None:
    """The name under which a send and a receive of the network's runtime belong together."""
    if instruction.opcode not in ('send', 'recv'):
        return None
    match = re.search(r'_xla_host_transfer_rendezvous="([^"]+)"', instruction.attributes)
    return match[1] if match and 'xla_megascale_runtime' in instruction.attributes else None


def result(instruction: Instruction) -> Shapes:
    """What a device has after it. The start of one gives its operands, its results and tokens.

    Of what goes to other slices, what a device sends.
    """
    shape: Shapes = instruction.shape
    if instruction.opcode in ('send', 'recv') and isinstance(shape, tuple):
        return shape[0]
    if instruction.opcode.endswith('-start') and isinstance(shape, tuple) and kind(instruction) != 'all-reduce':
        return shape[1]
    return shape


def result_bytes(instruction: Instruction) -> int:
    return sum(leaf.bytes for leaf in leaves(result(instruction)))


def scatters(fusion: Instruction) -> bool:
    """Whether the all-reduce in it leaves each device only its part of the sum, so that it goes round once.

    The compiler prints an all-reduce and a slice of its result for it, and says what it makes of both.
    """
    algorithm = fusion.config('collective_algorithm_config') or {}
    return 'AllReduceScatter' in algorithm.get('emitter', '')


class Channels:
    """Tells a collective that goes on while fusions compute, and appears in each of them, from as many of its own.

    It is asked about fusions in the order in which they run. Others may have the same channel, before or after.
    """

    def __init__(self) -> None:
        self._started: dict[str, str] = {}

    def started_as(self, fused: Computation, collective: Instruction) -> str:
        """The name of the one that it carries on or ends; its own where it is the first or the only one."""
        channel = collective.attribute('channel_id') or collective.name
        name = self._started.get(channel, collective.name)
        for each in fused.instructions.values():
            if each.target == 'AsyncCollectiveStart' and collective.name in each.operands:
                self._started[channel] = name
            if each.target == 'AsyncCollectiveDone' and collective.name in each.operands:
                self._started.pop(channel, None)
        return name


def groups(instruction: Instruction, devices: int) -> Groups:
    """The devices that work together; of a permutation, the pairs of sender and receiver, of a send to other slices
    none.
    """
    if instruction.opcode in ('send', 'recv'):
        return [()]
    text = instruction.attribute('replica_groups') or instruction.attribute('source_target_pairs') or '{}'
    if text.startswith('mesh'):
        return _of_mesh(text)
    if text.startswith('['):
        shape, _, order = text.partition('<=')
        return _rows(_iota(order).reshape(_ints(shape)))
    listed = [tuple(_ints(part)) for part in re.findall(r'\{([\d,\s]+)\}', text)]
    return listed or [tuple(range(devices))]


def axes(groups: Iterable[Sequence[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of a mesh, `{'data': 2, 'fsdp': 4}`, along which the devices of a group differ."""
    groups = [group for group in groups if group]
    sizes = tuple(mesh.values())
    moved = np.zeros(len(sizes), bool)
    for group in groups:
        places = np.stack(np.unravel_index(np.asarray(group), sizes))
        moved |= (places != places[:, :1]).any(axis=1)
    return tuple(name for name, moves in zip(mesh, moved, strict=True) if moves)


def _of_mesh(text: str) -> Groups:
    """Axes may be parts of one: `'b':(2)4` is four steps of `b`, each of what is left when 2 are taken before it."""
    match = re.fullmatch(r'mesh\[(.*?)\](?:, device_ids=\((.*)\))? \{(.*)\}', text)
    assert match, f'unknown form of replica groups: {text}'
    mesh = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", match[1])}
    ids = np.arange(np.prod(list(mesh.values()), dtype=int)) if match[2] is None else _listed_or_iota(match[2])
    taken: dict[str, list[tuple[int, int]]] = {name: [] for name in mesh}
    for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", match[3]):
        taken[name].append((int(before or 1), int(size or mesh[name])))
    dims, grouped = [], []
    for name, size in mesh.items():
        done = 1
        for before, part in sorted(taken[name]):
            dims += [before // done, part]
            grouped += [False, True]
            done = before * part
        dims.append(size // done)
        grouped.append(False)
    order = [i for i, g in enumerate(grouped) if not g] + [i for i, g in enumerate(grouped) if g]
    together = int(np.prod([size for size, g in zip(dims, grouped, strict=True) if g], dtype=int))
    return _rows(ids.reshape(dims).transpose(order).reshape(-1, together))


def _listed_or_iota(text: str) -> np.ndarray:
    return _iota(text) if text.startswith('[') else np.array(_ints(text))


def _iota(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: 0, 1, 2, … as an array of 2 by 4, transposed and flattened."""
    shape, _, permutation = text.partition('T')
    sizes = _ints(shape)
    iota = np.arange(np.prod(sizes, dtype=int)).reshape(sizes)
    return (iota.transpose(_ints(permutation)) if permutation else iota).reshape(-1)


def _rows(array: np.ndarray) -> Groups:
    return [tuple(row) for row in array.tolist()]


def _ints(text: str) -> list[int]:
    return list(map(int, re.findall(r'\d+', text)))

"""The mesh: six axes in one order, and sizes that fit the devices or say why not."""

import dataclasses
import itertools
import logging

import jax
import numpy as np
import pytest

from tpu_llm.config import ConfigError
from tpu_llm.parallel.mesh import AXES, Mesh


def test_every_mesh_has_the_same_six_axes():
    mesh = Mesh(fsdp=2, tensor=2, data=2).make()
    assert mesh.axis_names == AXES == ('stage', 'data', 'fsdp', 'expert', 'seq', 'tensor')
    assert mesh.devices.shape == (1, 2, 2, 1, 1, 2)
    assert [d.id for d in mesh.devices.flat] == [d.id for d in jax.devices()]  # tensor's neighbours lie side by side
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ('mesh', 'sizes'),
    [(Mesh(), {'fsdp': 8}), (Mesh(data=-1, fsdp=2), {'data': 4, 'fsdp': 2}), (Mesh(fsdp=8, tensor=-1), {'fsdp': 8})],
)
def test_minus_one_takes_the_devices_that_are_left(mesh, sizes):
    assert {axis: size for axis, size in mesh.make().shape.items() if size > 1} == sizes


def test_it_can_be_made_of_some_devices():
    assert Mesh().make(jax.devices()[:3]).shape['fsdp'] == 3


WRONG = [
    (
        Mesh(fsdp=4, tensor=4),
        r'mesh \(fsdp=4, tensor=4\) needs 16 devices but there are 8 \(cpu\); change config.mesh so that its product '
        r'is 8, as --config.mesh.fsdp=-1 does$',
    ),
    (Mesh(fsdp=2, tensor=16), r'so that its product is 8, as --config.mesh.tensor=-1 does$'),
    (Mesh(fsdp=3, tensor=3), r'so that its product is 8$'),
    (Mesh(fsdp=2), r'mesh \(fsdp=2\) needs 2 devices but there are 8'),
    (Mesh(tensor=3), r'mesh \(fsdp=-1, tensor=3\) needs a multiple of 3 devices but there are 8 .* product is 8$'),
    (Mesh(data=-1), r'mesh \(data=-1, fsdp=-1\) has more than one axis of -1; only one can take what is left'),
    (Mesh(seq=0, stage=-2), r'^stage = -2 and seq = 0 must be positive, or -1 for all the devices'),
]


@pytest.mark.parametrize(('mesh', 'message'), WRONG)
def test_a_mesh_that_does_not_fit_says_why(mesh, message):
    with pytest.raises(ConfigError, match=message):
        mesh.make()


# -------------------------------------------------------------------------------------------------- several slices


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the mesh looks at in a device of a TPU."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    process_index: int
    core_on_chip: int = 0
    platform: str = 'tpu'
    device_kind: str = 'TPU v5 lite'


def chips(*sides):
    """A square of v5e for each side, in the order of an unlucky listing: slices interleaved."""
    made = []
    for index, side in enumerate(sides):
        for y, x in np.ndindex(side, side):
            made.append(Chip(1000 * index + y * side + x, index, (x, y, 0), 10 * index + y // 2))
    return sorted(made, key=lambda chip: (chip.id % 1000, chip.slice_index))


SLICED = [
    (Mesh(data=2), 2, 'data', {'data': 2, 'fsdp': 16}),
    (Mesh(data=4, tensor=2), 2, 'data', {'data': 4, 'fsdp': 4, 'tensor': 2}),
    (Mesh(stage=2, data=2), 2, 'stage', {'stage': 2, 'data': 2, 'fsdp': 8}),
    (Mesh(stage=2, data=3), 3, 'data', {'stage': 2, 'data': 3, 'fsdp': 8}),
    (Mesh(), 2, 'fsdp', {'fsdp': 32}),
    (Mesh(data=4, expert=2), 4, 'data', {'data': 4, 'fsdp': 8, 'expert': 2}),
]


@pytest.mark.parametrize(('mesh', 'slices', 'across', 'sizes'), SLICED)
def test_each_slice_is_a_block_of_one_axis(mesh, slices, across, sizes):
    devices = chips(*[4] * slices)
    made = mesh.make(devices)
    assert {axis: size for axis, size in made.shape.items() if size > 1} == sizes
    index = np.vectorize(lambda chip: chip.slice_index)(made.devices)
    place = AXES.index(across)
    of_axis = np.moveaxis(index, place, 0).reshape(index.shape[place], -1)
    assert (of_axis == of_axis[:, :1]).all(), 'no other axis leaves the slice'
    np.testing.assert_array_equal(of_axis[:, 0], np.repeat(np.arange(slices), index.shape[place] // slices))
    assert len({chip.id for chip in made.devices.flat}) == len(devices)


def test_the_order_within_a_slice_is_that_of_one_slice():
    """By the torus: tensor's neighbours are neighbours, in the second slice as in the first."""
    made = Mesh(data=2, tensor=4).make(chips(4, 4))
    alone = Mesh(tensor=4).make(chips(4))
    coords = np.vectorize(lambda chip: chip.coords, otypes=[object])
    for block in made.devices[0]:
        assert (coords(block) == coords(alone.devices[0, 0])).all()
    for line in made.devices.reshape(-1, 4):
        steps = [np.abs(np.subtract(a.coords, b.coords)).sum() for a, b in itertools.pairwise(line)]
        assert steps == [1, 1, 1]


def test_weights_gathered_between_slices_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING, 'tpu_llm'):
        Mesh(data=2).make(chips(4, 4))
        assert caplog.messages == []
        Mesh().make(chips(4, 4))
    (message,) = caplog.messages
    assert 'between 2 slices; config.mesh.data=2 with fsdp=-1' in message


def test_slices_that_no_axis_can_span_or_of_two_sizes_are_refused():
    with pytest.raises(ConfigError, match=r'mesh \(tensor=32\) cannot go over 2 slices.*stage 1, data 1, fsdp 1'):
        Mesh(fsdp=1, tensor=32).make(chips(4, 4))
    with pytest.raises(ConfigError, match='the slices have 16, 4 devices; a mesh needs slices of one size'):
        Mesh(data=2).make(chips(4, 2))

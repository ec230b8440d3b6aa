"""The mesh: six axes in one order, and sizes that fit the devices or say why not."""

import jax
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
        r'mesh \(fsdp=4, tensor=4\) needs 16 devices but there are 8 \(cpu\); change config.mesh so that its product',
    ),
    (Mesh(fsdp=2), r'mesh \(fsdp=2\) needs 2 devices but there are 8'),
    (Mesh(tensor=3), r'mesh \(fsdp=-1, tensor=3\) needs a multiple of 3 devices but there are 8'),
    (Mesh(data=-1), r'mesh \(data=-1, fsdp=-1\) has more than one axis of -1; only one can take what is left'),
    (Mesh(seq=0, stage=-2), r"mesh axes \{'stage': -2, 'seq': 0\} must be positive, or -1 for all the devices"),
]


@pytest.mark.parametrize(('mesh', 'message'), WRONG)
def test_a_mesh_that_does_not_fit_says_why(mesh, message):
    with pytest.raises(ConfigError, match=message):
        mesh.make()

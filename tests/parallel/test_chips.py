"""Generations have peaks, slices have three names."""

import pytest

from tpu_llm.config import ConfigError
from tpu_llm.parallel.chips import CHIPS, find, from_accelerator_type, peak_flops, topologies


def test_a_device_has_its_share_of_its_chips_peak():
    assert peak_flops('TPU v5 lite') == 197e12
    assert peak_flops('TPU7x') == 2307e12 / 2


def test_what_is_not_in_the_table_has_no_peak():
    assert peak_flops('cpu') is None


@pytest.mark.parametrize('name', CHIPS)
def test_a_cycle_is_that_of_the_matrix_units(name):
    """A power of two of FLOPs: so many units of so many multiply-adds."""
    chip = CHIPS[name]
    units = {'v4': 2**18, 'v5e': 2**17, 'v5p': 2**18, 'v6e': 2**19, 'tpu7x': 2**19}
    assert chip.flops / chip.clock == pytest.approx(units[name], rel=5e-3)


@pytest.mark.parametrize(
    ('name', 'accelerator_type', 'topology', 'devices'),
    [
        ('v4-64', 'v4-128', 'v4:4x4x4', 64),
        ('v5e-1', 'v5litepod-1', 'v5e:1x1', 1),
        ('v5e-256', 'v5litepod-256', 'v5e:16x16', 256),
        ('v5p-4', 'v5p-8', 'v5p:2x2x1', 4),
        ('v5p-512', 'v5p-1024', 'v5p:8x8x8', 512),
        ('v5p-4096', 'v5p-8192', 'v5p:16x16x16', 4096),
        ('v6e-256', 'v6e-256', 'v6e:16x16', 256),
        ('tpu7x-64', 'tpu7x-128', 'tpu7x:4x4x4', 128),
    ],
)
def test_a_slice_by_its_three_names(name, accelerator_type, topology, devices):
    found = find(name)
    assert found == find(topology) == from_accelerator_type(accelerator_type)
    assert (found.name, found.accelerator_type, str(found), found.devices) == (
        name,
        accelerator_type,
        topology,
        devices,
    )


def test_a_topology_may_be_less_than_cubic():
    assert find('v4:4x4x16').chips == 256
    assert str(find('v4-256')) == 'v4:4x8x8'


@pytest.mark.parametrize(
    ('name', 'same', 'written', 'chips', 'devices'),
    [
        ('2xv4-3072', '2xv4:12x16x16', '2xv4:12x16x16', 6144, 6144),
        ('2xv5e-256', '2xv5e:16x16', '2xv5e:16x16', 512, 512),
        ('3xtpu7x-64', '3xtpu7x:4x4x4', '3xtpu7x:4x4x4', 192, 384),
        ('1xv5e-256', 'v5e:16x16', 'v5e:16x16', 256, 256),
    ],
)
def test_several_slices_have_their_number_first(name, same, written, chips, devices):
    found = find(name)
    assert found == find(same) == find(found.name)
    assert (str(found), found.chips, found.devices) == (written, chips, devices)
    assert found.single == find(name.partition('x')[2])
    assert found.accelerator_type == found.single.accelerator_type


def test_the_legal_topologies():
    assert topologies(CHIPS['v5e']) == ['1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16']
    assert topologies(CHIPS['v5p'])[:6] == ['2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8']
    assert topologies(CHIPS['v5p'])[-1] == '4x4x384'
    assert '16x16x24' in topologies(CHIPS['v5p'])
    assert '16x16x24' not in topologies(CHIPS['v4'])


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('v5e-300', r'no v5e slice of 300 chips \(v5e-300\); the nearest: v5e-256'),
        ('v5p-100', r'the nearest: v5p-64 and v5p-128'),
        ('v5e:16x32', 'no v5e slice of topology 16x32; the nearest: v5e-256'),
        ('v5p:8x4x8', 'no v5p slice of topology 8x4x8; the nearest: 4x8x8'),
        ('v5-256', r"unknown TPU generation 'v5' \(did you mean 'v5p'\?\); there are v4, v5e, v5p, v6e, tpu7x"),
        ('v5litepod-256', "'v5litepod-256' is Cloud's name of v5e-256"),
        ('256', "'256' is no slice; write generation-chips, as v5e-256, or generation:topology, as v5e:16x16, and for"),
        ('0xv4-8', "'0xv4-8' is 0 slices; write 1 or more, as 2xv4-8"),
        ('2xv5e-300', 'no v5e slice of 300 chips'),
        ('2xv5litepod-256', "'v5litepod-256' is Cloud's name of v5e-256"),
        ('2x', "'2x' is no slice"),
        ('-1xv4-8', "'-1xv4-8' is no slice"),
        ('2v4-8', "unknown TPU generation '2v4'"),
    ],
)
def test_what_does_not_exist_is_named_with_the_nearest(name, message):
    with pytest.raises(ConfigError, match=message):
        find(name)


def test_accelerator_types_that_do_not_exist():
    with pytest.raises(ConfigError, match=r"'v5e-256' is no accelerator type.*there are v4, v5litepod, v5p"):
        from_accelerator_type('v5e-256')
    with pytest.raises(ConfigError, match="'2xv5p-8' is no accelerator type"):
        from_accelerator_type('2xv5p-8')
    with pytest.raises(ConfigError, match='v5p-9 has an odd number of TensorCores, but a chip of v5p has 2'):
        from_accelerator_type('v5p-9')

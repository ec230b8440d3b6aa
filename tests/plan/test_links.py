"""Seconds of collectives against the formulas of the scaling book, worked out by hand for each shape of group."""

import dataclasses
import itertools

import pytest

from tpu_llm.parallel.chips import CHIPS
from tpu_llm.plan.links import HOP, Torus, torus

LINK = 50e9  # of v5e: bytes/s over one link in one direction, a quarter of what leaves a chip
MB = 1e6


def grid(chip, *sides, devices=1):
    """Devices in the order of their coordinates, those of a chip together."""
    places = itertools.product(*map(range, sides))
    return Torus(CHIPS[chip], sides, tuple(place for place in places for _ in range(devices)))


def row(start, step, count):
    return tuple(range(start, start + step * count, step))


V5E = grid('v5e', 16, 16)
RING = row(0, 1, 16)  # a whole side of v5e:16x16
ALL = row(0, 1, 256)
HALF = row(0, 1, 8)


def test_the_links_of_the_table():
    assert CHIPS['v5e'].ici_bandwidth == 4 * LINK
    assert CHIPS['v5p'].ici_bandwidth == 6 * 2 * LINK
    assert 2 * CHIPS['tpu7x'].ici_bandwidth == 6 * 2 * LINK  # two devices a chip


@pytest.mark.parametrize(
    ('kind', 'group', 'expected'),
    [
        # A ring of 16 sends both ways: V/W x 15/16, W being twice a link.
        ('all-gather', RING, 100 * MB * 15 / 16 / (2 * LINK)),
        ('all-gather', row(3, 16, 16), 100 * MB * 15 / 16 / (2 * LINK)),
        # Summed and told: twice that. Of a reduce-scatter the result is one part in 16.
        ('all-reduce', RING, 2 * 100 * MB * 15 / 16 / (2 * LINK)),
        ('reduce-scatter', RING, 16 * 100 * MB * 15 / 16 / (2 * LINK)),
        # Over two dims both pairs of links are in use.
        ('all-gather', ALL, 100 * MB * 255 / 256 / (4 * LINK)),
        ('all-reduce', ALL, 2 * 100 * MB * 255 / 256 / (4 * LINK)),
        # Half a side is a line: what its end lacks comes to it over one link.
        ('all-gather', HALF, 100 * MB * 7 / 8 / LINK),
        # Every fourth of a side: a ring, whose links three other groups want, too.
        ('all-gather', row(0, 4, 4), 100 * MB * 3 / 4 / (2 * LINK / 4)),
        ('all-gather', row(0, 2, 4), 100 * MB * 3 / 4 / (LINK / 2)),
        # V/4W for V = 16 x 100 MB in all; in a line of 8, half of the 4 first ones' data goes over the middle link.
        ('all-to-all', RING, 16 * 100 * MB / 4 / (2 * LINK)),
        ('ragged-all-to-all', RING, 16 * 100 * MB / 4 / (2 * LINK)),
        ('all-to-all', HALF, 4 * 100 * MB / 2 / LINK),
        # Over two dims each byte goes a quarter of a ring in both.
        ('all-to-all', ALL, 16 * 100 * MB / 4 / (2 * LINK)),
        # To the neighbour, in one direction; 4 away, each link carries what 4 send; the ends of a ring are neighbours.
        ('collective-permute', (0, 1), 100 * MB / LINK),
        ('collective-permute', (0, 64), 4 * 100 * MB / LINK),
        ('collective-permute', (15, 0), 100 * MB / LINK),
        ('collective-permute', (0, 8), 8 * 100 * MB / LINK),
    ],
)  # fmt: skip
def test_a_collective_takes_what_the_formula_says(kind, group, expected):
    assert V5E.seconds(kind, 100 * MB, group) == pytest.approx(expected)


def test_a_small_one_takes_as_long_as_its_way():
    assert V5E.seconds('all-gather', 1, RING) == 8 * HOP
    assert V5E.seconds('all-reduce', 1, ALL) == 16 * HOP
    assert V5E.seconds('collective-permute', 1, (0, 1)) == HOP


@pytest.mark.parametrize(
    ('slice_', 'group', 'rings'),
    [
        (grid('v5e', 8, 16), row(0, 1, 16), True),  # only a side of 16 closes
        (grid('v5e', 8, 16), row(0, 16, 8), False),
        (grid('v6e', 8, 8), row(0, 1, 8), False),
        (grid('v5p', 4, 4, 8), row(0, 1, 8), True),  # whole cubes close on all sides
        (grid('v5p', 4, 4, 8), row(0, 32, 4), True),
        (grid('v5p', 2, 4, 4), row(0, 1, 4), False),  # less than a cube does not
    ],
)
def test_which_sides_close_to_rings(slice_, group, rings):
    link = slice_.chip.ici_bandwidth / 2 / len(slice_.sides)
    size, peers = 100 * MB, len(group)
    expected = size * (peers - 1) / peers / (link * (2 if rings else 1))
    assert slice_.seconds('all-gather', size, group) == pytest.approx(expected)
    far = 1 if rings else peers - 1
    assert slice_.seconds('collective-permute', size, (group[0], group[-1])) == pytest.approx(far * size / link)


def test_over_a_part_of_two_dims():
    """4 x 4 of 16 x 16: lines along both."""
    group = [16 * i + j for i in range(4) for j in range(4)]
    assert V5E.seconds('all-gather', 16 * MB, group) == pytest.approx(15 * MB / (2 * LINK))


def test_two_devices_of_a_chip_share_its_links():
    cube = grid('tpu7x', 4, 4, 4, devices=2)
    link = 2 * LINK  # of a chip
    chip, one_each, both = (0, 1), row(0, 2, 4), row(0, 1, 8)
    size = 80 * MB
    # Every second device of a ring of 4 chips, while the others do the same: each has half of both links.
    assert cube.seconds('all-gather', size, one_each) == pytest.approx(size * 3 / 4 / (2 * link / 2))
    # All 8 devices of the 4 chips: what comes to a chip is for both.
    assert cube.seconds('all-gather', size, both) == pytest.approx(size * 3 / 4 / (2 * link))
    # What is exchanged differs from device to device.
    assert cube.seconds('all-to-all', size, both) == pytest.approx(size * 4 / 4 / (2 * link / 2))
    assert cube.seconds('collective-permute', size, (0, 2)) == pytest.approx(size / (link / 2))
    # Within a chip no link is needed.
    assert cube.seconds('all-reduce', size, chip) == size / cube.chip.hbm_bandwidth


@pytest.mark.parametrize(('kind', 'passes'), [('all-reduce', 2), ('all-gather', 1), ('send', 1)])
def test_between_slices_it_is_the_network_that_counts(kind, passes):
    seconds = V5E.seconds(f'{kind} between slices', 100 * MB, ())
    assert seconds == pytest.approx(passes * 100 * MB / CHIPS['v5e'].dcn_bandwidth)


def test_a_torus_of_devices_takes_their_coordinates():
    @dataclasses.dataclass
    class Device:
        coords: list[int]

    devices = [Device([x, y, 0]) for y in range(4) for x in range(2)]
    found = torus(CHIPS['v5e'], '2x4', devices)
    assert (found.sides, found.coordinates[:3]) == ((2, 4), ((0, 0), (1, 0), (0, 1)))

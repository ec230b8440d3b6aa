"""Points of a sweep and their names."""

import itertools

import numpy as np
import pytest

from tpu_llm.config import ConfigError
from tpu_llm.optim.schedule import Schedule
from tpu_llm.scaling.combinators import chain, integers, log_uniform, name, product, random, uniform, zip_


def test_product_turns_the_last_fastest():
    points = list(product(a=[1, 2], b=['x', 'y', 'z']))
    assert points == [{'a': a, 'b': b} for a, b in itertools.product([1, 2], 'xyz')]


def test_combinators_nest():
    shapes = zip_(width=[64, 128], heads=[2, 4])
    points = list(chain(product(shapes, rate=[1, 3]), [{'width': 256}]))
    assert points == [
        {'width': 64, 'heads': 2, 'rate': 1},
        {'width': 64, 'heads': 2, 'rate': 3},
        {'width': 128, 'heads': 4, 'rate': 1},
        {'width': 128, 'heads': 4, 'rate': 3},
        {'width': 256},
    ]


def test_zip_and_product_say_what_does_not_fit():
    with pytest.raises(ConfigError, match='zip_ was given 2, 3 values; give equally many'):
        list(zip_(a=[1, 2], b=[1, 2, 3]))
    with pytest.raises(ConfigError, match="'a' is given twice in one point"):
        list(product([{'a': 1}], a=[1, 2]))


def test_random_points_keep_their_values_when_there_are_more_of_them():
    few = list(random(4, seed=3, rate=log_uniform(1e-4, 1e-1), layers=integers(2, 5)))
    more = list(random(9, seed=3, width=[64, 128], rate=log_uniform(1e-4, 1e-1), layers=integers(2, 5)))
    assert [{key: point[key] for key in ('rate', 'layers')} for point in more[:4]] == few
    assert list(random(4, seed=4, rate=log_uniform(1e-4, 1e-1), layers=integers(2, 5))) != few


def test_random_values_are_spread_as_said():
    points = list(
        random(2000, linear=uniform(-1, 3), rate=log_uniform(1e-4, 1e-1), layers=integers(2, 5), width=[64, 128])
    )
    linear, rate = (np.array([point[key] for point in points]) for key in ('linear', 'rate'))
    assert (linear.min() >= -1, linear.max() <= 3) == (True, True)
    # Four standard errors of the means of uniform distributions of widths 4 and 3 (in decades).
    assert abs(linear.mean() - 1) < 4 * 4 / np.sqrt(12 * 2000)
    assert abs(np.log10(rate).mean() + 2.5) < 4 * 3 / np.sqrt(12 * 2000)
    assert abs(np.corrcoef(linear, rate)[0, 1]) < 0.1
    assert {point['layers'] for point in points} == {2, 3, 4, 5}
    assert {point['width'] for point in points} == {64, 128}


def test_drawn_numbers_are_short():
    for point in random(20, rate=log_uniform(1e-4, 1e-1)):
        assert point['rate'] == float(f'{point["rate"]:.3g}')


@pytest.mark.parametrize(
    ('point', 'said'),
    [
        ({'rate': 0.003, 'width': 64}, 'rate=0.003,width=64'),
        ({'rate': 1e-5, 'budget': 3e15, 'tied': True}, 'rate=1e-05,budget=3e15,tied=True'),
        ({'betas': (0.9, 0.95), 'schedule': Schedule(peak=1.0)}, 'betas=0.9x0.95,schedule=Schedule'),
    ],
)
def test_names(point, said):
    assert name(point) == said


def test_a_name_that_no_folder_can_have():
    with pytest.raises(ConfigError, match=r'data = .a/b. cannot be part of a folder.s name'):
        name({'data': 'a/b'})
    with pytest.raises(ConfigError, match='without values'):
        name({})
    with pytest.raises(ConfigError, match='0 < low'):
        log_uniform(0, 1)

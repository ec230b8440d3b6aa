"""How an optimizer reads a parameter's shape."""

import pytest

from tpu_llm.optim.params import Axes, ParamInfo, matrix

# (dims, what is summed, stacked dims, rows and columns of the linear map)
KERNELS = [
    ('DNH', 'D', 0, Axes((0,), (1, 2))),
    ('LNHD', 'NH', 1, Axes((1, 2), (3,))),
    ('LEDF', 'D', 2, Axes((2,), (3,))),
    ('EFD', 'F', 1, Axes((1,), (2,))),
    ('LDE', 'D', 1, Axes((1,), (2,))),
    ('LD', 'D', 1, None),  # to a number: nothing to be a column
]

# (path, dims, stacked dims, rows and columns)
OTHERS = [
    ('embed.table', 'VD', 0, Axes((0,), (1,))),
    ('query.bias', 'LNH', 1, None),
    ('query_norm.scale', 'NH', 0, None),
    ('up.bias', 'LEF', 2, None),
    ('router.bias', 'LE', 1, None),
    ('router.bias', 'E', 0, None),
    ('norm.scale', 'D', 0, None),
]


@pytest.mark.parametrize(('dims', 'summed', 'stack', 'axes'), KERNELS)
def test_a_linear_map_has_what_is_summed_as_its_rows(dims, summed, stack, axes):
    info = ParamInfo(dims, summed)
    assert info.stack == stack
    assert info.linear_map == axes
    assert matrix('kernel', info) == axes


@pytest.mark.parametrize(('path', 'dims', 'stack', 'axes'), OTHERS)
def test_a_table_is_a_matrix_and_a_bias_is_none(path, dims, stack, axes):
    info = ParamInfo(dims, '')
    assert info.stack == stack
    assert info.linear_map is None
    assert matrix(path, info) == axes


def test_padding_of_the_vocabulary_is_not_counted():
    info = ParamInfo('VD', '', padding=5)
    assert info.count((24, 16), (0,)) == 19
    assert info.count((24, 16), (1,)) == 16
    assert info.count((24, 16), (0, 1)) == 19 * 16

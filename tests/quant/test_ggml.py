"""The block formats equal ggml's, bit for bit: stored blocks, and random ones beside the `gguf` package."""

import pathlib

import numpy as np
import pytest

from tpu_llm.quant import ggml

DECODED = [kind.name for kind in ggml.FORMATS.values() if kind.decodes]
ENCODED = [kind.name for kind in ggml.FORMATS.values() if kind.encodes]


@pytest.fixture(scope='module')
def golden():
    with np.load(pathlib.Path(__file__).parents[1] / 'golden' / 'ggml' / 'blocks.npz') as arrays:
        return dict(arrays)


@pytest.fixture(scope='module')
def quants():
    return pytest.importorskip('gguf', reason='gguf is not installed (pip install gguf)').quants


def kind_of(quants, name):
    return quants.GGMLQuantizationType[name]


def assert_same_bits(got, expected):
    assert got.dtype == expected.dtype == np.float32
    nans = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), nans)
    np.testing.assert_array_equal(got.view(np.uint32)[~nans], expected.view(np.uint32)[~nans])


def test_what_is_read_and_written():
    assert set(DECODED) == {'F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q4_K', 'Q5_K', 'Q6_K'}
    assert set(ENCODED) == {'F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1'}


@pytest.mark.parametrize('name', DECODED)
def test_stored_blocks_decode(golden, name):
    assert_same_bits(ggml.decode(name, golden[f'{name}.blocks']), golden[f'{name}.values'])


@pytest.mark.parametrize('name', ENCODED)
def test_stored_numbers_encode(golden, name):
    np.testing.assert_array_equal(ggml.encode(name, golden[f'{name}.given']), golden[f'{name}.encoded'])


def test_numbers_and_sizes_are_those_of_gguf(quants):
    for kind in ggml.FORMATS.values():
        theirs = kind_of(quants, kind.name)
        assert (kind.number, kind.block_values, kind.block_bytes) == (theirs, *quants.GGML_QUANT_SIZES[theirs]), kind


@pytest.mark.parametrize('name', DECODED)
@pytest.mark.filterwarnings('ignore::RuntimeWarning')  # random scales overflow, here and there
def test_random_blocks_decode_as_in_gguf(quants, name):
    blocks = np.random.default_rng(0).integers(0, 256, (2, 3, ggml.FORMATS[name].block_bytes * 150), np.uint8)
    got = ggml.decode(name, blocks)
    assert got.shape == (2, 3, ggml.FORMATS[name].block_values * 150)
    assert_same_bits(got, quants.dequantize(blocks, kind_of(quants, name)).reshape(got.shape))


@pytest.mark.parametrize('name', ENCODED)
def test_numbers_encode_as_in_gguf(quants, name):
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((64, 320)) * np.exp(2 * rng.standard_normal((64, 1)))
    rows[0] = 0
    rows[1, :32] = -np.arange(32)  # largest by magnitude is negative
    rows[2, :64] = np.arange(64) % 32 - 16  # the largest is there twice, with either sign
    rows[3, :32] = np.arange(32) - 127 + 0.5  # halves between two steps of Q8_0
    rows[3, 31] = 127
    rows[4] *= 1e-7  # a scale below float16's normal numbers
    rows = rows.astype(np.float32)
    theirs = quants.quantize(rows, kind_of(quants, name)).view(np.uint8)
    np.testing.assert_array_equal(ggml.encode(name, rows), theirs)


def test_bfloat16_keeps_a_nan_a_nan_and_rounds_to_even(quants):
    bits = np.array([0x7F800001, 0xFFFFFFFF, 0x7F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF], np.uint32)
    values = bits.view(np.float32)[None]
    got = ggml.encode('BF16', values)
    assert got.view(np.uint16).tolist() == [[0x7FC0, 0xFFFF, 0x7F80, 0x3F80, 0x3F82, 0x3F81, 0x7F80]]
    np.testing.assert_array_equal(got, quants.quantize(values, kind_of(quants, 'BF16')))


@pytest.mark.parametrize(('name', 'steps'), [('Q8_0', 0.5), ('Q4_0', 1.0), ('Q4_1', 0.5)])
def test_what_is_encoded_comes_back_within_a_step(name, steps):
    values = np.random.default_rng(2).standard_normal((50, 3200)).astype(np.float32)
    blocks = ggml.encode(name, values)
    scales = blocks.reshape(-1, ggml.FORMATS[name].block_bytes)[:, :2].copy().view(np.float16).astype(np.float32)
    wrong = abs(ggml.decode(name, blocks) - values).reshape(-1, 32)
    # The scale is rounded to float16, by 2⁻¹¹ of itself, and then taken up to 127 times.
    assert (wrong <= abs(scales) * (steps + 128 * 2**-11)).all()
    assert wrong.max() > 0


@pytest.mark.parametrize('name', ['F32', 'F16', 'BF16'])
def test_numbers_that_fit_come_back_exactly(name):
    values = np.array([[0.0, -0.0, 1.5, -(2.0**-14), np.inf, 240.0]], np.float32)
    assert_same_bits(ggml.decode(name, ggml.encode(name, values)), values)


def test_a_block_too_small_for_a_scale_is_zero():
    values = np.full((1, 32), 1e-40, np.float32)
    for name in ('Q8_0', 'Q4_0', 'Q4_1'):
        assert not ggml.decode(name, ggml.encode(name, values)).any()


def test_no_rows():
    assert ggml.decode('Q4_0', np.zeros((0, 36), np.uint8)).shape == (0, 64)
    assert ggml.encode('Q4_0', np.zeros((0, 64), np.float32)).shape == (0, 36)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match='35 bytes are not a whole number of Q8_0 blocks of 34'):
        ggml.decode('Q8_0', np.zeros((2, 35), np.uint8))
    with pytest.raises(ValueError, match='rows of 48 are not a whole number of Q4_0 blocks of 32'):
        ggml.encode('Q4_0', np.zeros((2, 48), np.float32))
    large = np.full((1, 32), 7e4, np.float32)
    with pytest.raises(ValueError, match=r'7e\+04 is beyond float16'):
        ggml.encode('F16', large)
    with pytest.raises(ValueError, match='is beyond float16'):
        ggml.encode('Q8_0', large * 1000)


@pytest.mark.parametrize('name', ['Q8_0', 'Q4_0', 'Q4_1'])
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_no_quantised_block_holds_what_is_not_finite(name, bad):
    values = np.ones((1, 32), np.float32)
    values[0, 3] = bad
    with pytest.raises(ValueError, match='infinite or NaN'):
        ggml.encode(name, values)

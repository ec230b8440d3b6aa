"""safetensors files: read as the `safetensors` package reads them, written for it, and refused in one line."""

import json
import pickle
import struct

import jax.numpy as jnp
import mutations
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tpu_llm.checkpoint import safetensors_file, weight_file
from tpu_llm.checkpoint.safetensors_file import DTYPES, Reader, open_folder, write
from tpu_llm.checkpoint.weight_file import FileError
from tpu_llm.config import ConfigError

PLAIN = [dtype for dtype in DTYPES.values() if dtype.isbuiltin == 1]  # what NumPy has without ml_dtypes


def arrays():
    rng = np.random.default_rng(0)
    tensors = {f'x.{name}': (8 * rng.standard_normal((3, 4))).astype(dtype) for name, dtype in DTYPES.items()}
    return tensors | {
        'scalar': np.float32([2])[0:].reshape(()),
        'empty': np.zeros((0, 4), np.int8),
        'ünï 🙂': np.ones(5),
    }


def save(path, tensors, metadata=None):
    write(path, [(name, x.dtype, x.shape) for name, x in tensors.items()], tensors.__getitem__, metadata)
    return path


def assert_equal(got, expected):
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert got.tobytes() == expected.tobytes()


def by_hand(path, header, data=b''):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(text)) + text + data)
    return path


def entry(start, stop, dtype='U8', shape=None):
    return {'dtype': dtype, 'shape': [stop - start] if shape is None else shape, 'data_offsets': [start, stop]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'm.safetensors'


@pytest.fixture(scope='module')
def ours(tmp_path_factory):
    return save(tmp_path_factory.mktemp('safetensors') / 'ours.safetensors', arrays(), {'format': 'pt'})


@pytest.fixture(scope='module')
def library():
    return pytest.importorskip('safetensors.numpy', reason='safetensors is not installed (pip install safetensors)')


# ------------------------------------------------------------------------------------------ round trips


def test_what_was_written_is_read(ours):
    reader = Reader(ours)
    assert reader.metadata == {'format': 'pt'}
    assert reader.tensors.keys() == arrays().keys()
    for name, expected in arrays().items():
        got = reader.read(name)
        assert_equal(got, expected)
        assert got.flags.aligned
        assert not got.flags.owndata, 'a view of the file'
        assert not got.flags.writeable


def test_a_slice_reads_only_the_rows_of_its_first_dim(path, monkeypatch):
    whole = np.arange(5 * 4 * 3, dtype=np.float32).reshape(5, 4, 3)
    reader, read = Reader(save(path, {'w': whole})), []
    of_file = weight_file.WeightFile.read
    monkeypatch.setattr(weight_file.WeightFile, 'read', lambda *args: read.append(args[1:]) or of_file(*args))
    start = reader.tensors['w'].start
    for cuts in [
        (slice(1, 3),),
        (slice(1, 3), slice(None), slice(-2, None)),
        (slice(1, 3), slice(3, 1)),
        (slice(4, 2), slice(0, 2)),
        (),
    ]:
        assert_equal(reader.read('w', cuts), np.ascontiguousarray(whole[cuts]))
    assert read == [(start + 48, start + 144)] * 3 + [(start + 192, start + 192), (start, start + 240)]


def test_only_slices_without_a_step_that_fit_the_shape(ours):
    for cuts in [(slice(0, 2, 2),), (slice(None),) * 3]:
        with pytest.raises(ValueError, match='are not slices without a step of shape'):
            Reader(ours).read('x.F32', cuts)


def test_a_tensor_that_the_file_does_not_align_is_copied(path):
    data = b'\7' + np.arange(3, dtype='<f4').tobytes()
    got = Reader(by_hand(path, {'a': entry(0, 1), 'w': entry(1, 13, 'F32', [3])}, data)).read('w')
    assert got.flags.aligned
    np.testing.assert_array_equal(got, [0, 1, 2])


def test_the_library_reads_what_we_write(library, path):
    tensors = {name: x for name, x in arrays().items() if x.dtype in PLAIN}
    theirs = library.load_file(save(path, tensors, {'format': 'pt'}))
    assert theirs.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert_equal(theirs[name], expected)


def test_the_library_names_our_dtypes_as_we_do(library, ours):
    import safetensors

    with safetensors.safe_open(ours, 'np') as theirs:
        assert theirs.metadata() == {'format': 'pt'}
        assert {name: theirs.get_slice(f'x.{name}').get_dtype() for name in DTYPES} == {name: name for name in DTYPES}


def test_we_read_what_the_library_writes(library, path):
    tensors = {name: x for name, x in arrays().items() if x.dtype in PLAIN}
    library.save_file(tensors, path, {'a': 'b'})
    reader = Reader(path)
    assert reader.metadata == {'a': 'b'}
    assert reader.tensors.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert_equal(reader.read(name), expected)


names = st.text(st.characters(exclude_categories=['Cs']), max_size=10).filter(lambda name: name != '__metadata__')


@settings(max_examples=60, deadline=None)
@given(
    tensors=st.dictionaries(
        names,
        hnp.arrays(
            st.sampled_from(PLAIN),
            hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4),
        ),
        max_size=5,
    ),
    metadata=st.dictionaries(st.text(st.characters(exclude_categories=['Cs'])), names, max_size=2),
)
def test_any_file_comes_back(tmp_path_factory, tensors, metadata):
    path = tmp_path_factory.getbasetemp() / 'any.safetensors'
    reader = Reader(save(path, tensors, metadata))
    assert reader.metadata == metadata
    assert reader.tensors.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert_equal(reader.read(name), expected)


def test_arrays_of_jax_are_written(path):
    save(path, {'w': jnp.ones((2, 3), jnp.bfloat16)})
    assert_equal(Reader(path).read('w'), np.ones((2, 3), jnp.bfloat16))


# ------------------------------------------------------------------------------------------------ folders


def shards(folder, places):
    for file in {*places.values()}:
        save(folder / file, {name: np.float32([len(name)]) for name in places if places[name] == file})
    (folder / safetensors_file.INDEX).write_text(json.dumps({'metadata': {'total_size': 1}, 'weight_map': places}))


def test_a_folder_with_one_file(tmp_path):
    save(tmp_path / 'model.safetensors', {'a': np.zeros(2), 'b': np.ones(3)})
    readers = open_folder(tmp_path)
    assert readers.keys() == {'a', 'b'}
    np.testing.assert_array_equal(readers['b'].read('b'), np.ones(3))


def test_a_folder_with_shards(tmp_path):
    places = {'a': 'model-1.safetensors', 'bb': 'model-2.safetensors', 'ccc': 'model-1.safetensors'}
    shards(tmp_path, places)
    readers = open_folder(tmp_path)
    assert {name: reader.path.name for name, reader in readers.items()} == places
    assert [readers[name].read(name).item() for name in places] == [1, 2, 3]
    assert readers['a'] is readers['ccc']


def refused(call, *args, match):
    with pytest.raises(FileError, match=match) as caught:
        call(*args)
    assert str(caught.value).startswith(str(args[0]))
    assert '\n' not in str(caught.value)


def test_an_index_that_is_not_of_its_files(tmp_path):
    shards(tmp_path, {'a': 'one.safetensors', 'b': 'two.safetensors'})
    index = tmp_path / safetensors_file.INDEX

    def write_index(text):
        index.write_text(text if isinstance(text, str) else json.dumps({'weight_map': text}))

    write_index({'a': 'one.safetensors', 'b': 'one.safetensors'})
    refused(open_folder, tmp_path, match="it is not of these files: 'b' is not in one.safetensors")
    write_index({'a': 'one.safetensors', 'b': 'two.safetensors', 'c': 'two.safetensors'})
    refused(open_folder, tmp_path, match="'c' is not in two.safetensors")
    save(tmp_path / 'two.safetensors', {name: np.zeros(1) for name in 'abdefg'})
    write_index({'a': 'one.safetensors', 'b': 'two.safetensors'})
    refused(open_folder, tmp_path, match=r"'a' is in two.safetensors; .*\(and 2 more\)")
    write_index({'a': 'one.safetensors', 'b': '3.safetensors'})
    refused(open_folder, tmp_path, match="1 of 2 files are missing: '3.safetensors'")
    save(tmp_path.parent / 'outside.safetensors', {'a': np.zeros(1)})
    write_index({'a': '../outside.safetensors'})
    refused(open_folder, tmp_path, match="files are missing: '../outside.safetensors'")
    for text in ('{"weight_map": [1]}', '{"weight_map": {"a": 1}}', '{}'):
        write_index(text)
        refused(open_folder, tmp_path, match='its weight_map does not give the file of each tensor')
    write_index('{"weight_map": {"a": "one", "a": "two"}}')
    refused(open_folder, tmp_path, match="the index is not JSON: the name 'a' is there twice")


def test_a_folder_with_a_pickle_only(tmp_path):
    for name in ('pytorch_model.bin', 'model.pt', 'a.pth', 'b.ckpt'):
        folder = tmp_path / name.replace('.', '-')
        folder.mkdir()
        (folder / name).write_bytes(pickle.dumps({'a': 1}))
        refused(open_folder, folder, match=rf'{name} is a pickle, which runs code .* save_pretrained\(safe_serial')


def test_a_folder_without_weights(tmp_path):
    refused(open_folder, tmp_path, match=r'has neither model.safetensors nor model.safetensors.index.json$')
    (tmp_path / 'config.json').write_text('{}')
    refused(open_folder, tmp_path, match='index.json; there are config.json')
    refused(open_folder, tmp_path / 'nowhere', match='has neither')


# -------------------------------------------------------------------------------------- what is refused


def test_an_unknown_name_is_answered_with_the_nearest(ours):
    with pytest.raises(ConfigError, match=r"has no tensor 'x.F46' \(did you mean 'x.F16'\?\)|did you mean 'x.F64'"):
        Reader(ours).read('x.F46')


def test_files_that_are_something_else(path):
    refused(Reader, path, match='is not a file')
    refused(Reader, path.parent, match='is not a file')
    for data, match in [
        (b'', 'it has 0 bytes, too few'),
        (b'1234567', 'it has 7 bytes, too few'),
        (b'PK\3\4 a zip file', 'its header has .* bytes, more than 100000000; it is not safetensors'),
        (struct.pack('<Q', 3) + b'{}', 'its header has 3 bytes, and the file 10; it is cut short'),
        (struct.pack('<Q', 99_000_000) + b'{}', 'its header has 99000000 bytes, and the file 10'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n', 'run git lfs pull'),
    ]:
        path.write_bytes(data)
        refused(Reader, path, match=match)


@pytest.mark.parametrize(
    ('header', 'message'),
    [
        (b'', 'its header is not JSON: Expecting value'),
        (b'{"a": 1', 'its header is not JSON: Expecting'),
        (b'[]', 'its header is not a JSON object'),
        (b'{"a\xff": 1}', "its header is not JSON: 'utf-8' codec"),
        (b'{"a": 1, "a": 2}', "the name 'a' is there twice"),
        (b'{"\\ud800": 1}', r"the name '\\ud800' is no text"),
        (b'{"a": {"shape": [NaN]}}', 'NaN is no JSON'),
        (b'{"a": ' + b'9' * 5000 + b'}', 'its header is not JSON: Exceeds the limit'),
        (b'[' * 200_000, 'its header is nested too deep'),
        (b'{"a":' * 200_000, 'its header is nested too deep'),
        ({'__metadata__': []}, '__metadata__ is not an object of strings'),
        ({'__metadata__': {'a': 1}}, '__metadata__ is not an object of strings'),
        ({'a': 1}, "tensor 'a': it is not described by dtype, shape and data_offsets"),
        ({'a': entry(0, 4) | {'more': 1}}, 'it is not described by'),
        ({'a': entry(0, 4, 'F4')}, "tensor 'a': its dtype is 'F4'; known are BOOL, I8"),
        ({'a': entry(0, 4, 'x\n' * 999)}, r"tensor 'a': its dtype is 'x\\nx"),
        ({'a': entry(0, 4, [[]])}, "tensor 'a': its dtype is no string"),
        ({'a': entry(0, 4, shape=4)}, "tensor 'a': its shape is not a list of sizes"),
        ({'a': entry(0, 4, shape=[-4])}, "tensor 'a': its shape is not a list of sizes"),
        ({'a': entry(0, 4, shape=[4.0])}, "tensor 'a': its shape is not a list of sizes"),
        ({'a': entry(0, 4, shape=[True, 4])}, "tensor 'a': its shape is not a list of sizes"),
        ({'a': entry(0, 4, shape=[2**62, 2])}, "tensor 'a': its shape is not a list of sizes"),
        ({'a': entry(0, 0, shape=[0, 2**62, 2])}, "tensor 'a': its shape is not a list of sizes"),
        ({'a': entry(0, 4, shape=[2**62] * 10_000)}, "tensor 'a': its shape is not a list of sizes"),
        ({'a': entry(0, 4, shape=[1] * 33)}, "tensor 'a': its shape is not a list of sizes"),
        ({'a': entry(0, 4) | {'data_offsets': [0]}}, "tensor 'a': its data_offsets are not a start and a stop"),
        ({'a': entry(0, 4) | {'data_offsets': [4, 0]}}, "tensor 'a': its data_offsets are not a start and a stop"),
        ({'a': entry(0, 4) | {'data_offsets': [-4, 0]}}, "tensor 'a': its data_offsets are not a start and a stop"),
        ({'a': entry(0, 4, shape=[5])}, r"tensor 'a': it has 4 bytes, and U8 of shape \[5\] needs 5"),
        ({'a': entry(0, 4, 'F32', [4])}, r"tensor 'a': it has 4 bytes, and F32 of shape \[4\] needs 16"),
        ({'a': entry(0, 5)}, "tensor 'a': it ends at byte 73 of a file of 72; the file is cut short or damaged"),
        ({'a': entry(0, 2**61)}, "tensor 'a': it ends at byte"),
        ({'a': entry(0, 3)}, '1 bytes at its end belong to no tensor'),
        ({}, '4 bytes at its end belong to no tensor'),
        ({'a': entry(0, 3), 'b': entry(2, 4)}, "tensor 'b': it overlaps another"),
        ({'a': entry(0, 4), 'b': entry(2, 2)}, "tensor 'b': it overlaps another"),
        ({'a': entry(0, 1), 'b': entry(2, 4)}, "tensor 'b': it begins 1 bytes after the one before"),
        ({'a': entry(1, 4)}, "tensor 'a': it begins 1 bytes after the one before"),
    ],
)
def test_headers_that_are_not_sound(path, header, message):
    refused(Reader, by_hand(path, header, bytes(4)), match=message)


def test_a_boolean_that_is_neither(path):
    reader = Reader(by_hand(path, {'a': entry(0, 4, 'BOOL')}, b'\0\1\2\1'))
    with pytest.raises(FileError, match="tensor 'a': a boolean is neither 0 nor 1"):
        reader.read('a')
    np.testing.assert_array_equal(reader.read('a', (slice(0, 2),)), [False, True])


def test_a_file_cut_short_since_it_was_opened(path):
    reader = Reader(save(path, {'a': np.zeros(9)}))
    path.write_bytes(path.read_bytes()[:-1])
    refused_by = rf'{path}: byte {reader.tensors["a"].stop} is gone; it was cut short while it was read'
    with pytest.raises(FileError, match=refused_by):
        reader.read('a')


@pytest.mark.parametrize(
    ('tensors', 'message'),
    [
        ([('w', np.float32, (1,))] * 2, "tensor 'w' cannot be written: the name is there twice, or no name"),
        ([('__metadata__', np.float32, (1,))], 'cannot be written'),
        ([('\ud800', np.float32, (1,))], 'cannot be written'),
        ([('w', np.complex128, (1,))], "tensor 'w' cannot be written: safetensors has no complex128"),
    ],
)
def test_what_cannot_be_written_leaves_no_file(path, tensors, message):
    with pytest.raises(ConfigError, match=message):
        write(path, tensors, lambda name: np.zeros(1, np.float32))
    assert list(path.parent.iterdir()) == []


def test_other_data_than_announced_leaves_what_was_there(path):
    before = save(path, {'w': np.zeros(2)}).read_bytes()
    for data in (np.zeros(3, np.float32), np.zeros(2)):
        with pytest.raises(ValueError, match=r"tensor 'w' is float.*, and float32\[2\] was announced"):
            write(path, [('w', np.float32, (2,))], lambda name, data=data: data)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


TEXTS = [
    b'[',
    b'{',
    b'"',
    b'\\ud800',
    b'-1',
    b'18446744073709551616',
    b'9' * 5000,
    b'1e999',
    b'NaN',
    b'null',
    b',"a":{}',
]
TEXTS += [b'[' * 3000, b'{"a":' * 3000, b'"F64"', b'"BOOL"', b'\xff', b'"__metadata__":{},']


def fuzz(ours, path, count):
    small = {'a': np.arange(6, dtype=np.float32).reshape(2, 3), 'b': np.array([True, False])}
    seeds = [ours.read_bytes(), save(path, small, {'format': 'pt'}).read_bytes()]

    def read():
        reader = Reader(path)
        for name, info in reader.tensors.items():
            assert reader.read(name).shape == info.shape

    done, refusals = mutations.survive(path, mutations.mutations(seeds, count, TEXTS), read, memory=1_000_000)
    assert done > count / 50
    assert refusals > count / 5


def test_damaged_files_are_read_or_refused(ours, path):
    fuzz(ours, path, 400)


@pytest.mark.full
def test_ten_thousand_damaged_files_are_read_or_refused(ours, path):
    fuzz(ours, path, 10_000)

"""Others' weights on gs://, against a real GCS API server: read by range, and there only when they are whole."""

import json

import numpy as np
import pytest
from etils import epath

from tpu_llm.checkpoint import cloud, gguf_file, safetensors_file
from tpu_llm.checkpoint.weight_file import FileError


def save(path, tensors):
    table = [(name, x.dtype, x.shape) for name, x in tensors.items()]
    safetensors_file.write(path, table, tensors.__getitem__)


@pytest.fixture
def ranges(monkeypatch):
    """Bytes asked for by each request, as they are made."""
    asked, cat_file = [], cloud.filesystem().cat_file

    def listening(path, start, stop):
        asked.append(stop - start)
        return cat_file(path, start, stop)

    monkeypatch.setattr(cloud.filesystem(), 'cat_file', listening)
    return asked


def test_safetensors_by_range(bucket, ranges):
    tensors = {'w': np.arange(4000, dtype=np.float32).reshape(40, 100), 'none': np.zeros((0, 3)), 'b': np.ones(3, bool)}
    save(f'{bucket}/model.safetensors', tensors)
    reader = safetensors_file.Reader(f'{bucket}/model.safetensors')
    for name, expected in tensors.items():
        np.testing.assert_array_equal(reader.read(name), expected)
    ranges.clear()
    np.testing.assert_array_equal(reader.read('w', (slice(3, 5), slice(10, 20))), tensors['w'][3:5, 10:20])
    assert ranges == [2 * 400]


def test_shards(bucket):
    save(f'{bucket}/1.safetensors', {'a': np.zeros(2)})
    save(f'{bucket}/2.safetensors', {'b': np.ones(2)})
    index = epath.Path(bucket) / safetensors_file.INDEX
    index.write_text(json.dumps({'weight_map': {'a': '1.safetensors', 'b': '2.safetensors'}}))
    readers = safetensors_file.open_folder(bucket)
    np.testing.assert_array_equal(readers['b'].read('b'), np.ones(2))


def test_gguf_by_range(bucket, ranges):
    path = f'{bucket}/model.gguf'
    words = [f'word {i}' for i in range(300_000)]
    values = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    tensors = {'w': values, 'b': values[0]}
    gguf_file.write(path, {'words': words}, [('w', 'Q8_0', (16, 64)), ('b', 'F32', (64,))], tensors.__getitem__)
    reader = gguf_file.Reader(path)
    assert reader.metadata == {'words': words}, 'longer than what is fetched at first'
    assert sum(ranges) < 3 * epath.Path(path).stat().length
    whole = reader.read('w')
    assert abs(whole - values).max() < 0.02
    ranges.clear()
    np.testing.assert_array_equal(reader.read('w', (slice(2, 5),)), whole[2:5])
    assert ranges == [3 * 2 * 34]


def test_what_is_not_there(bucket):
    for kind in (safetensors_file.Reader, gguf_file.Reader):
        with pytest.raises(FileError, match=f'{bucket}/nothing is not a file'):
            kind(f'{bucket}/nothing')
    with pytest.raises(FileError, match='has neither'):
        safetensors_file.open_folder(bucket)


@pytest.mark.parametrize('megabytes', [1, 40], ids=['in one request', 'in several'])
def test_a_file_appears_whole_or_not_at_all(bucket, megabytes):
    path = epath.Path(bucket) / 'model.safetensors'
    tensors = {'a': np.arange(megabytes << 18, dtype=np.float32), 'b': np.ones(3, np.int8)}

    def stop(name):
        if name == 'b':
            raise KeyboardInterrupt
        return tensors[name]

    table = [(name, x.dtype, x.shape) for name, x in tensors.items()]
    with pytest.raises(KeyboardInterrupt):
        safetensors_file.write(path, table, stop)
    assert not path.exists()
    save(path, tensors)
    reader = safetensors_file.Reader(path)
    for name, expected in tensors.items():
        np.testing.assert_array_equal(reader.read(name), expected)

"""GGUF files that are not what they say are refused in one line, and what cannot be written leaves no file."""

import struct

import mutations
import numpy as np
import pytest
from gguf_parts import METADATA, arrays, by_hand, entry, pair, save, string

from tpu_llm.checkpoint import gguf_header
from tpu_llm.checkpoint.gguf_file import Reader, write
from tpu_llm.checkpoint.weight_file import FileError
from tpu_llm.config import ConfigError
from tpu_llm.quant import ggml


@pytest.fixture(scope='module')
def ours(tmp_path_factory):
    return save(tmp_path_factory.mktemp('gguf') / 'ours.gguf', METADATA, arrays())


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'm.gguf'


U32, STRING, ARRAY, BOOL = 4, 8, 9, 7


def refused(path, message):
    with pytest.raises(FileError, match=message) as caught:
        Reader(path)
    assert str(caught.value).startswith(str(path))
    assert '\n' not in str(caught.value)


def test_files_that_are_something_else(path):
    refused(path, 'is not a file')
    refused(path.parent, 'is not a file')
    for data in (b'', b'GG', b'PK\3\4 and so on', bytes(100)):
        path.write_bytes(data)
        refused(path, 'does not begin with GGUF')
    path.write_bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n')
    refused(path, 'run git lfs pull')
    path.write_bytes(b'GGUF' + struct.pack('>IQQ', 3, 0, 0))
    refused(path, 'big-endian')
    for version in (0, 1, 4):
        refused(by_hand(path, version=version), f'its GGUF version is {version}')


@pytest.mark.parametrize(
    ('pairs', 'message'),
    [
        ([pair('a', U32, bytes(4))] * 2, "metadata 'a': it is there twice"),
        ([pair('a', 13, bytes(4))], "metadata 'a': 13 is no type of value"),
        ([pair('a', BOOL, b'\2')], "metadata 'a': a boolean is neither 0 nor 1"),
        ([pair('a', STRING, string(b'\xff'))], "metadata 'a': it holds text that is not UTF-8"),
        ([pair('a', STRING, struct.pack('<Q', 2**63))], "metadata 'a': it ends at byte 9223372036854775853"),
        ([pair('a', ARRAY, struct.pack('<IQ', U32, 2**61))], "metadata 'a': it ends at byte"),
        ([pair('a', ARRAY, struct.pack('<IQ', STRING, 2**61))], 'it announces 2305843009213693952 strings, more'),
        ([pair('a', ARRAY, struct.pack('<IQ', ARRAY, 99))], 'it announces 99 arrays, more'),
        ([pair('a', ARRAY, struct.pack('<IQ', 13, 0))], '13 is no type of value'),
        ([pair('a', ARRAY, struct.pack('<IQ', ARRAY, 1) * 9)], 'arrays are nested more than 4 deep'),
        ([pair('general.alignment', U32, struct.pack('<I', 24))], 'general.alignment is 24, not a power of two'),
        ([pair('general.alignment', U32, bytes(4))], 'general.alignment is 0, not a power of two'),
        ([pair('general.alignment', STRING, string('32'))], "general.alignment is '32', not a power of two"),
    ],
)
def test_metadata_that_is_not_sound(path, pairs, message):
    refused(by_hand(path, pairs), message)


@pytest.mark.parametrize(
    ('entries', 'message'),
    [
        ([entry('w', (1,), 0, 0)] * 2, "tensor 'w': it is there twice"),
        ([entry('w', (1, 1, 1, 1, 1), 0, 0)], "tensor 'w': it has 5 dims, and GGUF at most 4"),
        ([entry('w', (2**62, 4), 0, 0)], r"tensor 'w': its shape \(4, 4611686018427387904\) is larger than any memory"),
        ([entry('w', (0, 2**62, 4), 0, 0)], 'is larger than any memory'),
        ([entry('w', (1,), 0, 7)], "tensor 'w': its offset 7 is not a multiple of 32"),
        ([entry('w', (33,), 8, 0)], "tensor 'w': rows of 33 are not a whole number of Q8_0 blocks of 32"),
        ([entry('w', (), 8, 0)], "tensor 'w': rows of 1 are not a whole number of Q8_0 blocks of 32"),
        ([entry('w', (17,), 0, 0)], "tensor 'w': it ends at byte .*; the file is cut short or damaged"),
        ([entry('w', (1,), 0, 2**64 - 32)], "tensor 'w': it ends at byte"),
        ([entry('w', (1,), 99, 64 + 32)], "tensor 'w': it ends at byte"),
        ([entry('v', (16,), 0, 0), entry('w', (1,), 0, 32)], "tensor 'w': it overlaps 'v'"),
        ([entry('x\n' * 99, (1,), 0, 7)], r"tensor 'x\\nx\\n.*…': its offset"),
    ],
)
def test_tensors_that_are_not_sound(path, entries, message):
    refused(by_hand(path, entries=entries, data=bytes(64)), message)


def test_counts_that_the_file_cannot_hold(path):
    for counts, what in [((2**60, 0), 'tensors'), ((0, 2**60), 'metadata pairs'), ((0, 2), 'metadata pairs')]:
        path.write_bytes(b'GGUF' + struct.pack('<IQQ', 3, *counts) + bytes(20))
        refused(path, f'announces {max(counts)} {what}, more than the file holds')


def test_a_header_without_end(path, monkeypatch):
    monkeypatch.setattr(gguf_header, 'MAX_HEADER_BYTES', 100)
    refused(by_hand(path, [pair('a', STRING, string('x' * 99))]), 'a header has at most 100')


def test_a_cut_file(ours, path):
    data = ours.read_bytes()
    for size in range(4, len(data) - 40, 61):
        path.write_bytes(data[:size])
        refused(path, 'cut short|more than the file holds')


@pytest.mark.parametrize(
    ('metadata', 'tensors', 'message'),
    [
        ({'a': 2**64}, [], "metadata 'a' cannot be written: 18446744073709551616 has more than 64 bits"),
        ({'a': None}, [], "metadata 'a' cannot be written: NoneType is no type of GGUF"),
        ({'a': 1e300}, [], "metadata 'a' cannot be written: float too large"),
        ({'a': [1, 'b']}, [], "metadata 'a' cannot be written: a list of int and str"),
        ({'a': [2**31]}, [], "metadata 'a' cannot be written"),
        ({'a': '\ud800'}, [], "metadata 'a' cannot be written"),
        ({'\ud800': 1}, [], 'cannot be written'),
        ({'a': np.zeros(2, np.complex64)}, [], "metadata 'a' cannot be written: complex64 is no type"),
        ({'general.alignment': 64}, [], 'general.alignment is 64; we write 32: leave it out'),
        (
            {},
            [('w', 'Q4_K', (256,))],
            "tensor 'w' cannot be written: Q4_K is not among F32, F16, Q4_0, Q4_1, Q8_0, BF16",
        ),
        ({}, [('w', 'F32', (1,))] * 2, "tensor 'w' cannot be written: it is there twice"),
        ({}, [('w', 'Q8_0', (2, 33))], "tensor 'w' cannot be written: rows of 33 are not a whole number"),
        ({}, [('w', 'F32', (1,) * 5)], "tensor 'w' cannot be written: it has 5 dims"),
        ({}, [('w' * 64, 'F32', (1,))], 'cannot be written: its name is longer than 63 bytes'),
        ({}, [('w', 'F16', (1,))], "tensor 'w' cannot be written as F16: 1e\\+09 is beyond float16"),
    ],
)
def test_what_cannot_be_written_leaves_no_file(path, metadata, tensors, message):
    with pytest.raises(ConfigError, match=message):
        write(path, metadata, tensors, lambda name: np.full(1, 1e9))
    assert list(path.parent.iterdir()) == []


def test_data_of_another_shape_than_announced(path):
    with pytest.raises(ValueError, match=r"tensor 'w' is \(3,\), and \(2,\) was announced"):
        write(path, {}, [('w', 'F32', (2,))], lambda name: np.zeros(3))
    assert list(path.parent.iterdir()) == []


def fuzz(ours, path, count):
    nested = pair('n', ARRAY, struct.pack('<IQ', ARRAY, 2) + struct.pack('<IQ', U32, 0) * 2)
    blocks = np.random.default_rng(0).integers(0, 99, 210 + 144, np.uint8).tobytes()
    entries = [entry('six', (256,), 14, 0), entry('four', (256,), 12, 224)]
    by_hand(path, [nested], entries, blocks[:210] + bytes(14) + blocks[210:])
    seeds = [ours.read_bytes(), path.read_bytes()]

    def read():
        reader = Reader(path)
        for name, info in reader.tensors.items():
            if info.type in ggml.FORMATS and ggml.FORMATS[info.type].decodes:
                with np.errstate(all='ignore'):
                    assert reader.read(name).shape == info.shape
                    reader.raw(name)

    done, refusals = mutations.survive(path, mutations.mutations(seeds, count), read, memory=200_000)
    assert done > count / 20
    assert refusals > count / 5


def test_damaged_files_are_read_or_refused(ours, path):
    fuzz(ours, path, 400)


@pytest.mark.full
def test_ten_thousand_damaged_files_are_read_or_refused(ours, path):
    fuzz(ours, path, 10_000)

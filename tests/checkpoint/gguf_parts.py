"""GGUF files for tests: ours, and others laid out by hand."""

import struct

import numpy as np

from tpu_llm.checkpoint.gguf_file import write

METADATA = {
    'general.architecture': 'llama',
    'general.name': 'Grüße 🙂',
    'llama.block_count': 2,
    'llama.rope.freq_base': 10000.0,
    'small': -3,
    'large': 2**40,
    'lowest': -(2**40),
    'exact': np.uint8(7),
    'double': np.float64(0.1),
    'tokenizer.ggml.add_bos_token': True,
    'tokenizer.ggml.tokens': ['<s>', 'a', '', 'ünï'],
    'tokenizer.ggml.token_type': [3, 1, 1, -1],
    'tokenizer.ggml.scores': np.array([0.5, -1.0], np.float32),
    'flags': [True, False],
    'floats': [1.5, 2.5],
    'bytes': np.arange(5, dtype=np.uint8),
    'none': [],
    'nested': [['a', 'b'], [1, 2], np.zeros(3, np.int64)],
}


def arrays():
    rng = np.random.default_rng(0)
    shapes = {'one': ('F32', (5,)), 'scalar': ('F32', ()), 'half': ('F16', (3, 7)), 'brain': ('BF16', (2, 3, 4))}
    shapes |= {'eight': ('Q8_0', (4, 96)), 'four': ('Q4_0', (2, 3, 64)), 'empty': ('F16', (0, 8))}
    return {name: (kind, rng.standard_normal(shape).astype(np.float32)) for name, (kind, shape) in shapes.items()}


def save(path, metadata, tensors):
    table = [(name, kind, values.shape) for name, (kind, values) in tensors.items()]
    write(path, metadata, table, lambda name: tensors[name][1])
    return path


def string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack('<Q', len(data)) + data


def pair(key, kind, value):
    return string(key) + struct.pack('<I', kind) + value


def entry(name, dims, kind, offset):
    return string(name) + struct.pack(f'<I{len(dims)}QIQ', len(dims), *dims, kind, offset)


def by_hand(path, pairs=(), entries=(), data=b'', version=3, alignment=32):
    header = b'GGUF' + struct.pack('<IQQ', version, len(entries), len(pairs)) + b''.join([*pairs, *entries])
    path.write_bytes(header + bytes(-len(header) % alignment) + data)
    return path

"""Rotary frequencies and T5's buckets as transformers computes them (5.23), for the tests of nn/rope_scaling.py and
kernels/mask.py.

python tests/golden/positions/make.py        needs torch and transformers; writes two files of JSON beside it
"""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.t5.modeling_t5 import T5Attention

SHORT, LONG = [1.0 + 0.1 * i for i in range(16)], [1.0 + 0.7 * i for i in range(16)]
# name: scheme of transformers, its parameters, theta, length of the row
CASES = {
    'Linear': ('linear', {'factor': 4.0}, 10_000.0, 100),
    # At four times the original length and factor 1, the dynamic scheme is the fixed one of factor 4.
    'NTK': ('dynamic', {'factor': 1.0, 'original_max_position_embeddings': 2048}, 10_000.0, 8192),
    'DynamicNTK, short': ('dynamic', {'factor': 2.0, 'original_max_position_embeddings': 2048}, 10_000.0, 1000),
    'DynamicNTK, long': ('dynamic', {'factor': 2.0, 'original_max_position_embeddings': 2048}, 10_000.0, 5000),
    'YaRN': ('yarn', {'factor': 16.0, 'original_max_position_embeddings': 4096}, 10_000.0, 100),
    'YaRN, DeepSeek': (
        'yarn',
        {
            'factor': 40.0,
            'original_max_position_embeddings': 4096,
            'beta_fast': 32,
            'beta_slow': 1,
            'mscale': 1.0,
            'mscale_all_dim': 1.0,
        },
        10_000.0,
        100,
    ),
    'YaRN, ends within pairs': (
        'yarn',
        {
            'factor': 32.0,
            'original_max_position_embeddings': 4096,
            'beta_fast': 32.0,
            'beta_slow': 1.0,
            'truncate': False,
        },
        150_000.0,
        100,
    ),
    'Llama3': (
        'llama3',
        {
            'factor': 8.0,
            'low_freq_factor': 1.0,
            'high_freq_factor': 4.0,
            'original_max_position_embeddings': 8192,
        },
        500_000.0,
        100,
    ),
    'LongRope, short': (
        'longrope',
        {'factor': 32.0, 'short_factor': SHORT, 'long_factor': LONG, 'original_max_position_embeddings': 4096},
        10_000.0,
        4096,
    ),
    'LongRope, long': (
        'longrope',
        {'factor': 32.0, 'short_factor': SHORT, 'long_factor': LONG, 'original_max_position_embeddings': 4096},
        10_000.0,
        4097,
    ),
}


def frequencies(kind: str, parameters: dict, theta: float, length: int) -> dict:
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        head_dim=32,
        max_position_embeddings=parameters.get('original_max_position_embeddings', 2048),
        rope_parameters={'rope_type': kind, 'rope_theta': theta, **parameters},
    )
    found, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device('cpu'), seq_len=length)
    return {'theta': theta, 'length': length, 'frequencies': found.tolist(), 'factor': float(factor)}


def buckets() -> dict:
    """Of keys 140 places later to 140 places before."""
    places = torch.arange(140, -141, -1)
    return {
        'distances': (-places).tolist(),
        **{
            name: T5Attention._relative_position_bucket(places, bidirectional=both).tolist()
            for name, both in (('causal', False), ('both ways', True))
        },
    }


if __name__ == '__main__':
    here = Path(__file__).parent
    found = {name: frequencies(*case) for name, case in CASES.items()}
    (here / 'frequencies.json').write_text(json.dumps(found, indent=1) + '\n')
    (here / 'buckets.json').write_text(json.dumps(buckets()) + '\n')

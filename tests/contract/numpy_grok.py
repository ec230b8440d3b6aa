"""Grok-1 in NumPy, float64 and loops, from the code that xAI published with its weights (xai-org/grok-1, model.py): the
order of every sum, norm and multiplier is that file's. Transformers has no class of it.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

EMBEDDING_MULTIPLIER = 78.38367176906169
OUTPUT_MULTIPLIER = 0.5773502691896257
LARGEST_SCORE = 30.0
CHOSEN = 2


def logits(weights: Mapping[str, Any], tokens: np.ndarray, layers: int) -> np.ndarray:
    """float64 [T, V] of one text. Weights go by the names of a stack that is all period: [L, …] each."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    h = w['embed.table'][tokens] * EMBEDDING_MULTIPLIER
    for i in range(layers):
        layer = {
            name.removeprefix('stack.period.0.'): value[i] for name, value in w.items() if name.startswith('stack.')
        }
        h = h + _norm(_attention(layer, _norm(h, layer['attention_norm.scale'])), layer['attention_out_norm.scale'])
        h = h + _norm(_experts(layer, _norm(h, layer['mlp_norm.scale'])), layer['mlp_out_norm.scale'])
    return _norm(h, w['norm.scale']) @ w['embed.table'].T * OUTPUT_MULTIPLIER


def _norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return scale * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)


def _attention(w: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    query, key, value = (w[f'attention.{name}.kernel'] for name in ('query', 'key', 'value'))
    size, shared = query.shape[2], query.shape[1] // key.shape[1]
    heads = []
    for n in range(query.shape[1]):
        q, k, v = _turned(x @ query[:, n]), _turned(x @ key[:, n // shared]), x @ value[:, n // shared]
        scores = LARGEST_SCORE * np.tanh(q @ k.T * size**-0.5 / LARGEST_SCORE)
        odds = np.tril(np.exp(scores))
        heads.append(odds / odds.sum(-1, keepdims=True) @ v)
    return np.concatenate(heads, -1) @ w['attention.out.kernel'].reshape(-1, x.shape[1])


def _turned(x: np.ndarray) -> np.ndarray:
    """x cos + rotate_half(x) sin, the phases of one half repeated for the other."""
    length, size = x.shape
    phase = np.outer(np.arange(length), 10_000.0 ** -(np.arange(0, size, 2) / size))
    phase = np.concatenate([phase, phase], -1)
    first, second = np.split(x, 2, axis=-1)
    return x * np.cos(phase) + np.concatenate([-second, first], -1) * np.sin(phase)


def _experts(w: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """A softmax over all experts, whose two largest are the weights as they are: they sum to less than 1."""
    out = np.zeros_like(x)
    for t, row in enumerate(x):
        odds = np.exp(row @ w['moe.router.map.kernel'])
        gates = odds / odds.sum()
        for e in np.argsort(-gates)[:CHOSEN]:
            linear, linear_v, linear_1 = (w[f'moe.experts.{name}.kernel'][e] for name in ('gate', 'up', 'down'))
            out[t] += gates[e] * ((_gelu(row @ linear) * (row @ linear_v)) @ linear_1)
    return out


def _gelu(x: np.ndarray) -> np.ndarray:
    """As jax.nn.gelu is by default, by tanh."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

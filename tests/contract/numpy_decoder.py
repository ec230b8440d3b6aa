"""The decoder again, in NumPy, float64 and loops: row by row, head by head, with nothing shared but the weights."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tpu_llm.models.decoder import DecoderConfig


def logits(config: DecoderConfig, weights: Mapping[str, Any], tokens: Any, segments: Any, positions: Any) -> np.ndarray:
    """float64 [B, T, V]."""
    weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    rows = zip(np.asarray(tokens), np.asarray(segments), np.asarray(positions), strict=True)
    return np.stack([_row(config, weights, *row) for row in rows])


def _row(config: DecoderConfig, weights: Mapping[str, np.ndarray], tokens, segments, positions) -> np.ndarray:
    x = weights['embed.table'][tokens]
    if config.position == 'learned':
        x = x + weights['position_embed.table'][positions]
    if config.position == 'sinusoidal':
        x = x + np.array([_sinusoid(p, config.width) for p in positions])
    for layer in range(config.layers):
        w = _layer(config, weights, layer)
        window = config.windows[layer % len(config.windows)]
        visible = seen(segments, positions, window)
        if config.norm_place == 'pre':
            x = x + _attention(config, w, _norm(config, w, 'attention_norm', x), visible, positions)
            x = x + _mlp(config, w, _norm(config, w, 'mlp_norm', x))
        else:
            x = _norm(config, w, 'attention_norm', x + _attention(config, w, x, visible, positions))
            x = _norm(config, w, 'mlp_norm', x + _mlp(config, w, x))
    if config.norm_place == 'pre':
        x = _norm(config, weights, 'norm', x)
    head = weights['embed.table'].T if config.tied_embeddings else weights['head.kernel']
    out = (x @ head)[:, : config.vocab_size]
    return config.logit_softcap * np.tanh(out / config.logit_softcap) if config.logit_softcap else out


def _layer(config: DecoderConfig, weights: Mapping[str, np.ndarray], layer: int) -> dict[str, np.ndarray]:
    """One layer's weights: a slice of the stacked periods, or a block of what remains of the last."""
    period = len(config.windows)
    repeat, place = divmod(layer, period)
    if repeat < config.layers // period:
        prefix = f'stack.period.{place}.'
        return {name.removeprefix(prefix): w[repeat] for name, w in weights.items() if name.startswith(prefix)}
    prefix = f'stack.suffix.{place}.'
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def seen(segments, positions, window: int) -> np.ndarray:
    """bool [T, S]: which keys each query sees, pair by pair."""
    length = len(segments)
    seen = np.zeros((length, length), bool)
    for t in range(length):
        for s in range(length):
            near = not window or positions[t] - positions[s] < window
            seen[t, s] = segments[t] == segments[s] and positions[s] <= positions[t] and near
    return seen


def _norm(config: DecoderConfig, w: Mapping[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    if config.norm == 'layer':
        centred = x - x.mean(-1, keepdims=True)
        y = centred / np.sqrt(centred.var(-1, keepdims=True) + config.norm_eps)
        return y * w[f'{name}.scale'] + w[f'{name}.bias']
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * w[f'{name}.scale']


def _attention(config: DecoderConfig, w: Mapping[str, np.ndarray], x: np.ndarray, visible, positions) -> np.ndarray:
    query, key, value = (
        np.stack([x @ w[f'attention.{name}.kernel'][:, n] for n in range(heads)])
        for name, heads in (('query', config.heads), ('key', config.kv_heads), ('value', config.kv_heads))
    )
    if config.bias:
        query = query + w['attention.query.bias'][:, None]
        key = key + w['attention.key.bias'][:, None]
        value = value + w['attention.value.bias'][:, None]
    if config.position == 'rope':
        query, key = (_rotate(heads, positions, config.rope_theta) for heads in (query, key))
    out = np.zeros_like(x)
    for n in range(config.heads):
        k = n * config.kv_heads // config.heads
        scores = query[n] @ key[k].T / np.sqrt(config.head_dim)
        if config.attention_softcap:
            scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
        odds = np.exp(scores) * visible
        out = out + odds / odds.sum(-1, keepdims=True) @ value[k] @ w['attention.out.kernel'][n]
    return out + w['attention.out.bias'] if config.bias else out


def _rotate(x: np.ndarray, positions, theta: float) -> np.ndarray:
    """Pairs (x[i], x[i + H/2]) as complex numbers, each turned by its own frequency."""
    half = x.shape[-1] // 2
    turns = np.exp(1j * np.outer(positions, theta ** (-np.arange(half) / half)))
    turned = (x[..., :half] + 1j * x[..., half:]) * turns
    return np.concatenate([turned.real, turned.imag], -1)


def _mlp(config: DecoderConfig, w: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    def linear(name: str, x: np.ndarray) -> np.ndarray:
        y = x @ w[f'mlp.{name}.kernel']
        return y + w[f'mlp.{name}.bias'] if config.bias else y

    up = linear('up', x)
    hidden = {
        'relu': lambda: np.maximum(up, 0),
        'gelu': lambda: _gelu(up),
        'geglu': lambda: _gelu(linear('gate', x)) * up,
        'swiglu': lambda: linear('gate', x) / (1 + np.exp(-linear('gate', x))) * up,
    }[config.mlp]()
    return linear('down', hidden)


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _sinusoid(position: int, width: int) -> np.ndarray:
    angles = [position / 10_000 ** (i / width) for i in range(0, width, 2)]
    return np.array([f(angle) for angle in angles for f in (np.sin, np.cos)])

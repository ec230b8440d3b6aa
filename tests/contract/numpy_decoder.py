"""The decoder again, in NumPy, float64 and loops: row by row, head by head, token by token, with nothing shared but the
weights.
"""

import functools
import math
import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy_rope

from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.nn.moe import MoE


def logits(
    config: DecoderConfig, weights: Mapping[str, Any], tokens: Any, segments: Any, positions: Any, prefix: Any = None
) -> np.ndarray:
    """float64 [B, T, V]."""
    weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    prefix = np.zeros(np.shape(tokens), bool) if prefix is None else np.asarray(prefix)
    rows = zip(np.asarray(tokens), np.asarray(segments), np.asarray(positions), prefix, strict=True)
    return np.stack([_row(config, weights, *row) for row in rows])


def _row(config: DecoderConfig, weights: Mapping[str, np.ndarray], tokens, segments, positions, prefix) -> np.ndarray:
    x = config.embed_scale * weights['embed.table'][tokens]
    if config.embed_width:
        x = x @ weights['embed.widen.kernel']
    if config.position == 'learned':
        x = x + weights['position_embed.table'][[p + config.position_offset for p in positions]]
    if config.position == 'sinusoidal':
        x = x + np.array([_sinusoid(p, config.width) for p in positions])
    if config.embed_norm:
        x = _norm(config, weights, 'embed_norm', x)
    length = max(positions[segments > 0], default=0) + 1
    for layer in range(config.layers):
        w = _layer(config, weights, layer) | _within(weights, 'position_bias.')
        window = config.windows[layer % len(config.windows)]
        turns = config.position == 'rope' and config.rope_layers[layer % len(config.rope_layers)]
        visible = seen(segments, positions, window) | ((segments[:, None] == segments) & prefix)
        halves = [
            ('attention', lambda h, args=(w, window, visible, turns): _attention(config, h, positions, length, *args)),
            ('mlp', lambda h, w=w: _feed_forward(config, w, h, segments > 0)),
        ]
        x = _in_turn(config, w, x, halves) if config.residual == 'serial' else _parallel(config, w, x, halves)
    if config.norm_place != 'post':
        x = _norm(config, weights, 'norm', x)
    if config.embed_width:
        x = x @ weights['narrow.kernel']
    head = weights['embed.table'].T if config.tied_embeddings else weights['head.kernel']
    out = (config.logit_scale * (x @ head + weights.get('head.bias', 0.0)))[:, : config.vocab_size]
    return config.logit_softcap * np.tanh(out / config.logit_softcap) if config.logit_softcap else out


def _in_turn(config: DecoderConfig, w: Mapping[str, np.ndarray], x: np.ndarray, halves) -> np.ndarray:
    for name, half in halves:
        if config.norm_place == 'pre':
            x = x + half(_norm(config, w, f'{name}_norm', x))
        elif config.norm_place == 'post':
            x = _norm(config, w, f'{name}_norm', x + half(x))
        elif config.norm_place == 'out':
            x = x + _norm(config, w, f'{name}_out_norm', half(x))
        else:
            x = x + _norm(config, w, f'{name}_out_norm', half(_norm(config, w, f'{name}_norm', x)))
    return x


def _parallel(config: DecoderConfig, w: Mapping[str, np.ndarray], x: np.ndarray, halves) -> np.ndarray:
    if config.norm_place == 'post':
        return _norm(config, w, 'attention_norm', x + sum(half(x) for _, half in halves))
    added = np.zeros_like(x)
    for name, half in halves:
        own = 'attention' if config.residual == 'parallel' else name
        y = half(x if config.norm_place == 'out' else _norm(config, w, f'{own}_norm', x))
        added += y if config.norm_place == 'pre' else _norm(config, w, f'{name}_out_norm', y)
    return x + added


def _layer(config: DecoderConfig, weights: Mapping[str, np.ndarray], layer: int) -> dict[str, np.ndarray]:
    """One layer's weights: a block of the prefix, a slice of the stacked periods, or a block of what remains."""
    first, every = (config.moe.first_dense, config.moe.every) if config.moe else (0, 1)
    period = math.lcm(len(config.windows), len(config.rope_layers), every)
    repeat, place = divmod(layer - first, period)
    if layer < first:
        return _within(weights, f'stack.prefix.{layer}.')
    if repeat < (config.layers - first) // period:
        return {name: w[repeat] for name, w in _within(weights, f'stack.period.{place}.').items()}
    return _within(weights, f'stack.suffix.{place}.')


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
    y = _unscaled(config, x)
    if config.norm == 'layer_fixed':
        return y
    y = y * (w[f'{name}.scale'] + (config.norm == 'rms_offset'))
    return y + w[f'{name}.bias'] if config.norm == 'layer' else y


def _unscaled(config: DecoderConfig, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True) if config.norm.startswith('layer') else x
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config.norm_eps)


def _attention(
    config: DecoderConfig,
    x: np.ndarray,
    positions,
    length: int,
    w: Mapping[str, np.ndarray],
    window: int,
    visible,
    turns,
) -> np.ndarray:
    scaling, theta = config.rope_scaling, config.rope_theta
    if window and config.local_rope_theta:
        scaling, theta = None, config.local_rope_theta
    turn = functools.partial(_rotate, positions=positions, length=length, theta=theta, scaling=scaling)
    if config.mla:
        return _latent_attention(config, w, x, visible, turn)
    query, key, value = (
        np.stack([x @ w[f'attention.{name}.kernel'][:, n] for n in range(heads)])
        for name, heads in (('query', config.heads), ('key', config.kv_heads), ('value', config.kv_heads))
    )
    if 'qkv' in config.bias:
        query = query + w['attention.query.bias'][:, None]
        key = key + w['attention.key.bias'][:, None]
        value = value + w['attention.value.bias'][:, None]
    if config.qkv_clip:
        query, key, value = (np.clip(heads, -config.qkv_clip, config.qkv_clip) for heads in (query, key, value))
    if config.qk_norm != 'none':
        query, key = _normed_heads(config, w, 'query', query), _normed_heads(config, w, 'key', key)
    if turns:
        part = config.rope_dim or config.head_dim
        query, key = (np.concatenate([turn(h[..., :part]), h[..., part:]], -1) for h in (query, key))
    out = np.zeros_like(x)
    for n in range(config.heads):
        k = n * config.kv_heads // config.heads
        scale = config.attention_scale or config.head_dim**-0.5
        scores = query[n] @ key[k].T * scale
        if config.position == 'transformer_xl':
            scores = scale * _distance_scores(
                config, _within(w, 'attention.positions.'), n, query[n], key[k], positions
            )
        if config.attention_softcap:
            scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
        scores = scores + [[_gain(config, w, n, p - q) for q in positions] for p in positions]
        odds = np.exp(scores) * visible
        out = out + odds / odds.sum(-1, keepdims=True) @ value[k] @ w['attention.out.kernel'][n]
    return out + w['attention.out.bias'] if 'out' in config.bias else out


def _normed_heads(config: DecoderConfig, w: Mapping[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    """Of x [N, T, H]."""
    if config.qk_norm == 'all_heads':
        y = _unscaled(config, x.swapaxes(0, 1).reshape(x.shape[1], -1))
        y = y.reshape(x.shape[1], *x.shape[::2]).swapaxes(0, 1)
    else:
        y = _unscaled(config, x)
    if config.norm == 'layer_fixed':
        return y
    scale = w[f'attention.{name}_norm.scale'] + (config.norm == 'rms_offset')
    if config.qk_norm == 'head_biased':
        return y * scale + w[f'attention.{name}_norm.bias']
    return y * (scale if config.qk_norm == 'head' else scale[:, None])


def _distance_scores(config: DecoderConfig, w: Mapping[str, np.ndarray], head: int, query, key, positions):
    """Transformer-XL (arXiv 1901.02860), section 3.3, terms (a) to (d), pair by pair."""
    kernel, u, v = w['kernel'][:, head], w['content'][head], w['distance'][head]
    scores = np.zeros((len(query), len(key)))
    for i, j in np.ndindex(scores.shape):
        distance = _sinusoid(positions[i] - positions[j], config.width) @ kernel
        scores[i, j] = query[i] @ key[j] + query[i] @ distance + u @ key[j] + v @ distance
    return scores


def _gain(config: DecoderConfig, w: Mapping[str, np.ndarray], head: int, distance: int) -> float:
    """What a score gains where the key is so far back; what is later is not seen."""
    distance = max(distance, 0)
    if config.position == 'alibi':
        return -config.alibi_scale * _slope(head, config.heads) ** (config.alibi_max / 8) * distance
    if config.position not in ('relative', 'relative_each'):
        return 0.0
    far = 16 + int(1e-9 + 16 * math.log(max(distance, 16) / 16) / math.log(128 / 16))
    table = w['attention.positions.table' if config.position == 'relative_each' else 'table']
    return table[distance if distance < 16 else min(far, 31), head]


def _slope(head: int, heads: int) -> float:
    """Heads 0 to P - 1, of the largest power of two P there is room for, then between them."""
    power = 1
    while 2 * power <= heads:
        power *= 2
    return 2 ** (-8 * (head + 1) / power) if head < power else 2 ** (-8 * (head - power + 0.5) / power)


def _latent_attention(config: DecoderConfig, w: Mapping[str, np.ndarray], x: np.ndarray, visible, turn):
    """DeepSeek-V2 (arXiv 2405.04434), equations 9 to 11 and 14 to 19."""
    mla = config.mla
    assert mla

    def normed(y, name):
        eps = mla.norm_eps or config.norm_eps
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + eps) * w[f'attention.{name}.scale']

    source = normed(x @ w['attention.query_down.kernel'], 'query_norm') if mla.query_rank else x
    latent = normed(x @ w['attention.latent.kernel'], 'latent_norm')
    shared = turn(x @ w['attention.key_rope.kernel'])
    out = np.zeros_like(x)
    for n in range(config.heads):
        turned = turn(source @ w['attention.query_rope.kernel'][:, n])
        query = np.concatenate([source @ w['attention.query.kernel'][:, n], turned], -1)
        key = np.concatenate([latent @ w['attention.key.kernel'][:, n], shared], -1)
        scale = config.attention_scale or (config.head_dim + mla.rope_dim) ** -0.5
        odds = np.exp(query @ key.T * scale) * visible
        attended = odds / odds.sum(-1, keepdims=True) @ (latent @ w['attention.value.kernel'][:, n])
        out = out + attended @ w['attention.out.kernel'][n]
    return out


def _rotate(x: np.ndarray, positions, length: int, theta: float, scaling) -> np.ndarray:
    """Pairs (x[i], x[i + H/2]) as complex numbers, each turned by its own frequency."""
    half = x.shape[-1] // 2
    frequencies, factor = numpy_rope.frequencies(scaling, 2 * half, theta, length)
    turns = factor * np.exp(1j * np.outer(positions, frequencies))
    turned = (x[..., :half] + 1j * x[..., half:]) * turns
    return np.concatenate([turned.real, turned.imag], -1)


def _feed_forward(config: DecoderConfig, w: Mapping[str, np.ndarray], x: np.ndarray, real) -> np.ndarray:
    moe, own = config.moe, _within(w, 'moe.experts.')
    if moe is None or not own:
        return _mlp(config.mlp, _within(w, 'mlp.'), x)
    kind = moe.mlp or config.mlp
    out = _mlp(kind, _within(w, 'moe.shared.'), x) if moe.shared else np.zeros_like(x)
    if moe.shared_gate:
        out = out / (1 + np.exp(-x @ w['moe.shared_gate.kernel']))
    for t, expert, weight in visits(moe, x @ w['moe.router.map.kernel'], w.get('moe.router.bias', 0.0), real):
        out[t] += weight * _mlp(kind, {name: kernels[expert] for name, kernels in own.items()}, x[t])
    return out


def visits(moe: MoE, logits: np.ndarray, bias, real) -> list[tuple[int, int, float]]:
    """(token, expert, weight) for every choice that is served."""
    places = max(1, math.ceil(moe.capacity * len(logits) * moe.chosen / moe.experts)) if moe.capacity else len(logits)
    tokens = np.flatnonzero(real)
    if moe.router.choice == 'expert_choice':
        odds = np.array([_softmax(row) for row in logits])
        wanted = [sorted(tokens, key=lambda t, e=e: -odds[t, e])[:places] for e in range(moe.experts)]
        return [(t, e, odds[t, e]) for e in range(moe.experts) for t in wanted[e]]
    choices = {t: _choices(moe, logits[t], bias) for t in tokens}
    asked, served = Counter(), []
    for rank in range(moe.chosen):  # first choices first
        for t in tokens:
            expert, weight = choices[t][rank]
            asked[expert] += 1
            if asked[expert] <= places:
                served.append((t, expert, weight))
    return served


def _choices(moe: MoE, logits: np.ndarray, bias) -> list[tuple[int, float]]:
    """A token's experts, best first, and their weights."""
    router, sigmoid = moe.router, moe.router.choice == 'sigmoid'
    scores = 1 / (1 + np.exp(-logits)) if sigmoid else _softmax(logits)
    ranked, size = scores + bias, moe.experts // router.groups
    worth = [sum(sorted(ranked[g * size : (g + 1) * size])[-1 - sigmoid :]) for g in range(router.groups)]
    groups = sorted(range(router.groups), key=lambda g: -worth[g])[: router.chosen_groups]
    allowed = [e for e in range(moe.experts) if e // size in groups]
    experts = sorted(allowed, key=lambda e: -ranked[e])[: moe.chosen]
    weights = _softmax(logits[experts]) if router.choice == 'topk_then_softmax' else scores[experts]
    if sigmoid or router.normalise:
        weights = weights / weights.sum()
    return list(zip(experts, router.scale * weights, strict=True))


def _softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum()


def _within(w: Mapping[str, np.ndarray], place: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(place): value for name, value in w.items() if name.startswith(place)}


def _mlp(kind: str, w: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ w[f'{name}.kernel'] + w.get(f'{name}.bias', 0.0)

    up = linear('up', x)
    hidden = {
        'relu': lambda: np.maximum(up, 0),
        'gelu': lambda: _gelu(up),
        'gelu_exact': lambda: _gelu_exact(up),
        'reglu': lambda: np.maximum(linear('gate', x), 0) * up,
        'geglu': lambda: _gelu(linear('gate', x)) * up,
        'geglu_exact': lambda: _gelu_exact(linear('gate', x)) * up,
        'swiglu': lambda: linear('gate', x) / (1 + np.exp(-linear('gate', x))) * up,
    }[kind]()
    return linear('down', hidden)


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _gelu_exact(x: np.ndarray) -> np.ndarray:
    """x times the probability that a normal variable is below it."""
    return x * np.vectorize(statistics.NormalDist().cdf)(x)


def _sinusoid(position: int, width: int) -> np.ndarray:
    angles = [position / 10_000 ** (i / width) for i in range(0, width, 2)]
    return np.array([f(angle) for angle in angles for f in (np.sin, np.cos)])

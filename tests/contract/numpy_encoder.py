"""The encoder in NumPy, float64: the layers of `numpy_decoder`, with every token seeing all of its segment."""

import numpy as np
from numpy_decoder import _attention, _feed_forward, _gelu, _in_turn, _layer, _norm, _within


def hidden(config, weights, tokens, segments, positions, types):
    """float64 [B, T, D]."""
    rows = zip(*map(np.asarray, (tokens, segments, positions, types)), strict=True)
    return np.stack([_row(config, doubles(weights), *row) for row in rows])


def _row(config, weights, tokens, segments, positions, types):
    tower, own = config.tower(), _within(weights, 'tower.')
    x = weights['embed.table'][tokens] + weights['token_types'][types] + own['position_embed.table'][positions]
    x = _norm(tower, own, 'embed_norm', x)
    visible = segments[:, None] == segments[None]
    for layer in range(config.layers):
        w = _layer(tower, own, layer)
        halves = [
            ('attention', lambda h, w=w: _attention(tower, h, positions, len(tokens), w, 0, visible, False)),
            ('mlp', lambda h, w=w: _feed_forward(tower, w, h, segments > 0)),
        ]
        x = _in_turn(tower, w, x, halves)
    return x


def masked_logits(config, weights, hidden):
    """float64 [B, T, V] of hidden states."""
    weights = doubles(weights)
    x = hidden @ weights['masked.map.kernel'] + weights['masked.map.bias']
    x = _norm(config.tower(), weights, 'masked.norm', _gelu(x))
    return (x @ weights['embed.table'].T + weights['masked.out.bias'])[..., : config.vocab_size]


def pair_logits(weights, hidden):
    """float64 [B, 2] of rows that begin with their first token."""
    weights = doubles(weights)
    pooled = np.tanh(hidden[:, 0] @ weights['pooler.kernel'] + weights['pooler.bias'])
    return pooled @ weights['pair.kernel'] + weights['pair.bias']


def doubles(weights):
    return {name: np.asarray(value, np.float64) for name, value in weights.items()}

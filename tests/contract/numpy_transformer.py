"""The Transformer of 2017 in plain NumPy, float64, a pair of texts at a time (Vaswani et al., arXiv 1706.03762)."""

import numpy as np


def logits(config, weights, source, target):
    """[T, V] of one source and one target, neither padded. Layers are stacked in front, as weights hold them."""
    weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    table = weights['embed.table'][: config.vocab_size]
    read = _embedded(config, table, source)
    for layer in range(config.encoder_layers):
        w = _layer(weights, 'encoder', layer)
        x = _attention(config, w, 'attention', read, read, np.ones((len(source), len(source)), bool))
        read = _norm(config, w, 'attention_norm', read + x)
        read = _norm(config, w, 'mlp_norm', read + _feed_forward(w, read))
    x = _embedded(config, table, target)
    earlier = np.tril(np.ones((len(target), len(target)), bool))
    everything = np.ones((len(target), len(source)), bool)
    for layer in range(config.decoder_layers):
        w = _layer(weights, 'decoder', layer)
        x = _norm(config, w, 'attention_norm', x + _attention(config, w, 'attention', x, x, earlier))
        x = _norm(config, w, 'cross_norm', x + _attention(config, w, 'cross', x, read, everything))
        x = _norm(config, w, 'mlp_norm', x + _feed_forward(w, x))
    return x @ table.T


def _layer(weights, side, layer):
    lead = f'{side}.stack.period.0.'
    return {name.removeprefix(lead): value[layer] for name, value in weights.items() if name.startswith(lead)}


def _embedded(config, table, tokens):
    """§3.4 and §3.5: PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i + 1) = cos of the same."""
    positions = np.zeros((len(tokens), config.width))
    for position in range(len(tokens)):
        for i in range(config.width // 2):
            angle = position / 10_000 ** (2 * i / config.width)
            positions[position, 2 * i : 2 * i + 2] = np.sin(angle), np.cos(angle)
    return table[tokens] * np.sqrt(config.width) + positions


def _attention(config, w, name, x, seen, allowed):
    """§3.2, a head at a time."""
    out = np.zeros_like(x)
    for head in range(config.heads):
        query = x @ w[f'{name}.query.kernel'][:, head]
        key, value = (seen @ w[f'{name}.{each}.kernel'][:, head] for each in ('key', 'value'))
        scores = np.where(allowed, query @ key.T / np.sqrt(config.head_dim), -np.inf)
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        out += shares @ value @ w[f'{name}.out.kernel'][head]
    return out


def _feed_forward(w, x):
    hidden = np.maximum(0, x @ w['mlp.up.kernel'] + w['mlp.up.bias'])
    return hidden @ w['mlp.down.kernel'] + w['mlp.down.bias']


def _norm(config, w, name, x):
    centred = x - x.mean(axis=1, keepdims=True)
    return (
        centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + config.norm_eps) * w[f'{name}.scale']
        + w[f'{name}.bias']
    )

"""Multi-token prediction again, in NumPy and float64, by the paper's equations (DeepSeek-V3, arXiv 2412.19437, 21 to
23). A depth's layer is the last one of `numpy_decoder`, with what the equations make of both streams as its embeddings.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy_decoder

from tpu_llm.models.decoder_config import DecoderConfig


def depths(
    config: DecoderConfig, weights: Mapping[str, Any], tokens: Any, segments: Any, positions: Any
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each depth float64 [B, T, V] and bool [B, T]: logits of the token k behind the next, and where it is known."""
    weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    tokens, segments, positions = (np.asarray(x) for x in (tokens, segments, positions))
    hidden, out = _hidden(config, weights, tokens, segments, positions), []
    for k in range(1, config.predict_ahead + 1):
        own = numpy_decoder._within(weights, f'ahead.{k - 1}.')
        inside = np.zeros(tokens.shape, bool)
        joined = np.zeros_like(hidden)
        for row, t in np.ndindex(tokens.shape):
            if t + k >= tokens.shape[1] or segments[row, t] != segments[row, t + k]:
                continue
            inside[row, t] = segments[row, t] > 0
            token = config.embed_scale * weights['embed.table'][tokens[row, t + k]]
            both = [
                numpy_decoder._norm(config, own, 'hidden_norm', hidden[row, t]),
                numpy_decoder._norm(config, own, 'token_norm', token),
            ]
            matrix = np.concatenate([own['hidden_map.kernel'], own['token_map.kernel']])
            joined[row, t] = np.concatenate(both) @ matrix
        layer, last = _one_layer(config, weights, own)
        known = np.where(inside, segments, 0)
        rows = list(zip(joined, known, positions, strict=True))

        def run(function, rows=rows, layer=layer, last=last):
            order = np.arange(tokens.shape[1])[None]
            return np.concatenate(
                [function(layer, {**last, 'embed.table': x}, order, s[None], p[None]) for x, s, p in rows]
            )

        hidden = run(_hidden)
        out.append((run(numpy_decoder.logits), inside))
    return out


def _one_layer(config: DecoderConfig, weights: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray]):
    """A decoder of one layer like the last, its weights those of a depth; head and tables are the model's."""
    at, moe = config.layers - 1, config.moe
    moe = dataclasses.replace(moe, first_dense=0, every=1) if moe and moe.at(at) else None
    window = config.windows[at % len(config.windows)]
    head = weights['embed.table'].T if config.tied_embeddings else weights['head.kernel']
    last = {name: w for name, w in weights.items() if name.split('.')[0] in ('head', 'position_bias')}
    last |= {name: w for name, w in own.items() if name.startswith('norm.')} | {'head.kernel': head}
    for name, w in own.items():
        if name.startswith('stack.'):
            last[name.replace('prefix', 'period')] = w[None]
    added = config.position in ('learned', 'sinusoidal')  # to embeddings, and so in what was hidden before
    layer = dataclasses.replace(
        config,
        layers=1,
        moe=moe,
        windows=(window,),
        position='none' if added else config.position,
        embed_scale=1.0,
        embed_norm=False,
        tied_embeddings=False,
    )
    return layer, last


def _hidden(config: DecoderConfig, weights: Mapping[str, np.ndarray], tokens, segments, positions) -> np.ndarray:
    """Behind the last norm: the logits of a head that changes nothing."""
    bias = tuple(place for place in config.bias if place != 'head')
    plain = dataclasses.replace(
        config, vocab_size=config.width, bias=bias, tied_embeddings=False, logit_scale=1.0, logit_softcap=0.0
    )
    weights = {name: w for name, w in weights.items() if name != 'head.bias'} | {'head.kernel': np.eye(config.width)}
    return numpy_decoder.logits(plain, weights, tokens, segments, positions)

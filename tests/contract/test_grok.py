"""Grok-1's config makes the model that its published code is."""

import dataclasses
import math

import jax
import numpy as np
import numpy_grok
import pytest
import toy

from tpu_llm.models.families import published

SIZES = {'vocab_size': 19, 'width': 16, 'layers': 2, 'heads': 4, 'kv_heads': 2, 'head_dim': 6, 'mlp_width': 20}


@pytest.mark.usefixtures('quick_compile')
def test_grok_computes_what_its_published_code_does():
    large = published('grok-1')
    moe = dataclasses.replace(large.moe, expert_width=12)
    config = dataclasses.replace(large, **SIZES, moe=moe, dtype='float32')
    graph = toy.graph(config, vocab_multiple=1)
    # Scores large enough that the cap shows, and blocks that count beside embeddings so multiplied.
    larger = {'attention.query.': 8.0, '_out_norm.': 20.0}
    weights = {
        name: w * math.prod(by for part, by in larger.items() if part in name) for name, w in toy.weights(graph).items()
    }
    tokens = np.random.default_rng(0).integers(0, 19, (2, 12))
    ours = jax.jit(lambda weights: graph.bind(weights)(tokens))(weights)
    theirs = np.stack([numpy_grok.logits(weights, row, config.layers) for row in tokens])
    np.testing.assert_allclose(ours, theirs, atol=1e-5)

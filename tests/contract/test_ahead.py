"""What predicts further tokens than the next, whatever the decoder is composed of; its loss is in test_objectives.py.

That transformers computes the same of DeepSeek-V3 is in test_zoo.py.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy_ahead
import pytest
import toy

from tpu_llm.config import ConfigError
from tpu_llm.nn.mla import MLA
from tpu_llm.nn.moe import MoE
from tpu_llm.nn.param import initialise, named_params
from tpu_llm.nn.router import Router
from tpu_llm.nn.stack import Stack

pytestmark = pytest.mark.usefixtures('quick_compile')

DECODERS = {
    # The dense layer is not the last.
    'deepseek-v3': toy.config(
        layers=2,
        kv_heads=4,
        predict_ahead=2,
        mla=MLA(kv_rank=12, query_rank=20, rope_dim=4, value_dim=6),
        moe=MoE(
            experts=8,
            chosen=3,
            expert_width=12,
            shared=1,
            first_dense=1,
            router=Router(choice='sigmoid', groups=4, chosen_groups=2, scale=2.5, bias_rate=0.001),
        ),
    ),
    # The last layer has no window.
    'gemma-2': toy.config(
        layers=2,
        predict_ahead=3,
        norm='rms_offset',
        norm_place='both',
        windows=(2, 0),
        logit_softcap=1.5,
        tied_embeddings=True,
        embed_scale=1.7,
        remat='full',
    ),
    'vaswani': toy.config(
        layers=1,
        kv_heads=4,
        mlp='relu',
        norm='layer',
        norm_place='post',
        position='learned',
        max_length=12,
        bias=('qkv', 'out', 'mlp', 'head'),
        predict_ahead=1,
    ),
}
# Two documents and padding; one that is shorter than the depths reach; padding on the left.
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 9 + [2] * 1 + [3] * 2, [0] * 5 + [1] * 7])


class Row:
    def __init__(self, config):
        self.config, self.batch = config, toy.batch(SEGMENTS)
        self.graph = toy.graph(config)
        self.weights = toy.weights(self.graph)
        self.run = jax.jit(self.depths)

    def depths(self, weights, tokens):
        model, layout = self.graph.bind(weights), {'segments': self.batch.segments, 'positions': self.batch.positions}
        found = model.look_ahead(model.hidden(tokens, **layout), tokens, **layout)
        return [(model.logits(hidden), inside) for hidden, inside, _ in found]


@pytest.fixture(scope='module', params=DECODERS)
def row(request):
    return Row(DECODERS[request.param])


def test_it_is_that_of_the_papers_equations(row):
    b = row.batch
    expected = numpy_ahead.depths(row.config, row.weights, b.tokens, b.segments, b.positions)
    found = row.run(row.weights, b.tokens)
    assert len(found) == row.config.predict_ahead
    for (logits, inside), (wanted, known) in zip(found, expected, strict=True):
        assert logits.dtype == jnp.float32
        np.testing.assert_array_equal(inside, np.where(known, SEGMENTS, 0))
        np.testing.assert_allclose(logits[known], wanted[known], atol=1e-5)


def test_depth_k_has_read_k_tokens_more_of_its_own_segment_and_nothing_else(row):
    """Which logits change with a token, for each token of the rows: it and those before it, back to k places before."""
    tokens, every = row.batch.tokens, np.arange(12)
    before = row.run(row.weights, tokens)
    for at in every:
        after = row.run(row.weights, tokens.at[:, at].set((tokens[:, at] + 1) % 19))
        for k, ((logits, inside), (other, _)) in enumerate(zip(before, after, strict=True), 1):
            changed = np.abs(logits - other).max(-1) > 1e-6
            for i, segments in enumerate(SEGMENTS):
                reads = (segments == segments[at]) & (every >= at - k)
                known = np.asarray(inside[i]) > 0
                np.testing.assert_array_equal(changed[i][known], reads[known])


def test_the_next_token_is_that_of_the_model_without(row):
    """Bit for bit, and so is what is drawn for it."""
    plain = toy.graph(dataclasses.replace(row.config, predict_ahead=0))
    kept = {name: w for name, w in row.weights.items() if not name.startswith('ahead.')}
    assert plain.leaves.keys() == kept.keys()
    b = row.batch
    logits = [
        jax.jit(lambda weights, graph=graph: graph.bind(weights)(b.tokens, segments=b.segments))(weights)
        for graph, weights in ((plain, kept), (row.graph, row.weights))
    ]
    np.testing.assert_array_equal(*logits)


def test_depths_are_drawn_apart():
    model = initialise(toy.config(layers=1, predict_ahead=2).make(vocab_multiple=8), seed=0)
    stacks: list[Stack] = [model.stack.unstacked(), *(depth.stack for depth in model.ahead)]
    kernels: list[Any] = [dict(named_params(stack))['prefix.0.mlp.up.kernel'][...] for stack in stacks]
    for i, one in enumerate(kernels):
        np.testing.assert_allclose(one.std(), 16**-0.5, rtol=0.2)
        assert all(np.abs(one - other).max() > 0.1 for other in kernels[:i])
    halves = [model.ahead[0].hidden_map.kernel[...], model.ahead[0].token_map.kernel[...]]
    np.testing.assert_allclose(np.std(halves), 32**-0.5, rtol=0.2)


def test_what_cannot_be_says_why():
    for changes in ({'predict_ahead': -1}, {'predict_ahead': 1, 'embed_width': 8}):
        with pytest.raises(ConfigError, match=r'predict_ahead = -?1 with embed_width = \d; it counts tokens behind'):
            toy.config(**changes).make()

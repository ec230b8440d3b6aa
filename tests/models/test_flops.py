"""FLOPs by hand, by counting pairs, and by what the compiler counts."""

import jax
import jax.numpy as jnp
import pytest
import toy

from tpu_llm.models.decoder import DecoderConfig
from tpu_llm.models.flops import forward_flops, train_flops, visible_keys


@pytest.mark.parametrize('window', [0, 1, 3, 7, 8, 20])
def test_visible_keys_are_the_pairs_the_mask_lets_through(window):
    pairs = [(t, s) for t in range(8) for s in range(t + 1) if not window or t - s < window]
    assert visible_keys(8, window) == len(pairs) / 8


def test_llama_2_7b_is_twice_its_matmul_parameters_and_its_attention():
    config = DecoderConfig(
        vocab_size=32_000, width=4096, layers=32, heads=32, kv_heads=32, head_dim=128, mlp_width=11_008
    )
    matmuls = 6_738_415_616 - 32_000 * 4096 - 65 * 4096  # but for embeddings and norms
    attention = 32 * 4 * 4096 * (2048 + 1) / 2
    assert forward_flops(config, 2048) == 2 * matmuls + attention
    assert train_flops(config, 2048) == 3 * forward_flops(config, 2048)


@pytest.mark.parametrize('changes', [{}, {'mlp': 'relu', 'kv_heads': 1}, {'mlp': 'geglu', 'head_dim': 16}])
def test_the_compiler_counts_the_same_matmuls(changes):
    """Unrolled, since XLA counts a loop's body once. It also counts norms, activations and masked pairs."""
    config = toy.config(
        **{'vocab_size': 128, 'width': 64, 'layers': 2, 'head_dim': 32, 'mlp_width': 128, 'unroll': 0} | changes
    )
    graph = toy.graph(config)
    tokens = jnp.zeros((2, 16), jnp.int32)
    program = jax.jit(lambda weights: graph.bind(weights)(tokens)).lower(graph.shapes())
    counted = program.cost_analysis()['flops'] / tokens.size
    ours = forward_flops(config, 16)
    whole = ours + 2 * 4 * config.heads * config.head_dim * (16 - visible_keys(16, 0))
    assert whole < counted < 1.15 * whole

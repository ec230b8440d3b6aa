"""FLOPs by hand, by counting pairs, and by what the compiler counts."""

import jax
import jax.numpy as jnp
import pytest
import toy

from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.flops import active_parameters, forward_flops, train_flops, visible_keys
from tpu_llm.nn.mla import MLA
from tpu_llm.nn.moe import MoE


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


def test_a_token_meets_the_router_its_own_experts_and_the_shared_ones():
    """Of five layers two have experts: 16 wide, router of 8, three chosen and one shared of 12 each."""
    moe = MoE(experts=8, chosen=3, expert_width=12, shared=1, first_dense=1, every=2, mlp='gelu')
    dense, config = toy.config(layers=5), toy.config(layers=5, moe=moe)
    gained = 16 * 8 + 4 * 2 * 16 * 12 - 3 * 16 * 20
    assert forward_flops(config, 8) == forward_flops(dense, 8) + 2 * 2 * gained
    assert active_parameters(config) == active_parameters(dense) + 2 * gained
    moe.shared_gate = True
    assert forward_flops(config, 8) == forward_flops(dense, 8) + 2 * 2 * (gained + 16)
    assert active_parameters(config) == active_parameters(dense) + 2 * (gained + 16)


BIASED = {'bias': ('qkv', 'out', 'mlp', 'head'), 'position': 'alibi'}  # sums that are not counted
DISTANCES = {'kv_heads': 4, 'position': 'transformer_xl'}
LATENT = {'kv_heads': 4, 'mla': MLA(kv_rank=32, query_rank=48, rope_dim=16, value_dim=48)}


@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'mlp': 'relu', 'kv_heads': 1},
        {'mlp': 'geglu', 'head_dim': 16},
        {'mlp': 'reglu', **BIASED},
        LATENT,
        DISTANCES,
    ],
)
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
    key_and_value = 32 + 16 + 48 if config.mla else 2 * config.head_dim
    if config.position == 'transformer_xl':  # 16 distances, and their map
        key_and_value += config.head_dim
        ours += 2 * 2 * config.width * config.heads * config.head_dim / 2
    whole = ours + 2 * 2 * config.heads * key_and_value * (16 - visible_keys(16, 0))
    assert whole < counted < 1.15 * whole

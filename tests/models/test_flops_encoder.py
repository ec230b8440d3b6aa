"""What encoders and encoder-decoders compute, against the compiler's own count of the same matmuls."""

import jax
import jax.numpy as jnp
import pytest
import toy

from tpu_llm.models import flops, flops_encoder
from tpu_llm.models.encoder import EncoderConfig
from tpu_llm.models.encoder_decoder import EncoderDecoderConfig
from tpu_llm.nn.param import count_parameters

# Wide enough that norms, activations and softmax, which the compiler counts and we do not, are a few per cent.
ENCODER = EncoderConfig(
    vocab_size=512, width=128, layers=2, heads=2, mlp_width=512, mlp='relu', max_length=64, dtype='float32', unroll=0
)
BOTH = EncoderDecoderConfig(
    vocab_size=512,
    width=128,
    encoder_layers=2,
    decoder_layers=1,
    heads=2,
    head_dim=64,
    mlp_width=512,
    norm='rms',
    norm_place='pre',
    position='relative',
    dtype='float32',
    unroll=0,
)


def compiled(config, *tokens):
    graph = toy.graph(config, vocab_multiple=1)
    run = jax.jit(lambda weights, *tokens: graph.bind(weights)(*tokens))
    return run.lower(graph.shapes(), *tokens).compile().cost_analysis()['flops']


def ids(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def test_an_encoder_computes_what_is_counted():
    counted = 64 * flops_encoder.encoder_flops(ENCODER, 64)
    assert compiled(ENCODER, ids(1, 64)) == pytest.approx(counted, rel=0.05)
    assert flops_encoder.train_flops(ENCODER, 64) == 3 * counted / 64


def test_an_encoder_decoder_computes_what_is_counted():
    """The compiler counts all pairs of a target, of which a causal mask allows (T + 1) / 2T."""
    counted = flops_encoder.encoder_decoder_flops(BOTH, 64, 16)
    masked = 4 * BOTH.heads * BOTH.head_dim * 16 * (16 - 17 / 2)
    assert compiled(BOTH, ids(1, 64), ids(1, 16)) == pytest.approx(counted + masked, rel=0.05)
    assert flops_encoder.train_flops(BOTH, 64, 16) == 3 * counted / 64


def test_decoders_are_counted_as_ever():
    config = toy.config()
    assert flops_encoder.train_flops(config, 8) == flops.train_flops(config, 8)
    assert flops_encoder.active_parameters(config) == flops.active_parameters(config)
    assert flops_encoder.active_parameters(ENCODER) == count_parameters(ENCODER.make())

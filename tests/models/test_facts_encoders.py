"""The published sizes that are no decoders: their parameters, and that they run (in the abstract)."""

import jax
import jax.numpy as jnp
import pytest

from tpu_llm.checkpoint import huggingface
from tpu_llm.config import ConfigError
from tpu_llm.models.encoder import EncoderConfig
from tpu_llm.models.families import ENCODERS, published
from tpu_llm.models.graph import ModelGraph

SIZES = {name: (facts, fact) for facts in ENCODERS.values() for name, fact in facts.sizes.items()}


@pytest.mark.parametrize('name', SIZES)
def test_its_parameters_are_those_that_were_published(name):
    facts, fact = SIZES[name]
    config = published(name)
    count = ModelGraph(config.make(vocab_multiple=1)).count()
    assert not fact.parameters or count == fact.parameters
    if fact.printed:
        number, unit = float(fact.printed[:-1]), {'M': 1e6, 'B': 1e9}[fact.printed[-1]]
        assert count / unit == pytest.approx(number, rel=0.035)
    if facts.architecture:
        assert huggingface.expressible(config, facts.architecture)[0].architecture == facts.architecture


@pytest.mark.parametrize(('name', 'count'), [('transformer-base', 63_045_632), ('transformer-big', 214_171_648)])
def test_the_transformer_has_what_its_equations_have(name, count):
    """By hand: 6 layers a side of 4 or 8 maps of attention and an MLP with biases, 2 or 3 norms, 37,000 embeddings."""
    config = published(name)
    width, mlp = config.width, 2 * 4 * config.width**2 + 5 * config.width
    layers = 6 * (12 * width**2 + 2 * mlp + 5 * 2 * width)
    assert ModelGraph(config.make(vocab_multiple=1)).count() == layers + 37_000 * width == count


@pytest.mark.parametrize('name', ['bert-large', 'roberta-large', 'transformer-big', 't5-11b', 'ul2', 'bart-large'])
def test_a_published_size_runs_in_the_abstract(name):
    config = published(name)
    graph = ModelGraph(config.make())
    tokens = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    inputs = (tokens,) if isinstance(config, EncoderConfig) else (tokens, tokens)
    logits = jax.eval_shape(lambda weights, *inputs: graph.bind(weights)(*inputs), graph.shapes(), *inputs)
    assert logits.shape == (2, 512, config.vocab_size)
    assert logits.dtype == jnp.float32


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown model 'bert-huge' \(did you mean 'bert-.*of GPT-1,.* T5, "):
        published('bert-huge')

"""Encoders and encoder-decoders: what transformers computes with the same files, and the way back.

The checkpoints are in tests/golden/zoo, with the script that made them. That transformers loads what is written here
is shown as in test_zoo.py: `python tests/contract/test_encoders.py --export FOLDER`, then `make.py --verify FOLDER`.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_llm.checkpoint import huggingface, pretrained, safetensors_file
from tpu_llm.infer.generate import decode
from tpu_llm.infer.sampling import Greedy
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.param import named_params

ZOO = Path(__file__).parents[1] / 'golden/zoo'
ENCODERS = ['bert', 'bert-pretraining', 'bert-body', 'roberta']
ENCODER_DECODERS = ['t5', 't5-v1.1', 'ul2', 'bart', 'bart-scaled']
TOLERANCE = 2e-5
GREEDY = 8
MARKS = {'bos_token_id': 1, 'eos_token_id': None}


def load(name):
    """(what the file makes, what transformers computed)"""
    model = pretrained.read_model(pretrained.open_source(ZOO / name), 'float32')
    return model, np.load(ZOO / name / 'expected.npz')


def run(model, function, *arguments):
    """`function(model, *arguments)`, compiled, its matmuls exact."""
    graph = ModelGraph(model)
    weights = {name: leaf.get_value() for name, leaf in named_params(model)}
    with jax.default_matmul_precision('highest'):
        return jax.jit(lambda weights, *arguments: function(graph.bind(weights), *arguments))(weights, *arguments)


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


# ------------------------------------------------------------------------------------------------- encoders


@pytest.mark.parametrize('name', ENCODERS)
def test_an_encoder_computes_what_transformers_does(name):
    model, expected = load(name)

    def everything(model, tokens, segments, types):
        hidden = model.hidden(tokens, segments=segments, token_types=types)
        said = {'hidden': hidden, 'sentences': model.sentences(tokens, segments=segments, token_types=types)}
        if model.masked is not None:
            said['logits'] = model(tokens, segments=segments, token_types=types)
        if model.pooler is not None:
            said['pooled'] = model.pooled(tokens, segments=segments, token_types=types)
        if model.pair is not None:
            said['next_sentence'] = model.next_sentence(said['pooled'])
        return said

    said = run(model, everything, expected['tokens'], expected['mask'], expected['types'])
    known = set(expected) & set(said)
    assert known == set(expected) - {'tokens', 'mask', 'types'}
    real = expected['mask'].astype(bool)
    for key in known:
        each = key in ('hidden', 'logits')
        close(said[key][real] if each else said[key], expected[key][real] if each else expected[key])
    for row, there in enumerate(real):
        mean = np.asarray(said['hidden'])[row, there].mean(axis=0)
        close(said['sentences'][row], mean / np.linalg.norm(mean))


# ------------------------------------------------------------------------------------------------- encoder-decoders


@pytest.mark.parametrize('name', ENCODER_DECODERS)
def test_an_encoder_decoder_computes_what_transformers_does(name):
    model, expected = load(name)

    def everything(model, tokens, mask, target, target_mask):
        """Logits of the targets whole, the same in two parts with a cache, and greedy targets of the sources."""
        whole = model(tokens, target, source_segments=mask, target_segments=target_mask)
        cut = target.shape[1] - 4
        positions = jnp.maximum(jnp.cumsum(target_mask, axis=1) - 1, 0)
        cache = model.start_cache(model.encode(tokens, segments=mask), target.shape[1], segments=mask)
        pieces = []
        for now in (slice(cut), slice(cut, None)):
            hidden, cache = model.extend(
                target[:, now], cache, segments=target_mask[:, now], positions=positions[:, now]
            )
            pieces.append(hidden)
        cached = model.logits(jnp.concatenate(pieces, axis=1))
        how = {'max_new': GREEDY, 'sampling': Greedy(), 'eos': -1, 'vocab_size': model.vocab_size}
        return whole, cached, decode(model, tokens, mask, jax.random.key(0), **how)

    asked = [expected[key] for key in ('tokens', 'mask', 'target', 'target_mask')]
    whole, cached, greedy = run(model, everything, *asked)
    real = expected['target_mask'].astype(bool)
    close(whole[real], expected['logits'][real])
    close(cached[real], expected['logits'][real])
    np.testing.assert_array_equal(greedy, expected['greedy'])


# ------------------------------------------------------------------------------------------------- files


def export(name, folder):
    source = huggingface.open_folder(ZOO / name)
    model, _ = load(name)
    weights = {path: leaf.get_value() for path, leaf in named_params(model)}
    huggingface.save(folder, source.config, ModelGraph(model), weights, MARKS, home=source.family.architecture)
    return source


@pytest.mark.parametrize('name', [*ENCODERS, *ENCODER_DECODERS])
def test_it_goes_back_bit_for_bit(name, tmp_path):
    source = export(name, tmp_path)
    again = huggingface.open_folder(tmp_path)
    assert again.family is source.family
    assert again.config == source.config
    theirs, ours = (safetensors_file.open_folder(folder) for folder in (ZOO / name, tmp_path))
    assert set(ours) == set(theirs)
    for tensor, reader in ours.items():
        np.testing.assert_array_equal(reader.read(tensor), theirs[tensor].read(tensor), err_msg=tensor)
    found, _ = huggingface.expressible(source.config)
    assert found is source.family


if __name__ == '__main__':
    assert sys.argv[1] == '--export', __doc__
    for each in [*ENCODERS, *ENCODER_DECODERS]:
        export(each, Path(sys.argv[2]) / each)

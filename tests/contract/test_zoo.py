"""Every architecture of transformers that loads here: its numbers, and its way back.

The checkpoints and what transformers computes with them are in tests/golden/zoo, with the script that made them. That
transformers loads what is written here is shown there too: `python tests/contract/test_zoo.py --export FOLDER`, then
`make.py --verify FOLDER`, which needs the `parity` extra.
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
OTHERS = ('bert', 'bert-body', 'bert-pretraining', 'roberta', 't5', 't5-v1.1', 'ul2', 'bart', 'bart-scaled')
NAMES = sorted({folder.parent.name for folder in ZOO.glob('*/expected.npz')} - {*OTHERS})  # test_encoders.py has those
TOLERANCE = 2e-5
GREEDY = 8
# Of no vocabulary as small as these are what transformers takes for them where a config does not say.
MARKS = {'bos_token_id': 1, 'eos_token_id': None, 'pad_token_id': 0}


def decoded(model, tokens, segments, prompts, prompt_segments):
    """Logits of the rows in two parts with a cache, and the tokens that follow the prompts."""
    cut = tokens.shape[1] - 4
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    cache = model.empty_cache(*tokens.shape)
    first, cache = model.extend(tokens[:, :cut], cache, segments=segments[:, :cut], positions=positions[:, :cut])
    rest, cache = model.extend(tokens[:, cut:], cache, segments=segments[:, cut:], positions=positions[:, cut:])
    cached = model.logits(jnp.concatenate([first, rest], axis=1))
    options = {'max_new': GREEDY, 'sampling': Greedy(), 'eos': -1, 'vocab_size': model.vocab_size}
    return cached, decode(model, prompts, prompt_segments, jax.random.key(0), **options)


def run(function, model, *rows):
    graph, weights = ModelGraph(model), {name: leaf.get_value() for name, leaf in named_params(model)}
    with jax.default_matmul_precision('highest'):
        return jax.jit(lambda weights, *rows: function(graph.bind(weights), *rows))(weights, *rows)


@pytest.fixture(scope='module', params=NAMES)
def family(request):
    """(name, the model, what transformers computed)"""
    folder = ZOO / request.param
    model = pretrained.read_model(pretrained.open_source(folder), 'float32')
    return request.param, model, np.load(folder / 'expected.npz')


def left(tokens, mask):
    """The rows with all their padding on the left."""
    rows = [np.concatenate([row[m == 0], row[m == 1]]) for row, m in zip(tokens, mask, strict=True)]
    return np.stack(rows), np.sort(mask, axis=1)


def test_it_computes_what_transformers_does(family):
    _, model, expected = family
    tokens, mask = expected['tokens'], expected['mask']
    logits = run(lambda model, tokens, mask: model(tokens, segments=mask), model, tokens, mask)
    real = mask.astype(bool)
    np.testing.assert_allclose(logits[real], expected['logits'][real], rtol=0, atol=TOLERANCE)


def further(model, tokens, mask):
    """Of each depth, logits and where they predict anything."""
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    hidden = model.hidden(tokens, segments=mask, positions=positions)
    depths = model.look_ahead(hidden, tokens, segments=mask, positions=positions)
    return [(model.logits(hidden), inside > 0) for hidden, inside, _ in depths]


def test_it_predicts_further_tokens_as_transformers_does(family):
    _, model, expected = family
    assert len(model.ahead) == len(expected.get('ahead', ()))
    if not model.ahead:
        return
    depths = run(further, model, expected['tokens'], expected['mask'])
    for (logits, real), theirs in zip(depths, expected['ahead'], strict=True):
        np.testing.assert_array_equal(real, theirs.any(axis=-1))
        np.testing.assert_allclose(logits[real], theirs[real], rtol=0, atol=TOLERANCE)


@pytest.mark.full
def test_it_decodes_what_transformers_does(family):
    _, model, expected = family
    tokens, mask = expected['tokens'], expected['mask']
    cached, greedy = run(decoded, model, tokens, mask, *left(tokens, mask))
    real = mask.astype(bool)
    np.testing.assert_allclose(cached[real], expected['logits'][real], rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(greedy, expected['greedy'])


def export(name, model, folder):
    """Writes the model as its own architecture, and its config as whatever says it."""
    source = huggingface.open_folder(ZOO / name)
    weights = {path: leaf.get_value() for path, leaf in named_params(model)}
    huggingface.save(folder, source.config, ModelGraph(model), weights, MARKS, home=source.family.architecture)
    return source


def test_it_goes_back_bit_for_bit(family, tmp_path):
    name, model, _ = family
    source = export(name, model, tmp_path)
    again = huggingface.open_folder(tmp_path)
    assert again.family is source.family
    assert again.config == source.config
    theirs, ours = (safetensors_file.open_folder(folder) for folder in (ZOO / name, tmp_path))
    assert set(ours) == set(theirs)
    for tensor, reader in ours.items():
        np.testing.assert_array_equal(reader.read(tensor), theirs[tensor].read(tensor), err_msg=tensor)


def test_there_is_an_architecture_that_says_its_config(family):
    name, _, _ = family
    source = huggingface.open_folder(ZOO / name)
    found, said = huggingface.expressible(source.config)
    assert said['architectures'] == [found.architecture]


if __name__ == '__main__':
    assert sys.argv[1] == '--export', __doc__
    for each in NAMES:
        export(each, pretrained.read_model(pretrained.open_source(ZOO / each), 'float32'), Path(sys.argv[2]) / each)

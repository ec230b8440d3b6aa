"""llama.cpp reads our GGUF: what it computes with files that our exporter writes is in tests/golden/llamacpp.

Files of today are those that it read, byte for byte, and we compute the same of them as it does.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden.llamacpp import make
from tpu_llm.checkpoint import gguf
from tpu_llm.models.graph import ModelGraph

SUMS = json.loads((make.HERE / 'sums.json').read_text())
# Each architecture's text is read in tests -m full; by default one of each sort of MLP and of norm.
QUICK = {'llama', 'gemma2', 'gpt2', 'phi3-long'}
READ = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.full)
    for name in make.MODELS
    if name not in ('phi3-between', 'phi3-window')  # which it reads in another way than we: below
]
# The differences' root mean square over the logits' spread.
TOLERANCE = {
    'F32': 3e-6,  # the order of sums
    'F16': 2e-3,  # what meets a matrix is rounded to float16, as the matrix is, in its sums
    'Q8_0': 6e-2,  # … to 8 bits, in blocks of 32
    'Q4_0': 6e-2,
    'Q4_1': 6e-2,
}
GELU = 1e-3  # at least: it looks it up in a table of float16


@pytest.fixture(scope='module')
def theirs():
    with np.load(make.HERE / 'expected.npz') as arrays:
        return dict(arrays)


@pytest.mark.filterwarnings('ignore:.*passes over the window')
@pytest.mark.parametrize('name', make.MODELS)
def test_we_write_what_it_read(name, tmp_path):
    model = make.build(name)
    for kind in make.kinds(name):
        path = make.export(model, kind, tmp_path)
        assert make.sha256(path) == SUMS[f'{name}.{kind}'], (
            'the exporter writes another file than llama.cpp was asked about; '
            'if it should: python tests/golden/llamacpp/make.py'
        )


@pytest.mark.parametrize('name', READ)
def test_it_computes_what_we_do(name, theirs, tmp_path):
    model = make.build(name)
    for kind in make.kinds(name):
        ours, config = read_back(make.export(model, kind, tmp_path))
        said = theirs[f'{name}.{kind}']
        wrong = np.sqrt(np.square(ours - said).mean()) / said.std()
        assert wrong < max(TOLERANCE[kind], 0 if config.mlp == 'swiglu' else GELU), kind


def read_back(path):
    file = gguf.open_file(path)
    graph = ModelGraph(dataclasses.replace(file.config, dtype='float32').make(vocab_multiple=1))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for name, x in graph.shapes().items()}
    with jax.default_matmul_precision('highest'):
        return np.asarray(graph.bind(file.load(graph, like))(jnp.array([make.TOKENS]))[0]), file.config


def test_it_passes_over_the_window_of_phi3(theirs, tmp_path):
    """And so we say it, where a model is written that has one."""
    np.testing.assert_allclose(theirs['phi3-window.F32'], theirs['phi3.F32'], atol=1e-5)
    with pytest.warns(UserWarning, match='llama.cpp passes over the window of 4 tokens'):
        path = make.export(make.build('phi3-window'), 'F32', tmp_path)
    ours, config = read_back(path)
    assert config.windows == (4,)
    # Up to the window's length the two agree.
    np.testing.assert_allclose(ours[:4], theirs['phi3-window.F32'][:4], atol=1e-5)
    assert abs(ours - theirs['phi3-window.F32']).max() > 0.1


def test_it_turns_by_long_factors_where_its_context_is_long(theirs):
    """Where the original length lies between the text's and its context's, it computes as if the text were long."""
    assert len(make.TOKENS) < 64 < make.CONTEXT
    np.testing.assert_allclose(theirs['phi3-between.F32'], theirs['phi3-long.F32'], atol=1e-5)
    assert abs(theirs['phi3-between.F32'] - theirs['phi3-short.F32']).max() > 0.1

"""Every dense architecture of llama.cpp that loads here, by what its own converter writes of the zoo's checkpoints.

What that says is in tests/golden/gguf, with the script that asked it.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tpu_llm.checkpoint import gguf, huggingface
from tpu_llm.checkpoint.gguf_file import Reader
from tpu_llm.config import ConfigError
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.param import named_params

GOLDEN = Path(__file__).parents[1] / 'golden'
SAID = json.loads((GOLDEN / 'gguf/said.json').read_text())
# What llama.cpp does not know of the zoo's checkpoints: the rest of them is compared.
WITHOUT = {
    'gemma2': {'attention_scale': 0.0},
    'gemma3': {'attention_scale': 0.0},
    'mpt': {'attention_scale': 0.0},
    'starcoder2': {'windows': (0,)},
}
# The converter writes a fixed length for two, and keys that say what llama.cpp takes for granted.
OTHERS = {'context_length', 'use_parallel_residual', 'rope.scaling.type'}


def load(source, config):
    graph = ModelGraph(dataclasses.replace(config, dtype='float32').make(vocab_multiple=1))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for name, x in graph.shapes().items()}
    return graph.bind(source.load(graph, like))


def from_zoo(name):
    folder = huggingface.open_folder(GOLDEN / 'zoo' / name)
    config = dataclasses.replace(folder.config, **WITHOUT.get(name, {}))
    return config, load(dataclasses.replace(folder, config=config), config)


def fingerprint(values):
    flat = values.reshape(-1).astype(np.float64)
    return flat @ np.cos(np.arange(flat.size))


@pytest.mark.parametrize('name', SAID)
def test_it_writes_what_llama_cpp_does(name, tmp_path):
    _, model = from_zoo(name)
    gguf.save(tmp_path / 'model.gguf', model, None, 'F32')
    said, reader = SAID[name], Reader(tmp_path / 'model.gguf')
    lead = said['architecture'] + '.'
    assert reader.metadata['general.architecture'] == said['architecture']
    for key, value in said['metadata'].items():
        if key.removeprefix(lead) not in OTHERS:
            assert reader.metadata[key] == pytest.approx(value), key
    assert {key: list(reversed(info.shape)) for key, info in reader.tensors.items()} == {
        key: dims for key, (dims, _) in said['tensors'].items()
    }
    for key, (_, print_) in said['tensors'].items():
        assert fingerprint(reader.read(key)) == pytest.approx(print_, abs=1e-5), key


@pytest.mark.parametrize('name', SAID)
def test_it_reads_it_back(name, tmp_path):
    config, model = from_zoo(name)
    gguf.save(tmp_path / 'model.gguf', model, None, 'F32')
    file = gguf.open_file(tmp_path / 'model.gguf')
    near = {'rope_scaling': config.rope_scaling}  # of which numbers are float32 there
    assert dataclasses.replace(file.config, **near) == config
    again = dict(named_params(load(file, file.config)))
    for path, leaf in named_params(model):
        # One is added to Gemma's norms and taken away again.
        inexact = 2e-7 if config.norm == 'rms_offset' and path.endswith('scale') else 0
        np.testing.assert_allclose(again[path].get_value(), leaf.get_value(), rtol=0, atol=inexact, err_msg=path)


@pytest.mark.parametrize(
    'name',
    [
        'qwen2-window',  # it knows no windows of Qwen 2
        'llama31',  # numbers that are not Llama 3's own
        'cohere-normed',  # it norms heads of deep models only
        'falcon-serial',
        'gptj',
    ],
)
def test_a_model_that_it_has_not_is_refused(name, tmp_path):
    _, model = from_zoo(name)
    with pytest.raises(ConfigError, match=r'no architecture of llama\.cpp is this model; the nearest is .* no '):
        gguf.save(tmp_path / 'model.gguf', model, None)
    assert not (tmp_path / 'model.gguf').exists()

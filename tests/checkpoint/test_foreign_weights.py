"""Weights from outside: every fault of the tensors in one line, straight into shards, and in little memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import toy

from tpu_llm.checkpoint import huggingface, pretrained, safetensors_file
from tpu_llm.checkpoint.files import CheckpointError
from tpu_llm.config import ConfigError
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.param import named_params, param_sharding
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.parallel.rules import PRESETS
from tpu_llm.parallel.sharding import Layout

LLAMA = Path(__file__).parents[1] / 'golden/zoo/llama'


def changed(folder, tmp_path, tensors=lambda name, array: {name: array}, **said):
    """A copy of the folder with other tensors or other words in its config."""
    files = safetensors_file.open_folder(folder)
    arrays = {}
    for name, reader in files.items():
        arrays |= tensors(name, reader.read(name))
    copy = tmp_path / 'copy'
    copy.mkdir()
    listed = [(name, array.dtype, array.shape) for name, array in arrays.items()]
    safetensors_file.write(copy / 'model.safetensors', listed, arrays.__getitem__)
    config = json.loads((folder / 'config.json').read_text()) | said
    (copy / 'config.json').write_text(json.dumps(config))
    return copy


def read(folder):
    return pretrained.read_model(pretrained.open_source(folder), 'float32')


def test_every_fault_of_the_tensors_is_said_at_once(tmp_path):
    def broken(name, array):
        if name.endswith('q_proj.weight'):
            return {name.replace('q_proj', 'qq_proj'): array}
        return {name: array[1:] if name.endswith('norm.weight') and 'layers' not in name else array}

    folder = changed(LLAMA, tmp_path, broken)
    with pytest.raises(CheckpointError) as error:
        read(folder)
    assert str(error.value) == (
        f'{folder}: the tensors do not fit the config; '
        '2 missing: model.layers.*.self_attn.q_proj.weight (2 of them), '
        'nearest model.layers.*.self_attn.qq_proj.weight; '
        '2 without a place: model.layers.*.self_attn.qq_proj.weight (2 of them), '
        'nearest model.layers.*.self_attn.q_proj.weight; '
        '1 of another shape: model.norm.weight is [15], not [16]'
    )


@pytest.mark.parametrize(
    ('said', 'message'),
    [
        ({'architectures': ['LamaForCausalLM']}, r"is a LamaForCausalLM, .* \(did you mean 'LlamaForCausalLM'\?\)"),
        ({'architectures': None, 'model_type': None}, 'names no architecture'),
        ({'hidden_act': 'silu2'}, "hidden_act = 'silu2' is not implemented; known are 'silu'"),
        ({'banana_factor': 2}, 'the config says banana_factor = 2, which is not implemented for this architecture'),
        ({'hidden_size': None}, 'has no hidden_size'),
        ({'rope_parameters': {'rope_type': 'spiral'}}, "rope_type = 'spiral' is not implemented; known are default"),
        ({'rope_parameters': {'rope_type': 'linear'}}, 'the rope of type linear has no factor'),
        ({'num_attention_heads': 0, 'head_dim': None}, 'one of its sizes is 0'),
        ({'architectures': 7}, 'architectures and model_type are no names'),
        ({'num_attention_heads': 3}, 'heads = 3 is not divisible by kv_heads = 2'),
        ({'vocab_size': 'many'}, "vocab_size is 'many'; expected int"),
    ],
)
def test_a_config_that_cannot_be(tmp_path, said, message):
    with pytest.raises(ConfigError, match=message) as error:
        pretrained.open_source(changed(LLAMA, tmp_path, **said))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('text', ['{', '[]', '"llama"', '[' * 100_000])
def test_a_config_that_is_not_json(tmp_path, text):
    folder = changed(LLAMA, tmp_path)
    (folder / 'config.json').write_text(text)
    with pytest.raises(CheckpointError, match=r'config\.json is'):
        pretrained.open_source(folder)


def test_pickles_are_refused(tmp_path):
    shutil.copy(LLAMA / 'config.json', tmp_path)
    (tmp_path / 'pytorch_model.bin').write_bytes(b'cos\nsystem\n')
    with pytest.raises(ConfigError, match='pickle'):
        pretrained.open_source(tmp_path)


@pytest.mark.parametrize(
    ('path', 'message'),
    [
        ('/nothing/here', 'there is no /nothing/here; give a Hugging Face folder'),
        ('smollm', r"there is no smollm \(did you mean 'smollm2'\?\); give a Hugging Face folder"),
        ('stage:sft', r"set run\.origin = Origin\(weights='stage:sft'\)"),
        ('tests/nothing', 'there is no tests/nothing; give'),
        (str(LLAMA / 'model.safetensors'), 'is a file; give the folder that it is in'),
        (str(LLAMA.parent), 'holds no finished checkpoint; give the workdir .* a Hugging Face folder'),
    ],
)
def test_there_is_nothing(path, message):
    with pytest.raises(ConfigError, match=message):
        pretrained.open_source(path)


def test_a_folder_cannot_be_called_a_gguf(tmp_path):
    with pytest.raises(ConfigError, match='a GGUF file is written by'):
        pretrained.save_pretrained(read(LLAMA), None, tmp_path / 'x.gguf')


def test_a_repository_of_the_hub_without_its_package(monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ConfigError, match='to fetch org/model from the Hugging Face Hub: pip install huggingface_hub'):
        pretrained.open_source('org/model')


@pytest.mark.parametrize('mesh', [{'fsdp': 8}, {'fsdp': 4, 'tensor': 2}, {'stage': 2, 'fsdp': 2, 'tensor': 2}], ids=str)
def test_straight_into_shards(mesh):
    """On 8 devices, the vocabulary of 61 padded to a multiple of 16: every shard holds its part of the whole."""
    source = pretrained.open_source(LLAMA)
    layout = Layout(Mesh(**mesh).make(), PRESETS['zero3'])
    graph = ModelGraph(source.config.make(vocab_multiple=16, stages=mesh.get('stage', 1)))
    like = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param_sharding(layout, name, leaf))
        for name, leaf in graph.leaves.items()
    }
    loaded = source.load(graph, like, lambda name: None)
    whole = {name: leaf.get_value() for name, leaf in named_params(read(LLAMA))}
    assert set(loaded) == set(whole)
    for name, array in loaded.items():
        assert array.sharding == like[name].sharding
        expected = np.zeros(array.shape, np.float32)
        expected[tuple(map(slice, whole[name].shape))] = whole[name]
        np.testing.assert_array_equal(array, expected, err_msg=name)


def test_a_run_starts_from_them(tmp_path):
    """Two steps of next to nothing on 8 devices: the checkpoint holds the folder's very weights."""
    from tpu_llm.checkpoint.resume import Origin
    from tpu_llm.checkpoint.retention import Checkpoints
    from tpu_llm.data.loader import Data
    from tpu_llm.data.mixture import Mixture
    from tpu_llm.data.sources import Stdlib
    from tpu_llm.data.tokenizer import Bytes
    from tpu_llm.objectives.next_token import NextToken
    from tpu_llm.optim.optimizer import AdamW
    from tpu_llm.optim.schedule import Schedule
    from tpu_llm.train.run import Run

    BYTES = 259
    wide = changed(
        LLAMA, tmp_path, lambda name, x: {name: np.resize(x, (BYTES, 16)) if len(x) == 61 else x}, vocab_size=BYTES
    )
    run = Run(
        model=pretrained.open_source(wide).config,
        data=Data(mixture=Mixture(sources={'s': Stdlib()}), tokenizer=Bytes(), seq_len=16, global_batch=8),
        objective=NextToken(),
        optimizer=AdamW(schedule=Schedule(peak=1e-30, warmup=1), weight_decay=0.0),
        steps=2,
        mesh=Mesh(fsdp=4, tensor=2),
        origin=Origin(weights=str(wide)),
        checkpoints=Checkpoints(every=1),
    )
    run.main(str(tmp_path / 'run'))
    trained, _ = pretrained.from_pretrained(tmp_path / 'run')
    apart = pretrained.read_model(pretrained.open_source(tmp_path / 'run'), 'float32', apart=True)
    assert len(apart.stack.prefix) == 2
    assert apart.stack.prefix[0].mlp.up.kernel.shape == (16, 24)
    for (name, before), (_, after) in zip(named_params(read(wide)), named_params(trained), strict=True):
        np.testing.assert_array_equal(before[...], after[...], err_msg=name)

    run.model.norm_eps = 1e-3
    with pytest.raises(ConfigError, match=r'are of another model \(norm_eps: 1e-06 there, 0.001 here\)'):
        run.main(str(tmp_path / 'other'))


def test_saved_without_the_padding(tmp_path):
    graph = toy.graph(toy.config(vocab_size=19), vocab_multiple=8)
    model = graph.bind(toy.weights(graph))
    pretrained.save_pretrained(model, None, tmp_path)
    again = read(tmp_path)
    assert again.embed.table.shape == (19, 16)
    np.testing.assert_array_equal(again.embed.table[...], model.embed.table[...][:19])


def test_a_model_of_no_architecture_is_not_saved(tmp_path):
    graph = toy.graph(toy.config(position='sinusoidal', qkv_clip=3.0))
    with pytest.raises(ConfigError, match='no architecture of transformers is this model; the nearest is'):
        pretrained.save_pretrained(graph.bind(toy.weights(graph)), None, tmp_path / 'folder')
    assert not (tmp_path / 'folder').exists()


MEASURE = """
import resource, sys
import jax, numpy as np
from tpu_llm.checkpoint import pretrained
source = pretrained.open_source(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = pretrained.read_model(source, sys.argv[2])
jax.block_until_ready([leaf for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.Array)])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.full
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_memory_of_two_gigabytes(tmp_path, dtype):
    """In a process of its own: the shards of this host, and beside them less than 1.3 times the largest tensor."""
    from tpu_llm.models.decoder_config import DecoderConfig

    config = DecoderConfig(
        vocab_size=32_000, width=2048, layers=10, heads=16, kv_heads=16, head_dim=128, mlp_width=5504, dtype='float32'
    )
    graph = ModelGraph(config.make(vocab_multiple=1))
    blank = np.zeros(max(leaf.size for leaf in graph.leaves.values()), np.float32)
    weights = {name: blank[: leaf.size].reshape(leaf.shape) for name, leaf in graph.leaves.items()}
    huggingface.save(tmp_path, config, graph, weights, {})
    sizes = {
        name: 4 * np.prod(reader.tensors[name].shape) for name, reader in safetensors_file.open_folder(tmp_path).items()
    }
    assert sum(sizes.values()) > 2e9
    command = [sys.executable, '-c', MEASURE, tmp_path, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={'JAX_PLATFORMS': 'cpu'})
    shards = sum(sizes.values()) // (1 if dtype == 'float32' else 2)
    assert int(done.stdout) < shards + 1.3 * max(sizes.values())

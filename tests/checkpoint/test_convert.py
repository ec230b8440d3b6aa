"""`python -m tpu_llm.checkpoint inspect` and `convert`, from every form into every other."""

import re
from pathlib import Path

import numpy as np
import pytest
import toy

from tpu_llm.checkpoint import gguf, gguf_file, huggingface, pretrained
from tpu_llm.checkpoint.__main__ import main
from tpu_llm.config import ConfigError
from tpu_llm.data.tokenizer import SentencePiece, train_bpe
from tpu_llm.nn.param import named_params

ZOO = Path(__file__).parents[1] / 'golden/zoo'
TEXT = ['the quick brown fox jumps over the lazy dog, again and again; ' * 20]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A Hugging Face folder with random weights and a tokenizer trained on the spot."""
    tokenizer = SentencePiece(train_bpe(TEXT, 300))
    graph = toy.graph(toy.config(vocab_size=300, width=32, head_dim=8, mlp_width=32), vocab_multiple=1)
    path = tmp_path_factory.mktemp('form') / 'hf'
    pretrained.save_pretrained(graph.bind(toy.weights(graph)), tokenizer, path)
    return path


def weights(path):
    model, tokenizer = pretrained.from_pretrained(path)
    return {name: np.asarray(leaf[...]) for name, leaf in named_params(model)}, tokenizer


@pytest.mark.parametrize('chain', [['hf', 'tpu_llm', 'gguf', 'hf'], ['gguf', 'tpu_llm', 'hf']], ids='→'.join)
def test_through_every_form_and_back(folder, tmp_path, chain, capsys):
    before, tokenizer = weights(folder)
    at = str(folder)
    for step, form in enumerate(chain):
        target = str(tmp_path / f'{step}.gguf' if form == 'gguf' else tmp_path / str(step))
        extra = ['--dtype=F32'] if form == 'gguf' else []
        assert main(['convert', at, target, f'--to={form}', *extra]) == 0
        assert capsys.readouterr().out.strip() == f'{at} → {target}'
        at = target
        assert main(['inspect', at]) == 0
        assert 'every tensor has its place' in capsys.readouterr().out
    after, same = weights(at)
    assert set(after) == set(before)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)
    assert same.encode(TEXT[0]).tolist() == tokenizer.encode(TEXT[0]).tolist()


def test_fewer_bits(folder, tmp_path):
    assert main(['convert', str(folder), str(tmp_path / 'a.gguf'), '--dtype=q8_0']) == 0
    before, after = weights(folder)[0], weights(tmp_path / 'a.gguf')[0]
    for name, array in before.items():
        assert np.abs(after[name] - array).max() <= np.abs(array).max() / 127
    assert main(['convert', str(folder), str(tmp_path / 'half'), '--dtype=bf16']) == 0
    assert pretrained.open_source(tmp_path / 'half').types().keys() == {'bfloat16'}


@pytest.mark.parametrize(
    ('target', 'flags', 'message'),
    [
        ('x', ['--dtype=int3'], '--dtype=int3: a model as hf has float32, bfloat16'),
        ('x.gguf', ['--dtype=Q5_0'], '--dtype=Q5_0: a model as gguf has F16, F32, BF16, Q8_0, Q4_0, Q4_1'),
        ('x', ['--to=gguf'], 'the name of a GGUF file ends in .gguf, and that of nothing else'),
        ('', [], 'is there already; give another place, or remove it'),
    ],
)
def test_mistakes(folder, tmp_path, target, flags, message, capsys):
    assert main(['convert', str(folder), str(tmp_path / target), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1
    assert not target or not (tmp_path / target).exists()


def test_what_does_not_map(folder, tmp_path, capsys):
    """It says so and exits 1."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes().replace(b'.q_proj.weight', b'.qq_proj.weigh'))
    assert main(['inspect', str(tmp_path)]) == 1
    assert '3 missing: model.layers.*.self_attn.q_proj.weight (3 of them)' in capsys.readouterr().out


def test_what_a_model_says_of_itself(folder, tmp_path, capsys):
    main(['inspect', str(folder)])
    out = capsys.readouterr().out
    assert '3 layers, width 32, 300 tokens, context not said\n' in out
    assert ' heads of 8, ' in out
    assert 'float32: ' in out
    for name in ('config.json', 'model.safetensors'):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert main(['inspect', str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert 'there is no tokenizer in' in out
    assert 'every tensor has its place' in out


@pytest.mark.parametrize(
    ('name', 'said'), [('t5', '1 + 2 layers'), ('mamba', 'no attention'), ('bert', '4 heads of 4')]
)
def test_a_model_of_another_kind(name, said, capsys):
    main(['inspect', str(ZOO / name)])
    assert said in capsys.readouterr().out


def test_in_fewer_bits_than_it_is_held(folder, tmp_path):
    model, tokenizer = pretrained.from_pretrained(folder)
    pretrained.save_pretrained(model, tokenizer, tmp_path / 'half', dtype='bfloat16')
    assert pretrained.open_source(tmp_path / 'half').types().keys() == {'bfloat16'}
    again, _ = pretrained.from_pretrained(tmp_path / 'half')
    for (_, leaf), (_, other) in zip(named_params(model), named_params(again), strict=True):
        np.testing.assert_array_equal(leaf[...].astype('bfloat16').astype('float32'), other[...])
    with pytest.raises(ConfigError, match="dtype = 'int8'; write 'float32' or 'bfloat16'"):
        pretrained.save_pretrained(model, tokenizer, tmp_path / 'x', dtype='int8')
    assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize(
    ('name', 'meant'),
    [('Phi4ForCausalLM', "'PhiForCausalLM'"), ('LLaMAForCausalLM', "'LlamaForCausalLM'"), ('RwkvForCausalLM', '')],
)
def test_an_unknown_architecture_is_met_with_a_near_name_or_none(name, meant):
    with pytest.raises(ConfigError) as error:
        huggingface.find({'architectures': [name]}, 'somewhere')
    suggestion = f' (did you mean {meant}?)' if meant else ''
    assert str(error.value).startswith(f'somewhere is a {name}, which is not known here{suggestion}; there are Llama')


@pytest.mark.parametrize(('name', 'meant'), [('phi4', "'phi3'"), ('plamo', ''), ('rwkv6', '')])
def test_so_is_one_of_llama_cpp(name, meant, tmp_path):
    gguf_file.write(tmp_path / 'x.gguf', {'general.architecture': name}, [], lambda name: np.zeros(0))
    suggestion = f' (did you mean {meant}?)' if meant else ''
    with pytest.raises(ConfigError, match=re.escape(f'is a {name!r}, which is not known here{suggestion}; there are')):
        gguf.open_file(tmp_path / 'x.gguf')

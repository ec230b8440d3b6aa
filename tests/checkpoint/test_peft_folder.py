"""Adapters in the form of the `peft` library: its folders here, and ours as it would write them.

The other direction (what it says with a folder of ours) is checked by hand: tests/golden/peft/make.py --verify.
Tolerance: 2e-5 of logits up to 5, float32 sums in another order.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tuned

from tpu_llm.checkpoint import adapters, pretrained, safetensors_file
from tpu_llm.checkpoint.__main__ import main
from tpu_llm.checkpoint.files import CheckpointError
from tpu_llm.checkpoint.resume import Origin
from tpu_llm.config import ConfigError
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Tokens
from tpu_llm.data.tokenizer import Ids, SentencePiece, train_bpe
from tpu_llm.nn.param import named_params
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.peft.adapters import Adapters
from tpu_llm.peft.ia3 import IA3
from tpu_llm.peft.lora import LoRA
from tpu_llm.peft.merging import bare, merge
from tpu_llm.peft.prompts import SoftPrompts
from tpu_llm.train.loop import fit
from tpu_llm.train.run import Run

pytestmark = pytest.mark.usefixtures('quick_compile')

GOLDEN = Path(__file__).parents[1] / 'golden/peft'
LOGITS = np.load(GOLDEN / 'logits.npz')
TOKENS = jnp.asarray((np.arange(16).reshape(2, 8) * 5) % 48)
KINDS = ['lora', 'rslora', 'dora', 'ia3', 'prompt', 'prefix']


def base(*, apart=False):
    return pretrained.read_model(pretrained.open_source(GOLDEN / 'base'), 'float32', apart=apart)


@pytest.fixture(scope='module', params=KINDS)
def loaded(request):
    model = base()
    return request.param, model, adapters.load(model, GOLDEN / request.param)


def test_a_folder_of_theirs_says_here_what_it_says_there(loaded):
    name, model, _ = loaded
    np.testing.assert_allclose(tuned.says(model, TOKENS), LOGITS[name], atol=2e-5)


def test_what_is_saved_is_their_folder_again(loaded, tmp_path):
    name, model, kind = loaded
    adapters.save(model, kind, tmp_path / 'a', base='base')
    ours, theirs = (
        safetensors_file.Reader(at / name / adapters.TENSORS) for at, name in ((tmp_path, 'a'), (GOLDEN, name))
    )
    assert set(ours.tensors) == set(theirs.tensors)
    for tensor, info in theirs.tensors.items():
        assert ours.tensors[tensor].shape == info.shape
        np.testing.assert_allclose(ours.read(tensor), theirs.read(tensor), rtol=1e-5, atol=1e-6)
    said, wanted = (json.loads((at / adapters.CONFIG).read_text()) for at in (tmp_path / 'a', GOLDEN / name))
    for key, value in said.items():
        assert sorted(value) == sorted(wanted[key]) if isinstance(value, list) else value == wanted[key], key


@pytest.mark.parametrize('name', ['dora', 'ia3', 'prefix'])
def test_layers_one_by_one(name):
    model = base(apart=True)
    adapters.load(model, GOLDEN / name)
    np.testing.assert_allclose(tuned.says(model, TOKENS), LOGITS[name], atol=2e-5)


def test_a_merged_model_is_saved_as_any_other(tmp_path):
    model = base()
    kind = adapters.load(model, GOLDEN / 'lora')
    merge(model)
    with pytest.raises(ConfigError, match='the adapter is merged; unmerge the model'):
        adapters.save(model, kind, tmp_path / 'apart')
    bare(model)
    pretrained.save_pretrained(model, None, tmp_path / 'whole')
    again = pretrained.read_model(pretrained.open_source(tmp_path / 'whole'), 'float32')
    np.testing.assert_allclose(tuned.says(again, TOKENS), LOGITS['lora'], atol=2e-5)


@pytest.mark.parametrize('name', KINDS)
def test_an_adapter_of_another_base_is_refused_in_one_line(name):
    other = tuned.base(width=32, layers=2, heads=4, kv_heads=1, head_dim=8, mlp_width=16)
    with pytest.raises(CheckpointError, match=r'for another base|adapter for this base') as error:
        adapters.load(other, GOLDEN / name)
    assert '\n' not in str(error.value)


def test_the_line_lists_names_and_shapes(tmp_path):
    folder = tmp_path / 'lora'
    shutil.copytree(GOLDEN / 'lora', folder)
    file = safetensors_file.Reader(folder / adapters.TENSORS)
    tensors = {name: file.read(name) for name in file.tensors}
    first = next(name for name in tensors if name.endswith('0.mlp.down_proj.lora_B.weight'))
    tensors[first] = np.zeros((7, 2), np.float32)
    tensors['base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight'] = np.zeros((3, 24), np.float32)
    listed = [(name, array.dtype, array.shape) for name, array in tensors.items()]
    safetensors_file.write(folder / adapters.TENSORS, listed, lambda name: tensors[name], {})
    with pytest.raises(CheckpointError) as error:
        adapters.load(base(), folder)
    assert '1 without a place: base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight' in str(error.value)
    assert 'layers.0.mlp.down_proj.lora_B.weight is [7, 2], not [24, 2]' in str(error.value)


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'peft_type': 'LOHA'}, "unknown peft_type 'LOHA'"),
        ({'bias': 'all'}, "bias = 'all' is not implemented"),
        ({'modules_to_save': ['lm_head']}, 'modules_to_save'),
        ({'r': None}, 'has no r'),
    ],
)
def test_what_is_not_implemented_is_named(changes, said, tmp_path):
    shutil.copytree(GOLDEN / 'lora', tmp_path / 'lora')
    config = json.loads((GOLDEN / 'lora' / adapters.CONFIG).read_text())
    for key, value in changes.items():
        config.pop(key) if value is None else config.update({key: value})
    (tmp_path / 'lora' / adapters.CONFIG).write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=said):
        adapters.load(base(), tmp_path / 'lora')


def test_what_peft_has_no_form_for(tmp_path):
    with pytest.raises(ConfigError, match='give the folder of an adapter'):
        adapters.load(base(), tmp_path)
    bottleneck = Adapters()
    with pytest.raises(ConfigError, match='PEFT has no form for Adapters'):
        adapters.save(tuned.wrapped(bottleneck), bottleneck, tmp_path / 'a')
    kind = SoftPrompts(length=2, tasks=2)
    with pytest.raises(ConfigError, match='one prompt a folder'):
        adapters.save(tuned.wrapped(kind), kind, tmp_path / 'a')


def test_merge_from_the_command_line(tmp_path, capsys):
    tokenizer = SentencePiece(train_bpe(['the quick brown fox jumps over the lazy dog ' * 20], 300))
    sizes = {'vocab_size': 300, 'width': 32, 'head_dim': 8, 'mlp_width': 32}
    pretrained.save_pretrained(tuned.base(**sizes), tokenizer, tmp_path / 'base')
    kind = LoRA(targets=('.*',), rank=2, dora=True)
    model = tuned.noisy(tuned.wrapped(kind, **sizes))
    adapters.save(model, kind, tmp_path / 'adapter', base=str(tmp_path / 'base'))
    assert main(['merge', str(tmp_path / 'adapter'), str(tmp_path / 'whole')]) == 0
    assert capsys.readouterr().out.strip() == f'{tmp_path}/base + {tmp_path}/adapter → {tmp_path}/whole'
    whole, again = pretrained.from_pretrained(tmp_path / 'whole')
    np.testing.assert_allclose(tuned.says(whole, TOKENS), tuned.says(model, TOKENS), rtol=1e-4, atol=1e-4)
    assert again.vocab_size == tokenizer.vocab_size
    assert main(['merge', str(tmp_path / 'adapter'), str(tmp_path / 'whole')]) == 2
    assert 'is there already' in capsys.readouterr().err
    assert main(['convert', str(tmp_path / 'adapter'), str(tmp_path / 'x')]) == 2
    assert f'merge it: python -m tpu_llm.checkpoint merge {tmp_path}/adapter TARGET\n' in capsys.readouterr().err
    assert main(['inspect', str(tmp_path / 'adapter')]) == 0
    out = capsys.readouterr().out
    assert f'an adapter of {tmp_path}/base; merge it: ' in out
    assert 'LORA: rank 2, of down_proj, ' in out
    count = sum(leaf.size for _, leaf in named_params(model) if leaf.get_metadata('added'))
    assert f' tensors, {count:,} parameters' in out
    prompts = SoftPrompts(length=2)
    adapters.save(tuned.wrapped(prompts, **sizes), prompts, tmp_path / 'prompts')
    assert main(['merge', str(tmp_path / 'prompts'), str(tmp_path / 'x')]) == 2
    assert 'names no base; write --base=FOLDER' in capsys.readouterr().err
    assert main(['merge', str(tmp_path / 'prompts'), str(tmp_path / 'x'), f'--base={tmp_path}/base']) == 2
    assert 'no adapter that its kernels could take up' in capsys.readouterr().err


def test_ranks_and_inputs_are_kept():
    model = base()
    assert adapters.load(model, GOLDEN / 'lora').rank_by == {'mlp.down': 2}
    assert isinstance(adapters.load(base(), GOLDEN / 'lora'), LoRA)
    kind = adapters.load(base(), GOLDEN / 'ia3')
    assert isinstance(kind, IA3)
    assert kind.inputs == ('mlp.down',)


def test_a_run_is_written_as_their_folder(tmp_path, capsys):
    """What it learned, beside the base that it names: the same logits as the model that the run loads as."""
    said, out = GOLDEN / 'base', tmp_path / 'folder'
    kind = LoRA(rank=3, targets=('query', 'down'))
    np.save(tmp_path / 'ids.npy', np.arange(3, 47, dtype=np.uint16).repeat(40))
    data = Data(
        mixture=Mixture(sources={'ids': Tokens(paths=(str(tmp_path / 'ids.npy'),), end=0)}),
        tokenizer=Ids(vocab_size=48, bos=1, eos=2),
        seq_len=16,
        global_batch=8,
    )
    run = Run(
        model=pretrained.open_source(said).config,
        data=data,
        objective=NextToken(),
        optimizer=AdamW(schedule=Schedule(peak=0.1, warmup=0)),
        steps=2,
        origin=Origin(weights=str(said)),
        peft=kind,
        report=False,
    )
    fit(run, tmp_path / 'run')
    capsys.readouterr()
    assert main(['convert', f'{tmp_path}/run', str(out), '--to=peft']) == 0
    assert adapters.read(out)['base_model_name_or_path'] == str(said)
    model = base()
    assert adapters.load(model, out) == dataclasses.replace(kind, targets=('attention.query', 'mlp.down'))
    merged, _ = pretrained.from_pretrained(tmp_path / 'run')
    np.testing.assert_allclose(tuned.says(model, TOKENS), merged(TOKENS), atol=2e-5)
    assert np.abs(merged(TOKENS) - base()(TOKENS)).max() > 0.1
    assert main(['inspect', f'{tmp_path}/run']) == 0
    shown = capsys.readouterr().out
    assert f'  an adapter, LoRA(rank=3): its tensors alone, beside those of {said}\n' in shown
    assert re.search(r'  float32: 4 tensors, [\d,]+ numbers\n  for training on, the optimizer among it: ', shown)


def test_what_has_no_adapter_is_not_written_as_one(tmp_path, capsys):
    tokenizer = SentencePiece(train_bpe(['the quick brown fox ' * 20], 300))
    sizes = {'vocab_size': 300, 'width': 32, 'head_dim': 8, 'mlp_width': 32}
    pretrained.save_pretrained(tuned.base(**sizes), tokenizer, tmp_path / 'base')
    assert main(['convert', f'{tmp_path}/base', f'{tmp_path}/x', '--to=peft']) == 2
    assert 'base has no adapter; give the workdir of a run with `peft`' in capsys.readouterr().err
    assert not (tmp_path / 'x').exists()

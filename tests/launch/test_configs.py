"""Every shipped page: it validates for every size and mesh, and its smoke form runs."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from configs import evaluate, moe, pretrain, quickstart
from configs.meshes import MESHES
from configs.sizes import SIZES, decoder
from tpu_llm.config import ConfigError, validate
from tpu_llm.nn.param import count_parameters

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('mesh', MESHES)
def test_pretrain_page_validates(size, mesh):
    run = pretrain.get_config(f'size={size},mesh={mesh}')
    validate(run)
    assert run.data.global_batch * run.data.seq_len == SIZES[size].batch_tokens


@pytest.mark.parametrize(
    ('size', 'millions'),
    [('125m', 135), ('350m', 375), ('1b', 1_236 - 128), ('3b', 3_020), ('8b', 7_248), ('70b', 68_988)],
)
def test_sizes_are_what_their_names_say(size, millions):
    """With 32,768 tokens and untied embeddings; counted without allocating anything."""
    model, _ = decoder(size, vocab_size=32_768, dtype='bfloat16')
    assert count_parameters(model.make()) / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize('page', [quickstart, pretrain, moe])
def test_a_page_and_its_smoke_form_validate(page):
    """The smoke form is the same run, smaller in every way that costs time."""
    run, smoke = page.get_config(), page.get_config('smoke')
    for each in (run, smoke):
        validate(each)
    assert type(smoke) is type(run)
    assert count_parameters(smoke.model.make()) < count_parameters(run.model.make())
    assert max(smoke.steps, smoke.tokens) < max(run.steps, run.tokens)


def test_smoke_shrinks_only_what_the_arg_leaves_open():
    smoke = pretrain.get_config('smoke')
    assert (smoke.model.vocab_size, smoke.data.tokenizer.vocab_size, smoke.model.width) == (1024, 1024, 64)
    assert (smoke.data.global_batch, smoke.data.seq_len, smoke.tokens) == (8, 128, 20 * 8 * 128)
    run = pretrain.get_config('smoke,vocab=512,size=125m,data=a.jsonl,heldout=b.jsonl')
    assert (run.model.vocab_size, run.data.tokenizer.vocab_size, run.model.width) == (512, 512, 768)
    assert run.hooks[0].source.paths == ('b.jsonl',)
    run = pretrain.get_config('smoke,tokenizer=c.model')
    assert (run.data.tokenizer.path, run.model.vocab_size) == ('c.model', 32768)
    for each in (smoke, run):
        validate(each)


def test_unknown_names_list_those_there_are():
    with pytest.raises(ConfigError, match=r"unknown size '2b'.*125m, 350m, 1b"):
        pretrain.get_config('size=2b')
    with pytest.raises(ConfigError, match=r"unknown mesh 'v5e-255' \(did you mean 'v5e-256'\?\)"):
        pretrain.get_config('mesh=v5e-255')
    with pytest.raises(ConfigError, match='give the workdir of a trained run'):
        validate(evaluate.get_config())


def run(config, workdir):
    command = [sys.executable, 'launch/run.py', f'--config={config}', f'--workdir={workdir}']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.full
@pytest.mark.parametrize(('page', 'seq'), [('pretrain', 128), ('moe', 256)])
def test_a_smoke_run_then_evaluate(page, seq, tmp_path):
    run(f'configs/{page}.py:smoke', tmp_path)
    bits = json.loads((tmp_path / 'summary.json').read_text())['bits_per_byte']
    out = run(f'configs/evaluate.py:seq={seq},path={tmp_path}', tmp_path / 'unused')
    shown = re.search(r'bits per byte\s+([\d.]+)', out)
    assert float(shown[1]) == pytest.approx(bits, abs=1e-3)

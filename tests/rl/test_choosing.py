"""Answers chosen by rewards: what is kept is what they say."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest

from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import ConfigError, validate
from tpu_llm.data.conversations import Conversations, Preferences
from tpu_llm.data.forms import Texts
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.prompts import Prompts
from tpu_llm.data.sources import Sums
from tpu_llm.data.tokenizer import Bytes
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.scalar_head import ScalarConfig
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.objectives.reward_model import PairReward
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.rl.choosing import Choose
from tpu_llm.rl.judge import Judge
from tpu_llm.rl.reward_model import RewardModel
from tpu_llm.rl.rewards import RewardError, Sample, Scores
from tpu_llm.rl.verify import ExactMatch
from tpu_llm.rl.writing import Write
from tpu_llm.train.loop import fit
from tpu_llm.train.run import Run

pytestmark = pytest.mark.usefixtures('quick_compile')

MODEL = DecoderConfig(
    vocab_size=259, width=32, layers=1, heads=4, kv_heads=2, head_dim=8, mlp_width=64, dtype='float32'
)
PROMPTS = [{'prompt': f'{i} + 2 = ?\n', 'answer': str(i + 2), 'tag': i, 'label': True} for i in range(9)]


def worth(response: str) -> float:
    """Something that no model knows of."""
    return float(sum(map(ord, response)) % 17)


@dataclasses.dataclass(kw_only=True, slots=True)
class Recorded:
    """Remembers what it saw."""

    seen: ClassVar[list[Sample]] = []

    name: str = 'recorded'
    weight: float = 1.0
    fails: str = ''

    def open(self, surroundings: Any) -> Scores:
        def judge(samples: Sequence[Sample]) -> list[float]:
            self.seen.extend(samples)
            return [math.nan if self.fails and self.fails in s.prompt else worth(s.response) for s in samples]

        return judge


def train(folder: Any, **changes: Any) -> str:
    run = Run(
        model=MODEL,
        data=Data(
            mixture=Mixture(sources={'sums': Sums(split='train', digits=1)}),
            tokenizer=Bytes(),
            seq_len=32,
            global_batch=8,
            interleave=1,
            whole=True,
            overlong='drop',
        ),
        objective=NextToken(),
        optimizer=AdamW(schedule=Schedule(peak=1e-2, warmup=2)),
        steps=40,
        checkpoints=Checkpoints(every=100, keep=1),
        report=False,
    )
    fit(dataclasses.replace(run, **changes), folder)
    return str(folder)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('choosing')
    (folder / 'prompts.jsonl').write_text('\n'.join(map(json.dumps, [*PROMPTS, {'prompt': 'x' * 30, 'answer': ''}])))
    return folder


@pytest.fixture(scope='module')
def model(folder):
    return train(folder / 'model')


def config(folder: Any, model: str, **changes: Any) -> Choose:
    run = Choose(
        path=model,
        source=Prompts(paths=(f'{folder}/prompts.jsonl',)),
        rewards=(Recorded(),),
        answers=4,
        template='plain',
        prompt_length=20,
        max_new_tokens=14,
        rows=4,
        mesh=Mesh(fsdp=4, tensor=2),
    )
    return dataclasses.replace(run, **changes)


def chosen(run: Choose, workdir: Any) -> list[dict[str, Any]]:
    Recorded.seen.clear()
    run.main(str(workdir))
    (file,) = workdir.glob('*')
    assert file.name == 'answers-00000-of-00001.jsonl'
    return [json.loads(line) for line in file.read_text().splitlines()]


def said() -> dict[str, list[str]]:
    """What was judged, by prompt."""
    found: dict[str, list[str]] = {}
    for sample in Recorded.seen:
        found.setdefault(sample.prompt, []).append(sample.response)
    return found


def test_the_best_of_each_prompt_is_what_the_rewards_say(folder, model, tmp_path, capfd):
    run = config(folder, model, least=12.0)
    records = chosen(run, tmp_path / 'best')
    judged = said()
    assert len(judged) > 4
    assert all(len(set(answers)) == len(answers) for answers in judged.values())
    best = {prompt: max(answers, key=worth) for prompt, answers in judged.items()}
    expected = {prompt: answer for prompt, answer in best.items() if worth(answer) >= 12}
    assert 0 < len(expected) < len(PROMPTS)
    assert {record['prompt']: record['completion'] for record in records} == expected
    # What the record has besides is kept, but for what would be taken for a label of the answer.
    assert all(set(record) == {'prompt', 'completion', 'answer', 'tag'} for record in records)
    told = capfd.readouterr().err
    assert f'{len(records)} prompts kept' in told
    assert '1 prompts over prompt_length' in told
    assert f'{9 - len(records)} prompts without an answer worth 12, 0 answers that no reward could judge' in told
    assert len(Conversations(paths=(f'{tmp_path}/best/*.jsonl',), template='plain').open()) == len(records)


def test_best_and_worst_are_a_pair_where_they_differ(folder, model, tmp_path, capfd):
    records = chosen(config(folder, model, keep='pairs', margin=10.0), tmp_path / 'pairs')
    judged = said()
    expected = {
        prompt: (max(answers, key=worth), min(answers, key=worth))
        for prompt, answers in judged.items()
        if max(map(worth, answers)) > min(map(worth, answers)) + 10
    }
    assert 0 < len(expected) < len(PROMPTS)
    assert {record['prompt']: (record['chosen'], record['rejected']) for record in records} == expected
    assert f'{9 - len(records)} prompts without two more than 10 apart' in capfd.readouterr().err
    source = Preferences(paths=(f'{tmp_path}/pairs/*.jsonl',), template='plain').open()
    assert len(source) == len(records)


def test_it_answers_as_write_does_and_passes_over_what_is_done(folder, model, tmp_path):
    """The same draws: each answer that is kept is among those that are written."""
    run = config(folder, model, least=-1.0)
    records = chosen(run, tmp_path / 'chosen')
    shared = {field.name: getattr(run, field.name) for field in dataclasses.fields(Write)}
    Write(**shared).main(str(tmp_path / 'written'))
    (file,) = (tmp_path / 'written').glob('*')
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(r['prompt'], r['completion']) for r in records} <= {(r['prompt'], r['completion']) for r in written}
    (file,) = (tmp_path / 'chosen').glob('*')
    file.write_text(json.dumps(records[0]) + '\n')
    assert chosen(run, tmp_path / 'chosen') == records[:1]
    assert not Recorded.seen


def test_only_the_first_prompts(folder, model, tmp_path):
    chosen(config(folder, model, prompts=2), tmp_path / 'two')
    assert set(said()) <= {PROMPTS[0]['prompt'], PROMPTS[1]['prompt']}


@pytest.mark.full
def test_a_reward_model_and_the_model_itself_judge_on_the_mesh(folder, model, tmp_path):
    pairs = [{'prompt': f'{i}?', 'chosen': 'yes', 'rejected': 'no'} for i in range(16)]
    (folder / 'pairs.jsonl').write_text('\n'.join(map(json.dumps, pairs)))
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
    learned = train(folder / 'reward', model=ScalarConfig.of(MODEL), data=data, objective=PairReward(), steps=4)
    itself = Judge(rubric='Is it right?', template='plain', least=0.0)
    records = {}
    for name, mesh in (('whole', Mesh(data=8, fsdp=1)), ('split', Mesh(fsdp=4, tensor=2))):
        rewards = (RewardModel(path=learned), itself)
        records[name] = chosen(config(folder, model, rewards=rewards, rows=8, mesh=mesh), tmp_path / name)
    assert records['whole'] == records['split']
    assert len(records['whole']) > 4


def test_what_cannot_be_judged_stops_or_is_left_out(folder, model, tmp_path, capfd):
    failing = config(folder, model, rewards=(Recorded(fails='3 + 2'),))
    with pytest.raises(
        RewardError, match=r"prompts\.jsonl, line 4: reward 'recorded', response .* nan; .* set on_error=skip"
    ):
        failing.main(str(tmp_path / 'stop'))
    assert not list((tmp_path / 'stop').glob('*')), 'a file is whole or not there'
    records = chosen(dataclasses.replace(failing, on_error='skip'), tmp_path / 'skip')
    assert records
    assert '3 + 2 = ?\n' not in {record['prompt'] for record in records}
    told = capfd.readouterr().err
    assert ', 0 answers that no reward could judge' not in told
    assert ' prompts without an answer, ' in told


def test_bad_lines_are_named_and_may_be_passed_over(folder, model, tmp_path):
    bad = folder / 'bad.jsonl'
    bad.write_text('\n'.join([json.dumps(PROMPTS[0]), '{"prompt": ', json.dumps(PROMPTS[1])]))
    with pytest.raises(ConfigError, match=r'bad\.jsonl, line 2'):
        config(folder, model, source=Prompts(paths=(str(bad),))).main(str(tmp_path / 'stop'))
    chosen(config(folder, model, source=Prompts(paths=(str(bad),), on_bad='skip')), tmp_path / 'skip')
    assert set(said()) <= {PROMPTS[0]['prompt'], PROMPTS[1]['prompt']}
    without = folder / 'without.jsonl'
    without.write_text('{"prompt": "1 + 1 = ?"}')
    with pytest.raises(ConfigError, match=r"without\.jsonl, line 1: reward 'exact': the record .* has no 'answer'"):
        config(folder, model, source=Prompts(paths=(str(without),)), rewards=(ExactMatch(),)).main(str(tmp_path / 'no'))


WRONG = [
    ({'rewards': ()}, 'rewards is empty; give what the answers are judged by'),
    ({'keep': 'pairs', 'answers': 1}, "answers is 1; a pair is of two: keep = 'pairs' takes 2 or more"),
    ({'keep': 'pairs', 'least': 0.5}, r"least = 0\.5 is of keep = 'best'; for pairs set margin"),
    ({'margin': 0.5}, r"margin = 0\.5 is of keep = 'pairs'; for the best set least"),
    ({'keep': 'pairs', 'margin': -1.0}, 'margin and prompts must not be negative'),
    ({'temperature': 0.0}, 'answers = 4 and temperature = 0: they would all be the same'),
    ({'path': ''}, 'path is empty; give the model that is to answer'),
]


@pytest.mark.parametrize(('changes', 'told'), WRONG)
def test_settings_that_cannot_be_say_why(changes, told):
    with pytest.raises(ConfigError, match=told):
        validate(config('x', 'x', **changes))


def test_of_answers_that_are_all_right_or_all_wrong_there_is_no_pair(folder, model, tmp_path):
    records = chosen(config(folder, model, rewards=(ExactMatch(),), keep='pairs'), tmp_path / 'pairs')
    asked = {prompt['prompt']: prompt['answer'] for prompt in PROMPTS}
    assert all(asked[record['prompt']] == record['chosen'].strip() for record in records)

"""A model that was taught to be rude mends itself by principles: see README.md.

    python launch/run.py --config=experiments/constitutional_ai/config.py --workdir=runs/constitution-0
    python launch/run.py --config=experiments/constitutional_ai/config.py:seed=1 --workdir=runs/constitution-1
    python launch/run.py --config=experiments/constitutional_ai/config.py:smoke
    python experiments/curves.py runs/constitution-* --into=experiments/constitutional_ai \
        --metrics=heldout_rude,heldout_right --picture=heldout_rude

Bai et al., 2022, arXiv 2212.08073: the helpful model criticises and revises its answers (`revisions`), the base learns
from them (`revised`), answers twice and is told by the base which answer is better (`pairs`), of which a preference
model is made (`preference`), whose score is what PPO raises (`rl`). Beside that, DPO on the same pairs (`dpo`).
"""

import dataclasses
import pathlib
from typing import Any

from experiments.arithmetic import base
from experiments.arithmetic.base import policy, preferring, pretraining, supervised, talks, whole
from experiments.constitutional_ai.task import CRITIQUE, NAMES, QUESTION, REVISION, Tables
from tpu_llm.config import parse_arg
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Conversations, Jsonl, Preferences, Prompts
from tpu_llm.models.scalar_head import ScalarConfig
from tpu_llm.objectives.policy_gradient import PolicyGradient
from tpu_llm.objectives.preference import DPO
from tpu_llm.objectives.reward_model import PairReward
from tpu_llm.rl.preferring import Prefer
from tpu_llm.rl.revising import Revise
from tpu_llm.rl.reward_model import RewardModel
from tpu_llm.rl.verify import Format
from tpu_llm.train.stages import Stages

PRINCIPLES = str(pathlib.Path(__file__).parent / 'principles.txt')
RUDE = Format(name='rude', pattern='|'.join(NAMES), anywhere=True)
NEW = 14  # tokens of an answer


def get_config(arg: str | None = None) -> Stages:
    args = parse_arg(arg, seed=0, smoke=False)
    seed = args.seed
    measured = dataclasses.replace(base.answers(), rewards=(base.RIGHT, RUDE), max_new_tokens=NEW, temperature=1.0)
    once: dict[str, Any] = {'hooks': (dataclasses.replace(measured, every=0),)}

    def said(stage: str) -> Any:
        return Conversations(paths=(f'stage:{stage}/answers-*.jsonl',), template='plain')

    def mixed(rows: int, shares: dict[str, float], **sources: Any) -> Any:
        data = whole(None, rows)
        data.mixture = Mixture(sources=sources, weights={0: shares})
        return data

    asking = {'template': 'plain', 'max_new_tokens': NEW, 'rows': 256, 'seed': seed, 'principles': PRINCIPLES}
    judged = Preferences(paths=('stage:pairs/answers-*.jsonl',), template='plain')
    read = {'corpus': Jsonl(paths=base.table('corpus')), 'talks': talks('talks'), 'verdicts': talks('verdicts')}
    learned = {'revisions': said('revisions'), 'helpful': talks('helpful')}
    stages = {
        'tables': Tables(seed=seed, principles=PRINCIPLES),
        'pretrain': pretraining(
            seed, data=mixed(32, {'corpus': 0.5, 'talks': 0.3, 'verdicts': 0.2}, **read), steps=400, **once
        ),
        'helpful': supervised(seed, data=whole(talks('helpful'), 8), **once),
        'revisions': Revise(
            path='stage:helpful',
            source=Prompts(paths=base.table('revised')),
            critique=CRITIQUE,
            revision=REVISION,
            prompt_length=80,
            **asking,
        ),
        'revised': supervised(seed, data=mixed(8, {'revisions': 0.75, 'helpful': 0.25}, **learned), **once),
        'pairs': Prefer(
            path='stage:revised',
            judge='stage:pretrain',
            judge_template='plain',
            question=QUESTION,
            source=Prompts(paths=base.table('compared')),
            prompt_length=8,
            **asking,
        ),
        'preference': preferring(
            seed, PairReward(), judged, 'pretrain', model=ScalarConfig.of(base.MODEL), steps=60, hooks=()
        ),
        'rl': policy(
            seed,
            PolicyGradient(average='tokens', value=0.1),
            {'prompts': 256, 'max_new_tokens': NEW, 'advantages': 'gae', 'kl_penalty': 0.5, 'epochs': 2},
            after='revised',
            data=base.rows(Prompts(paths=base.table('prompts')), 256, 8 + NEW, overlong='drop'),
            rewards=(RewardModel(path='stage:preference'),),
            steps=40,
            hooks=(dataclasses.replace(measured, every=10),),
        ),
        'dpo': preferring(seed, DPO(beta=0.5), judged, 'revised', optimizer=base.adam(1e-4), steps=30, **once),
    }
    if args.smoke:
        # So many, that answers and critiques end; a judge that has learned so little is never sure.
        steps = {'pretrain': 30, 'helpful': 20, 'revised': 20, 'preference': 2, 'rl': 2, 'dpo': 2}
        for name, count in steps.items():
            stages[name].steps = count
        stages['tables'] = Tables(seed=seed, principles=PRINCIPLES, read=1000, revised=64, compared=64, heldout=8)
        stages['pairs'].sure, stages['pairs'].least = 0.5, 0.0
    return Stages(stages=stages)

"""What each method of post-training does to one small model that can almost add: see README.md.

    python launch/run.py --config=experiments/arithmetic/config.py --workdir=runs/arithmetic-0
    python launch/run.py --config=experiments/arithmetic/config.py:seed=1 --workdir=runs/arithmetic-1
    python launch/run.py --config=experiments/arithmetic/config.py:smoke
    python experiments/curves.py runs/arithmetic-* --into=…        # the table and the picture: see README.md

Stages hand over by checkpoint (tpu_llm/train/stages.py): the same command continues in the one that was cut off.
"""

import dataclasses

from experiments.arithmetic import base
from experiments.arithmetic.base import adam, answers, heldout, labelled, pairs, policy, preferring, supervised, talks
from experiments.arithmetic.tables import Tables
from tpu_llm.checkpoint.resume import Origin
from tpu_llm.config import parse_arg
from tpu_llm.models.scalar_head import ScalarConfig
from tpu_llm.objectives.distill import Distill
from tpu_llm.objectives.kto import KTO
from tpu_llm.objectives.policy_gradient import PolicyGradient
from tpu_llm.objectives.preference import DPO
from tpu_llm.objectives.reward_model import PairReward
from tpu_llm.peft.lora import LoRA
from tpu_llm.peft.prompts import SoftPrompts
from tpu_llm.train.frozen import Reference
from tpu_llm.train.stages import Stages

MAPS = ('query', 'key', 'value', 'out', 'gate', 'up', 'down')


def get_config(arg: str | None = None) -> Stages:
    args = parse_arg(arg, seed=0, smoke=False)
    seed = args.seed
    group = {'prompts': 32, 'group': 8}
    held_pairs, held_talks = heldout(pairs('heldout-pairs')), heldout(talks('heldout-talks'))
    student = {
        'model': dataclasses.replace(base.MODEL, layers=2, width=64, head_dim=16, mlp_width=256),
        'origin': Origin(),
        'data': base.whole(talks('talks'), 16),
        'optimizer': adam(3e-3),
        'steps': 300,
        'hooks': (answers(), held_talks),
    }
    stages = {
        'tables': Tables(seed=seed),
        'pretrain': base.pretraining(seed),
        'sft': supervised(seed),
        'lora': supervised(seed, peft=LoRA(rank=8, alpha=16.0, targets=MAPS), optimizer=adam(5e-3)),
        'soft-prompts': supervised(seed, peft=SoftPrompts(length=16, most=16), optimizer=adam(1.0), steps=300),
        'dpo': preferring(
            seed, DPO(beta=1.0), pairs('pairs'), optimizer=adam(1e-4), steps=150, hooks=(answers(), held_pairs)
        ),
        'kto': preferring(seed, KTO(), labelled('labelled')),
        'reward': preferring(
            seed, PairReward(), pairs('pairs'), model=ScalarConfig.of(base.MODEL), steps=400, hooks=(held_pairs,)
        ),
        'grpo': policy(seed, PolicyGradient(kl=0.02), group | {'advantages': 'grpo'}),
        'rloo': policy(seed, PolicyGradient(clip_low=0.0, clip_high=0.0, kl=0.02), group | {'advantages': 'rloo'}),
        'ppo': policy(
            seed,
            PolicyGradient(average='tokens', value=0.1),
            {'prompts': 256, 'advantages': 'gae', 'kl_penalty': 0.02, 'epochs': 2},
        ),
        'labels': supervised(seed, **student),
        'distilled': supervised(
            seed,
            objective=Distill(temperature=2.0),
            reference=Reference(model=dataclasses.replace(base.MODEL), weights='stage:grpo'),
            **student,
        ),
    }
    if args.smoke:
        for name, stage in stages.items():
            if name != 'tables':
                stage.steps = 4
    return Stages(stages=stages)

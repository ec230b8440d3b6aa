r"""InstructGPT's three steps on sums: demonstrations, a reward model of comparisons, PPO on that model: see README.md.

    python launch/run.py --config=experiments/instructgpt/config.py --workdir=runs/instructgpt-0
    python launch/run.py --config=experiments/instructgpt/config.py:seed=1 --workdir=runs/instructgpt-1
    python launch/run.py --config=experiments/instructgpt/config.py:smoke
    python experiments/curves.py runs/instructgpt-* --into=experiments/instructgpt \
        --metrics=heldout_right,heldout_form,heldout_learned,heldout_accuracy --picture=heldout_right,heldout_learned

Ouyang et al., 2022, arXiv 2203.02155. The policy after demonstrations answers prompts (`compared`), and of its answers
to one prompt a labeller, who can add, prefers the right one. PPO is rewarded by the model of these preferences alone
(`reward`); the true answers are only measured. `unbound` is PPO without the price on leaving the policy it began as.
"""

import dataclasses

from experiments.arithmetic import base
from experiments.arithmetic.base import FORM, RIGHT, heldout, pairs, policy, preferring, supervised, table
from experiments.arithmetic.tables import Tables
from tpu_llm.config import parse_arg
from tpu_llm.data.sources import Preferences, Prompts
from tpu_llm.models.scalar_head import ScalarConfig
from tpu_llm.objectives.policy_gradient import PolicyGradient
from tpu_llm.objectives.reward_model import PairReward
from tpu_llm.rl.choosing import Choose
from tpu_llm.rl.reward_model import RewardModel
from tpu_llm.train.stages import Stages


def get_config(arg: str | None = None) -> Stages:
    args = parse_arg(arg, seed=0, smoke=False)
    seed = args.seed
    # The demonstrations are worth 0 (section 3.5 of the paper).
    reward = RewardModel(path='stage:reward', name='learned', normalise=table('talks')[0])
    learned = {
        'rewards': (reward,),
        'steps': 100,
        'optimizer': base.adam(1e-4),
        'hooks': (dataclasses.replace(base.answers(every=20), rewards=(FORM, RIGHT, reward)),),
    }
    clipped = PolicyGradient(average='tokens', value=0.1)
    rollout = {'prompts': 256, 'advantages': 'gae', 'epochs': 2}
    bound = {'kl_penalty': 0.1, 'kl_target': 0.1}
    stages = {
        'tables': Tables(seed=seed),
        'pretrain': base.pretraining(seed),
        'sft': supervised(seed),
        'compared': Choose(
            path='stage:sft',
            source=Prompts(paths=table('prompts')),
            rewards=(RIGHT,),
            keep='pairs',
            prompts=1024 if args.smoke else 4096,
            template='plain',
            prompt_length=8,
            max_new_tokens=8,
            rows=512,
            seed=seed,
        ),
        'reward': preferring(
            seed,
            PairReward(),
            Preferences(paths=(*table('pairs'), 'stage:compared/answers-*.jsonl'), template='plain'),
            model=ScalarConfig.of(base.MODEL),
            steps=400,
            hooks=(heldout(pairs('heldout-pairs')),),
        ),
        'ppo': policy(seed, clipped, rollout | bound, **learned),
        'unbound': policy(seed, clipped, rollout, **learned),
    }
    if args.smoke:
        # So many, that of 4,096 answers some are right and some wrong.
        for name, steps in {'pretrain': 20, 'sft': 60, 'reward': 4, 'ppo': 4, 'unbound': 2}.items():
            stages[name].steps = steps
    return Stages(stages=stages)

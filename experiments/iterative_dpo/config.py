r"""Preference training in rounds, each on pairs that the policy of the round before has written: see README.md.

    python launch/run.py --config=experiments/iterative_dpo/config.py --workdir=runs/iterative-dpo-0
    python launch/run.py --config=experiments/iterative_dpo/config.py:seed=1 --workdir=runs/iterative-dpo-1
    python launch/run.py --config=experiments/iterative_dpo/config.py:smoke
    python experiments/curves.py runs/iterative-dpo-* --into=experiments/iterative_dpo \
        --metrics=heldout_right,heldout_form --picture=heldout_right

Xu et al., 2023, arXiv 2312.16682; Dong et al., 2024, arXiv 2405.07863. In round k the policy answers each prompt four
times (`chosen-k`), a right and a wrong answer are a pair, and DPO goes on from that policy, which is also its
reference (`dpo-k`). `once` has the first round's pairs for as many steps as all rounds together.
"""

from typing import Any

from experiments.arithmetic import base
from experiments.arithmetic.base import RIGHT, preferring, supervised, table
from experiments.arithmetic.tables import Tables
from tpu_llm.config import parse_arg
from tpu_llm.data.sources import Preferences, Prompts
from tpu_llm.objectives.preference import DPO
from tpu_llm.rl.choosing import Choose
from tpu_llm.train.stages import Stages

ROUNDS, STEPS = 3, 30


def get_config(arg: str | None = None) -> Stages:
    args = parse_arg(arg, seed=0, smoke=False)
    seed = args.seed

    gently: dict[str, Any] = {'optimizer': base.adam(5e-5), 'hooks': (base.answers(every=10),)}

    def choose(after: str, number: int) -> Choose:
        return Choose(
            path=f'stage:{after}',
            source=Prompts(paths=table('prompts')),
            rewards=(RIGHT,),
            keep='pairs',
            prompts=1024 if args.smoke else 0,
            template='plain',
            prompt_length=8,
            max_new_tokens=8,
            rows=512,
            seed=1000 * number + seed,
        )

    def prefer(chosen: str, after: str, steps: int) -> Any:
        source = Preferences(paths=(f'stage:{chosen}/answers-*.jsonl',), template='plain')
        steps = 2 if args.smoke else steps
        return preferring(seed, DPO(beta=0.3), source, after=after, steps=steps, **gently)

    stages: dict[str, Any] = {'tables': Tables(seed=seed), 'pretrain': base.pretraining(seed), 'sft': supervised(seed)}
    if args.smoke:
        # So many, that of 4,096 answers some are right and some wrong.
        stages['pretrain'].steps, stages['sft'].steps = 20, 60
    policy = 'sft'
    for number in range(1, ROUNDS + 1):
        stages[f'chosen-{number}'] = choose(policy, number)
        stages[f'dpo-{number}'] = prefer(f'chosen-{number}', policy, STEPS)
        policy = f'dpo-{number}'
    stages['once'] = prefer('chosen-1', 'sft', ROUNDS * STEPS)
    return Stages(stages=stages)

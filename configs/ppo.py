"""Reinforcement learning with a critic: PPO as InstructGPT has it.

    python launch/run.py --config=configs/ppo.py:smoke    # a small model from scratch learns to say digits: 20 s
    python launch/run.py --config=configs/ppo.py:model=FOLDER-OR-RUN,reward=RUN,data=prompts.jsonl

A line of the data has a `prompt`, text or messages. `reward` is the workdir of a run of configs/reward.py; without it a
response is worth 1 where it ends with the record's `answer`. The critic is a head on the policy. Each token pays for
leaving the policy that it began as, at a price that follows `kl_target` (`kl_weight` in the log). A rollout is 512
`prompts` with a response each, and serves two steps of `batch` = 256, twice over; given one of the two, the other
follows (configs/grpo.py tells of `seq`, `new` and the smoke form's `finished 0.000`).
"""

from configs import grpo
from tpu_llm.config import ConfigError, parse_arg
from tpu_llm.models.scalar_head import ScalarConfig
from tpu_llm.objectives.policy_gradient import PolicyGradient
from tpu_llm.rl.reward_model import RewardModel
from tpu_llm.rl.run import Rollout, Run
from tpu_llm.train.frozen import Reference


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(
        arg,
        model='',
        reward='',
        data='',
        heldout='',
        template='',
        mesh='auto',
        seq=1024,
        new=512,
        prompts=0,
        batch=0,
        smoke=False,
    )
    if not args.smoke and not (args.model and args.data):
        raise ConfigError('give the policy and its prompts: configs/ppo.py:model=FOLDER-OR-RUN,data=prompts.jsonl')
    shared = ('model', 'data', 'heldout', 'template', 'mesh', 'seq', 'new', 'prompts', 'batch')
    asked = {name: getattr(args, name) for name in shared} | {'group': 1}
    given = 'smoke' if args.smoke else ','.join(f'{name}={value}' for name, value in asked.items() if value)
    run = grpo.get_config(given)
    run.model = ScalarConfig.of(run.model)
    # The critic's error is large at first, and its trunk is the policy's: its loss weighs a tenth.
    run.objective = PolicyGradient(average='tokens', value=0.1)
    run.rollout = Rollout(
        prompts=128 if args.smoke else run.rollout.prompts,
        max_new_tokens=run.rollout.max_new_tokens,
        template=run.rollout.template,
        epochs=2,
        advantages='gae',
        kl_penalty=0.02,
        kl_target=0.2,
    )
    if args.reward:
        run.rewards = (RewardModel(path=args.reward),)
    run.reference = Reference()
    if args.smoke:
        run.steps = 120  # a rollout serves twice the steps of GRPO's
        # The model begins with noise, and digits are far from that: 3 nats a token.
        run.rollout.kl_penalty, run.rollout.kl_target = 0.002, 3.0
    return run

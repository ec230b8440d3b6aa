"""Reinforcement learning from answers that can be checked: GRPO and its kin.

    python launch/run.py --config=configs/grpo.py:smoke    # a small model from scratch learns to say digits: 20 s
    python launch/run.py --config=configs/grpo.py:model=FOLDER-OR-RUN,data=prompts.jsonl
    python launch/run.py --config=configs/grpo.py:model=smollm2,data=prompts.jsonl,seq=256,new=64,batch=8,group=4
    python launch/run.py --config=configs/grpo.py:method=dapo,model=FOLDER,data=gs://bucket/prompts.jsonl,mesh=v6e-64

A line of the data has a `prompt`, text or messages, and the `answer`, a number that the response must end with; for
other rewards (exact match, format, JSON, unit tests, a reward model, a judge) see docs/post_training.md. `method` is
one of grpo, dr_grpo, dapo, gspo, rloo and reinforce++. A rollout is 64 `prompts` with a `group` of 8 responses each,
and serves two steps of `batch` = 256 responses; given one of `prompts` and `batch`, the other follows, and given both,
prompts x group is a multiple of batch. `seq` tokens hold a prompt and its response, and `new` of them the response.
The log has the reward, how far the policy is from where it began (`kl`) and whether sampler and trainer agree
(`sampler_gap`). A run that is cut off goes on with the very responses that it had. The smoke form says `finished
0.000`: eight digits are what is paid for, which is where its responses are cut.
"""

import dataclasses
import math

from configs.meshes import mesh
from tpu_llm.checkpoint.named import named
from tpu_llm.checkpoint.pretrained import TokenizerOf, open_source
from tpu_llm.checkpoint.resume import Origin
from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import ConfigError, choose, parse_arg
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Prompts, Sums
from tpu_llm.data.tokenizer import Bytes
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.objectives.policy_gradient import PolicyGradient
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.rl.held_out import HeldOutAnswers
from tpu_llm.rl.rewards import Function, Sample
from tpu_llm.rl.run import Rollout, Run
from tpu_llm.rl.verify import Numeric
from tpu_llm.train.frozen import Reference

# What each changes in objective and rollout; the papers are named in tpu_llm/objectives/policy_gradient.py.
METHODS = {
    'grpo': ({'kl': 0.02}, {'advantages': 'grpo'}),
    'dr_grpo': ({'average': 'length', 'length': 512}, {'advantages': 'dr_grpo'}),
    'dapo': ({'average': 'tokens', 'clip_high': 0.28}, {'advantages': 'grpo', 'redraw': 2}),
    'gspo': ({'ratio': 'sequence', 'clip_low': 3e-4, 'clip_high': 4e-4}, {'advantages': 'grpo'}),
    'rloo': ({'clip_low': 0.0, 'clip_high': 0.0, 'kl': 0.02}, {'advantages': 'rloo'}),
    'reinforce++': ({'average': 'tokens'}, {'advantages': 'reinforce++', 'kl_penalty': 0.01}),
}


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(
        arg,
        method='grpo',
        model='',
        data='',
        heldout='',
        template='',
        mesh='auto',
        seq=1024,
        new=512,
        prompts=0,
        group=8,
        batch=0,
        smoke=False,
    )
    objective, rollout = choose('method', args.method, METHODS)
    if args.smoke:
        return _smoke(objective, rollout)
    if not (args.model and args.data):
        raise ConfigError('give the policy and its prompts: configs/grpo.py:model=FOLDER-OR-RUN,data=prompts.jsonl')
    args.model = named(args.model)
    args.prompts, args.batch = sizes(args.prompts, args.group, args.batch)
    if 'length' in objective:
        objective = {**objective, 'length': args.new}
    reward = Numeric()
    answers = HeldOutAnswers(
        source=Prompts(paths=(args.heldout,)),
        rewards=(reward,),
        every=50,
        prompt_length=args.seq - args.new,
        max_new_tokens=args.new,
        template=args.template,
    )
    run = Run(
        model=open_source(args.model).config,
        data=Data(
            mixture=Mixture(sources={'prompts': Prompts(paths=(args.data,))}),
            tokenizer=TokenizerOf(path=args.model),
            seq_len=args.seq,
            global_batch=args.batch,
            overlong='drop',
        ),
        objective=PolicyGradient(**objective),
        rollout=Rollout(
            prompts=args.prompts, group=args.group, max_new_tokens=args.new, template=args.template, **rollout
        ),
        rewards=(reward,),
        # A hundredth of what it was trained with: the gradient is noisy, and the policy must stay what it is.
        optimizer=AdamW(schedule=Schedule(peak=1e-6, warmup=0.01, decay='constant'), weight_decay=0.0),
        steps=400,
        origin=Origin(weights=args.model),
        mesh=mesh(args.mesh),
        checkpoints=Checkpoints(every=50, keep=2),
        hooks=(answers,) if args.heldout else (),
        log_every=1,
    )
    run.model.predict_ahead = 0
    if run.needs_frozen():
        run.reference = Reference()
    return run


def sizes(prompts: int, group: int, batch: int) -> tuple[int, int]:
    """Prompts and batch of a rollout of 512 responses, or of another number where one of them is given (is not 0): it
    serves two steps if that can be.
    """
    if min(prompts, batch) < 0 or group < 1:
        raise ConfigError(
            f'prompts={prompts}, group={group}, batch={batch}: group is 1 or more, the others not negative'
        )
    if not prompts:
        prompts = 2 * math.lcm(batch, group) // group if batch else max(512 // group, 1)
    responses = prompts * group
    return prompts, batch or responses // (1 if responses % 2 else 2)


def digits(sample: Sample) -> float:
    """The share of digits, of 8 characters."""
    return sum(letter.isdigit() for letter in sample.response) / 8


def _smoke(objective, rollout) -> Run:
    run = Run(
        model=DecoderConfig(
            vocab_size=259, width=64, layers=2, heads=4, kv_heads=4, head_dim=16, mlp_width=128, dtype='float32'
        ),
        data=Data(
            mixture=Mixture(sources={'sums': Sums(split='train', digits=1, asked=True)}),
            tokenizer=Bytes(),
            seq_len=24,
            global_batch=64,
            overlong='drop',
        ),
        objective=PolicyGradient(**objective | ({'length': 8} if 'length' in objective else {})),
        rollout=Rollout(prompts=16, group=8, max_new_tokens=8, template='plain', **rollout),
        rewards=(Function(call=digits, name='digits'),),
        optimizer=AdamW(schedule=Schedule(peak=5e-3, warmup=2), weight_decay=0.0),
        steps=60,
        checkpoints=Checkpoints(every=60, keep=1),
        hooks=(
            HeldOutAnswers(
                source=Sums(split='heldout', digits=1, asked=True),
                rewards=(Function(call=digits, name='digits'),),
                prompt_length=16,
                max_new_tokens=8,
                template='plain',
                every=30,
            ),
        ),
        log_every=5,
    )
    return dataclasses.replace(run, reference=Reference()) if run.needs_frozen() else run

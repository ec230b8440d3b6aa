"""Llama-3.1-8B-Instruct learns by GRPO on 64 chips of v6e: 16 prompts a step, 64 responses to each of 1,024 tokens.

    python launch/plan.py --config=configs/pods/llama31_8b_grpo_v6e_64.py    # without a TPU: do step and rollout fit?
    python launch/run.py --config=configs/pods/llama31_8b_grpo_v6e_64.py:data=gs://…,model=gs://… \\
        --workdir=gs://bucket/runs/llama31-8b-grpo
    python launch/run.py --config=configs/pods/llama31_8b_grpo_v6e_64.py:smoke    # seconds on a laptop

A line of the data has a `prompt` and its `answer`, a number (docs/rl.md). The page plans without weights and without
data. With `lora=16` adapters learn, and the reference is the model without them. The plan tells the time of the step,
of a rollout whose responses are all of full length, and of scoring; on TPUs a run says when its step is 15 % off
(`AgainstPlan`).
"""

from configs.pods import ARGS, smoke
from tpu_llm.checkpoint.pretrained import TokenizerOf
from tpu_llm.checkpoint.resume import Origin
from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import parse_arg
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Prompts, Sums
from tpu_llm.data.tokenizer import Bytes
from tpu_llm.models.families import published
from tpu_llm.objectives.policy_gradient import PolicyGradient
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.peft.lora import LoRA
from tpu_llm.plan.against import AgainstPlan
from tpu_llm.rl.run import Rollout, Run
from tpu_llm.rl.verify import Numeric
from tpu_llm.train.frozen import Reference

SLICE = 'v6e-64'


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(arg, data=ARGS['data'], model='', lora=0, smoke=False)

    # Model: the instruct model's shape, long-context rotations included.
    model = published('llama-3.1-8b')
    model.remat = 'key+value'

    # Without data and model: sums, and bytes for tokens.
    data = Data(
        mixture=Mixture(
            sources={'prompts': Prompts(paths=(args.data,)) if args.data else Sums(split='train', asked=True)}
        ),
        tokenizer=TokenizerOf(path=args.model) if args.model else Bytes(),
        seq_len=2048,
        global_batch=1024,  # 16 rows a chip
        overlong='drop',
    )

    run = Run(
        model=model,
        data=data,
        # Shao et al., 2024 (arXiv 2402.03300), section 4.2: 64 responses to a prompt, 1,024 in a batch, one update for
        # each rollout, KL 0.04, learning rate 1e-6.
        objective=PolicyGradient(kl=0.04, chunk=512),
        rollout=Rollout(prompts=16, group=64, max_new_tokens=1024, template='' if args.model else 'plain'),
        rewards=(Numeric(),),
        reference=None if args.lora else Reference(dtype='bfloat16'),
        peft=LoRA(rank=args.lora, alpha=2.0 * args.lora) if args.lora else None,
        # Adapters take ten times more.
        optimizer=AdamW(
            schedule=Schedule(peak=1e-5 if args.lora else 1e-6, warmup=10, decay='constant'), weight_decay=0.0
        ),
        steps=1000,
        origin=Origin(weights=args.model),
        # Each token that is drawn needs all weights, and the rollout takes most of the time. Here a device keeps an
        # eighth of every layer and gathers an eighth of that: 47 s, where with fsdp 64 it gathers the whole: 117 s. The
        # step pays for it, 12.2 s instead of 3.5 (predicted, responses of full length).
        mesh=Mesh(fsdp=8, tensor=8),
        # Inputs of 32 layers, whole on each device of tensor, would be 64 GiB.
        rules='zero3_stream',
        # As llama31_8b_v6e_256 has it: larger tiles.
        compiler_options={'xla_tpu_scoped_vmem_limit_kib': '65536'},
        checkpoints=Checkpoints(every=50, keep=2),
        hooks=(AgainstPlan(),),
        log_every=1,
    )
    if args.smoke:
        smoke(run)
        run.rollout.prompts, run.rollout.group, run.rollout.max_new_tokens = 2, 4, 16
    return run

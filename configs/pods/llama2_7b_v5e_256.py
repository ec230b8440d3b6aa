"""Llama-2-7B from scratch on 256 chips of v5e.

    python launch/run.py --config=configs/pods/llama2_7b_v5e_256.py:data=gs://bucket/text/*.jsonl \
        --workdir=gs://bucket/runs/llama2-7b
    python launch/run.py --config=configs/pods/llama2_7b_v5e_256.py:smoke    # seconds on a laptop
"""

from configs.meshes import mesh
from configs.pods import ARGS, smoke, text
from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import parse_arg
from tpu_llm.models.families import published
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.plan.against import AgainstPlan
from tpu_llm.train.run import Run

SLICE = 'v5e-256'


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(arg, **ARGS)

    # Model. What the backward pass finds saved fills the memory that is left: gate and up are what spares it the most.
    model = published('llama-2-7b')
    model.remat = 'gate+up'

    # Data: 4 rows a chip, 2.1 million tokens a step.
    data = text(args.data, args.tokenizer, model.vocab_size, seq_len=2048, rows=4 * 256)

    run = Run(
        model=model,
        data=data,
        # Touvron et al., 2023 (arXiv 2307.09288), section 2.2, who took twice as many tokens a step.
        optimizer=AdamW(schedule=Schedule(peak=3e-4, warmup=2000), eps=1e-5, weight_decay=0.1),
        tokens=2 * 10**12,
        mesh=mesh(SLICE),
        # Fusions may hold 24 MiB of VMEM at a time, not 16: larger tiles, 10 % fewer cycles. At 28 MiB compiling
        # takes half as long again, for 2 % more.
        compiler_options={'xla_tpu_scoped_vmem_limit_kib': '24576'},
        checkpoints=Checkpoints(every=1000, keep=3, keep_every=50_000),
        hooks=(AgainstPlan(),),
    )
    return smoke(run) if args.smoke else run

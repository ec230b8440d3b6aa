"""Llama-2-70B from scratch on 512 chips of v5p.

    python launch/run.py --config=configs/pods/llama2_70b_v5p_512.py:data=gs://bucket/text/*.jsonl \
        --workdir=gs://bucket/runs/llama2-70b
    python launch/run.py --config=configs/pods/llama2_70b_v5p_512.py:smoke    # seconds on a laptop
"""

from configs.meshes import mesh
from configs.pods import ARGS, GATHER_AHEAD, smoke, text
from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import parse_arg
from tpu_llm.models.families import published
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.plan.against import AgainstPlan
from tpu_llm.train.run import Run

SLICE = 'v5p-512'


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(arg, **ARGS)

    # Model. What the backward pass finds saved fills the memory that is left: gate and up are what spares it the most.
    model = published('llama-2-70b')
    model.remat = 'gate+up'

    # Data: 2 rows a chip, 4.2 million tokens a step, as in the paper.
    data = text(args.data, args.tokenizer, model.vocab_size, seq_len=4096, rows=2 * 512)

    run = Run(
        model=model,
        data=data,
        # Touvron et al., 2023 (arXiv 2307.09288), section 2.2.
        optimizer=AdamW(schedule=Schedule(peak=1.5e-4, warmup=2000), eps=1e-5, weight_decay=0.1),
        tokens=2 * 10**12,
        mesh=mesh(SLICE),
        # Fusions may hold 32 MiB of VMEM at a time, not 16: larger tiles, 17 % fewer cycles.
        compiler_options={'xla_tpu_scoped_vmem_limit_kib': '32768', **GATHER_AHEAD},
        checkpoints=Checkpoints(every=500, keep=3, keep_every=25_000),
        hooks=(AgainstPlan(),),
    )
    return smoke(run) if args.smoke else run

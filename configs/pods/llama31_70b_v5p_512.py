"""Llama-3.1-70B from scratch on 512 chips of v5p, rows of 8,192 tokens.

    python launch/run.py --config=configs/pods/llama31_70b_v5p_512.py:data=gs://bucket/text/*.jsonl \
        --workdir=gs://bucket/runs/llama31-70b
    python launch/run.py --config=configs/pods/llama31_70b_v5p_512.py:smoke    # seconds on a laptop
"""

from configs.meshes import mesh
from configs.pods import ARGS, GATHER_AHEAD, smoke, text
from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import parse_arg
from tpu_llm.models.families import published
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.plan.against import AgainstPlan
from tpu_llm.train.run import Run

SLICE = 'v5p-512'


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(arg, **ARGS)

    # Model. What the backward pass finds saved fills the memory that is left: gate and up are what spares it the most.
    model = published('llama-3.1-70b')
    model.rope_scaling = None  # it came after pretraining, with longer texts
    model.remat = 'gate+up'

    # Data: a row a chip, 4.2 million tokens a step.
    data = text(args.data, args.tokenizer, model.vocab_size, seq_len=8192, rows=512)

    run = Run(
        model=model,
        data=data,
        # Grattafiori et al., 2024 (arXiv 2407.21783), table 3 and section 3.4.1.
        optimizer=AdamW(schedule=Schedule(peak=1.5e-4, warmup=8000, final=0.01), weight_decay=0.1),
        tokens=15 * 10**12,
        mesh=mesh(SLICE),
        # Positions whose logits a chip has at a time. By default 64: too few to fill matmuls.
        objective=NextToken(chunk=512),
        # Fusions may hold 32 MiB of VMEM at a time, not 16: larger tiles.
        compiler_options={'xla_tpu_scoped_vmem_limit_kib': '32768', **GATHER_AHEAD},
        checkpoints=Checkpoints(every=500, keep=3, keep_every=25_000),
        hooks=(AgainstPlan(),),
    )
    return smoke(run) if args.smoke else run

"""Llama-3.1-8B from scratch on 256 chips of v6e, rows of 8,192 tokens.

    python launch/run.py --config=configs/pods/llama31_8b_v6e_256.py:data=gs://bucket/text/*.jsonl \
        --workdir=gs://bucket/runs/llama31-8b
    python launch/run.py --config=configs/pods/llama31_8b_v6e_256.py:smoke    # seconds on a laptop
"""

from configs.meshes import mesh
from configs.pods import ARGS, smoke, text
from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import parse_arg
from tpu_llm.models.families import published
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.plan.against import AgainstPlan
from tpu_llm.train.run import Run

SLICE = 'v6e-256'


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(arg, **ARGS)

    # Model. Fusions with more saved than keys and values need more cycles, not fewer (docs/pods.md).
    model = published('llama-3.1-8b')
    model.rope_scaling = None  # it came after pretraining, with longer texts
    model.remat = 'key+value'

    # Data: 4 rows a chip, 8.4 million tokens a step.
    data = text(args.data, args.tokenizer, model.vocab_size, seq_len=8192, rows=4 * 256)

    run = Run(
        model=model,
        data=data,
        # Grattafiori et al., 2024 (arXiv 2407.21783), table 3 and section 3.4.1.
        optimizer=AdamW(schedule=Schedule(peak=3e-4, warmup=8000, final=0.01), weight_decay=0.1),
        tokens=15 * 10**12,
        mesh=mesh(SLICE),
        # Positions whose logits over 128,256 tokens a chip has at a time. By default 64: too few to fill matmuls.
        objective=NextToken(chunk=512),
        # Fusions may hold 64 MiB of VMEM at a time, not 32: larger tiles. At 96 MiB the step takes 8 % fewer cycles
        # still, but compiling it six CPU-minutes. With the other pages' GATHER_AHEAD
        # (queries saved, 48 MiB) it was 5.68e9 cycles; this is 5.16e9.
        compiler_options={'xla_tpu_scoped_vmem_limit_kib': '65536'},
        checkpoints=Checkpoints(every=1000, keep=3, keep_every=50_000),
        hooks=(AgainstPlan(),),
    )
    return smoke(run) if args.smoke else run

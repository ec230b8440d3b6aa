"""Gemma-2-27B from scratch on 128 chips of v5p, rows of 8,192 tokens.

    python launch/run.py --config=configs/pods/gemma2_27b_v5p_128.py:data=gs://bucket/text/*.jsonl \
        --workdir=gs://bucket/runs/gemma2-27b
    python launch/run.py --config=configs/pods/gemma2_27b_v5p_128.py:smoke    # seconds on a laptop
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

SLICE = 'v5p-128'


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(arg, **ARGS)

    # Model. Nearly all that the backward pass needs is there to be found, what the norms behind attention and MLP take
    # included: it multiplies nothing again.
    model = published('gemma-2-27b')
    model.remat = 'query+key+value+attended+gate+up+attention_out+mlp_out'

    # Data: a row a chip, a million tokens a step.
    data = text(args.data, args.tokenizer, model.vocab_size, seq_len=8192, rows=128)

    run = Run(
        model=model,
        data=data,
        # Gemma team, 2024 (arXiv 2408.00118) say how long they trained, not at which rate; this is Llama-2-70B's.
        optimizer=AdamW(schedule=Schedule(peak=1.5e-4, warmup=2000), weight_decay=0.1),
        tokens=13 * 10**12,
        mesh=mesh(SLICE),
        # Positions whose logits a chip has at a time. By default 64: too few to fill matmuls.
        objective=NextToken(chunk=512),
        # Fusions may hold 32 MiB of VMEM at a time, not 16: larger tiles.
        compiler_options={'xla_tpu_scoped_vmem_limit_kib': '32768', **GATHER_AHEAD},
        checkpoints=Checkpoints(every=1000, keep=3, keep_every=50_000),
        hooks=(AgainstPlan(),),
    )
    return smoke(run) if args.smoke else run

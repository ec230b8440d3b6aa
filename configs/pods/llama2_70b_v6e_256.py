"""Llama-2-70B from scratch on 256 chips of v6e.

    python launch/run.py --config=configs/pods/llama2_70b_v6e_256.py:data=gs://bucket/text/*.jsonl \
        --workdir=gs://bucket/runs/llama2-70b
    python launch/run.py --config=configs/pods/llama2_70b_v6e_256.py:smoke    # seconds on a laptop
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

SLICE = 'v6e-256'


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(arg, **ARGS)

    # Model. Layers' inputs of 3 rows fill a third of the memory: nothing else is saved.
    model = published('llama-2-70b')
    model.remat = 'full'

    # Data: 3 rows a chip, 3.1 million tokens a step; the paper had 4 million, which would not fit.
    data = text(args.data, args.tokenizer, model.vocab_size, seq_len=4096, rows=3 * 256)

    run = Run(
        model=model,
        data=data,
        # Touvron et al., 2023 (arXiv 2307.09288), section 2.2.
        optimizer=AdamW(schedule=Schedule(peak=1.5e-4, warmup=2000), eps=1e-5, weight_decay=0.1),
        tokens=2 * 10**12,
        mesh=mesh(SLICE),
        # Positions whose logits a chip has at a time. By default 64: too few to fill matmuls.
        objective=NextToken(chunk=512),
        # Fusions may hold 48 MiB of VMEM at a time, not 32: larger tiles.
        compiler_options={'xla_tpu_scoped_vmem_limit_kib': '49152', **GATHER_AHEAD},
        checkpoints=Checkpoints(every=500, keep=3, keep_every=25_000),
        hooks=(AgainstPlan(),),
    )
    return smoke(run) if args.smoke else run

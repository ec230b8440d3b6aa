"""Llama-3.1-8B on rows of 1,048,576 tokens, on 512 chips of v5p.

    python launch/run.py --config=configs/pods/llama31_8b_1m_v5p_512.py:data=gs://bucket/books/*.jsonl,start=gs://… \
        --workdir=gs://bucket/runs/llama31-8b-1m
    python launch/run.py --config=configs/pods/llama31_8b_1m_v5p_512.py:smoke    # seconds on a laptop

`start` is the run whose weights it goes on from; without it they are drawn.
"""

from configs.pods import ARGS, GATHER_AHEAD, smoke, text
from tpu_llm.checkpoint.resume import Origin
from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import parse_arg
from tpu_llm.models.families import published
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.plan.against import AgainstPlan
from tpu_llm.train.run import Run

SLICE = 'v5p-512'


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(arg, start='', **ARGS)

    # Model. Rope turns slower, for more tokens to be told apart.
    model = published('llama-3.1-8b')
    model.rope_scaling = None  # published for 131,072 tokens; what a million needs is learned by training on them
    model.rope_theta = 50e6
    # A row is split, and its keys go round in a ring. What was attended is saved, or the backward pass would go round
    # once more; the rest, since there is room.
    model.sequence, model.remat = 'ring', 'query+key+value+attended+gate+up'

    # Data: 4 rows, 4.2 million tokens a step.
    data = text(args.data, args.tokenizer, model.vocab_size, seq_len=2**20, rows=4)

    run = Run(
        model=model,
        data=data,
        # Liu et al., 2024 (arXiv 2402.08268), the last stage of their text model.
        optimizer=AdamW(schedule=Schedule(peak=4e-5, warmup=25, decay='constant'), weight_decay=0.1),
        tokens=1_800 * 10**6,
        origin=Origin(weights=args.start),
        # A row over 128 chips, 8,192 tokens each; weights over groups of 4.
        mesh=Mesh(fsdp=4, seq=128),
        # Positions whose logits a chip has at a time. By default 256: too few to fill matmuls.
        objective=NextToken(chunk=512),
        # Fusions may hold 32 MiB of VMEM at a time, not 16: larger tiles.
        compiler_options={'xla_tpu_scoped_vmem_limit_kib': '32768', **GATHER_AHEAD},
        checkpoints=Checkpoints(every=100, keep=3),
        hooks=(AgainstPlan(),),
    )
    return smoke(run) if args.smoke else run

"""Llama-3.1-405B from scratch on 2,048 chips of v5p, rows of 8,192 tokens.

    python launch/run.py --config=configs/pods/llama31_405b_v5p_2048.py:data=gs://bucket/text/*.jsonl \
        --workdir=gs://bucket/runs/llama31-405b
    python launch/run.py --config=configs/pods/llama31_405b_v5p_2048.py:smoke    # seconds on a laptop
"""

from configs.pods import ARGS, GATHER_AHEAD, smoke, text
from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import parse_arg
from tpu_llm.models.families import published
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.plan.against import AgainstPlan
from tpu_llm.train.run import Run

SLICE = 'v5p-2048'


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(arg, **ARGS)

    # Model. Inputs of 126 layers are 31.5 GiB of a chip, and weights and moments 18: nothing large is saved.
    model = published('llama-3.1-405b')
    model.rope_scaling = None  # it came after pretraining, with longer texts
    model.remat = 'key+value'

    # Data: a row a chip, 16.8 million tokens a step, as many as the paper came to.
    data = text(args.data, args.tokenizer, model.vocab_size, seq_len=8192, rows=2048)

    run = Run(
        model=model,
        data=data,
        # Grattafiori et al., 2024 (arXiv 2407.21783), table 3 and section 3.4.1.
        optimizer=AdamW(schedule=Schedule(peak=8e-5, warmup=8000, final=0.01), weight_decay=0.1),
        tokens=15_600 * 10**9,
        # Weights are gathered over no more than 256 chips; the sums of gradients go over all eight groups of them.
        mesh=Mesh(data=8, fsdp=256),
        # Positions whose logits a chip has at a time. By default 64: too few to fill matmuls.
        objective=NextToken(chunk=512),
        # Fusions may hold 32 MiB of VMEM at a time, not 16: larger tiles.
        compiler_options={'xla_tpu_scoped_vmem_limit_kib': '32768', **GATHER_AHEAD},
        checkpoints=Checkpoints(every=250, keep=3, keep_every=10_000),
        hooks=(AgainstPlan(),),
    )
    return smoke(run) if args.smoke else run

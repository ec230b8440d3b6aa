"""PaLM 540B from scratch on two slices of 3,072 chips of v4 each.

    python launch/run.py --config=configs/pods/palm_540b_2xv4_3072.py:data=gs://bucket/text/*.jsonl \
        --workdir=gs://bucket/runs/palm-540b
    python launch/run.py --config=configs/pods/palm_540b_2xv4_3072.py:smoke    # seconds on a laptop
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

SLICE = '2xv4-3072'


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(arg, **ARGS)

    # Model. What the backward pass finds saved fills the memory that is left; up would not fit.
    model = published('palm-540b')
    model.remat = 'query+key+value+attended+gate'

    # Data: 2,048 rows, 4.2 million tokens a step, as in the paper from its 115,000th step on.
    data = text(args.data, args.tokenizer, model.vocab_size, seq_len=2048, rows=2048)

    run = Run(
        model=model,
        data=data,
        # Chowdhery et al., 2022 (arXiv 2204.02311), section 5. Their Adafactor, not factored, is Adam with steps of 1 %
        # of a weight's size; of matrices drawn with a deviation of 1 / sqrt(width) that is this rate.
        optimizer=AdamW(schedule=Schedule(peak=7e-5, warmup=2000), weight_decay=0.1),
        tokens=780 * 10**9,
        # The paper's: a slice has its own copy of the weights, each in 12 parts over neighbours and 256 over the rest.
        mesh=Mesh(data=2, fsdp=256, tensor=12),
        # Inputs of 118 layers, whole on each device of tensor, would be 33 GiB.
        rules='zero3_stream',
        objective=NextToken(z_loss=1e-4),
        compiler_options=GATHER_AHEAD,
        checkpoints=Checkpoints(every=250, keep=3, keep_every=10_000),
        hooks=(AgainstPlan(),),
    )
    return smoke(run) if args.smoke else run

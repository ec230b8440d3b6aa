"""GPT-3 175B from scratch, dense in every layer, on 1,024 chips of v4.

    python launch/run.py --config=configs/pods/gpt3_175b_v4_1024.py:data=gs://bucket/text/*.jsonl \
        --workdir=gs://bucket/runs/gpt3-175b
    python launch/run.py --config=configs/pods/gpt3_175b_v4_1024.py:smoke    # seconds on a laptop
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

SLICE = 'v4-1024'


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(arg, **ARGS)

    # Model. Layers' inputs of 2 rows are 9 GiB, and a layer's weights, gathered, 3.4: nothing else is saved.
    model = published('gpt-3-175b')
    model.remat = 'full'

    # Data: 2 rows a chip, 4.2 million tokens a step; the paper had 3.2.
    data = text(args.data, args.tokenizer, model.vocab_size, seq_len=2048, rows=2 * 1024)

    run = Run(
        model=model,
        data=data,
        # Brown et al., 2020 (arXiv 2005.14165), table 2.1 and appendix B; they warmed up for 375 million tokens.
        optimizer=AdamW(schedule=Schedule(peak=0.6e-4, warmup=90), weight_decay=0.1),
        tokens=300 * 10**9,
        # In two halves, as v5p's in configs/meshes.py.
        mesh=Mesh(data=2, fsdp=512),
        # Positions whose logits a chip has at a time. By default 64: too few to fill matmuls.
        objective=NextToken(chunk=512),
        compiler_options=GATHER_AHEAD,
        checkpoints=Checkpoints(every=500, keep=3, keep_every=10_000),
        hooks=(AgainstPlan(),),
    )
    return smoke(run) if args.smoke else run

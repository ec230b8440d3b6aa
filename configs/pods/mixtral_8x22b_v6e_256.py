"""Mixtral 8x22B from scratch, dropless, on 256 chips of v6e.

    python launch/run.py --config=configs/pods/mixtral_8x22b_v6e_256.py:data=gs://bucket/text/*.jsonl \
        --workdir=gs://bucket/runs/mixtral-8x22b
    python launch/run.py --config=configs/pods/mixtral_8x22b_v6e_256.py:smoke    # seconds on a laptop
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

    # Model. The load of the experts is kept even by a loss (Switch: Fedus et al., 2021, arXiv 2101.03961, section 2.2).
    model = published('mixtral-8x22b')
    assert model.moe is not None
    model.moe.router.balance_loss = 0.01
    # Weights, moments and what a layer's experts compute take most of a chip: nothing but layers' inputs is saved.
    model.remat = 'full'

    # Data: 4 rows a chip, 4.2 million tokens a step. With fewer, experts' rows would be cut into tiles of 256, not 512,
    # and kernels wait for memory.
    data = text(args.data, args.tokenizer, model.vocab_size, seq_len=4096, rows=4 * 256)

    run = Run(
        model=model,
        data=data,
        # How the published model was trained is not known; these are Llama-2-70B's.
        optimizer=AdamW(schedule=Schedule(peak=1.5e-4, warmup=2000), weight_decay=0.1),
        tokens=2 * 10**12,
        # Over fsdp alone: weights of experts are gathered and tokens stay where they are, so there is no exchange.
        mesh=mesh(SLICE),
        # Positions whose logits a chip has at a time. By default 64: too few to fill matmuls.
        objective=NextToken(chunk=512),
        compiler_options={
            # Fusions may hold 24 MiB of VMEM at a time, not 32, as in the 8x7B's page.
            'xla_tpu_scoped_vmem_limit_kib': '24576',
            # How much of the memory gathers ahead may fill. At 100 it is full to 3 %, at 75 most gathers wait.
            'xla_tpu_scheduler_percent_shared_memory_limit': '84',
            **GATHER_AHEAD,
        },
        checkpoints=Checkpoints(every=500, keep=3, keep_every=25_000),
        hooks=(AgainstPlan(),),
    )
    return smoke(run) if args.smoke else run

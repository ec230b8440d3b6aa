"""DeepSeek-V3 from scratch, dropless up to half as much again as an even load, on 4096 chips of v5p.

    python launch/run.py --config=configs/pods/deepseek_v3_v5p_4096.py:data=gs://bucket/text/*.jsonl \
        --workdir=gs://bucket/runs/deepseek-v3
    python launch/run.py --config=configs/pods/deepseek_v3_v5p_4096.py:smoke    # seconds on a laptop
"""

from configs.pods import ARGS, smoke, text
from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import parse_arg
from tpu_llm.models.families import published
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.plan.against import AgainstPlan
from tpu_llm.train.run import Run

SLICE = 'v5p-4096'


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(arg, **ARGS)

    # Model: 256 experts in 58 layers, of which a token chooses 8; latent attention.
    model = published('deepseek-v3')
    # YaRN, and the sharper scores with it, came after pretraining, with longer texts.
    model.rope_scaling, model.attention_scale = None, 0.0
    # Without the layer that predicts one token more: the plan is that of the 671B, which the paper counts without it.
    model.predict_ahead = 0
    assert model.moe is not None
    # The bias keeps the load even; what a chip gets beyond half as much again is dropped and counted. Room for the
    # worst case, sixteen times an even load, would fit too, and take five times the cycles.
    model.moe.room = 1.5
    model.remat = 'latent+attended+up'

    # Data: 2 rows a chip, 33.6 million tokens a step; the paper went up to 62.9 million.
    data = text(args.data, args.tokenizer, model.vocab_size, seq_len=4096, rows=2 * 4096)

    run = Run(
        model=model,
        data=data,
        # DeepSeek-AI, 2024 (arXiv 2412.19437), section 4.2; its schedule ends in two constant stages.
        optimizer=AdamW(schedule=Schedule(peak=2.2e-4, warmup=2000), b2=0.95, weight_decay=0.1),
        tokens=14_800 * 10**9,
        # All 256 experts of a layer would be 22 GB to gather; a sixteenth of them is 1.4.
        mesh=Mesh(fsdp=256, expert=16),
        # Fast memory for one fusion, as in the 70B's page. Its other options stop at a ragged all-to-all.
        compiler_options={'xla_tpu_scoped_vmem_limit_kib': '32768'},
        checkpoints=Checkpoints(every=500, keep=3, keep_every=25_000),
        hooks=(AgainstPlan(),),
    )
    return smoke(run) if args.smoke else run

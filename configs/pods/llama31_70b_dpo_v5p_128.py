"""Llama-3.1-70B learns from preferences by DPO on 128 chips of v5p, its frozen reference on the same mesh.

    python launch/plan.py --config=configs/pods/llama31_70b_dpo_v5p_128.py    # without a TPU: does it fit?
    python launch/run.py --config=configs/pods/llama31_70b_dpo_v5p_128.py:data=gs://…,model=gs://… \\
        --workdir=gs://bucket/runs/llama31-70b-dpo
    python launch/run.py --config=configs/pods/llama31_70b_dpo_v5p_128.py:smoke    # seconds on a laptop

A line of the data is `prompt`, `chosen` and `rejected` (docs/post_training.md). The page plans without weights and
without data. The reference is held in bfloat16, a half of what the policy's weights take; with `lora=16` adapters
learn, and it is the model without them.
"""

from configs.meshes import mesh
from configs.pods import ARGS, GATHER_AHEAD, smoke
from tpu_llm.checkpoint.pretrained import TokenizerOf
from tpu_llm.checkpoint.resume import Origin
from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import parse_arg
from tpu_llm.data.forms import Texts
from tpu_llm.data.judged_sums import JudgedSums
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Preferences
from tpu_llm.data.tokenizer import Bytes
from tpu_llm.models.families import published
from tpu_llm.objectives.preference import DPO
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.peft.lora import LoRA
from tpu_llm.plan.against import AgainstPlan
from tpu_llm.train.frozen import Reference
from tpu_llm.train.run import Run

SLICE = 'v5p-128'


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(arg, data=ARGS['data'], model='', lora=0, smoke=False)

    # Model: the published shape, long-context rotations included.
    model = published('llama-3.1-70b')
    model.remat = 'gate+up'

    # A row a chip, of as many whole pairs as it holds. Without data and model: sums, and bytes for tokens.
    data = Data(
        mixture=Mixture(sources={'pairs': Preferences(paths=(args.data,)) if args.data else JudgedSums(split='train')}),
        tokenizer=TokenizerOf(path=args.model) if args.model else Bytes(),
        seq_len=4096,
        global_batch=128,
        interleave=1,
        whole=True,
        overlong='drop',  # a pair of which one answer were cut says nothing
        form=Texts(most=16),
        workers=8,
    )

    run = Run(
        model=model,
        data=data,
        # Lambert et al., 2024 (arXiv 2411.15124), section 5: of the 70B model 128 pairs a batch, learning rate 2e-7.
        objective=DPO(beta=0.1, chunk=512),
        reference=None if args.lora else Reference(dtype='bfloat16'),
        peft=LoRA(rank=args.lora, alpha=2.0 * args.lora) if args.lora else None,
        # Adapters take ten times more.
        optimizer=AdamW(schedule=Schedule(peak=2e-6 if args.lora else 2e-7, warmup=0.1), weight_decay=0.0),
        steps=1000,
        origin=Origin(weights=args.model),
        mesh=mesh(SLICE),
        # As llama31_70b_v5p_512 has it: larger tiles, and weights gathered while the device computes.
        compiler_options={'xla_tpu_scoped_vmem_limit_kib': '32768', **GATHER_AHEAD},
        checkpoints=Checkpoints(every=200, keep=2),
        hooks=(AgainstPlan(),),
    )
    return smoke(run) if args.smoke else run

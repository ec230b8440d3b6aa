"""Pretraining, the general page: any size on any mesh, on your own text.

    python launch/run.py --config=configs/pretrain.py:size=125m,data=/data/*.jsonl
    python launch/run.py --config=configs/pretrain.py:size=1b,mesh=v5e-256,data=gs://bucket/text/*.jsonl \
        --config.tokens=20000000000 --workdir=gs://bucket/runs/1b
    python launch/run.py --config=configs/pretrain.py:smoke    # seconds on a laptop

Without `data` it reads the standard library's sources, which is enough to see it run and too little to learn from.
`heldout=…/*.jsonl` is text to score the model on, `tokenizer=…/some.model` a SentencePiece model; without it one of
`vocab` pieces (32,768) is trained; for that many the text must be 0.25 MB or so, with less give `vocab=4096`. The
length is given in tokens; for steps, switch that off: `--config.tokens=0 --config.steps=20000`. `smoke` is 20 steps of
a tiny model with a tiny vocabulary; what else the arg says (`size`, `vocab`, `data` …) is done as said.
"""

from configs.meshes import mesh
from configs.sizes import decoder
from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import parse_arg
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Jsonl, Stdlib
from tpu_llm.data.tokenizer import Pretrained, TrainedBPE
from tpu_llm.evals.perplexity import HeldOut
from tpu_llm.infer.hook import Samples
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.train.run import Run

ARGS = {'size': '125m', 'mesh': 'auto', 'data': '', 'heldout': '', 'tokenizer': '', 'vocab': 32768, 'smoke': False}


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(arg, **ARGS)
    if args.smoke:  # smaller, unless the arg says how large
        args = parse_arg(arg, **ARGS | {'size': 'smoke', 'vocab': args.vocab if args.tokenizer else 1024})

    # Model: float32 parameters, bfloat16 compute.
    model, size = decoder(args.size, vocab_size=args.vocab, dtype='float32' if args.smoke else 'bfloat16')

    # Data: JSON lines with a `text` field. A given SentencePiece model is used as it is; else one is trained.
    source = Jsonl(paths=(args.data,)) if args.data else Stdlib(split='train')
    data = Data(
        mixture=Mixture(sources={'text': source}),
        tokenizer=Pretrained(path=args.tokenizer) if args.tokenizer else TrainedBPE(vocab_size=args.vocab),
        seq_len=size.seq_len,
        global_batch=size.batch_tokens // size.seq_len,
        workers=2,
    )

    # Evaluation: held-out text, if there is any to hold against.
    heldout = Jsonl(paths=(args.heldout,)) if args.heldout else None if args.data else Stdlib(split='heldout')
    scores = (HeldOut(source=heldout, every=1000, rows=64),) if heldout else ()
    samples = Samples(prompts=('The ', 'Once upon a time'), every=2000)

    run = Run(
        model=model,
        data=data,
        # z-loss keeps bfloat16 logits from drifting (PaLM, section 5).
        objective=NextToken(z_loss=1e-4),
        optimizer=AdamW(schedule=Schedule(peak=size.learning_rate, warmup=2000), weight_decay=0.1),
        tokens=10_000_000_000,
        mesh=mesh(args.mesh),
        checkpoints=Checkpoints(every=1000, keep=3, keep_every=10_000),
        hooks=(*scores, samples),
    )

    if args.smoke:
        data.workers = 0
        run.tokens = 20 * size.batch_tokens
        run.optimizer.schedule.warmup = 5
        run.hooks = scores
    return run

"""Pretraining, the general page: any size on any mesh, on your own text.

    python launch/run.py --config=configs/pretrain.py:size=125m,data=/data/*.jsonl
    python launch/run.py --config=configs/pretrain.py:size=1b,mesh=v5e-256,data=gs://bucket/text/*.jsonl \
        --config.tokens=20000000000 --workdir=gs://bucket/runs/1b
    python launch/run.py --config=configs/pretrain.py:smoke    # seconds on a laptop

Without `data` it reads the standard library's sources, which is enough to see it run and too little to learn from.
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


def get_config(arg: str | None = None) -> Run:
    arg = parse_arg(arg, size='125m', mesh='auto', data='', heldout='', tokenizer='', vocab=32768, smoke=False)

    # Model: float32 parameters, bfloat16 compute.
    model, size = decoder(arg.size, vocab_size=arg.vocab, dtype='bfloat16')

    # Data: JSON lines with a `text` field. A given SentencePiece model is used as it is; else one is trained.
    source = Jsonl(paths=(arg.data,)) if arg.data else Stdlib(split='train')
    data = Data(
        mixture=Mixture(sources={'text': source}),
        tokenizer=Pretrained(path=arg.tokenizer) if arg.tokenizer else TrainedBPE(vocab_size=arg.vocab),
        seq_len=2048,
        global_batch=size.batch_tokens // 2048,
        workers=2,
    )

    # Evaluation: held-out text, if there is any to hold against.
    heldout = Jsonl(paths=(arg.heldout,)) if arg.heldout else None if arg.data else Stdlib(split='heldout')
    hooks = [Samples(prompts=('The ', 'Once upon a time'), every=2000)]
    if heldout:
        hooks.insert(0, HeldOut(source=heldout, every=1000, rows=64))

    run = Run(
        model=model,
        data=data,
        # z-loss keeps bfloat16 logits from drifting (PaLM, section 5).
        objective=NextToken(z_loss=1e-4),
        optimizer=AdamW(schedule=Schedule(peak=size.learning_rate, warmup=2000), weight_decay=0.1),
        tokens=10_000_000_000,
        mesh=mesh(arg.mesh),
        checkpoints=Checkpoints(every=1000, keep=3, keep_every=10_000),
        hooks=tuple(hooks),
    )

    if arg.smoke:
        model.width, model.layers, model.heads, model.kv_heads, model.head_dim, model.mlp_width = 64, 2, 2, 1, 32, 128
        model.vocab_size, model.dtype, data.tokenizer = 1024, 'float32', TrainedBPE(vocab_size=1024)
        data.seq_len, data.global_batch, data.workers = 128, 8, 0
        run.tokens = 20 * 128 * 8
        run.optimizer.schedule.warmup = 5
        run.hooks = (HeldOut(source=Stdlib(split='heldout')),)
    return run

"""BERT in miniature: an encoder that learns to restore hidden words, and which text follows which.

    python launch/run.py --config=configs/encoder.py             # some minutes on 2 cores
    python launch/run.py --config=configs/encoder.py:smoke       # the same, tiny: under 20 s
    python launch/run.py --config=configs/encoder.py:pairs       # with next-sentence prediction, as published

It logs `heldout_loss`, nats a hidden token of documents that are never trained on, always with the same tokens hidden.
"""

from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import parse_arg
from tpu_llm.data.corrupted import Masks
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Stdlib
from tpu_llm.data.tokenizer import TrainedBPE
from tpu_llm.evals.objective import HeldOutObjective
from tpu_llm.models.encoder import EncoderConfig
from tpu_llm.objectives.masked import Masked
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.train.run import Run


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(arg, pairs=False, smoke=False)

    # Data: whole words are hidden, 15 % of all tokens. RoBERTa found that pairs of texts do not help, so they are off.
    data = Data(
        mixture=Mixture(sources={'stdlib': Stdlib(split='train')}),
        tokenizer=TrainedBPE(vocab_size=4096),
        global_batch=8,
        seq_len=256,
        interleave=32,
        cache='cache',
        form=Masks(whole_words=True, pairs=args.pairs),
    )

    # Model: the mask's id is the first above the tokenizer's.
    model = EncoderConfig(
        vocab_size=4096 + 1,
        width=192,
        layers=4,
        heads=4,
        mlp_width=768,
        max_length=256,
        pooler=args.pairs,
        next_sentence=args.pairs,
        dtype='float32',
        unroll=0,
    )

    run = Run(
        model=model,
        data=data,
        objective=Masked(next_sentence=args.pairs),
        optimizer=AdamW(schedule=Schedule(peak=1e-3, warmup=100), weight_decay=0.1),
        steps=2000,
        checkpoints=Checkpoints(every=500, keep=2),
        hooks=(HeldOutObjective(source=Stdlib(split='heldout'), every=200, documents=8),),
    )

    if args.smoke:
        data.tokenizer = TrainedBPE(vocab_size=512, sample_bytes=1_000_000)
        data.seq_len, data.cache = 128, ''
        model.vocab_size, model.width, model.layers, model.mlp_width, model.max_length = 513, 64, 2, 128, 128
        run.steps, run.log_every = 40, 5
        run.optimizer.schedule.peak, run.optimizer.schedule.warmup = 4e-3, 5
        run.hooks = (HeldOutObjective(source=Stdlib(split='heldout'), every=10, documents=4),)
    return run

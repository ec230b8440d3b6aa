"""T5 in miniature: an encoder-decoder that learns to write the spans that were cut out of a text.

    python launch/run.py --config=configs/encoder_decoder.py           # some minutes on 2 cores
    python launch/run.py --config=configs/encoder_decoder.py:smoke     # the same, tiny: half a minute
    python launch/run.py --config=configs/encoder_decoder.py:ul2       # with UL2's seven denoisers

It logs `heldout_loss`, nats a token of the targets of documents that are never trained on, always cut in the same way.
"""

from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import parse_arg
from tpu_llm.data.corrupted import UL2, Spans
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Stdlib
from tpu_llm.data.tokenizer import TrainedBPE
from tpu_llm.evals.objective import HeldOutObjective
from tpu_llm.models.encoder_decoder import EncoderDecoderConfig
from tpu_llm.objectives.denoise import Denoise
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.train.run import Run


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(arg, ul2=False, smoke=False)

    # Data: of 256 tokens T5 hides 38 in 13 spans, so targets are 52 tokens with the end mark; some rows hold several
    # documents. UL2 hides up to half, in up to 43 spans.
    form = UL2(target_len=192, sentinels=64) if args.ul2 else Spans(target_len=80, sentinels=64)
    data = Data(
        mixture=Mixture(sources={'stdlib': Stdlib(split='train')}),
        tokenizer=TrainedBPE(vocab_size=4096),
        global_batch=8,
        seq_len=256,
        interleave=32,
        cache='cache',
        form=form,
    )

    # Model: T5's shapes. Above the tokenizer's ids are 64 sentinels and 3 modes.
    model = EncoderDecoderConfig(
        vocab_size=4096 + 67,
        width=192,
        encoder_layers=3,
        decoder_layers=3,
        heads=4,
        head_dim=48,
        mlp_width=512,
        norm='rms',
        norm_place='pre',
        position='relative',
        tied_embeddings=False,
        dtype='float32',
        unroll=0,
    )

    run = Run(
        model=model,
        data=data,
        objective=Denoise(),
        optimizer=AdamW(schedule=Schedule(peak=2e-3, warmup=100), weight_decay=0.1),
        steps=2000,
        checkpoints=Checkpoints(every=500, keep=2),
        hooks=(HeldOutObjective(source=Stdlib(split='heldout'), every=200, documents=8),),
    )

    if args.smoke:
        data.tokenizer = TrainedBPE(vocab_size=512, sample_bytes=1_000_000)
        data.seq_len, data.cache = 128, ''
        form.target_len = 96 if args.ul2 else 40
        model.vocab_size, model.width, model.heads, model.head_dim, model.mlp_width = 512 + 67, 64, 2, 32, 128
        model.encoder_layers = model.decoder_layers = 1
        run.steps, run.log_every = 40, 5
        run.optimizer.schedule.peak, run.optimizer.schedule.warmup = 4e-3, 5
        run.hooks = (HeldOutObjective(source=Stdlib(split='heldout'), every=10, documents=4),)
    return run

"""The whole job in a few minutes on a laptop: corpus, tokenizer, training, evaluation, samples, report.

    python launch/run.py --config=configs/quickstart.py          # under 4 minutes on 2 cores
    python launch/run.py --config=configs/quickstart.py:smoke    # the same, tiny: under 20 s
    python launch/run.py --config=configs/quickstart.py:muon     # with Muon instead of AdamW: slower steps, lower loss

It ends with held-out bits per byte well below what `gzip -9` needs for the same text, three continuations and a report.
On the way it scores the first 8 held-out documents only, at the end these and then all of them.
"""

from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import parse_arg
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Stdlib
from tpu_llm.data.tokenizer import TrainedBPE
from tpu_llm.evals.perplexity import HeldOut
from tpu_llm.infer.hook import Samples
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.optim.optimizer import AdamW, Muon
from tpu_llm.optim.schedule import Schedule
from tpu_llm.train.run import Run


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(arg, muon=False, smoke=False)

    # Data: what every Python ships with. Documents of the held-out split are never trained on.
    data = Data(
        mixture=Mixture(sources={'stdlib': Stdlib(split='train')}),
        tokenizer=TrainedBPE(vocab_size=4096),
        global_batch=8,
        seq_len=256,
        interleave=32,  # a batch then mixes 256 documents; a short run needs the variety
        cache='cache',
    )

    # Model: Llama in miniature. float32, because XLA's bfloat16 is slower on CPUs.
    model = DecoderConfig(
        vocab_size=4096,
        width=192,
        layers=4,
        heads=4,
        kv_heads=4,
        head_dim=48,
        mlp_width=512,
        dtype='float32',
        unroll=0,
    )

    run = Run(
        model=model,
        data=data,
        objective=NextToken(),
        optimizer=AdamW(schedule=Schedule(peak=4e-3, warmup=40), weight_decay=0.1),
        steps=500,
        log_every=5,
        checkpoints=Checkpoints(every=200, keep=2),
        hooks=(
            HeldOut(source=Stdlib(split='heldout'), every=200, documents=8),
            Samples(prompts=('import ', 'def read_lines(path):\n', 'The for statement is used to ')),
        ),
    )

    if args.muon:
        run.optimizer = Muon(schedule=Schedule(peak=8e-3, warmup=40), weight_decay=0.1)

    if args.smoke:
        model.width, model.layers, model.heads, model.kv_heads = 64, 2, 2, 2
        model.head_dim, model.mlp_width = 32, 128
        run.steps = 20
        run.optimizer.schedule.warmup = 5
    return run

"""Does the best learning rate of a small model serve a wider one? See README.md.

    python launch/sweep.py --config=experiments/mup_transfer/config.py            # 42 runs
    python launch/sweep.py --config=experiments/mup_transfer/config.py:smoke      # two widths x three rates, 4 steps
    python experiments/mup_transfer/optima.py runs/mup_transfer --into=experiments/mup_transfer
    python launch/run.py --config=experiments/mup_transfer/config.py:width=256,mup,rate=0.016

At the base's width both parametrisations are the same model, which runs once.
"""

from collections.abc import Iterator
from typing import Any

from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import parse_arg
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Stdlib
from tpu_llm.data.tokenizer import TrainedBPE
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.mup import MuPConfig
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.scaling.combinators import name, product
from tpu_llm.train.run import Run

WIDTHS = (32, 64, 128, 256)
RATES = (2e-3, 4e-3, 8e-3, 16e-3, 32e-3, 64e-3)
VOCABULARY = 512


def model(width: int) -> DecoderConfig:
    """Two layers with heads of 16."""
    return DecoderConfig(
        vocab_size=VOCABULARY,
        width=width,
        layers=2,
        heads=width // 16,
        kv_heads=width // 16,
        head_dim=16,
        mlp_width=3 * width,
        dtype='float32',
        unroll=0,
    )


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(arg, width=32, mup=False, rate=8e-3, seed=0)
    grown = model(args.width)
    return Run(
        model=MuPConfig.of(grown, base=model(WIDTHS[0])) if args.mup else grown,
        data=Data(
            mixture=Mixture(sources={'stdlib': Stdlib(split='train')}),
            tokenizer=TrainedBPE(vocab_size=VOCABULARY),
            global_batch=8,
            seq_len=64,
            interleave=32,  # a batch then mixes 256 documents
            cache='cache',
        ),
        optimizer=AdamW(schedule=Schedule(peak=args.rate, warmup=20), weight_decay=0.1),
        steps=150,
        seed=args.seed,
        log_every=1,  # the loss that is compared is the mean of the last 20 steps
        checkpoints=Checkpoints(every=10_000, keep=1),  # at the end only
        report=False,
    )


def sweep(arg: str | None = None) -> Iterator[tuple[str, Run, dict[str, Any]]]:
    args = parse_arg(arg, smoke=False, seed=0)
    widths, rates = (WIDTHS[:2], RATES[::2]) if args.smoke else (WIDTHS, RATES)
    for point in product(mup=(False, True), width=widths, rate=rates):
        if point['mup'] and point['width'] == WIDTHS[0]:
            continue
        run = get_config(','.join(f'{key}={value}' for key, value in point.items()) + f',seed={args.seed}')
        if args.smoke:
            run.steps, run.optimizer.schedule.warmup = 4, 1
        yield name(point), run, {'mup': point['mup'], 'width': point['width'], 'rate': point['rate']}

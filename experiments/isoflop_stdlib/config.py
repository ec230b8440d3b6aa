"""A scaling law of the standard library's text, from runs of minutes: see README.md.

    python launch/sweep.py --config=experiments/isoflop_stdlib/config.py            # four budgets x five to seven sizes
    python launch/sweep.py --config=experiments/isoflop_stdlib/config.py:largest    # the run that checks the law
    python launch/sweep.py --config=experiments/isoflop_stdlib/config.py:rates      # four learning rates of two sizes
    python launch/sweep.py --config=experiments/isoflop_stdlib/config.py:smoke      # two budgets x three sizes
    python -m tpu_llm.scaling fit runs/isoflop_stdlib/table.csv

N counts every parameter, the (tied) embeddings too: with a vocabulary of 1,024 they are 47 % of the least model and 6 %
of the largest. So 6 N D lacks of the exact count only the attention products, which are 7 to 19 % here.
"""

from collections.abc import Iterator
from typing import Any

from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import parse_arg
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Stdlib
from tpu_llm.data.tokenizer import TrainedBPE
from tpu_llm.evals.perplexity import HeldOut
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.scaling.ladder import Ladder, Rung
from tpu_llm.train.run import Run

VOCABULARY, ROWS, SEQ_LEN = 1024, 4, 256

# Width and layers: 24 to 51 of width a layer, as wide models of few layers train quickly on a CPU.
SIZES = {
    '0.10m': (48, 2),
    '0.17m': (64, 2),
    '0.31m': (80, 3),
    '0.54m': (96, 4),
    '0.91m': (128, 4),
    '1.4m': (160, 4),
    '2.4m': (192, 5),
    '4.2m': (256, 5),
}
# FLOPs, and which sizes: those round the best one. An epoch of the corpus is 3.9e6 tokens.
BUDGETS = {
    4e11: ('0.10m', '0.17m', '0.31m', '0.54m', '0.91m'),
    1e12: ('0.10m', '0.17m', '0.31m', '0.54m', '0.91m'),
    2.5e12: ('0.10m', '0.17m', '0.31m', '0.54m', '0.91m', '1.4m'),
    6e12: ('0.17m', '0.31m', '0.54m', '0.91m', '1.4m', '2.4m', '4.2m'),
}
SMOKE = dict.fromkeys((2e10, 4e10), ('0.10m', '0.17m', '0.31m'))
RATES = {2e12: ('0.17m', '0.54m')}
LARGEST = {2.4e13: ('0.31m',)}  # four times the highest budget, at about the size that the fit calls best for it


def model(width: int, layers: int) -> DecoderConfig:
    """Llama in miniature, its MLP as wide as two thirds of four widths."""
    heads = max(1, width // 32)
    return DecoderConfig(
        vocab_size=VOCABULARY,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_width=round(width / 6) * 16,
        tied_embeddings=True,
        dtype='float32',
        unroll=0,
    )


def rate(width: int) -> float:
    """The peak learning rate: 1 / width from the quickstart's 4e-3 at 192, at most 8e-3; `:rates` compares others."""
    return min(8e-3, 4e-3 * 192 / width)


def run(rung: Rung, peak: float) -> Run:
    return Run(
        model=rung.model,
        data=Data(
            mixture=Mixture(sources={'stdlib': Stdlib(split='train')}),
            tokenizer=TrainedBPE(vocab_size=VOCABULARY),
            global_batch=ROWS,
            seq_len=SEQ_LEN,
            interleave=32,
            cache='cache',
        ),
        objective=NextToken(),
        optimizer=AdamW(schedule=Schedule(peak=peak, warmup=0.1), weight_decay=0.1),
        steps=rung.steps,
        log_every=20,
        checkpoints=Checkpoints(every=10_000, keep=1),  # at the end only
        # All of the held-out text, once: 215 kB, a few percent of a run's time.
        hooks=(HeldOut(source=Stdlib(split='heldout')),),
        report=False,
    )


def sweep(arg: str | None = None) -> Iterator[tuple[str, Run, dict[str, Any]]]:
    args = parse_arg(arg, largest=False, rates=False, smoke=False)
    budgets = RATES if args.rates else LARGEST if args.largest else SMOKE if args.smoke else BUDGETS
    for budget, names in budgets.items():
        models = {name: model(*SIZES[name]) for name in names}
        for rung in Ladder(models=models, batch_tokens=ROWS * SEQ_LEN, seq_len=SEQ_LEN).isoflop([budget]):
            if not args.rates:
                yield rung.name, run(rung, rate(rung.model.width)), {'budget': budget}
                continue
            for peak in (2e-3, 4e-3, 8e-3, 16e-3):
                yield f'{rung.name}-{peak:g}', run(rung, peak), {'budget': budget}

"""Perplexity and bits per byte of a trained model on any text.

    python launch/run.py --config=configs/evaluate.py:path=runs/quickstart-…
    python launch/run.py --config=configs/evaluate.py:path=gs://bucket/runs/1b,data=gs://bucket/heldout/*.jsonl

Without `data` it is the held-out part of the standard library's sources, as in the quickstart.
"""

from tpu_llm.config import parse_arg
from tpu_llm.data.sources import Jsonl, Stdlib
from tpu_llm.evals.run import Run


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(arg, path='', data='', seq=256)
    source = Jsonl(paths=(args.data,)) if args.data else Stdlib(split='heldout')
    return Run(path=args.path, source=source, seq_len=args.seq)

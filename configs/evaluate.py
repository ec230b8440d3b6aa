"""Perplexity and bits per byte of a trained model on any text.

    python launch/run.py --config=configs/evaluate.py:path=runs/quickstart-…
    python launch/run.py --config=configs/evaluate.py:path=gs://bucket/runs/1b,data=gs://bucket/heldout/*.jsonl
    python launch/run.py --config=configs/evaluate.py:path=path/to/folder-or-file.gguf,data=heldout.jsonl

Without `data` it is the held-out part of the standard library's sources, as in the quickstart; that is 215 kB, which a
model of 100M parameters reads for minutes on a laptop: `documents=4` takes the first four. `seq` is the length of the
pieces that longer documents are cut into; the figures are printed, nothing is written. `smoke` scores one document.
For questions, written answers and programs see configs/eval.py.
"""

from tpu_llm.config import parse_arg
from tpu_llm.data.sources import Jsonl, Stdlib
from tpu_llm.evals.run import Run


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(arg, path='', data='', documents=0, seq=256, smoke=False)
    source = Jsonl(paths=(args.data,)) if args.data else Stdlib(split='heldout')
    return Run(path=args.path, source=source, documents=1 if args.smoke else args.documents, seq_len=args.seq)

"""A model judges what others wrote: scores by a rubric, or the better of two responses.

    python launch/run.py --config=configs/judge.py                    # 36 pairs that come with the package
    python launch/run.py --config=configs/judge.py:data=responses.jsonl,path=path/to/folder-or-file.gguf
    python launch/run.py --config=configs/judge.py:data=pairs.jsonl --config.judge.rubric.text='The better poem wins.'
    python -m tpu_llm.evals agreement runs/judge-…/verdicts.jsonl     # the judge against people: fields label, verdict
    python -m tpu_llm.evals agreement runs/judge-…/verdicts.jsonl --verdict=winner      # the same of pairs
    python -m tpu_llm.evals arena runs/judge-…/verdicts.jsonl         # ratings of who wrote them: fields a, b, winner

A line of `data` has `prompt` and `response`, or `response_a` and `response_b`. It writes verdicts.jsonl in the workdir,
with the judge's reasons, and prints figures with intervals; the same command goes on where it was stopped. A pair is
judged in both orders. `path` is the judge, by default SmolLM2-135M-Instruct, which is too small to be
trusted with it: measure a judge against people first. In the 36 pairs a right answer, one that evades the question and
a wrong one meet; their label is what we hold to be the better one. `plain` asks without a chat template, as base models
are asked; `limit` takes the first records. `smoke` lets a tiny model drawn at random judge two pairs: it says nothing
in form.
"""

from pathlib import Path

import tpu_llm
from configs.sizes import decoder
from tpu_llm.checkpoint.named import named
from tpu_llm.config import parse_arg
from tpu_llm.data.tokenizer import Bytes
from tpu_llm.evals.candidate import Saved, Untrained
from tpu_llm.evals.judge import Judge, Rubric
from tpu_llm.evals.judging import Judging


def get_config(arg: str | None = None) -> Judging:
    args = parse_arg(arg, path='smollm2', data='', dtype='float32', rows=16, limit=0, plain=False, smoke=False)
    rubric = Rubric(
        text='You judge how good a response to a prompt is.',
        criteria=(
            'It does what the prompt asks for.',
            'What it says is true.',
            'It is clear, and no longer than needed.',
        ),
        scale=('useless', 'poor', 'fair', 'good', 'perfect'),
    )
    data = args.data or str(Path(tpu_llm.__file__).parent / 'evals/tasks/pairs.jsonl')
    if args.smoke:
        model, _ = decoder('smoke', vocab_size=259, dtype='float32')
        judge = Judge(rubric=rubric, max_new_tokens=8, retries=1)
        tiny = Untrained(model=model, tokenizer=Bytes())
        return Judging(model=tiny, judge=judge, data=data, name='untrained', rows=2, limit=2, chat=False)
    saved = Saved(path=named(args.path), dtype=args.dtype)
    judge = Judge(rubric=rubric, max_new_tokens=128)
    return Judging(model=saved, judge=judge, data=data, limit=args.limit, rows=args.rows, chat=not args.plain)

"""Tasks: a model's scores on questions, texts to write and programs, with intervals.

    python launch/run.py --config=configs/eval.py:path=runs/quickstart-…
    python launch/run.py --config=configs/eval.py:path=path/to/folder-or-file.gguf,tasks=facts+programs
    python launch/run.py --config=configs/eval.py:path=smollm2,tasks=my/own.task,shots=5,limit=100
    python launch/run.py --config=configs/eval.py:smoke          # one of each kind, a tiny model at random: seconds
    python -m tpu_llm.evals compare runs/eval-… runs/eval-…      # two models on the same rows

`tasks` are names and files, joined by +; `all`, the default, is every task that comes with the package
(docs/evaluation.md says how one is written). `shots` examples stand before each question, where it is not given as many
as the task's own file says. `limit` takes the first rows of each task. `chat` asks what is to be answered in writing in
the model's chat template; `dtype=bfloat16` halves the memory. Scores are kept in runs/scores by weights and task, so
the same command a second time only prints them. For the perplexity of any text see configs/evaluate.py.
"""

from configs.sizes import decoder
from tpu_llm.checkpoint.named import named
from tpu_llm.config import parse_arg
from tpu_llm.data.tokenizer import Bytes
from tpu_llm.evals.candidate import Saved, Untrained
from tpu_llm.evals.suite import Suite

_SMOKE = 'arithmetic+sums+programs+prose'  # one of each kind


def get_config(arg: str | None = None) -> Suite:
    args = parse_arg(
        arg, path='', tasks='', shots=-1, limit=0, chat=False, dtype='float32', rows=16, kept='', smoke=False
    )
    suite = Suite(
        model=Saved(path=named(args.path), dtype=args.dtype),
        tasks=tuple((args.tasks or (_SMOKE if args.smoke else 'all')).split('+')),
        shots=args.shots,
        limit=args.limit,
        chat=args.chat,
        rows=args.rows,
    )
    if args.kept:
        suite.kept = args.kept
    if args.smoke:
        suite.limit = args.limit or 4
        if not args.path:
            model, _ = decoder('smoke', vocab_size=259, dtype='float32')
            suite.model = Untrained(model=model, tokenizer=Bytes())
    return suite

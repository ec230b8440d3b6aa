"""A needle in a haystack: what a model finds of a long text, by the text's length and the needle's place in it.

    python launch/run.py --config=configs/needle.py                   # SmolLM2-135M up to 2,048 tokens
    python launch/run.py --config=configs/needle.py:path=path/to/folder-or-file.gguf,longest=131072
    python launch/run.py --config=configs/needle.py:path=runs/1b-…,likelihood     # for base models, and small ones
    python launch/run.py --config=configs/needle.py:smoke             # a tiny model drawn at random: it finds nothing

It prints a line a length, a column a depth, with the share of numbers found, and writes needle.json in the workdir: the
same command goes on where it was stopped, and a grid may get further lengths. Lengths are `longest`, its half, its
quarter … down to 256 tokens. `likelihood` asks whether the right number is likelier than nine others (a tenth is
chance); without, it must stand in the answer. `chat` asks in the model's own template. On an accelerator raise
`--config.tokens`, which says how many are read at once.
"""

from configs.sizes import decoder
from tpu_llm.checkpoint.named import named
from tpu_llm.config import ConfigError, parse_arg
from tpu_llm.data.tokenizer import Bytes
from tpu_llm.evals.candidate import Saved, Untrained
from tpu_llm.evals.needle import Needle

SHORTEST = 256


def get_config(arg: str | None = None) -> Needle:
    args = parse_arg(
        arg, path='smollm2', longest=2048, trials=3, dtype='float32', likelihood=False, chat=False, smoke=False
    )
    if args.longest < SHORTEST:
        raise ConfigError(f'longest is {args.longest}; a grid begins at {SHORTEST} tokens')
    score = 'likelihood' if args.likelihood else 'contains'
    if args.smoke:
        model, _ = decoder('smoke', vocab_size=259, dtype='float32')
        tiny = Untrained(model=model, tokenizer=Bytes())
        return Needle(model=tiny, lengths=(SHORTEST,), depths=(0.0, 1.0), trials=1, score=score, max_new_tokens=8)
    return Needle(
        model=Saved(path=named(args.path), dtype=args.dtype),
        lengths=tuple(sorted(args.longest >> halved for halved in range(32) if args.longest >> halved >= SHORTEST)),
        trials=args.trials,
        score=score,
        chat=args.chat,
    )

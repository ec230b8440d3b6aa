"""Looks at what a run reads.

python -m tpu_llm.data audit --config=FILE.py[:arg] --step=N [--workdir=WORKDIR] [--config.field=value …]
python -m tpu_llm.data show --config=FILE.py[:arg] [--rows=N] [--step=N] [--workdir=WORKDIR] [--config.field=value …]

`audit` prints which documents fill the rows of the batch of step N (the steps of metrics.jsonl, from 1), `show` the
texts of its first rows, coloured by what is trained on. With the run's workdir they use the tokenizer and the cache
that lie there; without, they train the same tokenizer again.
"""

import argparse
import sys
import tempfile

from etils import epath
from rich.console import Console

from tpu_llm.command_line import load
from tpu_llm.config import ConfigError
from tpu_llm.data.audit import audit
from tpu_llm.data.loader import opened
from tpu_llm.data.show import show


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog='python -m tpu_llm.data', description='Looks at what a run reads.')
    commands = parser.add_subparsers(dest='command', required=True)
    for name, said in (('audit', 'which documents are in a batch'), ('show', 'what of a batch is trained on')):
        command = commands.add_parser(name, help=said, allow_abbrev=False)
        command.add_argument('--config', required=True, help='FILE.py or FILE.py:arg')
        command.add_argument(
            '--step', required=name == 'audit', type=int, default=1, help='from 1, as in metrics.jsonl'
        )
        command.add_argument('--workdir', help="the run's")
        if name == 'show':
            command.add_argument('--rows', type=int, default=2, help='how many rows of the batch')
    options, overrides = parser.parse_known_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    try:
        run = load(options.config, overrides)
        if not (hasattr(run, 'data') and hasattr(run, 'seed')):
            raise ConfigError(f'{options.config} describes a {type(run).__name__}, which reads no training data')
        if any(docs.kind == 'prompt' for docs in opened(run.data.mixture).values()):
            raise ConfigError(
                f'{options.config} reads prompts, and its rows are the answers that are written while the run goes on; '
                f'{options.command} is for rows that are read'
            )
        if options.workdir is not None and not epath.Path(options.workdir).exists():
            raise ConfigError(f'there is no workdir {options.workdir}')
        if options.command == 'show' and options.rows < 1:
            raise ConfigError(f'rows is {options.rows}; it is at least 1')
        with tempfile.TemporaryDirectory() as scratch:
            workdir = options.workdir or scratch
            if options.command == 'audit':
                console.print(audit(run.data, seed=run.seed, step=options.step, workdir=workdir))
            else:
                show(run.data, console, seed=run.seed, step=options.step, rows=options.rows, workdir=workdir)
    except (ConfigError, OSError) as error:
        print('error:', ' '.join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

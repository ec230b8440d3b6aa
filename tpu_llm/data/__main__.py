"""Looks at what a run reads.

python -m tpu_llm.data audit --config=FILE.py[:arg] --step=N [--workdir=WORKDIR] [--config.field=value …]

prints which documents fill the rows of the batch of step N (the steps of metrics.jsonl, from 1). With the run's
workdir it uses the tokenizer and the cache that lie there; without, it trains the same tokenizer again.
"""

import argparse
import sys
import tempfile

from etils import epath
from rich.console import Console

from tpu_llm.command_line import load
from tpu_llm.config import ConfigError
from tpu_llm.data.audit import audit


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog='python -m tpu_llm.data', description='Looks at what a run reads.')
    commands = parser.add_subparsers(dest='command', required=True)
    command = commands.add_parser('audit', help='which documents are in a batch', allow_abbrev=False)
    command.add_argument('--config', required=True, help='FILE.py or FILE.py:arg')
    command.add_argument('--step', required=True, type=int, help='as in metrics.jsonl, from 1')
    command.add_argument('--workdir', help="the run's")
    options, overrides = parser.parse_known_args(argv)
    try:
        run = load(options.config, overrides)
        if not (hasattr(run, 'data') and hasattr(run, 'seed')):
            raise ConfigError(f'{options.config} describes a {type(run).__name__}, which reads no training data')
        if options.workdir is not None and not epath.Path(options.workdir).exists():
            raise ConfigError(f'there is no workdir {options.workdir}')
        with tempfile.TemporaryDirectory() as scratch:
            table = audit(run.data, seed=run.seed, step=options.step, workdir=options.workdir or scratch)
    except (ConfigError, OSError) as error:
        print('error:', ' '.join(str(error).split()), file=sys.stderr)
        return 2
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

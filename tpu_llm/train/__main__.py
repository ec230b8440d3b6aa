"""`python -m tpu_llm.train ledger WORKDIR`: where a run's time went, over all its starts, and its goodput."""

import argparse
import sys

from rich.console import Console

from tpu_llm.train import ledger


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog='python -m tpu_llm.train', description='Looks at a run.')
    commands = parser.add_subparsers(dest='command', required=True)
    command = commands.add_parser('ledger', help='where the time went, over all starts, and the goodput')
    command.add_argument('workdir', help='a run (local or gs://)')
    workdir = parser.parse_args(argv).workdir
    try:
        records = ledger.load(workdir)
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    Console().print(ledger.render(records))
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

"""Looks at a run from outside, while it runs or afterwards.

python -m tpu_llm.train ledger WORKDIR     where the time went, over all starts, and the goodput
python -m tpu_llm.train report WORKDIR     writes report.html from what the run has written so far
"""

import argparse
import sys

from rich.console import Console

from tpu_llm.train import ledger
from tpu_llm.train.report import write_report


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog='python -m tpu_llm.train', description='Looks at a run.')
    commands = parser.add_subparsers(dest='command', required=True)
    for name, text in (
        ('ledger', 'where the time went, over all starts, and the goodput'),
        ('report', 'writes report.html from what the run has written so far'),
    ):
        commands.add_parser(name, help=text).add_argument('workdir', help='a run (local or gs://)')
    options = parser.parse_args(argv)
    try:
        if options.command == 'ledger':
            Console().print(ledger.render(ledger.load(options.workdir)))
        else:
            print(write_report(options.workdir))
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

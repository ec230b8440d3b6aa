"""How the process of each host ended, written where the other hosts can read it, and which of the ends was the cause.

    python -m tpu_llm.parallel.deaths JOINED --code=-9 --oom-kills=1

launch/worker.py calls this when its child has ended, since who is killed cannot write any more. The child says before,
in the file JOINED, which run it has joined (`announce`). A record is a file WORKDIR/hosts/START/HOST.json.

Of the hosts of a run that broke, most only lost contact with the one that died: they are never taken for the cause.
"""

import argparse
import dataclasses
import datetime
import json
import pathlib
import signal
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence

from etils import epath

from tpu_llm.config import RunError

LOST = 75  # the exit status of a process that lost contact (EX_TEMPFAIL of sysexits.h: try again)
PATIENCE = 20  # seconds in which every host notices that another is gone, and its parent writes so
FILE = 'TPU_LLM_JOINED'  # in the environment of the child
# What jax's client says before it ends a process of which it has lost the others.
_ABORTED = b'JAX distributed service detected fatal errors'
_TAIL = 1 << 16


class LostHost(RunError):
    """Another host did not come, or is there no longer. The same command, given to all hosts again, continues."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Joined:
    """A process and the run that it is part of."""

    workdir: str
    start: str
    host: int
    hosts: int

    @property
    def folder(self) -> epath.Path:
        return folder(self.workdir, self.start)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """The end of one host's process: an exit status or a signal's name, and how often the kernel killed in its cgroup
    for lack of memory meanwhile (None: not known).
    """

    host: int
    machine: str
    at: str
    exit: int | None
    signal: str | None
    oom_kills: int | None
    lost_contact: bool

    def __str__(self) -> str:
        how = f'was ended by {self.signal}' if self.signal else f'ended with exit status {self.exit}'
        kills = 'no' if self.oom_kills == 0 else self.oom_kills
        plural = '' if self.oom_kills == 1 else 's'
        kernel = '' if kills is None else f'; the kernel counted {kills} out-of-memory kill{plural}'
        return f'host {self.host} ({self.machine}) {how}{kernel}'


def named(hosts: Iterable[int]) -> str:
    """`host 2`, `hosts 0, 2`; of three or more in a row `hosts 0-2, 7`."""
    runs: list[list[int]] = []
    for host in sorted(hosts):
        if runs and host == runs[-1][-1] + 1:
            runs[-1].append(host)
        else:
            runs.append([host])
    words = [f'{run[0]}-{run[-1]}' if len(run) > 2 else ', '.join(map(str, run)) for run in runs]
    return f'host{"s" if sum(map(len, runs)) > 1 else ""} {", ".join(words)}'


def folder(workdir: epath.PathLike, start: str) -> epath.Path:
    """Where the hosts of one start leave what they have to say."""
    return epath.Path(workdir) / 'hosts' / start


def announce(joined: Joined, path: pathlib.Path) -> None:
    partial = path.with_suffix('.partial')  # the parent may look at any moment
    partial.write_text(json.dumps(dataclasses.asdict(joined)))
    partial.replace(path)


def end(host: int, code: int, oom_kills: int | None, log: bytes) -> End:
    """The end of a process by its wait status as Python gives it (-9: by signal 9) or a shell does (137)."""
    number = -code if code < 0 else code - 128
    name = signal.Signals(number).name if number in [*map(int, signal.Signals)] else None
    return End(
        host=host,
        machine=socket.gethostname(),
        at=datetime.datetime.now(datetime.UTC).isoformat(timespec='milliseconds'),
        exit=None if name else code,
        signal=name,
        oom_kills=oom_kills,
        lost_contact=code == LOST or (code != 0 and _ABORTED in log),
    )


def culprit(ends: Mapping[int, End]) -> End | None:
    """The host that ended first of those that did not merely lose contact; None while no such is known."""
    died = [end for end in ends.values() if not end.lost_contact and end.exit != 0]
    return min(died, key=lambda end: end.at, default=None)


def verdict(ends: Mapping[int, End], hosts: int) -> str:
    """Why a run broke of which no more records will come."""
    if found := culprit(ends):
        return str(found)
    if silent := [host for host in range(hosts) if host not in ends]:
        return f'{named(silent)} vanished, cause unknown'
    return 'no host died, each lost contact with another: look at the network between them'


def write(folder: epath.Path, end: End) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f'.{end.host}.partial'  # others read meanwhile
    partial.write_text(json.dumps(dataclasses.asdict(end)) + '\n')
    partial.replace(folder / f'{end.host}.json')


def read(folder: epath.Path) -> dict[int, End]:
    ends = [End(**json.loads(file.read_text())) for file in folder.glob('*.json')]
    return {end.host: end for end in ends}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('joined', type=pathlib.Path, help='the file that the child has written')
    parser.add_argument(
        '--code', type=int, required=True, help="the child's exit status; of a signal, minus its number"
    )
    parser.add_argument('--oom-kills', type=int, help='how often the kernel killed in its cgroup while it ran')
    parser.add_argument('--log', type=pathlib.Path, help="the end of the child's output is looked at")
    args = parser.parse_args(argv)
    joined = Joined(**json.loads(args.joined.read_text()))
    mine = end(joined.host, args.code, args.oom_kills, _tail(args.log) if args.log else b'')
    write(joined.folder, mine)
    if mine.lost_contact:
        print(_wait_for_verdict(joined), flush=True)
    elif mine.signal:
        print(mine, flush=True)
    return 0


def _wait_for_verdict(joined: Joined) -> str:
    limit = time.monotonic() + PATIENCE
    while culprit(ends := read(joined.folder)) is None and time.monotonic() < limit:
        time.sleep(0.5)
    return verdict(ends, joined.hosts)


def _tail(log: pathlib.Path) -> bytes:
    with open(log, 'rb') as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        return file.read()


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

"""A queued resource and the workers in it: found or made, filled with this checkout, and listened to."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import sleep
from typing import Any

from launch import cloud
from launch.cloud import Pod, PodError
from tpu_llm.parallel import deaths
from tpu_llm.parallel.chips import Slice

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 900  # seconds for one call of gcloud, other than the run itself
LOST = ('FAILED', 'SUSPENDED')
PREEMPTED = 'preempted: saved'  # train/loop.py says so, and ends with 0
SOURCES = {'gcloud': 'cloud.google.com/sdk/docs/install', 'kubectl': 'gcloud components install kubectl'}
SOURCES |= {'xpk': 'pip install xpk', 'git': 'apt install git'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to create where there is nothing."""

    shape: Slice
    slices: int
    capacity: str
    wait: str
    account: str | None
    also: str


@dataclasses.dataclass
class Ended:
    """How one look at a run ended: gcloud's exit status, and each worker's own where it was heard."""

    code: int = 0
    exits: dict[str, int] = dataclasses.field(default_factory=dict)
    stopped: bool = False  # by `pod.py stop`
    preempted: bool = False

    @property
    def failed(self) -> dict[str, int]:
        """The workers that failed; last those that only lost contact with another (or were aborted by jax for it)."""
        failed = {worker: code for worker, code in self.exits.items() if code}
        return dict(sorted(failed.items(), key=lambda each: each[1] in (deaths.LOST, 128 + signal.SIGABRT)))


class Queued:
    def __init__(self, pod: Pod, dry: bool) -> None:
        self.pod, self.dry = pod, dry

    def state(self) -> str:
        """ACTIVE, WAITING_FOR_RESOURCES …, or 'gone'."""
        found = self._find()
        return found['state']['state'] if found else 'gone'

    def ensure(self, wanted: Wanted, tries: int) -> bool:
        """Waits until the pod is there; says whether it is new.

        A request that waits or is half through is adopted, one that ended is deleted and made again.
        """
        create = self.pod.create(**vars(wanted))
        if self.dry:
            self.call(create)
            return True
        made, seen, pauses = 0, '', backoff()
        while True:
            found = self._find()
            state = found['state']['state'] if found else 'gone'
            if state != seen:
                say(f'{self.pod.name}: {state}')
                seen, pauses = state, backoff()
            if found and state not in LOST:
                self._compare(found, wanted)
            if state == 'ACTIVE':
                return made > 0
            if made and found and state == 'FAILED':
                why = found['state'].get('failedData', {}).get('error', {}).get('message', 'Cloud gave no reason')
                raise PodError(f'{self.pod.name} could not be had: {cloud.explain(why)}')
            if state in LOST:
                self.call(self.pod.delete())
            elif state == 'gone' and made > tries:
                raise PodError(f'{self.pod.name} was taken away {made} times before it was used; try another zone')
            elif state == 'gone':
                self.call(create)
                made += 1
            else:
                sleep(next(pauses))

    def push(self, env_file: str | None, extras: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            files = [pack(Path(folder))]
            if env_file:
                files.append(private(Path(env_file), Path(folder)))
            self.call(self.pod.ssh(cloud.PREPARE))
            self.call(self.pod.scp(files))
            self.call(self.pod.ssh(cloud.unpack(extras)))

    def attend(self, token: str, command: Sequence[str]) -> Ended:
        """Starts the command on all workers, or attaches to it, and shows what they say until all have ended."""
        words = self.pod.ssh(cloud.worker('run', token, '--', *command))
        ended, exits = Ended(), re.compile(rf'^\[(.+?)\] {token} ended: exit (\d+)(.*)')
        if self.dry:
            print(shlex.join(words))
            return ended
        with popen(words) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end='', flush=True)
                ended.preempted |= PREEMPTED in line
                if found := exits.match(line):
                    ended.exits[found[1]] = int(found[2])
                    ended.stopped |= 'stopped' in found[3]
        ended.code = process.returncode
        return ended

    def call(self, words: Sequence[str], text: str | None = None) -> str:
        """What a tool printed; in a dry run only says what would be called."""
        if self.dry:
            print(shlex.join(words))
            return ''
        try:
            done = subprocess.run(words, input=text, capture_output=True, text=True, timeout=LIMIT)
        except FileNotFoundError:
            raise missing(words[0]) from None
        except subprocess.TimeoutExpired:
            name = ' '.join(words[:5])
            raise PodError(f'{name}: no answer in {LIMIT} s; the same command goes on from what there is') from None
        if done.returncode:
            raise cloud.refusal(done.stderr or done.stdout)
        return done.stdout

    def _find(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.call(self.pod.describe()) or 'null')  # a dry run hears nothing
        except PodError as error:
            if 'NOT_FOUND' in str(error) or 'not found' in str(error):
                return None
            raise

    def _compare(self, found: dict[str, Any], wanted: Wanted) -> None:
        specs = found['tpu']['nodeSpec']
        slices = max(len(specs), int(specs[0].get('multisliceParams', {}).get('nodeCount', 1)))
        there = (slices, specs[0]['node'].get('acceleratorType', wanted.shape.accelerator_type))
        asked = (wanted.slices, wanted.shape.accelerator_type)
        if there != asked:
            had, want = (f'{count} x {kind}' for count, kind in (there, asked))
            raise PodError(f'{self.pod.name} is {had}, not {want}: delete it first, or take another name')


def popen(words: Sequence[str]) -> subprocess.Popen[str]:
    pipe, merged = subprocess.PIPE, subprocess.STDOUT
    try:
        return subprocess.Popen(words, stdout=pipe, stderr=merged, text=True, errors='replace')
    except FileNotFoundError:
        raise missing(words[0]) from None


def missing(tool: str) -> PodError:
    return PodError(f'{tool} is not installed: {SOURCES[tool]}')


def pack(folder: Path) -> str:
    """A tar of what git tracks or would track: not what .gitignore names, nor what was deleted."""
    listed = ['git', '-C', str(ROOT), 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    try:
        done = subprocess.run(listed, capture_output=True, text=True)
    except FileNotFoundError:
        raise missing('git') from None
    if done.returncode:
        raise PodError(f'{ROOT} cannot be pushed: {cloud.explain(done.stderr)}')
    with tarfile.open(folder / 'code.tgz', 'w:gz') as tar:
        for name in sorted(set(done.stdout.split('\0')) - {''}):
            if os.path.lexists(ROOT / name):
                tar.add(ROOT / name, name, recursive=False)
    return str(folder / 'code.tgz')


def private(file: Path, folder: Path) -> str:
    """A copy of a file of secrets under the name it has on the workers, seen by nobody else here or there."""
    if not file.is_file():
        raise PodError(f'no file {file}: write one, NAME=value in each line, and chmod 600 {file}')
    if file.stat().st_mode & 0o077:
        raise PodError(f'{file} can be read by others: chmod 600 {file}')
    if wrong := [i for i, line in enumerate(file.read_text().splitlines(), 1) if not re.match(r'\w+=|#|$', line)]:
        raise PodError(f'{file}, line {wrong[0]}: not NAME=value')
    return str(shutil.copy(file, folder / 'env'))  # copies the mode, too


def backoff() -> Iterator[float]:
    """Seconds to wait: 10, 20, 40 … up to five minutes."""
    seconds = 10.0
    while True:
        yield seconds
        seconds = min(2 * seconds, 300)


def say(words: str) -> None:
    print(f'pod: {words}', file=sys.stderr, flush=True)

"""Runs of a sweep elsewhere: on a pod one after another, or as jobs of a Kubernetes cluster.

Both go through launch/pod.py, so what they need and what they say is what it needs and says. Each run is
`launch/sweep.py one NAME`, which writes how it ended into the run's folder, on storage that is seen from here (gs://).
What was started goes on when the sweep here is stopped: the same command attaches to it.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence

from tpu_llm.config import RunError
from tpu_llm.scaling import sweep
from tpu_llm.scaling.sweep import Job

LOOK = 20.0  # seconds between two looks at a job of the cluster
Words = Sequence[str]
LEFT = 'what was started goes on, and the same command attaches to it'


class Pod:
    """A pod that runs one after another; `pod` are the words after `pod.py run`: its name and, to make it, its type."""

    left = LEFT

    def __init__(self, launcher: Words, pod: Words, one: Callable[[Job], list[str]]):
        self.words, self.one = [*launcher, 'run', *pod, '--'], one
        self._job: Job | None = None
        self._process: subprocess.Popen | None = None

    def room(self, job: Job) -> bool:
        del job
        return self._process is None

    def start(self, job: Job) -> None:
        self._job = job
        # In a session of its own: Ctrl-C here is for the sweep to hear.
        self._process = subprocess.Popen([*self.words, *self.one(job)], start_new_session=True)

    def ended(self) -> list[tuple[str, str]]:
        if self._process is None or self._job is None or (code := self._process.poll()) is None:
            return []
        job, self._job, self._process = self._job, None, None
        return [(job.name, f'pod.py ended with exit {code}, and the run said nothing')]

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait()


class JobSets:
    """Jobs of GKE, all submitted at once: the cluster's own queue says when each runs. `jobset` are the words after the
    name in `pod.py manifest`: type, image …
    """

    left = LEFT

    def __init__(self, launcher: Words, jobset: Words, one: Callable[[Job], list[str]]):
        self.launcher, self.jobset, self.one = list(launcher), list(jobset), one
        self._running: dict[str, tuple[Job, int]] = {}  # by the JobSet's name, and the tries of the run before
        self._looked = float('-inf')

    def room(self, job: Job) -> bool:
        del job
        return True

    def start(self, job: Job) -> None:
        """Submits it, unless an earlier start of the sweep did and it is not over. Raises RunError where it cannot."""
        name = jobset_name(job)
        if self._state(name) != 'active':
            _call(['kubectl', 'delete', 'jobset', name, '--ignore-not-found'])
            _call([*self.launcher, 'manifest', name, *self.jobset, '--apply', '--', *self.one(job)])
        self._running[name] = job, len(sweep.tries(job.folder))

    def ended(self) -> list[tuple[str, str]]:
        if time.monotonic() - self._looked < LOOK:
            return []
        over = []
        for name, (job, before) in list(self._running.items()):
            state = self._state(name)  # asked first, so that no last word is missed
            if len(sweep.tries(job.folder)) > before:
                over.append((job.name, ''))
            elif state != 'active':
                why = f'its JobSet is {state}, and it said nothing: kubectl describe jobset {name}'
                over.append((job.name, why))
            else:
                continue
            del self._running[name]
        self._looked = time.monotonic()
        return over

    def stop(self) -> None:
        """Nothing: the jobs are the cluster's."""

    def _state(self, name: str) -> str:
        said = _call(['kubectl', 'get', 'jobset', name, '--ignore-not-found', '-o', 'json'])
        if not said.strip():
            return 'gone'
        return json.loads(said).get('status', {}).get('terminalState', '').lower() or 'active'


def jobset_name(job: Job) -> str:
    """A name for Kubernetes: what it allows of the run's, and a hash, so that it is the only one."""
    own = hashlib.sha256(os.fspath(job.folder).encode()).hexdigest()[:8]
    return f'r-{re.sub("[^a-z0-9]+", "-", job.name.lower()).strip("-")[:24].strip("-")}-{own}'


def _call(words: Words) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RunError(f'{words[0]} is not installed: gcloud components install {words[0]}') from None
    if done.returncode:
        said = ' '.join((done.stderr or done.stdout).split())[-400:]
        raise RunError(f'{" ".join(words[:4])}: {said.removeprefix("error: ")}')
    return done.stdout

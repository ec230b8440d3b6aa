"""Runs of a sweep on a Ray cluster: each is a task that takes what it is said to take of the cluster's resources.

The checkout must lie at the same path on every machine of the cluster, and the sweep's folder on a disk that all see or
on gs://.
"""

import contextlib
import os
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

from tpu_llm.config import ConfigError
from tpu_llm.scaling.sweep import Job

LOG = 'log.txt'
GRACE = 120.0  # seconds in which a run that is to stop must have saved


class Ray:
    """The engine. `address` is a cluster's ('auto' finds one), or 'local' for one on this machine, of this sweep only.

    `each` is what a run takes, by Ray's names: CPU, GPU, and others such as TPU. Raises ConfigError without Ray.
    """

    left = 'the runs at work have saved, and the same command goes on'

    def __init__(
        self, address: str, each: Mapping[str, float], one: Callable[[Job], list[str]], env: Mapping[str, str]
    ):
        try:
            import ray  # pyright: ignore[reportMissingImports] (an extra)
        except ImportError:
            raise ConfigError("Ray is asked for but not installed: pip install -e '.[ray]'") from None
        self.ray, self.one = ray, one
        # Without an accelerator of its own, a task must not be told by Ray that it has none.
        self.env = {'RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO': '0', **env}
        ray.init(
            address=address,
            include_dashboard=False if address == 'local' else None,
            log_to_driver=False,
            configure_logging=False,
        )
        rest = {name: count for name, count in each.items() if name not in ('CPU', 'GPU')}
        options = {'num_cpus': each.get('CPU', 1), 'num_gpus': each.get('GPU', 0), 'resources': rest, 'max_retries': 0}
        self.task = ray.remote(**options)(task)
        self._running: dict[Any, Job] = {}

    def room(self, job: Job) -> bool:
        """Ray keeps the queue."""
        del job
        return True

    def start(self, job: Job) -> None:
        folder = os.fspath(job.folder)
        log = '' if '://' in folder else os.path.abspath(os.path.join(folder, LOG))
        self._running[self.task.remote(self.one(job), os.getcwd(), dict(self.env), log)] = job

    def ended(self) -> list[tuple[str, str]]:
        if not self._running:
            return []
        ready, _ = self.ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        return [(self._running.pop(ref).name, self._why(ref)) for ref in ready]

    def stop(self) -> None:
        for ref in self._running:
            self.ray.cancel(ref)
        if self._running:
            self.ray.wait(list(self._running), num_returns=len(self._running), timeout=GRACE)
        self.ray.shutdown()

    def _why(self, ref: Any) -> str:
        try:
            return f'its process ended with exit {self.ray.get(ref)}'
        except self.ray.exceptions.RayError as error:
            return f'Ray lost it: {str(error).splitlines()[0]}'


def task(words: list[str], folder: str, env: dict[str, str], log: str) -> int:
    """Runs the command and returns its exit status. Where Ray cancels it, the command is told to save and end."""
    if log:
        os.makedirs(os.path.dirname(log), exist_ok=True)
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(open(log, 'ab')) if log else None
        process = subprocess.Popen(words, cwd=folder, env={**os.environ, **env}, stdout=output, stderr=output)
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(GRACE)
                except subprocess.TimeoutExpired:
                    process.kill()

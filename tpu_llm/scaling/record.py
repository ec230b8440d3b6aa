"""What a sweep writes down as it goes: `sweep.json`, and the table anew whenever a run starts or ends."""

import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from tpu_llm import config as configs
from tpu_llm.config import ConfigError
from tpu_llm.scaling import table
from tpu_llm.scaling.sweep import Job
from tpu_llm.train.metrics import replace_text

FILE = 'sweep.json'


class Record:
    """The files of a sweep, kept up to date; `missing` says what could not be written, and why."""

    def __init__(self, jobs: Sequence[Job], workdir: epath.PathLike, spec: str, overrides: Sequence[str]):
        self.jobs, self.workdir = jobs, epath.Path(workdir)
        self.spec, self.overrides = spec, list(overrides)
        self.status: dict[str, str] = {}
        self.rows: dict[str, table.Row] = {}
        self.missing = ''

    def begin(self, status: dict[str, str]) -> None:
        self.workdir.mkdir(parents=True, exist_ok=True)
        for job in self.jobs:
            self._put(job, status[job.name])
        self.write()

    def changed(self, job: Job, status: str, reason: str = '') -> None:
        del reason  # it stands in the run's own record
        self._put(job, status)
        self.write()

    def tick(self) -> None:
        """Nothing to do between changes."""

    def write(self) -> None:
        runs = {
            job.name: {
                'status': self.status[job.name],
                'config_hash': configs.digest(job.config),
                'labels': job.labels,
                'config': configs.dump(job.config),
            }
            for job in self.jobs
        }
        about = {'sweep': self.spec, 'overrides': self.overrides, 'runs': runs}
        replace_text(self.workdir / FILE, json.dumps(about, indent=1))
        self.missing = table.write(list(self.rows.values()), self.workdir)

    def _put(self, job: Job, status: str) -> None:
        self.status[job.name] = status
        self.rows[job.name] = table.row(job, status)


def read(workdir: epath.PathLike) -> dict[str, Any]:
    """What `sweep.json` of a sweep's folder holds. Raises ConfigError where there is none."""
    path = epath.Path(workdir) / FILE
    if not path.exists():
        raise ConfigError(f'{path} does not exist: is {workdir} the workdir of a sweep?')
    return json.loads(path.read_text())

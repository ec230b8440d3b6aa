"""A sweep is a function that yields (name, config); here it becomes jobs, checked before any of them runs.

A third value may be yielded, a dict of labels: columns of the table, such as the budget that a run belongs to.

What became of each try of a run stands in `tries.json` in its folder, with the config that was run: by it the same
command knows what is finished, whoever ran it.
"""

import dataclasses
import datetime
import json
import os
import re
from collections.abc import Sequence
from typing import Any, Literal

from etils import epath

from tpu_llm import command_line
from tpu_llm import config as configs
from tpu_llm.config import ConfigError
from tpu_llm.train.metrics import replace_text

RUNS, TRIES = 'runs', 'tries.json'
MOST = 150  # characters of a run's name

# `lost`: its process died; `stopped`: it saved and ended before its last step; `refused`: a mistake in its config.
Ended = Literal['finished', 'diverged', 'failed', 'refused', 'lost', 'stopped']
FINAL = ('finished', 'diverged')
AGAIN = ('failed', 'lost', 'stopped')  # worth another try


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One run of a sweep, and its folder: a workdir like any other."""

    name: str
    config: Any
    labels: dict[str, Any]
    folder: epath.Path


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Try:
    """How one try of a run ended."""

    status: Ended
    reason: str = ''  # in words, where it did not finish
    seconds: float = 0.0
    at: str = ''  # when it ended, UTC


def load(spec: str, overrides: Sequence[str], workdir: epath.PathLike, others: Sequence[str]) -> list[Job]:
    """The jobs of `FILE.py[:arg]`, in the order of its `sweep`, each config with the overrides and validated.

    Raises ConfigError on names that collide or can be no folder's, and on two runs of one config.
    """
    yielded = command_line.call(spec, 'sweep', 'yields (name, config)')
    try:
        items = [_item(each) for each in yielded]
    except TypeError:
        raise ConfigError(f'sweep of {spec} gave {yielded!r}; it yields (name, config)') from None
    if not items:
        raise ConfigError(f'sweep of {spec} yields no run')
    if len({id(config) for _, config, _ in items}) < len(items):
        raise ConfigError(f'sweep of {spec}: one object was yielded twice; make a fresh config for each run')
    jobs: list[Job] = []
    for name, config, labels in items:
        _check_name(name)
        try:
            config = command_line.override(config, list(overrides), others)
            configs.validate(config)
        except ConfigError as error:
            raise ConfigError(f'run {name}: {error}') from None
        jobs.append(Job(name, config, labels, epath.Path(workdir) / RUNS / name))
    _check_apart(jobs)
    return jobs


def _item(each: Any) -> tuple[str, Any, dict[str, Any]]:
    if isinstance(each, tuple) and len(each) in (2, 3):
        name, config, labels = (*each, {}) if len(each) == 2 else each
        if isinstance(name, str) and configs.is_config(config):
            if not isinstance(labels, dict):
                raise ConfigError(f'run {name}: labels are to be a dict, not {labels!r}')
            return name, config, labels
    raise ConfigError(f'a sweep yields (name, config) or (name, config, labels), not {each!r}')


def _check_name(name: str) -> None:
    if not re.fullmatch(r'[\w=,-][\w.=,-]*', name) or len(name) > MOST:
        raise ConfigError(
            f'run {name!r} is to be a folder; name it with letters, digits and . - _ = , (at most {MOST}), or by '
            'name(point)'
        )


def _check_apart(jobs: Sequence[Job]) -> None:
    """Names must differ by more than case, which some disks do not see; configs by any field."""
    names: dict[str, Job] = {}
    same: dict[str, Job] = {}
    for job in jobs:
        dumped = configs.dump(job.config)
        if (other := names.setdefault(job.name.lower(), job)) is not job:
            if changes := configs.diff(configs.dump(other.config), job.config):
                mend = f'they differ in {listed(changes)}; say so in their names, as name(point) does'
            else:
                mend = 'and are one config; yield it once'
            raise ConfigError(f'two runs of the sweep are named {job.name}: {mend}')
        if (other := same.setdefault(json.dumps(dumped, sort_keys=True), job)) is not job:
            raise ConfigError(
                f'runs {other.name} and {job.name} have one and the same config: a flag sets what the sweep varies, '
                'or the sweep does not use its point'
            )


def listed(changes: Sequence[configs.Change], most: int = 4) -> str:
    rest = f' and {len(changes) - most} more' if len(changes) > most else ''
    return '; '.join(map(str, changes[:most])) + rest


# ------------------------------------------------------------------------------------------------------------ tries


def tries(folder: epath.Path) -> list[Try]:
    """How the tries of a run ended, oldest first. Raises ConfigError where the record is damaged."""
    found = _record(folder)
    return [Try(**each) for each in found['tries']] if found else []


def record(job: Job, ended: Try) -> None:
    """Adds the end of a try."""
    found = _record(job.folder)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
    all_ = [*(found['tries'] if found else ()), dataclasses.asdict(dataclasses.replace(ended, at=now))]
    job.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({'tries': all_, 'config': configs.dump(job.config)}, indent=1)
    replace_text(job.folder / TRIES, text)


def _record(folder: epath.Path) -> dict[str, Any] | None:
    path = folder / TRIES
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        [Try(**each) for each in found['tries']]
        return {'tries': found['tries'], 'config': found['config']}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f'{path} is damaged; bring it back, or delete {folder} to run it again') from None


# ----------------------------------------------------------------------------------------------------------- resuming


def is_done(job: Job) -> bool:
    """Whether this very run has come to its end, finished or diverged.

    A run whose schedule changed (more steps) is not: it goes on in its folder. Raises ConfigError where a field that
    decides its numbers is another than that of the run in the folder.
    """
    found = _record(job.folder)
    changes = _changes(job, found)
    if refused := [change for change in changes if change.mark == 'maths']:
        raise ConfigError(
            f'run {job.name} was made with another config: {listed(refused)}; undo that, name it otherwise, take '
            'another folder for the sweep: --workdir=another, or have it and others like it made anew: --changed=rerun'
        )
    if not found or not found['tries'] or found['tries'][-1]['status'] not in FINAL:
        return False
    return all(change.mark == 'machine' for change in changes)


def is_changed(job: Job) -> bool:
    """Whether the folder holds a run with other numbers."""
    return any(change.mark == 'maths' for change in _changes(job, _record(job.folder)))


def _changes(job: Job, found: dict[str, Any] | None) -> list[configs.Change]:
    """What differs from the config in the folder: of its last try, or of a run that was killed in its first."""
    path = job.folder / 'config.json'
    if found is None and not path.exists():
        return []
    return configs.diff(found['config'] if found else json.loads(path.read_text()), job.config)


def clear(job: Job) -> None:
    """Deletes what is in the folder of a run."""
    if job.folder.exists():
        job.folder.rmtree()


# ------------------------------------------------------------------------------------------------------- a run at work


def ended(config: Any, folder: epath.PathLike) -> bool:
    """Whether a run whose `main` returned has come to its last step, rather than saved and stopped before."""
    from tpu_llm.train.stages import Stages
    from tpu_llm.train.summary import SUMMARY

    runs = trained(config, folder)
    if isinstance(config, Stages) or runs:
        return all((place / SUMMARY).exists() for _, _, place in runs)
    return True


def trained(config: Any, folder: epath.PathLike) -> list[tuple[str, Any, epath.Path]]:
    """The training runs in a config, each with its name (of a stage; '' for the config itself) and its folder."""
    from tpu_llm.train.run import Run
    from tpu_llm.train.stages import Stages

    if isinstance(config, Run):
        return [('', config, epath.Path(folder))]
    if isinstance(config, Stages):
        return [
            (f'{name}{below and "/"}{below}', run, place)
            for name, stage in config.stages.items()
            for below, run, place in trained(stage, os.path.join(folder, name))
        ]
    return []

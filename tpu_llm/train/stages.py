"""A pipeline as one config: runs one after another, which hand over by checkpoint."""

import copy
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from tpu_llm.checkpoint import agree
from tpu_llm.config import ConfigError, is_config, nearest, validate
from tpu_llm.train.run import Run
from tpu_llm.train.summary import SUMMARY

_PLACE = re.compile(r'stage:([\w.-]+)')


@dataclasses.dataclass(kw_only=True, slots=True)
class Stages:
    """What `launch/run.py` runs: each stage in the folder of its name in the workdir.

    A stage is a run, or any config with `main(workdir)` that passes over what it has done. Where a path in one begins
    with `stage:NAME`, that is the folder of stage NAME, which stands before it. The same command goes on in the stage
    that was cut off; those that came to their end only look at their checkpoint.
    """

    stages: dict[str, Any]

    def validate(self) -> None:
        done: list[str] = []
        for name, stage in self.stages.items():
            if not re.fullmatch(r'[\w.-]+', name):
                raise ConfigError(f'stage {name!r} is to be a folder; name it with letters, digits, - and _')
            for place in _places(stage):
                if place not in done:
                    raise ConfigError(
                        f'stage {name} reads stage:{place}, which is not before it{nearest(place, done)}; before it '
                        f'are {", ".join(done) or "none"}'
                    )
            done.append(name)

    def main(self, workdir: str) -> None:
        validate(self)
        for number, (name, stage) in enumerate(self.stages.items(), 1):
            print(f'── stage {number} of {len(self.stages)}: {name}', flush=True)
            folder = epath.Path(workdir) / name
            _placed(stage, workdir).main(str(folder))
            if isinstance(stage, Run) and agree.first(str((folder / SUMMARY).exists())) != 'True':
                print(f'stopped in stage {name}; the same command goes on from there', flush=True)
                return


def _places(value: Any) -> Iterator[str]:
    """The stages that the paths of a config are in."""
    if isinstance(value, str):
        if found := _PLACE.match(value):
            yield found[1]
    elif is_config(value):
        for field in dataclasses.fields(value):
            yield from _places(getattr(value, field.name))
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _places(item)


def _placed(value: Any, workdir: str) -> Any:
    """The config with the folders of stages in place of their names."""
    if isinstance(value, str):
        return _PLACE.sub(lambda found: f'{workdir}/{found[1]}', value, count=1) if _PLACE.match(value) else value
    if is_config(value):
        made = copy.copy(value)
        for field in dataclasses.fields(value):
            setattr(made, field.name, _placed(getattr(value, field.name), workdir))
        return made
    if isinstance(value, dict):
        return {key: _placed(item, workdir) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_placed(item, workdir) for item in value)
    return value

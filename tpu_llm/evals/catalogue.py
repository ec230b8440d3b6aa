"""The kinds of tasks there are, and tasks by name: those that come with the package, and files."""

from collections.abc import Sequence
from pathlib import Path

from etils import epath

from tpu_llm.config import ConfigError, nearest
from tpu_llm.evals import task
from tpu_llm.evals.choice import Choice
from tpu_llm.evals.generative import Generative
from tpu_llm.evals.pass_at_k import Code
from tpu_llm.evals.reasoned import Reasoned
from tpu_llm.evals.task import Form, Task
from tpu_llm.evals.texts import Texts

KINDS: dict[str, type[Form]] = {form.kind: form for form in (Choice, Generative, Reasoned, Code, Texts)}
_FOLDER = Path(__file__).with_name('tasks')
_ENDING = '.task'


def shipped() -> list[str]:
    """The names of the tasks that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob(f'*{_ENDING}'))


def find(names: Sequence[str]) -> list[Task]:
    """The tasks of these names; `all` is every one that comes with the package, what ends in .task is a file.

    Raises ConfigError for what is not there, for a file that is no task and for two tasks of one name.
    """
    paths = [path for name in names for path in _paths(name)]
    tasks = [task.read(path, KINDS) for path in paths]
    seen: dict[str, epath.Path] = {}
    for path, each in zip(paths, tasks, strict=True):
        if each.name in seen:
            raise ConfigError(f'two tasks are named {each.name}: {seen[each.name]} and {path}; rename a file')
        seen[each.name] = path
    if not tasks:
        raise ConfigError(f'no task is given; there are {", ".join(shipped())}, all, and files that end in {_ENDING}')
    return tasks


def _paths(name: str) -> list[epath.Path]:
    there = shipped()
    if name == 'all':
        return [epath.Path(_FOLDER / f'{each}{_ENDING}') for each in there]
    if name in there:
        return [epath.Path(_FOLDER / f'{name}{_ENDING}')]
    if name.endswith(_ENDING):
        return [epath.Path(name).expanduser()]
    raise ConfigError(
        f'there is no task {name!r}{nearest(name, there)}; there are {", ".join(there)}, all, and files that end in '
        f'{_ENDING}'
    )

"""A task is a small data file: a head of YAML that says what is asked and how, a line `---`, a row of JSON a line.

    kind: choice
    about: Sums of two numbers, four choices each.
    prompt: '{question} ='
    continuation: ' {choice}'
    ---
    {"question": "12 + 34", "choices": ["46", "45", "36", "56"], "answer": 0}

`{name}` in the head's templates is the row's field of that name; braces around anything else stay as they are. A row
with `"example": true` is never scored: such are what a prompt of n shots shows, the first n of them.
"""

import abc
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import yaml
from etils import epath

from tpu_llm.config import ConfigError, nearest, validate
from tpu_llm.data.documents import fingerprint
from tpu_llm.evals.measures import Measured
from tpu_llm.evals.subject import Subject

Fields = Mapping[str, Any]

_PLACE = re.compile(r'\{(\w+)\}')
_RULE = '---'  # the line between head and rows


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    line: int  # of the file, from 1
    fields: Fields


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What a model made of a task's rows: metrics by name, and of each row what was asked and said."""

    metrics: dict[str, Measured]
    samples: list[dict[str, Any]]


@dataclasses.dataclass(kw_only=True, slots=True)
class Form(abc.ABC):
    """The head of a task. Each kind of task is one."""

    kind: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()  # fields that every row has, besides those of the templates
    filled: ClassVar[tuple[str, ...]] = ('prompt',)  # the templates that a row fills; an example, continuation too
    given: ClassVar[tuple[str, ...]] = ()  # names in templates that are no field of a row
    takes_shots: ClassVar[bool] = True
    falling: ClassVar[tuple[str, ...]] = ()  # metrics that are better where they are lower
    writes: ClassVar[bool] = False  # whether the model does, and not only weighs what is there

    about: str
    prompt: str
    continuation: str  # what follows the prompt: in an example, and where it is scored
    opening: str = ''  # before everything
    separator: str = '\n\n'  # behind each example
    shots: int = 0  # examples, where a suite does not say how many
    metric: str = ''  # the one to look at; '': the first

    def validate(self) -> None:
        if self.shots < 0:
            raise ConfigError(f'shots is {self.shots}; it is 0 or more')
        if self.metric and self.metric not in self.names():
            there = ', '.join(self.names())
            raise ConfigError(f'metric is {self.metric!r}{nearest(self.metric, self.names())}; there are {there}')

    @abc.abstractmethod
    def names(self) -> tuple[str, ...]:
        """Of its metrics."""

    def check(self, fields: Fields) -> None:
        """Raises ValueError for a row that cannot be asked."""
        for name in self.needs:
            _there(name, fields, f'a task of kind {self.kind}')
        shown = [] if 'continuation' in self.filled or not fields.get('example') else ['continuation']
        for template in (*self.filled, *shown):
            for name in _PLACE.findall(getattr(self, template)):
                if name not in self.given:
                    _written(name, fields, template)

    def example(self, fields: Fields) -> str:
        """An example's prompt and what follows it."""
        return fill(self.prompt, fields) + self.answered(fields)

    @abc.abstractmethod
    def answered(self, fields: Fields) -> str:
        """What follows the prompt, of a row whose answer is shown."""

    @abc.abstractmethod
    def outcome(self, subject: Subject, task: 'Task', shots: int) -> Outcome:
        """Asks the model every row. Raises ConfigError where it cannot be asked."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    name: str
    form: Form
    rows: Sequence[Row]  # those that are scored
    examples: Sequence[Row]
    fingerprint: str  # of head and rows
    of_rows: str  # of the rows alone: two scores of the same rows can be paired

    def head(self, limit: int) -> 'Task':
        """The first `limit` rows; all, where it is 0 or more than there are."""
        if not 0 < limit < len(self.rows):
            return self
        rows = self.rows[:limit]
        same = {'fingerprint': fingerprint(self.fingerprint, limit), 'of_rows': _of_rows(rows)}
        return dataclasses.replace(self, rows=rows, **same)

    def shots(self, wanted: int) -> int:
        """How many examples it shows where so many are wanted; -1: as its file says."""
        return (self.form.shots if wanted < 0 else wanted) if self.form.takes_shots else 0

    def prompts(self, shots: int) -> list[str]:
        """What each row asks, behind so many examples. Raises ConfigError where there are fewer."""
        if shots > len(self.examples):
            raise ConfigError(
                f'task {self.name} has {len(self.examples)} examples, and shots = {shots}; ask for fewer, or mark more '
                'rows with "example": true'
            )
        form = self.form
        shown = ''.join(form.example(row.fields) + form.separator for row in self.examples[:shots])
        return [form.opening + shown + fill(form.prompt, row.fields) for row in self.rows]


def fill(template: str, fields: Fields) -> str:
    """The template with the fields in their places."""
    return _PLACE.sub(lambda place: str(fields[place[1]]), template)


def read(path: epath.PathLike, kinds: Mapping[str, type[Form]]) -> Task:
    """The task in a file. Raises ConfigError, one line, that names the file, the line, the field and the mend."""
    path = epath.Path(path)
    lines = _lines(path)
    if _RULE not in lines:
        raise ConfigError(f'{path}: there is no line {_RULE} between the head and the rows; put one')
    border = lines.index(_RULE)
    form = _form(path, '\n'.join(lines[:border]), kinds)
    numbered = enumerate(lines[border + 1 :], border + 2)
    rows = [_row(path, number, line, form) for number, line in numbered if line.strip()]
    scored = [row for row in rows if not row.fields.get('example')]
    if not scored:
        raise ConfigError(f'{path}: no row to score stands behind line {border + 1}; add one')
    examples = [row for row in rows if row.fields.get('example')]
    return Task(
        name=path.stem,
        form=form,
        rows=scored,
        examples=examples,
        fingerprint=fingerprint(form.kind, dataclasses.asdict(form), [dict(row.fields) for row in rows]),
        of_rows=_of_rows(scored),
    )


def _lines(path: epath.Path) -> list[str]:
    try:
        return path.read_bytes().decode().split('\n')
    except FileNotFoundError:
        raise ConfigError(f'there is no task file {path}') from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b'\n') + 1
        raise ConfigError(f'{path} line {line}: it is not UTF-8; convert the file') from None


def _of_rows(rows: Sequence[Row]) -> str:
    return fingerprint([dict(row.fields) for row in rows])


# ------------------------------------------------------------------------------------------------------------ the head


def _form(path: epath.Path, text: str, kinds: Mapping[str, type[Form]]) -> Form:
    try:
        head, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, 'problem_mark', None)
        where = f' line {mark.line + 1}' if mark else ''
        raise ConfigError(f'{path}{where}: the head is not YAML: {getattr(error, "problem", error)}') from None
    if not isinstance(head, dict) or not isinstance(node, yaml.MappingNode):
        raise ConfigError(f'{path} line 1: the head is no mapping; write field: value on each line')
    at = {str(key.value): key.start_mark.line + 1 for key, _ in node.value}
    kind = head.pop('kind', None)
    if not isinstance(kind, str) or kind not in kinds:
        said = "no field 'kind'" if kind is None else f'kind is {kind!r}{nearest(str(kind), kinds)}'
        raise ConfigError(f'{path} line {at.get("kind", 1)}: {said}; write one of {", ".join(kinds)}')
    form = kinds[kind]
    fields = {field.name: field for field in dataclasses.fields(form)}
    for name in head:
        if name not in fields:
            there = ', '.join(fields)
            raise ConfigError(
                f'{path} line {at.get(str(name), 1)}: a task of kind {kind} has no field {name!r}'
                f'{nearest(str(name), fields)}; it has {there}'
            )
    for name, field in fields.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and name not in head:
            raise ConfigError(f'{path} line 1: the head has no field {name!r}, which kind {kind} needs; add it')
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in head.items()}
    made = form(**values)
    try:
        validate(made, 'head')
    except ConfigError as error:
        named = re.match(r'head[.:] ?(\w+)', str(error))
        line = at.get(named[1], 1) if named else 1
        raise ConfigError(f'{path} line {line}: {re.sub("^head[.:] ?", "", str(error))}') from None
    return made


# ------------------------------------------------------------------------------------------------------------ the rows


def _row(path: epath.Path, number: int, line: str, form: Form) -> Row:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f'{path} line {number}: not JSON ({error.msg} at character {error.pos + 1})') from None
    if not isinstance(fields, dict):
        raise ConfigError(f'{path} line {number}: the row is no object; write {{"field": …}}')
    try:
        form.check(fields)
        if not isinstance(fields.get('example', False), bool):
            raise ValueError(f"field 'example' is {fields['example']!r}; write true or leave it out")
    except ValueError as error:
        raise ConfigError(f'{path} line {number}: {error}') from None
    return Row(number, fields)


def _there(name: str, fields: Fields, reader: str) -> Any:
    if name not in fields:
        has = ', '.join(map(repr, fields)) or 'none'
        raise ValueError(f'no field {name!r}, which {reader} reads (the row has {has}); add it')
    return fields[name]


def _written(name: str, fields: Fields, template: str) -> None:
    value = _there(name, fields, f'the template {template!r}')
    if not isinstance(value, (str, int, float)):
        raise ValueError(f'field {name!r} is {value!r}, which the template {template!r} cannot write; make it a text')

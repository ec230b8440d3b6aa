"""Rewards that are checked, not felt: 1 where a response has the record's answer or the form asked for, else 0.

The record is the prompt's line of JSON; `field` names what is read of it. Its value is one answer, or a list of which
any will do. A record without the field cannot be judged: the reward fails there, naming it.
"""

import dataclasses
import functools
import importlib.util
import json
import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from etils import epath

from tpu_llm.config import ConfigError
from tpu_llm.evals import answers, patterns
from tpu_llm.rl.rewards import OneByOne, Sample, Scores

Ignore = Literal['case', 'space', 'punctuation', 'articles']


@dataclasses.dataclass(kw_only=True, slots=True)
class ExactMatch(OneByOne):
    """The response, or what it marks as its answer, is the record's answer, letter by letter but for what is ignored.

    Both are brought to Unicode's form NFC and stripped.
    """

    name: str = 'exact'
    field: str = 'answer'
    marked: bool = False  # compare what stands in \\boxed{…} or behind ####; a response without a mark is worth 0
    ignore: tuple[Ignore, ...] = ()

    def check(self, record: Mapping[str, Any]) -> None:
        known(record, self.field)

    def judge(self, sample: Sample) -> float:
        said = answers.marked(sample.response) if self.marked else sample.response
        wanted = [_text(answer) for answer in known(sample.record, self.field)]
        return float(said is not None and self._plain(said) in map(self._plain, wanted))

    def _plain(self, text: str) -> str:
        text = unicodedata.normalize('NFC', text)
        if 'case' in self.ignore:
            text = text.casefold()
        if 'punctuation' in self.ignore:
            text = text.translate(dict.fromkeys(map(ord, string.punctuation)))
        if 'articles' in self.ignore:
            text = re.sub(r'\b(?:a|an|the)\b', ' ', text, flags=re.IGNORECASE)
        return ' '.join(text.split()) if 'space' in self.ignore else text.strip()


@dataclasses.dataclass(kw_only=True, slots=True)
class Numeric(OneByOne):
    """The number that the response marks as its answer, or else its last one, is the record's, in whatever unit.

    What counts as a number and a unit: `evals.answers.last_quantity`. A difference of max(absolute, relative * answer)
    is let pass; 0, the default, is equality of exact fractions.
    """

    name: str = 'numeric'
    field: str = 'answer'
    marked: bool = False  # only what stands in \\boxed{…} or behind ####
    relative: float = 0.0
    absolute: float = 0.0  # in the unit of the answer
    unit: Literal['optional', 'required'] = 'optional'  # 'required': a number without a unit is without dimension

    def validate(self) -> None:
        if self.relative < 0 or self.absolute < 0:
            raise ConfigError(f'relative = {self.relative} and absolute = {self.absolute}; write 0 or more')

    def check(self, record: Mapping[str, Any]) -> None:
        for answer in known(record, self.field):
            self._quantity(answer)

    def judge(self, sample: Sample) -> float:
        wanted = [self._quantity(answer) for answer in known(sample.record, self.field)]
        mark = answers.marked(sample.response)
        said = None
        if mark is not None or not self.marked:
            said = answers.last_quantity(sample.response if mark is None else mark)
        if said is None:
            return 0.0
        bare = self.unit == 'optional'
        close = {'relative': self.relative, 'absolute': self.absolute, 'bare': bare}
        return float(any(answers.equal(said, answer, **close) for answer in wanted))

    def _quantity(self, answer: Any) -> answers.Quantity:
        text = _text(answer)
        found = answers.last_quantity(answers.marked(text) or text)
        if found is None:
            raise ValueError(f"the record's {self.field!r} is {answer!r}, which holds no number")
        return found


@dataclasses.dataclass(kw_only=True, slots=True)
class Format:
    """The response has the form of a regular expression: as a whole, or anywhere in it. `.` matches line feeds."""

    pattern: str
    name: str = 'format'
    weight: float = 1.0
    anywhere: bool = False

    def validate(self) -> None:
        try:
            re.compile(self.pattern, re.DOTALL)
        except re.error as error:
            raise ConfigError(f'pattern is {self.pattern!r}: {error}') from None

    def open(self, surroundings: Any) -> Scores:
        del surroundings
        return lambda samples: [
            float(found)
            for found in patterns.match(self.pattern, [s.response for s in samples], anywhere=self.anywhere)
        ]


@dataclasses.dataclass(kw_only=True, slots=True)
class JsonSchema:
    """The response is JSON, by itself or as its only fenced block, that a JSON schema (draft 2020-12) takes."""

    name: str = 'json'
    weight: float = 1.0
    schema: str = ''  # JSON, or the path of a .json file; '': the record's `field`
    field: str = 'schema'

    def validate(self) -> None:
        if self.schema:
            _validator(self._read())

    def check(self, record: Mapping[str, Any]) -> None:
        if not self.schema:
            _validator(json.dumps(known(record, self.field)[0]))

    def open(self, surroundings: Any) -> Scores:
        del surroundings
        schema = self._read() if self.schema else ''

        def judge(sample: Sample) -> float:
            validator = _validator(schema or json.dumps(known(sample.record, self.field)[0]))
            fenced = re.findall(r'```(?:json)?[ \t]*\n(.*?)```', sample.response, re.DOTALL)
            try:
                value = json.loads(fenced[0] if len(fenced) == 1 else sample.response, parse_constant=_refuse)
                return float(validator.is_valid(value))
            except (json.JSONDecodeError, _NoJson, RecursionError):
                return 0.0

        return lambda samples: [judge(sample) for sample in samples]

    def _read(self) -> str:
        if self.schema.lstrip().startswith('{'):
            return self.schema
        path = epath.Path(self.schema).expanduser()
        if not path.exists():
            raise ConfigError(f'there is no schema {path}; give the path of a .json file, or the schema itself')
        return path.read_text()


@functools.lru_cache(maxsize=64)
def _validator(schema: str) -> Any:
    """Raises ValueError for what is no schema."""
    if importlib.util.find_spec('jsonschema') is None:
        raise ConfigError("JSON schemas need the package jsonschema: pip install -e '.[json]'")
    import jsonschema
    import referencing

    kind = jsonschema.Draft202012Validator
    try:
        value = json.loads(schema)
        kind.check_schema(value)
    except json.JSONDecodeError as error:
        raise ValueError(f'the schema is no JSON: {error}') from None
    except jsonschema.SchemaError as error:
        raise ValueError(f'the schema is none: {error.message} at {error.json_path}') from None
    return kind(value, registry=referencing.Registry())  # which knows of nothing elsewhere, and fetches nothing


class _NoJson(ValueError):
    pass


def _refuse(name: str) -> None:
    raise _NoJson(f'{name} is no JSON')


def known(record: Mapping[str, Any], field: str) -> Sequence[Any]:
    """The record's value, as a list. Raises ValueError where it has none."""
    value = record.get(field)
    if value is None or value == []:
        has = ', '.join(map(repr, record)) or 'none'
        raise ValueError(f'the record of this prompt has no {field!r} (its fields are {has})')
    return value if isinstance(value, list) else [value]


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else json.dumps(answer)

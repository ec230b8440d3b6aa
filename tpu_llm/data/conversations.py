"""Sources of post-training: JSONL of conversations, preferences, labels, scores, rankings and judged steps.

A line's fields say what it is. What a record lacks, or what cannot be meant, is a bad record that names its line.
"""

import abc
import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from tpu_llm.config import ConfigError
from tpu_llm.data import chat, documents, templates
from tpu_llm.data.documents import Document, Documents, OnBad
from tpu_llm.data.files import Lines, parse_json
from tpu_llm.data.speech import Spoken, Writer
from tpu_llm.data.tokenizer import Tokenizer

Messages = list[dict[str, Any]]

_SHAREGPT = {'human': 'user', 'gpt': 'assistant', 'chatgpt': 'assistant', 'bing': 'assistant', 'bard': 'assistant'}
_SHAREGPT |= {'model': 'assistant', 'function_call': 'assistant', 'function_response': 'tool', 'observation': 'tool'}
_SHAREGPT |= {role: role for role in chat.ROLES}


@dataclasses.dataclass(kw_only=True, slots=True)
class ChatSource(abc.ABC):
    kind: ClassVar[str]
    wanted: ClassVar[str]  # fields of a record

    paths: tuple[str, ...]
    template: str = ''  # '': the tokenizer's own; else a name of `data.templates`, a .jinja file, or 'plain'
    system: str = ''  # what conversations without a system message begin with
    on_bad: OnBad = 'stop'

    def open(self) -> Documents:
        return _Conversations(self)

    def taught(self, tokenizer: Tokenizer) -> Tokenizer | None:
        """The tokenizer as it goes with a model that is trained on this, so that both chat alike; None if plain."""
        return Writer(tokenizer, self.template, templates.read(self.template)).taught()

    @abc.abstractmethod
    def read(self, record: Mapping[str, Any]) -> list[Spoken]:
        """The texts of a record. Raises ValueError that says what is wrong with it."""

    def lacks(self, record: Mapping[str, Any]) -> ValueError:
        fits = next((kind for kind, fields in _FITS if fields <= set(record)), None)
        other = f' (they are those of {fits.__name__})' if fits and fits is not type(self) else ''
        return ValueError(f'the fields are {", ".join(map(repr, record)) or "none"}{other}; wanted are {self.wanted}')

    def begin(self, messages: Messages) -> Messages:
        if self.system and messages[0]['role'] not in ('system', 'developer'):
            return [{'role': 'system', 'content': self.system}, *messages]
        return messages


@dataclasses.dataclass(kw_only=True, slots=True)
class Conversations(ChatSource):
    """To be imitated: `messages` (and `tools`), `conversations` as ShareGPT has them, `prompt` and `completion`, or as
    Alpaca `instruction`, `input` (where there is one) and `output`.
    """

    kind: ClassVar = 'conversation'
    wanted: ClassVar = "'messages', 'conversations', 'prompt' and 'completion', or 'instruction' and 'output'"

    on: Literal['responses', 'last'] = 'responses'  # train on every response of the assistant, or on its last

    def read(self, record: Mapping[str, Any]) -> list[Spoken]:
        if 'messages' in record:
            messages = _messages(record['messages'], 'messages')
        elif 'conversations' in record:
            messages = _sharegpt(record['conversations'])
        elif {'prompt', 'completion'} <= set(record):
            messages = _prompt(record['prompt']) + _answer(record['completion'], 'completion')
        elif {'instruction', 'output'} <= set(record):
            messages = _alpaca(record)
        else:
            raise self.lacks(record)
        messages = self.begin(messages)
        _check(messages)
        since = len(messages) - 1 if self.on == 'last' else 0
        return [Spoken(messages=messages, since=since, tools=_tools(record))]


@dataclasses.dataclass(kw_only=True, slots=True)
class Preferences(ChatSource):
    """`prompt`, `chosen` and `rejected`, each text or messages, and a `margin` where there is one: two texts, both of
    its value.

    Chosen and rejected may be whole conversations, their prompt repeated.
    """

    kind: ClassVar = 'preference'
    wanted: ClassVar = "'prompt', 'chosen' and 'rejected'"

    def read(self, record: Mapping[str, Any]) -> list[Spoken]:
        if not {'chosen', 'rejected'} <= set(record):
            raise self.lacks(record)
        margin = _number(record.get('margin', 0.0), 'margin')
        texts = [_completed(self, record, name, margin) for name in ('chosen', 'rejected')]
        if texts[0].messages == texts[1].messages:
            raise ValueError('chosen and rejected are the same; drop the record')
        _check_prompts(*texts)
        return texts


@dataclasses.dataclass(kw_only=True, slots=True)
class Labelled(ChatSource):
    """`prompt`, `completion` and `label`, true or false: a text of value 1 or -1."""

    kind: ClassVar = 'labelled'
    wanted: ClassVar = "'prompt', 'completion' and 'label'"

    def read(self, record: Mapping[str, Any]) -> list[Spoken]:
        if not {'prompt', 'completion', 'label'} <= set(record):
            raise self.lacks(record)
        label = record['label']
        if not isinstance(label, bool):
            raise ValueError(f'label is {label!r}; write true for a wanted completion, false for an unwanted one')
        return [_completed(self, record, 'completion', 1.0 if label else -1.0)]


@dataclasses.dataclass(kw_only=True, slots=True)
class Rated(ChatSource):
    """`prompt`, `completion` and `score`, a number: a text of that value."""

    kind: ClassVar = 'rated'
    wanted: ClassVar = "'prompt', 'completion' and 'score'"

    def read(self, record: Mapping[str, Any]) -> list[Spoken]:
        if not {'prompt', 'completion', 'score'} <= set(record):
            raise self.lacks(record)
        return [_completed(self, record, 'completion', _number(record['score'], 'score'))]


@dataclasses.dataclass(kw_only=True, slots=True)
class Ranked(ChatSource):
    """`prompt` and `completions`, the best first: as many texts in that order."""

    kind: ClassVar = 'ranked'
    wanted: ClassVar = "'prompt' and 'completions' (the best first)"

    def read(self, record: Mapping[str, Any]) -> list[Spoken]:
        if not {'prompt', 'completions'} <= set(record) or 'labels' in record:
            raise self.lacks(record)
        answers = record['completions']
        if not isinstance(answers, list) or len(answers) < 2:
            raise ValueError('completions is no list of two or more; a ranking compares them, the best first')
        if any(answer in answers[:index] for index, answer in enumerate(answers)):
            raise ValueError('two of the completions are the same; drop one of them')
        return [_completed(self, {**record, 'completion': answer}, 'completion', 0.0) for answer in answers]


@dataclasses.dataclass(kw_only=True, slots=True)
class Steps(ChatSource):
    """`prompt`, `completions` (the steps of one answer) and `labels`, one a step: a text, a value at each step's end.

    A label is true (1), false (-1) or a number between them.
    """

    kind: ClassVar = 'steps'
    wanted: ClassVar = "'prompt', 'completions' (steps) and 'labels' (one a step)"

    between: str = '\n'  # what the steps of an answer are joined by

    def read(self, record: Mapping[str, Any]) -> list[Spoken]:
        if not {'prompt', 'completions', 'labels'} <= set(record):
            raise self.lacks(record)
        steps, labels = record['completions'], record['labels']
        if (
            not isinstance(steps, list)
            or not steps
            or not all(isinstance(step, str) and step.strip() for step in steps)
        ):
            raise ValueError('completions is no list of texts, none of them empty; write a step each')
        if not isinstance(labels, list) or len(labels) != len(steps):
            raise ValueError(f'there are {len(steps)} steps, and labels is not a list of as many')
        judged = [_judged(label) for label in labels]
        whole = {'prompt': record['prompt'], 'completion': self.between.join(steps)}
        spoken = _completed(self, whole, 'completion', 0.0)
        return [dataclasses.replace(spoken, steps=tuple(steps), judged=tuple(judged))]


_FITS: list[tuple[type[ChatSource], set[str]]] = [
    (Steps, {'completions', 'labels'}),
    (Ranked, {'completions'}),
    (Preferences, {'chosen', 'rejected'}),
    (Labelled, {'completion', 'label'}),
    (Rated, {'completion', 'score'}),
    (Conversations, {'messages'}),
    (Conversations, {'conversations'}),
    (Conversations, {'prompt', 'completion'}),
    (Conversations, {'instruction', 'output'}),
]


# -------------------------------------------------------------------------------------------------------- documents


class _Conversations(Lines):
    def __init__(self, source: ChatSource):
        self._template = templates.read(source.template)
        options = [value for name, value in dataclasses.asdict(source).items() if name not in ('paths', 'on_bad')]
        super().__init__(source.kind, source.paths, source.on_bad, self._template, *options)
        self.kind = source.kind
        self._source = source
        self._write: Callable[[Sequence[Spoken]], Any] | None = None

    def encoded(self, tokenizer: Tokenizer) -> Documents:
        made = copy.copy(self)
        made.fingerprint = documents.fingerprint(self.fingerprint, tokenizer.fingerprint)
        made._write = Writer(tokenizer, self._source.template, self._template)
        return made

    def parse(self, line: str) -> Document:
        record = parse_json(line)
        if not isinstance(record, dict):
            raise ValueError(f'the record is no object; wanted are the fields {self._source.wanted}')
        texts = self._source.read(record)
        if self._write is None:
            return Document(text='\n'.join(_said(texts)))
        return Document(pairs=self._write(texts))


def _said(texts: Sequence[Spoken]) -> list[str]:
    """What all messages say, each once."""
    return list(dict.fromkeys(message['content'] or '' for text in texts for message in text.messages))


# ---------------------------------------------------------------------------------------------------------- records


def _completed(source: ChatSource, record: Mapping[str, Any], name: str, value: float) -> Spoken:
    """The prompt and one answer to it, on whose responses is trained."""
    answer = _answer(record[name], name)
    if answer[0]['role'] != 'assistant':  # a whole conversation
        prompt, answer = answer[:-1], answer[-1:]
        said = [message['content'] for message in prompt]
        if isinstance(record.get('prompt'), str) and record['prompt'] not in said:
            raise ValueError(f'{name} is a conversation in which the prompt is not; mend one of them')
    elif 'prompt' not in record:
        raise source.lacks(record)
    else:
        prompt = _prompt(record['prompt'])
    messages = source.begin([*prompt, *answer])
    _check(messages)
    return Spoken(messages=messages, since=len(messages) - len(answer), value=value, tools=_tools(record))


def _check_prompts(chosen: Spoken, rejected: Spoken) -> None:
    """Raises ValueError unless two answers are to one prompt."""
    prompts = ([(m['role'], m['content']) for m in text.messages[: text.since]] for text in (chosen, rejected))
    for index, (one, other) in enumerate(itertools.zip_longest(*prompts)):
        if one != other:
            raise ValueError(
                f'chosen and rejected answer different prompts, from messages[{index}] on; mend one of them, or drop '
                'the record'
            )


def _prompt(value: Any) -> Messages:
    return [{'role': 'user', 'content': value}] if isinstance(value, str) else _messages(value, 'prompt')


def _answer(value: Any, name: str) -> Messages:
    return [{'role': 'assistant', 'content': value}] if isinstance(value, str) else _messages(value, name)


def _messages(value: Any, name: str) -> Messages:
    try:
        return chat.read(value)
    except ConfigError as error:
        raise ValueError(str(error).replace('messages', name, 1)) from None


def _sharegpt(turns: Any) -> Messages:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("conversations is no list of {'from': …, 'value': …}")
    for index, turn in enumerate(turns):
        if turn.get('from') not in _SHAREGPT:
            raise ValueError(f'conversations[{index}] is from {turn.get("from")!r}; known are {", ".join(_SHAREGPT)}')
        if 'value' not in turn:
            raise ValueError(f"conversations[{index}] has no 'value'; its fields are {', '.join(map(repr, turn))}")
    return _messages([{'role': _SHAREGPT[turn['from']], 'content': turn['value']} for turn in turns], 'conversations')


def _alpaca(record: Mapping[str, Any]) -> Messages:
    said = {name: record.get(name) or '' for name in ('instruction', 'input', 'output')}
    for name, text in said.items():
        if not isinstance(text, str):
            raise ValueError(f'{name} is {text!r}; it must be text')
    asked = '\n\n'.join(filter(None, (said['instruction'], said['input'])))
    return _prompt(asked) + _answer(said['output'], 'output')


def _tools(record: Mapping[str, Any]) -> list[Any] | None:
    tools = record.get('tools')
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError:
            tools = 'no JSON'
    if tools and not isinstance(tools, list):
        raise ValueError('tools is no list, nor the JSON of one')
    return tools or None


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f'{name} is {value!r}; it must be a finite number')
    return float(value)


def _judged(label: Any) -> float:
    if isinstance(label, bool):
        return 1.0 if label else -1.0
    if not isinstance(label, (int, float)) or not -1 <= label <= 1:
        raise ValueError(f'labels holds {label!r}; write true, false, or a number from -1 to 1')
    return float(label)


def _check(messages: Messages) -> None:
    """Raises ValueError unless turns alternate and the last is a response that says something."""
    before = ''
    for index, message in enumerate(messages):
        role = message['role']
        if role not in _NEXT[before]:
            after = f"after the {before}'s" if before else 'first'
            raise ValueError(
                f"messages[{index}] is the {role}'s {after}; wanted there is {' or '.join(_NEXT[before])}: mend the "
                'order, join what one says, or drop the record'
            )
        if role == 'assistant' and not (message['content'] or '').strip() and not message.get('tool_calls'):
            raise ValueError(f'messages[{index}] is an empty response; drop the record, or the messages from there on')
        before = role
    if all(message['role'] != 'assistant' for message in messages):
        raise ValueError('the conversation has no response; drop the record')
    if before != 'assistant':
        raise ValueError(f"the conversation ends without a response, with the {before}'s; drop what is behind the last")


_NEXT = {
    '': ('system', 'developer', 'user'),
    'system': ('user', 'developer'),
    'developer': ('user',),
    'user': ('assistant',),
    'assistant': ('user', 'tool'),
    'tool': ('assistant', 'tool', 'user'),
}

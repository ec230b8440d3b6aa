"""Conversations as text, by the Jinja template that comes with a tokenizer.

Templates are programs of strangers and run in `sandbox`; whatever goes wrong there is one ConfigError.

What a message says cannot pass for a mark: special tokens written in it stay text, while those of the template are
marks. (Where messages hold none, ids are those of `transformers`' apply_chat_template.) `{% generation %}` blocks, in
which a template puts what the assistant says, tell fine-tuning what that is; without them it is found turn by turn.
"""

import dataclasses
import functools
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tpu_llm.config import ConfigError
from tpu_llm.data.tokenizer import Tokenizer

Message = Mapping[str, Any]
ROLES = ('system', 'developer', 'user', 'assistant', 'tool')

# Around a special token in what a message says. Like `sandbox`'s, characters that Unicode sets aside for use inside of
# programs; no text holds them.
_WRITTEN, _WRITTEN_END = '\ufdd0\ufdd1'
_SAID = '\ufdd2'
_OURS = re.compile('[\ufdd0-\ufdd3]')
_SAYS = re.compile('[\ufdd2\ufdd3]')


class Refused(ConfigError):
    """The template runs, and says that it does not take these messages."""


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    bos_token: str = '',
    eos_token: str = '',
    **variables: Any,
) -> str:
    """The conversation as text, as `transformers` renders it; `variables` are what a template takes besides (`tools`).

    Raises ConfigError for a template that does not run to its end, and for messages that are none.
    """
    check(messages)
    marks = {'bos_token': bos_token, 'eos_token': eos_token, 'add_generation_prompt': add_generation_prompt}
    return _OURS.sub('', _run(template, {'messages': list(messages), **marks, **variables}))


def read(messages: Any) -> list[dict[str, Any]]:
    """The messages of a record, with content that is in parts ([{'type': 'text', 'text': …}]) as one text, and with
    None where calls of tools stand alone.

    Raises ConfigError as `check` does, and for a part that is no text.
    """
    if isinstance(messages, list):
        messages = [_whole(message, index) for index, message in enumerate(messages)]
    check(messages)
    return list(messages)


def _whole(message: Any, index: int) -> Any:
    if not isinstance(message, dict):
        return message
    if message.get('tool_calls'):
        message = {'content': None, **message}
    if not isinstance(message.get('content'), list):
        return message
    texts = []
    for part in message['content']:
        text = part.get('text') if isinstance(part, dict) and part.get('type') == 'text' else None
        if not isinstance(text, str):
            said = f'of type {part.get("type")!r}' if isinstance(part, dict) else repr(part)
            raise ConfigError(f'messages[{index}] has a part {said}; only text is read: drop the part, or the record')
        texts.append(text)
    return {**message, 'content': ''.join(texts)}


def check(messages: Sequence[Message]) -> None:
    """Raises ConfigError unless each message has a role and a content that is text."""
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise ConfigError("messages must be a list of {'role': …, 'content': …} with at least one")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ConfigError(f"messages[{index}] is {message!r}; it must be {{'role': …, 'content': …}}")
        if message.get('role') not in ROLES:
            raise ConfigError(f'messages[{index}] has role {message.get("role")!r}; roles are {", ".join(ROLES)}')
        content = message.get('content')
        if 'content' not in message and not message.get('tool_calls'):
            raise ConfigError(f"messages[{index}] has no 'content'; its fields are {', '.join(map(repr, message))}")
        if not isinstance(content, str) and not (content is None and message.get('tool_calls')):
            raise ConfigError(f'messages[{index}] has content {content!r}; it must be text')
        if content and _OURS.search(content):
            raise ConfigError(f'messages[{index}] holds one of the characters U+FDD0 to U+FDD3, which no text may')


@dataclasses.dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template, ready to make ids of messages."""

    template: str

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> 'ChatTemplate':
        if tokenizer.chat_template is None:
            raise ConfigError(
                'this tokenizer has no chat template; its model was trained on plain text: prompt it so '
                "(template='plain', where there is such a field)"
            )
        return cls(tokenizer.chat_template)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> np.ndarray:
        """Ids of the conversation, int32 `[n]`, with the marks that the template writes and no others."""
        text = self._text(tokenizer, messages, add_generation_prompt, variables)
        ids = [tokenizer.encode(part, special=not written) for part, written in _parts(_SAYS.sub('', text), tokenizer)]
        return np.concatenate([np.zeros(0, np.int32), *ids])

    @property
    def marked(self) -> bool:
        """Whether it has `{% generation %}` around what the assistant says."""
        return bool(re.search(r'\{%-?\s*generation\b', self.template))

    def written(self, tokenizer: Tokenizer, messages: Sequence[Message], **variables: Any) -> 'Written':
        """The conversation with the place of every id, and of what the assistant says.

        That is in `{% generation %}` where the template has it, else what a turn adds to the conversation before it
        with its generation prompt. Raises ConfigError where that is no beginning of the whole.
        """
        text = self._text(tokenizer, messages, False, variables)
        said = [] if self.marked else self._turns(tokenizer, messages, _SAYS.sub('', text), variables)
        ids, starts, length, opened = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)], 0, 0
        for part, written in _parts(text, tokenizer):
            if written:
                ids.append(tokenizer.encode(part))
                starts.append(np.full(len(ids[-1]), length))
                length += len(part)
                continue
            pieces, before = _SAYS.split(part), length
            for mark, piece in zip(['', *_SAYS.findall(part)], pieces, strict=True):
                if mark == _SAID:
                    opened = length
                elif mark:
                    said.append((opened, length))
                length += len(piece)
            found, places = tokenizer.locate(''.join(pieces))
            ids.append(found)
            starts.append(places + before)
        return Written(_OURS.sub('', text), np.concatenate(ids), np.concatenate(starts), said)

    def _turns(
        self, tokenizer: Tokenizer, messages: Sequence[Message], whole: str, variables: Mapping[str, Any]
    ) -> list[tuple[int, int]]:
        spans = []
        for index in (i for i, message in enumerate(messages) if message['role'] == 'assistant'):
            before = self._text(tokenizer, messages[:index], True, variables)
            after = whole
            if index < len(messages) - 1:
                after = self._text(tokenizer, messages[: index + 1], False, variables)
            if not (whole.startswith(after) and after.startswith(before)):
                raise ConfigError(
                    'the chat template writes a turn in another way when others follow, so what the assistant says '
                    'cannot be told; put {% generation %} and {% endgeneration %} around it, or take another template'
                )
            spans.append((len(_OURS.sub('', before)), len(_OURS.sub('', after))))
        return spans

    def _text(
        self, tokenizer: Tokenizer, messages: Sequence[Message], prompt: bool, variables: Mapping[str, Any]
    ) -> str:
        """What the template writes, our marks in it."""
        check(messages)
        written = {index: token for token, index in tokenizer.special_tokens.items()}
        marks = {f'{name}_token': written.get(getattr(tokenizer, name), '') for name in ('bos', 'eos', 'pad')}
        known = {'add_generation_prompt': prompt, **marks, **variables}
        special = re.compile(_alternatives(tuple(tokenizer.special_tokens)))
        return _run(self.template, {**known, 'messages': _marked(list(messages), special)})


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
    """A conversation as text and ids; `starts` are the characters in which these begin, `said` the assistant's."""

    text: str
    ids: np.ndarray
    starts: np.ndarray
    said: list[tuple[int, int]]

    def within(self, spans: Sequence[tuple[int, int]]) -> np.ndarray:
        """bool `[n]`: which ids begin in one of the spans of characters."""
        inside = np.zeros(len(self.ids), bool)
        for start, stop in spans:
            inside |= (start <= self.starts) & (self.starts < stop)
        return inside


def _parts(text: str, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Parts that are tokenized apart; true for a special token that is in a message, and so is none."""
    names = _alternatives(tuple(tokenizer.special_tokens))
    # A mark of ours that lost its other half still keeps what is beside it apart.
    for part in re.split(f'({_WRITTEN}(?:{names}){_WRITTEN_END})|[{_WRITTEN}{_WRITTEN_END}]', text):
        if part:
            written = part[0] == _WRITTEN
            yield (part[1:-1] if written else part), written


@functools.lru_cache(maxsize=16)
def _alternatives(names: tuple[str, ...]) -> str:
    """A regular expression of any of them, the longest first."""
    return '|'.join(map(re.escape, sorted(names, key=len, reverse=True))) or '(?!)'


def _marked(value: Any, special: re.Pattern[str]) -> Any:
    """The same, with our marks around each special token in its texts."""
    if isinstance(value, str):
        return special.sub(f'{_WRITTEN}\\g<0>{_WRITTEN_END}', value)
    if isinstance(value, Mapping):
        return {key: _marked(item, special) for key, item in value.items()}
    return [_marked(item, special) for item in value] if isinstance(value, (list, tuple)) else value


def _run(template: str, variables: Mapping[str, Any]) -> str:
    if importlib.util.find_spec('jinja2') is None:
        raise ConfigError("chat templates take jinja2 to run; pip install -e '.[hf]'")
    from tpu_llm.data import sandbox

    # What transformers defines for templates to ask about.
    return sandbox.run(template, {'tools': None, 'documents': None, **variables})

"""Conversations into pairs: what the model reads, and which of it is trained on.

Trained on is what the assistant says, and the mark that ends its turn. With a template that is where the template has
`{% generation %}`, or else what each response adds to the conversation before it (`chat`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tpu_llm.config import ConfigError
from tpu_llm.data import templates
from tpu_llm.data.chat import ChatTemplate, Refused
from tpu_llm.data.examples import text_pairs, with_steps
from tpu_llm.data.templates import PLAIN
from tpu_llm.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Spoken:
    """One text of an example: a conversation of which the responses from message `since` on are trained on."""

    messages: Sequence[Mapping[str, Any]]
    since: int = 0
    value: float = 0.0
    steps: Sequence[str] = ()  # what the last response is made of, and how each was judged
    judged: Sequence[float] = ()
    tools: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        assert len(self.steps) == len(self.judged)


class Writer:
    """Writes spoken texts as pairs, with one tokenizer and one template."""

    def __init__(self, tokenizer: Tokenizer, name: str, template: str):
        """`name` as in a config, `template` what `templates.read` gives for it. Raises ConfigError."""
        self._tokenizer = tokenizer
        if not name and tokenizer.chat_template is None:
            raise ConfigError(
                f'this tokenizer has no chat template; set template to one of {", ".join(templates.TEMPLATES)}, to a '
                f'.jinja file, or to {PLAIN!r} for a model of plain text'
            )
        templates.check(name, tokenizer)
        self._name = f'template {name!r}' if name else "the tokenizer's own template"
        self._template = None if name == PLAIN else ChatTemplate(template or tokenizer.chat_template or '')

    def __call__(self, texts: Sequence[Spoken]) -> np.ndarray:
        """An example. Raises ValueError for messages that the template does not take, ConfigError for a template that
        does not say what is trained on.
        """
        written = [self._pairs(spoken, number) for number, spoken in enumerate(texts)]
        return np.concatenate(written)

    def taught(self) -> Tokenizer | None:
        """The tokenizer with this template, and with the mark that ends a response among those that end generation."""
        if self._template is None:
            return None
        pairs = self([Spoken(messages=[{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}])])
        end = int(pairs['target'][pairs['weight'] > 0][-1])
        if self._template.template == self._tokenizer.chat_template and end in self._tokenizer.stops:
            return self._tokenizer
        return self._tokenizer.with_chat(self._template.template, end)

    def _pairs(self, spoken: Spoken, text: int) -> np.ndarray:
        if self._template is None:
            ids, trained, ends = self._plain(spoken)
        else:
            try:
                ids, trained, ends = self._templated(self._template, spoken)
            except Refused as error:
                raise ValueError(str(error)) from None
            except ConfigError as error:
                raise ConfigError(f'{self._name}: {error}') from None
        pairs = text_pairs(ids, trained, text=text, value=spoken.value)
        return with_steps(pairs, np.asarray(ends), np.asarray(spoken.judged)) if spoken.steps else pairs

    def _plain(self, spoken: Spoken) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """(ids, which are trained on, where each step ends)."""
        tokenizer = self._tokenizer
        ids, trained, ends = [], [], []

        def add(tokens: Sequence[int] | np.ndarray, said: bool) -> None:
            ids.extend(tokens)
            trained.extend([said] * len(tokens))

        if tokenizer.add_bos:
            add([tokenizer.bos], False)
        for index, message in enumerate(spoken.messages):
            if spoken.tools or message.get('tool_calls'):
                raise ValueError(f'it has tools, which template = {PLAIN!r} does not write; write them as text')
            said = message['role'] == 'assistant' and index >= spoken.since
            if spoken.steps and index == len(spoken.messages) - 1:
                rest = message['content']
                for step in spoken.steps:
                    before, _, rest = rest.partition(step)
                    add(tokenizer.encode(before), said)
                    add(tokenizer.encode(step), said)
                    ends.append(len(ids) - 1)
            else:
                add(tokenizer.encode(message['content']), said)
            if message['role'] == 'assistant':
                add([tokenizer.eos], said)
        return np.asarray(ids, np.int32), np.asarray(trained), ends

    def _templated(self, template: ChatTemplate, spoken: Spoken) -> tuple[np.ndarray, np.ndarray, list[int]]:
        variables = {'tools': spoken.tools} if spoken.tools else {}
        if spoken.tools and 'tools' not in template.template:
            raise ConfigError("it does not write tools; take 'tools' out of the records, or another template")
        if 'tool_calls' not in template.template and any(message.get('tool_calls') for message in spoken.messages):
            raise ConfigError('it does not write calls of tools; write them as text, or take another template')
        written = template.written(self._tokenizer, spoken.messages, **variables)
        roles = [message['role'] for message in spoken.messages]
        responses = [index for index, role in enumerate(roles) if role == 'assistant']
        if len(written.said) != len(responses):
            raise ConfigError(
                f'it marks {len(written.said)} places as said by the assistant, who speaks {len(responses)} times; put '
                '{% generation %} around each response'
            )
        trained = np.zeros(len(written.ids), bool)
        for index, span in zip(responses, written.said, strict=True):
            if index >= spoken.since:
                trained[self._until_end(written.ids, written.within([span]))] = True
        ends, at = [], written.said[-1][0]
        for step in spoken.steps:
            found = written.text.find(step.strip(), at, written.said[-1][1])
            if found < 0:
                raise ConfigError('it changes what it is given, so the steps of a response cannot be found in it')
            at = found + len(step.strip())
            ends.append(int(np.flatnonzero(written.starts < at)[-1]))
        return written.ids, trained, ends

    def _until_end(self, ids: np.ndarray, said: np.ndarray) -> slice:
        """What is trained on of a response: from its first id to the mark that ends the turn, in it or right behind."""
        marks = np.isin(ids, list(self._tokenizer.special_tokens.values()))
        here = np.flatnonzero(said)
        start, stop = (int(here[0]), int(here[-1]) + 1) if len(here) else (0, 0)
        last = stop
        while last > start and not marks[last - 1] and not self._tokenizer.decode([int(ids[last - 1])]).strip():
            last -= 1  # a line feed behind the mark
        if last > start and marks[last - 1]:
            return slice(start, last)
        if stop < len(ids) and marks[stop]:
            return slice(start, stop + 1)
        raise ConfigError(
            'it writes no special token behind a response, so the model would not learn to end; put eos_token there'
        )

"""Prompts to be answered: JSONL whose records hold a `prompt`, and whatever a reward may ask for beside it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tpu_llm.config import ConfigError
from tpu_llm.data import chat, templates
from tpu_llm.data.chat import ChatTemplate
from tpu_llm.data.documents import Document, Documents, OnBad
from tpu_llm.data.files import Lines, parse_json
from tpu_llm.data.templates import PLAIN
from tpu_llm.data.tokenizer import Tokenizer


@dataclasses.dataclass(kw_only=True, slots=True)
class Prompts:
    """A JSON object a line: `prompt`, text or messages; all its other fields are the record that rewards see."""

    paths: tuple[str, ...]
    on_bad: OnBad = 'stop'

    def open(self) -> Documents:
        return _Prompts('prompts', self.paths, self.on_bad)


class _Prompts(Lines):
    kind = 'prompt'

    def parse(self, line: str) -> Document:
        record = parse_json(line)
        fields = list(record) if isinstance(record, dict) else []
        if 'prompt' not in fields:
            held = ', '.join(map(repr, fields)) or 'none'
            raise ValueError(
                f"the fields are {held}; wanted is 'prompt', text or messages, and beside it what the rewards read"
            )
        prompt = record['prompt']
        if isinstance(prompt, str):
            if not prompt.strip():
                raise ValueError('the prompt is empty; drop the record')
            return Document(text=prompt, record=record)
        try:
            prompt = chat.read(prompt)
        except ConfigError as error:
            raise ValueError(str(error).replace('messages', 'prompt', 1)) from None
        if prompt[-1]['role'] == 'assistant':
            raise ValueError('the prompt ends with a response; drop that, which is what the policy is to write')
        return Document(text=prompt[-1]['content'] or '', record={**record, 'prompt': prompt})


class Asker:
    """Prompts as ids, with the template's marks and its invitation to answer."""

    def __init__(self, tokenizer: Tokenizer, template: str = '', system: str = ''):
        """`template` as in `data.conversations`. Raises ConfigError where there is none."""
        text = templates.read(template)
        templates.check(template, tokenizer)
        self._tokenizer, self._system = tokenizer, system
        self._template = None if template == PLAIN else ChatTemplate.of(tokenizer) if not text else ChatTemplate(text)

    def __call__(self, document: Document) -> np.ndarray:
        """int32[n]."""
        record: Mapping[str, Any] = document.record or {}
        prompt = record.get('prompt', document.text)
        messages: Sequence[Mapping[str, Any]] = (
            [{'role': 'user', 'content': prompt}] if isinstance(prompt, str) else prompt
        )
        if self._system and messages[0]['role'] not in ('system', 'developer'):
            messages = [{'role': 'system', 'content': self._system}, *messages]
        if self._template is not None:
            return self._template.encode(self._tokenizer, messages, add_generation_prompt=True)
        parts = [[self._tokenizer.bos] if self._tokenizer.add_bos else []]
        for message in messages:
            ends = [self._tokenizer.eos] if message['role'] == 'assistant' else []
            parts += [self._tokenizer.encode(message['content']), ends]
        return np.concatenate(parts).astype(np.int32)

"""A model answers, says what a principle finds wrong with its answer, and writes it anew: data to be imitated.

Constitutional AI's supervised stage (Bai et al., 2022, arXiv 2212.08073, section 3.1): critique and revision are asked
for in further turns of the same conversation; what is learned from is the prompt with the revision.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from tpu_llm.config import ConfigError
from tpu_llm.data.documents import Document, Documents
from tpu_llm.rl import principles
from tpu_llm.rl.rewards import Sample
from tpu_llm.rl.writing import Answerer, Part, Records, Write, asked, ended

_CRITIQUE = 'Say in what ways your last response goes against this principle: {principle}'
_REVISION = (
    'Rewrite that response so that it follows this principle: {principle}\nSay the new response and nothing else.'
)


@dataclasses.dataclass(kw_only=True, slots=True)
class Revise(Write):
    """As `Write`, with the revised answer: a record has `prompt` and `completion`, and how it came to that beside them
    (`principle`, `answered`, `critique`).

    Each conversation is about one of the principles. An answer, critique or revision that was cut or is empty ends it,
    and so does a conversation that grew over `prompt_length`: it is left out, and counted.
    """

    unit: ClassVar = 'revisions'

    principles: str  # a text file, a principle a line
    critique: str = _CRITIQUE  # the request, with {principle}
    revision: str = _REVISION

    def validate(self) -> None:
        Write.validate(self)
        if self.answers != 1:
            raise ConfigError(f'answers is {self.answers}; one answer is revised, so leave it at 1')
        for name in ('critique', 'revision'):
            principles.check_form(name, getattr(self, name), ('principle',))

    def open(self, documents: Documents) -> Part:
        known = principles.read(self.principles)
        answer = Answerer(self)

        def part(numbers: range) -> tuple[Records, str]:
            answered, long = answer(documents, numbers)
            first = [(sample, asked(sample)) for _, (sample,) in answered]
            drawn = principles.drawn(known, len(first), self.seed, numbers.start)
            talks = [
                _Talk(prompt, principle, (self.critique, self.revision), (sample.response,))
                for (sample, prompt), principle in zip(first, drawn, strict=True)
                if ended(sample)
            ]
            lost, grown = [len(first) - len(talks)], 0
            for turn in (1, 2):
                requests = _Requests(talks, turn * len(documents) + numbers.start)
                answered, more = answer(requests, requests.numbers)
                talks = [_answered(sample) for _, (sample,) in answered if ended(sample)]
                lost, grown = [*lost, len(answered) - len(talks)], grown + more
            records = [talk.record() for talk in talks]
            same = sum(record['completion'] == record['answered'] for record in records)
            return records, (
                f'{same:,} say what was answered before; left out {long:,} prompts and {grown:,} conversations over '
                f'prompt_length, and {lost[0]:,} answers, {lost[1]:,} critiques and {lost[2]:,} revisions cut or empty'
            )

        return part


@dataclasses.dataclass(frozen=True, slots=True)
class _Talk:
    """A conversation about an answer, as far as it has come."""

    prompt: Any  # text or messages
    principle: str
    forms: tuple[str, ...]  # of the requests
    said: tuple[str, ...]  # by the model: the answer, then what the requests brought

    def messages(self) -> list[dict[str, Any]]:
        """All of it, with the next request."""
        begun = [{'role': 'user', 'content': self.prompt}] if isinstance(self.prompt, str) else list(self.prompt)
        for said, form in zip(self.said, self.forms, strict=False):
            begun.append({'role': 'assistant', 'content': said})
            begun.append({'role': 'user', 'content': form.format(principle=self.principle)})
        return begun

    def record(self) -> dict[str, Any]:
        answered, critique, revision = self.said
        about = {'principle': self.principle, 'answered': answered, 'critique': critique}
        return {'prompt': self.prompt, 'completion': revision, **about}


class _Requests(Documents):
    """Conversations as prompts, numbered from `first`."""

    def __init__(self, talks: Sequence[_Talk], first: int):
        self.talks, self.numbers = talks, range(first, first + len(talks))
        self.fingerprint = ''  # nothing of it is cached

    def __len__(self) -> int:
        return len(self.talks)

    def name(self, index: int) -> str:
        return repr(self.talks[index - self.numbers.start].prompt)

    def read(self, index: int) -> Document:
        talk = self.talks[index - self.numbers.start]
        messages = talk.messages()
        return Document(text=messages[-1]['content'], record={'prompt': messages, 'talk': talk})


def _answered(sample: Sample) -> _Talk:
    talk: _Talk = sample.record['talk']
    return dataclasses.replace(talk, said=(*talk.said, sample.response))

"""Which prompts a rollout answers: a function of the seed and of how many were taken of each source."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence

import numpy as np

from tpu_llm.config import ConfigError
from tpu_llm.data.documents import Document, Documents
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import most_behind
from tpu_llm.data.prompts import Asker
from tpu_llm.data.shuffle import Shuffle

_IN_VAIN = 1000  # prompts in a row that may be unusable before the source is called so
logger = logging.getLogger('tpu_llm')


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    document: Document
    ids: np.ndarray  # int32[n], as it is asked
    where: Callable[[], str]  # its file and line


class PromptOrder:
    """Each source in an endless shuffled stream, the sources in turn by their weights."""

    def __init__(self, data: Data, documents: Sequence[Documents], asker: Asker, *, seed: int, room: int):
        """`room` is the most tokens of a prompt; longer ones are dropped, or with overlong='stop' an error."""
        stages = data.mixture.stages()
        if len(stages) > 1:
            raise ConfigError('data.mixture.weights has stages, which prompts are not drawn by; give shares for step 0')
        self._weights = stages[0][1]
        self._names = list(data.mixture.sources)
        self._documents, self._ask, self._room, self._overlong = documents, asker, room, data.overlong
        self._orders = [Shuffle(len(d), seed, name) for d, name in zip(documents, self._names, strict=True)]
        self._said: set[str] = set()

    def take(self, drawn: np.ndarray, count: int) -> tuple[list[Prompt], np.ndarray]:
        """The next prompts after `drawn` (int64, one number a source), and how many are drawn then."""
        drawn, found = drawn.copy(), []
        vain = 0
        while len(found) < count:
            source = most_behind(drawn.tolist(), self._weights)
            prompt = self._prompt(source, self._orders[source][int(drawn[source])])
            drawn[source] += 1
            vain = 0 if prompt else vain + 1
            found += [prompt] if prompt else []
            if vain == _IN_VAIN:
                raise ConfigError(
                    f'{_IN_VAIN} prompts in a row of source {self._names[source]!r} are bad or longer than '
                    f'{self._room} tokens; mend the source or raise data.seq_len'
                )
        return found, drawn

    def _prompt(self, source: int, number: int) -> Prompt | None:
        document = self._documents[source][number]
        if document is None:
            return None
        ids, where = self._ask(document), functools.partial(self._documents[source].name, number)
        if len(ids) <= self._room:
            return Prompt(document, ids, where)
        name = where()
        long = f'{name}: the prompt has {len(ids)} tokens, more than the {self._room} that data.seq_len leaves it'
        if self._overlong == 'stop':
            raise ConfigError(f"{long}; raise data.seq_len, or set data.overlong='drop'")
        if name not in self._said:
            self._said.add(name)
            logger.warning('%s: left out (%d so far)', long, len(self._said))
        return None


def of_prompts(name: str, documents: Documents) -> Documents:
    """The same documents. Raises ConfigError where they are no prompts, or the first record is none."""
    if documents.kind not in ('prompt', 'text'):
        raise ConfigError(
            f'source {name!r} is of {documents.kind} examples, which are answered already; a policy takes Prompts'
        )
    if not len(documents):
        raise ConfigError(f'source {name!r} holds no prompt; check its paths')
    documents.read_first()
    return documents

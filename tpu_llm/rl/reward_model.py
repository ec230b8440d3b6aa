"""A reward that was learned: scores of a decoder with a scalar head, from the checkpoint of a reward run."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from etils import epath

from tpu_llm.arrays import Array
from tpu_llm.checkpoint import pretrained, reader
from tpu_llm.config import ConfigError
from tpu_llm.data import templates
from tpu_llm.data.conversations import Conversations
from tpu_llm.data.speech import Spoken, Writer
from tpu_llm.data.templates import PLAIN
from tpu_llm.data.tokenizer import Tokenizer
from tpu_llm.models.scalar_head import ScalarConfig
from tpu_llm.rl.reader import Reader, Surroundings, open_beside
from tpu_llm.rl.rewards import Sample, Scores


@dataclasses.dataclass(kw_only=True, slots=True)
class RewardModel:
    """The score at a conversation's last position, where the reward run has learned it.

    Prompt and response are written anew with the reward model's own tokenizer and template, so that they look as they
    did in its training, whatever the policy's are.
    """

    on_mesh: ClassVar = True

    path: str  # of the reward run
    name: str = 'reward_model'
    weight: float = 1.0
    template: str = ''  # '': as the sources of the reward run have it; else as in `data.conversations`
    system: str = ''  # the same
    normalise: str = ''  # JSONL of conversations: scores less their mean, over their deviation
    normalise_on: int = 256  # of these conversations, from the first
    dtype: Literal['float32', 'bfloat16'] = 'float32'  # in which its weights are held and used

    def validate(self) -> None:
        if not self.path:
            raise ConfigError('path is empty; give the workdir of a reward run')
        if self.normalise_on < 2:
            raise ConfigError(f'normalise_on is {self.normalise_on}; a deviation is of 2 or more')

    def check(self, record: Mapping[str, Any]) -> None:
        """Raises ConfigError where `path` is no reward run; of the record nothing is asked."""
        del record
        if not isinstance(pretrained.open_source(self.path).config, ScalarConfig):
            raise ConfigError(f'{self.path} has no scalar head; give the workdir of a run whose model is ScalarConfig')

    def open(self, surroundings: Surroundings) -> Scores:
        self.check({})
        beside = open_beside(self.path, surroundings, self.dtype)
        read = Reader('reward model', beside, _score)
        template, system = self.template or _of_run(self.path, 'template'), self.system or _of_run(self.path, 'system')
        write = Writer(beside.tokenizer, template, templates.read(template))
        mean, deviation = 0.0, 1.0
        if self.normalise:
            source = Conversations(paths=(self.normalise,), template=template, system=system)
            scores = read(_texts(source, beside.tokenizer, self.normalise_on))
            mean, deviation = float(scores.mean()), float(scores.std())
            if not deviation > 0:
                raise ConfigError(f'the scores of {self.normalise} are all {mean:g}; they cannot be a measure')

        def spoken(sample: Sample) -> Spoken:
            answer = {'role': 'assistant', 'content': sample.response}
            return Spoken(messages=[*asked(sample, system), answer])

        def judge(samples: Sequence[Sample]) -> np.ndarray:
            return (read([_inputs(write([spoken(sample)])) for sample in samples]) - mean) / deviation

        return judge


def _of_run(path: str, name: str) -> str:
    """What the sources of a run have in a field."""
    checkpoint = reader.find(epath.Path(path))
    assert checkpoint is not None, 'it was just read'
    return common(path, name, checkpoint.manifest()['config']['data']['mixture']['sources'])


def common(path: str, name: str, sources: Mapping[str, Mapping[str, Any]]) -> str:
    """Sources without such a field are plain text, without a system message. Raises ConfigError where they differ."""
    found = {source.get(name, PLAIN if name == 'template' else '') for source in sources.values()}
    if len(found) > 1:
        raise ConfigError(f'the sources of {path} differ in {name}: {", ".join(map(repr, sorted(found)))}; set it here')
    return found.pop()


def _texts(source: Conversations, tokenizer: Tokenizer, count: int) -> list[np.ndarray]:
    found = source.open().encoded(tokenizer)
    texts = [found[index] for index in range(min(len(found), count))]
    return [_inputs(text.pairs) for text in texts if text is not None and text.pairs is not None]


def asked(sample: Sample, system: str = '') -> Sequence[Mapping[str, Any]]:
    """The prompt as messages."""
    prompt = sample.record.get('prompt', sample.prompt)
    messages: Sequence[Mapping[str, Any]] = [{'role': 'user', 'content': prompt}] if isinstance(prompt, str) else prompt
    if system and messages[0]['role'] not in ('system', 'developer'):
        return [{'role': 'system', 'content': system}, *messages]
    return messages


def _inputs(pairs: np.ndarray) -> np.ndarray:
    """What the model reads of an example: its last position is where the reward run's value is marked."""
    return pairs['token']


def _score(model: Any, hidden: Array) -> Array:
    return model.scores(hidden)[:, 0]

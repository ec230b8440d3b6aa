"""The model that a suite asks: one that was saved, or one that nobody has trained, to know what chance gives."""

import dataclasses
import functools
from typing import Any, Literal

from etils import epath

from tpu_llm.checkpoint import pretrained
from tpu_llm.config import ConfigError, dump
from tpu_llm.data.documents import fingerprint
from tpu_llm.data.tokenizer import Tokenizer
from tpu_llm.evals import asked
from tpu_llm.evals.asked import Asked
from tpu_llm.models.decoder import Decoder
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.param import draw


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Of how a model is asked. `rows` is of a batch, `chat`: prompts to be answered are what a user says."""

    rows: int
    chat: bool
    seed: int
    max_length: int = 0  # tokens of a context with what is weighed behind it; 0: what the model is made for


class Candidate:
    """Known by its weights before they are read: where all scores are kept already, they never are."""

    def __init__(self, name: str, identity: str, read: Any):
        self.name, self.identity = name, identity
        self._read = functools.cache(read)

    def ask(self, settings: Settings) -> Asked:
        """Reads the weights, the first time."""
        model, tokenizer = self._read()
        return asked.of_model(model, tokenizer, **dataclasses.asdict(settings))

    @property
    def tokenizer(self) -> Tokenizer:
        return self._read()[1]


@dataclasses.dataclass(kw_only=True, slots=True)
class Saved:
    """At `path`: a run's workdir or one of its checkpoint folders, a Hugging Face folder, a .gguf file."""

    path: str
    dtype: Literal['float32', 'bfloat16'] = 'float32'  # of weights and computation

    def validate(self) -> None:
        if not self.path:
            raise ConfigError('path is empty; give the workdir of a run, a Hugging Face folder or a .gguf file')

    def open(self) -> Candidate:
        source = pretrained.open_source(self.path)
        if not isinstance(source.config, DecoderConfig):
            raise ConfigError(f'{self.path} holds no decoder but a model of type {type(source.config).__name__}')
        tokenizer = source.tokenizer()
        identity = fingerprint(source.identity(), dump(source.config), tokenizer.fingerprint, self.dtype)

        def read() -> tuple[Decoder, Tokenizer]:
            return pretrained.read_model(source, self.dtype), tokenizer

        return Candidate(self.path, identity, read)


@dataclasses.dataclass(kw_only=True, slots=True)
class Untrained:
    """Drawn at random, as a run would start."""

    model: DecoderConfig
    tokenizer: Any
    seed: int = 0

    def open(self) -> Candidate:
        tokenizer = self.tokenizer.make(iter(()), epath.Path('.'))

        def read() -> tuple[Decoder, Tokenizer]:
            graph = ModelGraph(self.model.make(vocab_multiple=1))
            return graph.bind(draw(graph.leaves, self.seed)), tokenizer

        return Candidate('untrained', fingerprint(dump(self), tokenizer.fingerprint), read)

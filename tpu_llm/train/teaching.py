"""A teacher reads a run's data once, and what it holds likely is stored: students then train without it.

The layout of what is stored is told in `data/taught.py`. Training then costs no teacher, but 6 bytes to read for each
of a position's `top_k` tokens.
"""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from tpu_llm.arrays import Array, Batch, Float
from tpu_llm.checkpoint.pretrained import open_source
from tpu_llm.config import ConfigError, machine, validate
from tpu_llm.data import taught
from tpu_llm.data.documents import is_remote
from tpu_llm.data.loader import Data, open_documents, open_tokenizer
from tpu_llm.data.streams import Stream
from tpu_llm.kernels.chunked import split_rows
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.graph import ModelGraph
from tpu_llm.parallel import sharding
from tpu_llm.parallel.compile import Compiled
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.parallel.rules import PRESETS
from tpu_llm.parallel.sharding import Layout
from tpu_llm.train import weights

_SMALLEST = -100.0  # of a log-prob that is stored: float16 holds it, and it is no probability to speak of


@dataclasses.dataclass(kw_only=True, slots=True)
class Teaching:
    """Writes the teacher's `top_k` likeliest tokens of every position of `data` to the workdir, a local folder."""

    path: str  # the teacher: a Hugging Face folder, a GGUF file or a run's workdir
    data: Data
    top_k: int = 64
    dtype: Literal['float32', 'bfloat16'] = machine('float32')
    mesh: Mesh = machine(factory=Mesh)
    rules: str = machine('zero3')

    def validate(self) -> None:
        if not self.path:
            raise ConfigError('path is empty; give the teacher')
        if self.top_k < 1:
            raise ConfigError(f'top_k is {self.top_k}; it is at least 1')
        if not (self.data.whole and self.data.overlong == 'drop' and self.data.form is None):
            raise ConfigError("a teacher reads whole documents; set data.whole, data.overlong='drop' and no data.form")

    def main(self, workdir: str) -> None:
        validate(self)
        if is_remote(workdir) or jax.process_count() > 1:
            raise ConfigError('a teacher is stored by one host, in a local folder; give one with --workdir')
        folder, console = Path(workdir), Console(stderr=True, highlight=False, soft_wrap=True)
        source = open_source(self.path)
        weights = source.identity()
        if (folder / 'about.json').exists():
            there = json.loads((folder / 'about.json').read_text())
            if (there.get('weights'), there['top_k']) != (weights, self.top_k):
                raise ConfigError(
                    f'{folder} holds {there["top_k"]} tokens of {there["teacher"]} as it was then; give another '
                    '--workdir'
                )
            console.print(f'{folder}: all is stored')
            return
        if not isinstance(source.config, DecoderConfig):
            raise ConfigError(f'{self.path} holds no decoder but a {type(source.config).__name__}')
        tokenizer = open_tokenizer(self.data, workdir)
        opened = open_documents(self.data, tokenizer, workdir)
        teach = _Teacher(self, dataclasses.replace(source.config, dtype=self.dtype), tokenizer.fingerprint)
        names = list(self.data.mixture.sources)
        for i, (name, docs) in enumerate(zip(names, opened, strict=True)):
            stream = Stream(name, docs, tokenizer, 0)
            data = self.data
            count = taught.store(stream, docs, folder / str(i), data.global_batch, data.seq_len, tokenizer.pad, teach)
            console.print(f'{folder / str(i)}: {count:,} positions of source {name!r}')
        about = {
            'top_k': self.top_k,
            'teacher': str(self.path),
            'weights': weights,
            'tokenizer': tokenizer.fingerprint,
            'sources': [{'name': n, 'fingerprint': d.fingerprint} for n, d in zip(names, opened, strict=True)],
        }
        (folder / 'about.json').write_text(json.dumps(about, indent=2))  # last: what has it is whole


class _Teacher:
    """The likeliest tokens of the rows of a batch."""

    def __init__(self, config: Teaching, model: DecoderConfig, tokenizer: str):
        if config.top_k >= model.vocab_size:
            raise ConfigError(f'top_k = {config.top_k} is all of the {model.vocab_size} tokens; keep fewer')
        self._layout = layout = Layout(config.mesh.make(), PRESETS[config.rules])
        graph = ModelGraph(model.make(vocab_multiple=128 * layout.mesh.shape['tensor']))
        self._weights = weights.of_model(config.path, model, graph, layout, tokenizer, 0, 'path')

        def teach(params: dict[str, Array], batch: Batch) -> tuple[Array, Array, Array]:
            with sharding.use(layout):
                bound = graph.bind(params)
                hidden = bound.hidden(batch.tokens, segments=batch.segments, positions=batch.positions)
                chunks = split_rows((hidden,), 0, model.vocab_size)[0]
                found = jax.lax.map(lambda part: likeliest(bound.logits(part), config.top_k), chunks)
                tokens, log_probs, rest = (_rows(x, hidden.shape[1]) for x in found)
                return tokens, log_probs, rest

        self._program = Compiled('teaching', teach, out_shardings=layout.replicated)

    def __call__(self, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        place = self._layout.named(self._layout.rules.activations, 'BT', batch.tokens.shape, 'the batch')
        tokens, log_probs, rest = self._program(self._weights, jax.device_put(batch, place))
        return np.asarray(tokens), np.asarray(log_probs), np.asarray(rest)


def likeliest(logits: Float[Array, 'B T V'], top_k: int) -> tuple[Array, Array, Array]:
    """The likeliest tokens, their log-probs, and the log of the probability of all others together."""
    log_probs = jax.nn.log_softmax(logits)
    first, tokens = jax.lax.top_k(log_probs, top_k)
    row, position = (jax.lax.broadcasted_iota(jnp.int32, tokens.shape, axis) for axis in (0, 1))
    rest = jax.nn.logsumexp(log_probs.at[row, position, tokens].set(-jnp.inf), axis=-1)
    return tokens, jnp.maximum(first, _SMALLEST), jnp.maximum(rest, _SMALLEST)


def _rows(chunks: Array, length: int) -> Array:
    """[T / chunk, B, chunk, …] → [B, T, …]."""
    whole = chunks.swapaxes(0, 1)
    return whole.reshape(whole.shape[0], -1, *whole.shape[3:])[:, :length]

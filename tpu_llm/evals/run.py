"""Evaluation as a run of its own: score a trained model on any source, on one device."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tpu_llm.arrays import Batch
from tpu_llm.checkpoint.pretrained import from_pretrained
from tpu_llm.config import ConfigError, machine, validate
from tpu_llm.data.documents import Head
from tpu_llm.data.evaluation import gzip_bits_per_byte
from tpu_llm.data.tokenizer import Tokenizer
from tpu_llm.evals.perplexity import Evaluator, Heard, Score
from tpu_llm.infer.chat import busy
from tpu_llm.models.decoder import Decoder
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.param import named_params
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.parallel.rules import PRESETS
from tpu_llm.parallel.sharding import Layout


@dataclasses.dataclass(kw_only=True, slots=True)
class Run:
    """Perplexity and bits per byte of the model saved at `path` on `source`."""

    path: str  # a run's workdir or one of its checkpoint folders, a Hugging Face folder, a .gguf file
    source: Any
    documents: int = 0  # only so many, the first; 0: all
    seq_len: int = 256
    rows: int = machine(16)

    def validate(self) -> None:
        if not self.path:
            raise ConfigError('path is empty; give the workdir of a trained run')
        if self.rows < 1 or self.seq_len < 1 or self.documents < 0:
            raise ConfigError(
                f'rows = {self.rows} and seq_len = {self.seq_len} must be at least 1, and documents = '
                f'{self.documents} not negative'
            )

    def main(self, workdir: str) -> None:
        """Prints the score, and on the error stream how far it is; nothing is written."""
        del workdir
        validate(self)
        score, gzip = self.score()
        lines = [
            f'documents         {score.raw_bytes:>12,} bytes, {score.tokens:,} tokens',
            f'bits per byte     {score.bits_per_byte:>12.4f}   (gzip -9: {gzip:.4f})',
            f'loss              {score.loss:>12.4f}   nats a token',
            f'perplexity        {score.perplexity:>12.2f}',
        ]
        Console(highlight=False).print('\n'.join(lines), markup=False)

    def score(self) -> tuple[Score, float]:
        """The model's score and the bits per byte that gzip -9 needs for the same documents."""
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        with busy(console, f'reading {self.path}'):
            model, tokenizer = from_pretrained(self.path)
        if not isinstance(model, Decoder):
            raise ConfigError(f'{self.path} holds no decoder but a model of type {type(model).__name__}')
        documents = self.source.open()
        if not len(documents):
            raise ConfigError('the source holds no document; check its paths')
        if self.documents:
            documents = Head(documents, self.documents)
        layout = Layout(Mesh(fsdp=1).make(jax.devices()[:1]), PRESETS['zero3'])
        evaluator = Evaluator(ModelGraph(model), tokenizer, layout, rows=self.rows, seq_len=self.seq_len)
        weights = {path: jax.device_put(leaf.get_value(), layout.replicated) for path, leaf in named_params(model)}
        with _shown(console, tokenizer) as heard:
            score = evaluator(weights, documents, heard)
        with busy(console, 'compressing with gzip'):
            return score, gzip_bits_per_byte(documents, tokenizer)


_LINE_EVERY = 10.0  # seconds, where there is no terminal


@contextlib.contextmanager
def _shown(console: Console, tokenizer: Tokenizer) -> Iterator[Heard]:
    """How much of the documents is scored: a bar in a terminal, lines elsewhere."""
    columns = (TextColumn('{task.description}'), BarColumn(), TextColumn('{task.percentage:>3.0f} %'))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task('compiling', total=None)
        start = said = time.monotonic()
        done = tokens = 0

        def heard(batch: Batch, total: int) -> None:
            nonlocal done, tokens, said
            done += len(tokenizer.decode_bytes(batch.tokens[batch.segments > 0].tolist()))
            tokens += int(batch.weights.sum())
            speed = f'{tokens / (time.monotonic() - start):,.0f} tokens/s'
            bar.update(task, description=f'scoring, {speed}', completed=min(done, total), total=total)
            if not console.is_terminal and time.monotonic() - said > _LINE_EVERY:
                said = time.monotonic()
                console.print(f'scored {done:,} of {total:,} bytes ({done / total:.0%}), {speed}')

        if not console.is_terminal:
            console.print('scoring')
        yield heard

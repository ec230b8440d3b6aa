"""Evaluation as a run of its own: score a trained model on any source, on one device."""

import dataclasses
from typing import Any

import jax
from rich.console import Console

from tpu_llm.checkpoint.pretrained import from_pretrained
from tpu_llm.config import ConfigError, machine, validate
from tpu_llm.data.evaluation import gzip_bits_per_byte
from tpu_llm.evals.perplexity import Evaluator, Score
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.param import named_params
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.parallel.rules import PRESETS
from tpu_llm.parallel.sharding import Layout


@dataclasses.dataclass(kw_only=True, slots=True)
class Run:
    """Perplexity and bits per byte of the model saved at `path` on `source`."""

    path: str  # a run's workdir, or one of its checkpoint folders
    source: Any
    seq_len: int = 256
    rows: int = machine(16)

    def validate(self) -> None:
        if not self.path:
            raise ConfigError('path is empty; give the workdir of a trained run')
        if self.rows < 1 or self.seq_len < 1:
            raise ConfigError(f'rows = {self.rows} and seq_len = {self.seq_len} must be at least 1')

    def main(self, workdir: str) -> None:
        """Prints the score; nothing is written."""
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
        model, tokenizer = from_pretrained(self.path)
        documents = self.source.open()
        if not len(documents):
            raise ConfigError('the source holds no document; check its paths')
        layout = Layout(Mesh(fsdp=1).make(jax.devices()[:1]), PRESETS['zero3'])
        evaluator = Evaluator(ModelGraph(model), tokenizer, layout, rows=self.rows, seq_len=self.seq_len)
        weights = {path: jax.device_put(leaf.get_value(), layout.replicated) for path, leaf in named_params(model)}
        return evaluator(weights, documents), gzip_bits_per_byte(documents, tokenizer)

"""The reference's log-probs, computed before training and kept beside the token cache (`data.referenced`).

The reference is what the run starts from: `origin.weights`, or the weights that it draws. It is then not held while the
run trains, and not run in every epoch.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from tpu_llm.arrays import Array, Batch
from tpu_llm.checkpoint import agree, pretrained
from tpu_llm.config import digest
from tpu_llm.data import documents, referenced
from tpu_llm.data.documents import Documents
from tpu_llm.data.loader import cache_folder
from tpu_llm.data.referenced import Referenced
from tpu_llm.data.tokenizer import Tokenizer
from tpu_llm.models.graph import ModelGraph
from tpu_llm.objectives.texts import reference_log_probs
from tpu_llm.parallel import hosts, sharding
from tpu_llm.parallel.compile import Compiled
from tpu_llm.parallel.sharding import Layout
from tpu_llm.train import weights
from tpu_llm.train.run import Run


def reads_stored(run: Run) -> bool:
    """Whether the objective reads the reference's log-probs from the batch."""
    return getattr(run.objective, 'reference', '') == 'stored'


def with_reference(
    run: Run, docs: Documents, tokenizer: Tokenizer, graph: ModelGraph, layout: Layout, workdir: Any
) -> Documents:
    """Examples that are ready to be packed, with the reference's log-probs; computes those that no earlier start has.

    `graph` is the bare model's. To be called on all hosts at the same time.
    """
    path = run.origin.weights
    start = pretrained.open_source(path).identity() if path else f'drawn {run.seed}'
    made_of = (docs.fingerprint, tokenizer.fingerprint, start, digest(run.model), run.data.seq_len)
    folder: Path = cache_folder(run.data, workdir) / f'reference-{documents.fingerprint(*made_of)}'
    if 'absent' in agree.gather('there' if folder.exists() else 'absent'):
        rows = run.data.global_batch // run.accumulate
        score = _Score(run, tokenizer, graph, layout)
        referenced.write(docs, tokenizer, folder, rows, run.data.seq_len, score)
    return Referenced(docs, folder)


class _Score:
    """log p of the targets of a batch under the weights that the run starts from, on every host."""

    def __init__(self, run: Run, tokenizer: Tokenizer, graph: ModelGraph, layout: Layout):
        self._layout = layout
        path, fingerprint = run.origin.weights, tokenizer.fingerprint
        self._weights = weights.of_model(path, run.model, graph, layout, fingerprint, run.seed)

        def score(params: dict[str, Array], batch: Batch) -> Array:
            with sharding.use(layout):
                return reference_log_probs(graph.bind(params), batch, run.objective.chunk)

        self._program = Compiled('reference log-probs', score, out_shardings=layout.replicated)

    def __call__(self, batch: Batch) -> np.ndarray:
        return np.asarray(self._program(self._weights, jax.tree.map(self._global, batch)))

    def _global(self, whole: np.ndarray) -> Array:
        place = self._layout.named(self._layout.rules.activations, 'BT', whole.shape, 'the batch')
        own = hosts.local_rows(place, len(whole))
        return hosts.assemble(whole[own], own, len(whole), place)

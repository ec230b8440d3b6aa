"""What the trainer makes of rows that the policy wrote: log-probs of policy and reference, and the critic's values."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpu_llm.arrays import Array, Batch
from tpu_llm.objectives.policy_gradient import response_log_probs
from tpu_llm.parallel import hosts, sharding
from tpu_llm.parallel.compile import Compiled
from tpu_llm.parallel.sharding import Layout
from tpu_llm.rl.run import Run
from tpu_llm.train.frozen import Frozen
from tpu_llm.train.weights import Graphs

_READ = ('tokens', 'targets', 'weights', 'segments', 'positions')


class Scorer:
    """One program for as many rows as a training batch has.

    It scores the policy where the run `remembers` it, and the reference where it is compared with one; `asked` says
    whether there is anything to score.
    """

    def __init__(self, run: Run, graphs: Graphs, layout: Layout):
        self._layout, self._rows = layout, run.data.global_batch
        objective, count, remembers = run.objective, run.rollout.max_new_tokens, run.remembers
        self.asked = remembers or run.needs_frozen()

        def log_probs(model: Any, hidden: Array, batch: Batch) -> Array:
            return response_log_probs(
                model, hidden, batch.targets[:, -count:], temperature=objective.temperature, chunk=objective.chunk
            )

        def score(weights: Mapping[str, Array], frozen: Frozen, batch: Batch) -> dict[str, Array]:
            def hidden(model: Any) -> Array:
                whole = model.hidden(batch.tokens, segments=batch.segments, positions=batch.positions)
                return whole[:, -count:]

            found = {}
            with sharding.use(layout):
                if remembers:
                    model = graphs.model.bind(weights)
                    found['old'] = log_probs(model, own := hidden(model), batch)
                    if objective.value:
                        found['values'] = model.scores(own)
                if (other := frozen.model(graphs.reference)) is not None:
                    found['reference'] = log_probs(other, hidden(other), batch)
            return found

        self._program = Compiled('scoring', score, out_shardings=layout.replicated)

    def __call__(
        self, weights: Mapping[str, Array], frozen: Frozen, rows: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """float32[B, A] each; B is a multiple of the batch."""
        if not self.asked:
            return {}
        parts = [
            self._program(
                weights, frozen, Batch(**{name: self._global(rows[name][at : at + self._rows]) for name in _READ})
            )
            for at in range(0, len(rows['tokens']), self._rows)
        ]
        return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}

    def lower(self, weights: Mapping[str, jax.ShapeDtypeStruct], frozen: Frozen, length: int) -> Any:
        """The program for rows of that length before it is compiled, of shapes and shardings alone."""
        shape = self._rows, length
        place = self._place(shape)
        fields: dict[str, Any] = {
            name: jax.ShapeDtypeStruct(shape, jnp.float32 if name == 'weights' else jnp.int32, sharding=place)
            for name in _READ
        }
        return self._program.lower(weights, frozen, Batch(**fields))

    def _place(self, shape: tuple[int, ...]) -> jax.sharding.NamedSharding:
        return self._layout.named(self._layout.rules.activations, 'BT', shape, 'rows of a rollout')

    def _global(self, whole: np.ndarray) -> Array:
        place = self._place(whole.shape)
        own = hosts.local_rows(place, len(whole))
        return hosts.assemble(whole[own], own, len(whole), place)

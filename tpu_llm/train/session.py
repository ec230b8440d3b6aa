"""Everything a run holds while it trains, made once from its config: the surroundings of the loop."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import jax
from etils import epath

from tpu_llm.arrays import Array
from tpu_llm.checkpoint.fence import Fence
from tpu_llm.data.tokenizer import Tokenizer
from tpu_llm.models.graph import ModelGraph
from tpu_llm.optim.optimizer import Update
from tpu_llm.parallel.compile import Compiled
from tpu_llm.parallel.sharding import Layout
from tpu_llm.train.frozen import Frozen
from tpu_llm.train.ledger import Ledger, Phase
from tpu_llm.train.metrics import Writers
from tpu_llm.train.progress import Reporter
from tpu_llm.train.saved import Saved
from tpu_llm.train.state import TrainState

if TYPE_CHECKING:
    from tpu_llm.train.run import Run
    from tpu_llm.train.setup import Feed
    from tpu_llm.train.weights import Graphs


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """What the loop and its hooks use; `steps` is the run's length."""

    run: 'Run'
    workdir: epath.Path
    fence: Fence
    layout: Layout
    graphs: 'Graphs'
    tx: Update
    train_step: Compiled
    saved: Saved
    tokenizer: Tokenizer
    feed: 'Feed'
    steps: int
    ledger: Ledger
    writers: Writers
    reporter: Reporter
    frozen: Frozen  # its weights once they are loaded

    @property
    def graph(self) -> ModelGraph:
        """The model that trains."""
        return self.graphs.model

    def frozen_model(self) -> Any:
        """What the objective is given besides the model that trains, or None."""
        return self.frozen.model(self.graphs.reference)

    def weights(self, state: TrainState) -> dict[str, Array]:
        """Every weight of the model, to look at: its moving average where there is one."""
        base = cast(dict[str, Array], self.frozen.base)
        return {**base, **(state.params if state.ema is None else state.ema)}

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints and writes shared files."""
        return jax.process_index() == 0

    @contextlib.contextmanager
    def busy(self, phase: Phase, text: str) -> Iterator[None]:
        """Charges the block to a phase of the ledger and says so to whoever watches."""
        with self.ledger.phase(phase), self.reporter.status(text):
            yield

    def print(self, text: str) -> None:
        self.reporter.print(text)


class OpenHook(Protocol):
    """A hook at work: gets the finished step and the weights to look at; returns metrics to log (often none)."""

    def __call__(self, step: int, weights: dict[str, Array]) -> dict[str, float]: ...


class Hook(Protocol):
    """The config of a hook; most are `config.Periodic`.

    One whose numbers `checkpoints.best` may name lists them in a class attribute `metrics`. One that reads data of its
    own has `check(session)`, which raises ConfigError for what it cannot read, before any weights are loaded.
    """

    def due(self, step: int, steps: int) -> bool: ...

    def open(self, session: Any) -> OpenHook: ...


def call_hooks(
    calls: Sequence[tuple[Hook, OpenHook]], step: int, weights: dict[str, Array]
) -> tuple[dict[str, float], Exception | None]:
    """The metrics of the hooks that are due, and what one of them raised, so that the step can be saved before.

    Of several hosts that one raises it at once: the others may be waiting for it in the hook, and not come to save.
    """
    values: dict[str, float] = {}
    try:
        for _, call in calls:
            values |= call(step, weights)
    except Exception as error:
        if jax.process_count() > 1:
            raise
        return values, error
    return values, None

"""Everything a run holds while it trains, made once from its config: the surroundings of the loop."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import jax
import optax
from etils import epath

from tpu_llm.arrays import Array
from tpu_llm.checkpoint.fence import Fence
from tpu_llm.data.tokenizer import Tokenizer
from tpu_llm.models.graph import ModelGraph
from tpu_llm.parallel.sharding import Layout
from tpu_llm.train.ledger import Ledger, Phase
from tpu_llm.train.metrics import Writers
from tpu_llm.train.progress import Reporter
from tpu_llm.train.saved import Saved

if TYPE_CHECKING:
    from tpu_llm.train.run import Run
    from tpu_llm.train.setup import Feed


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """What the loop and its hooks use; `steps` is the run's length."""

    run: 'Run'
    workdir: epath.Path
    fence: Fence
    layout: Layout
    graph: ModelGraph
    tx: optax.GradientTransformation
    saved: Saved
    tokenizer: Tokenizer
    feed: 'Feed'
    steps: int
    ledger: Ledger
    writers: Writers
    reporter: Reporter

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
    """The config of a hook; most are `config.Periodic`."""

    def due(self, step: int, steps: int) -> bool: ...

    def open(self, session: Any) -> OpenHook: ...

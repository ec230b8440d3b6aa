"""Which module's output went wrong first: a forward pass, module by module, outside jit."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import Batch
from tpu_llm.train.session import Session
from tpu_llm.train.state import TrainState


def first_non_finite(session: Session, state: TrainState, batch: Batch, step: int) -> str:
    """One phrase that names the first module whose output is not finite on this batch of step `step`, in model order.

    Several hosts would have to run it together, which no longer can be relied on once training is broken:
    there the phrase says how to find out instead.
    """
    if jax.process_count() > 1:
        return 'run the last checkpoint on one host to learn which module it was'
    for name, value in state.params.items():
        if not bool(jnp.isfinite(value).all()):
            return f'the parameter {name} is not finite'
    model = session.graph.bind({**session.frozen.base, **state.params}).unstacked()
    with recorded(model) as outputs:
        frozen = session.frozen_model()
        loss, *_ = session.run.objective(model, batch, frozen=frozen, key=None, step=jnp.int32(step - 1))
    for name, finite in outputs:
        if not finite:
            return f'the first non-finite output is that of {name}'
    if not bool(jnp.isfinite(loss)):
        return "every module's output is finite, but the loss made of them is not"
    return 'the forward pass is finite, so the gradients were not'


@contextlib.contextmanager
def recorded(model: nnx.Module) -> Iterator[list[tuple[str, bool]]]:
    """Within it, every module of `model` that is called adds (its path, whether its output is finite)."""
    names = {id(module): '.'.join(map(str, path)) for path, module in nnx.iter_modules(model)}
    outputs: list[tuple[str, bool]] = []
    classes = {type(module) for _, module in nnx.iter_modules(model)}
    callables = {cls: cls.__dict__['__call__'] for cls in classes if '__call__' in cls.__dict__}

    def watched(call: Any) -> Any:
        def run(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
            result = call(self, *args, **kwargs)
            finite = all(
                bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(result) if jnp.issubdtype(x.dtype, jnp.floating)
            )
            if id(self) in names:
                outputs.append((names[id(self)] or type(self).__name__, finite))
            return result

        return run

    for cls, call in callables.items():
        cls.__call__ = watched(call)
    try:
        yield outputs
    finally:
        for cls, call in callables.items():
            cls.__call__ = call

"""What a wrapped map must know while it runs but is not told: its layer and the keys of noise, and what its rows chose.

Both are said around a call, not passed through it, so that no module in between need know of wrappers.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

from flax import nnx

from tpu_llm.arrays import Array, Float, Int, Key
from tpu_llm.nn.dropout import dropout, site_keys
from tpu_llm.nn.stack import Stack
from tpu_llm.peft.wrapping import mixed

_site: contextvars.ContextVar[tuple[Key[Array, ' B'] | None, Any]] = contextvars.ContextVar('site', default=(None, 0))
_choice: contextvars.ContextVar[Int[Array, ' B'] | None] = contextvars.ContextVar('choice', default=None)


@contextlib.contextmanager
def choose(index: Int[Array, ' B']) -> Iterator[None]:
    """Within it, each row of a batch has its own adapter or soft prompt, by index; -1 is none of the adapters.

    In a compiled function, use it inside: `with choose(index): return graph.bind(weights)(tokens)`.
    """
    token = _choice.set(index)
    try:
        yield
    finally:
        _choice.reset(token)


def choice(rows: int, needed: str) -> Int[Array, ' B']:
    """What the rows chose. Raises ValueError where nothing was said, or of another number of rows."""
    index = _choice.get()
    if index is None:
        raise ValueError(
            f'{needed}; say which each row takes: with tpu_llm.peft.rows.choose(index), or to train '
            'data.form = Tasks() and objective = EachTask()'
        )
    if index.shape != (rows,):
        raise ValueError(f'rows.choose has {list(index.shape)} numbers for {rows} rows; give one a row')
    return index


# ------------------------------------------------------------------------------------------------- noise


class Drawing(nnx.Module):
    """A block that says which keys and which layer it has, to those inside that draw."""

    def __call__(self, x: Float[Array, 'B T D'], context: Any, layer: Any, cache: Any) -> Any:
        token = _site.set((context.keys, layer))
        try:
            return super().__call__(x, context, layer, cache)  # pyright: ignore
        finally:
            _site.reset(token)


def tell_blocks(model: nnx.Module) -> None:
    """Makes all layers of a model say their keys, in place."""
    for _, stack in list(nnx.iter_modules(model)):
        if isinstance(stack, Stack):
            for block in (*stack.prefix, *stack.period, *stack.suffix):
                if not isinstance(block, Drawing):
                    block.__class__ = mixed(Drawing, type(block))


def dropped(x: Float[Array, 'B ...'], rate: float, site: str) -> Float[Array, 'B ...']:
    """Dropout of a wrapped map's input; nothing outside training."""
    keys, layer = _site.get()
    if keys is None or rate == 0.0:
        return x
    return dropout(x, rate, site_keys(keys, site, layer))

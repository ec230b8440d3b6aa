"""Compilation, counted: every jitted entry point compiles once, and a second time says what changed."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

logger = logging.getLogger('tpu_llm')

Signature = dict[str, str]


class Compiled:
    """`jax.jit(function)`, compiled ahead of its first call for exactly the arguments it is given.

    The recompile sentry: `compiles` counts the programs made, and a program for new arguments is reported with the
    shapes, dtypes and shardings that differ from the last ones. What is static is closed over by `function`.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        donate: Sequence[int] = (),
        out_shardings: Any = None,
        options: Mapping[str, Any] | None = None,
    ):
        self.name = name
        self.options = dict(options or {})
        self._jitted = jax.jit(function, donate_argnums=tuple(donate), out_shardings=out_shardings)
        self._programs: dict[tuple[Any, ...], Any] = {}
        self._last: tuple[Any, ...] | None = None

    @property
    def compiles(self) -> int:
        return len(self._programs)

    @property
    def newest(self) -> Any:
        """The program that was last made, or None."""
        return next(reversed(self._programs.values()), None)

    def __call__(self, *args: Any) -> Any:
        return self.program(*args)(*args)

    def program(self, *args: Any) -> Any:
        """The executable for these arguments (arrays or ShapeDtypeStructs), compiled if there is none yet."""
        key = _key(args)
        if key not in self._programs:
            if self._last is not None:
                logger.warning('%s is compiled again: %s', self.name, _difference(self._last, args))
            self._programs[key] = self.lower(*args).compile(compiler_options=self.options)
        if key != self._last:
            self._last = key
        return self._programs[key]

    def lower(self, *args: Any) -> Any:
        """The program before it is compiled."""
        return self._jitted.lower(*args)


def _key(args: tuple[Any, ...]) -> tuple[Any, ...]:
    leaves, tree = jax.tree.flatten(args)
    return tree, tuple((x.shape, x.dtype, getattr(x, 'sharding', None)) for x in leaves)


def _difference(last: tuple[Any, ...], args: tuple[Any, ...]) -> str:
    tree, new = _key(args)
    if tree != last[0]:
        return 'the arguments have another structure (a static value or a missing array)'
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(args)]
    changes = []
    for path, before, after in zip(paths, last[1], new, strict=True):
        parts = [f'{_show(b)} → {_show(a)}' for b, a in zip(before, after, strict=True) if b != a]
        if parts:
            changes.append(f'{path}: {", ".join(parts)}')
    return '; '.join(changes[:4]) + (f'; and {len(changes) - 4} more' if len(changes) > 4 else '')


def _show(value: Any) -> str:
    return str(value.spec) if isinstance(value, jax.sharding.NamedSharding) else str(value)

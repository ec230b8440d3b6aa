"""The run-time checker that jaxtyping's import hook puts on every function of `tpu_llm`: shapes and dtypes of arrays.

All other types are pyright's and `config.validate`'s business.
"""

import inspect
import typing
from collections.abc import Callable
from typing import Any

from beartype import beartype
from jaxtyping import AbstractArray


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype over the annotations that hold an array.

    Constructors are left alone: JAX builds its tree nodes of shardings, axes and sentinels as well as of arrays.
    """
    hints = {name: hint for name, hint in function.__annotations__.items() if _holds_array(hint)}
    if not hints or function.__name__ == '__init__':
        return function
    function.__annotations__ = hints
    return beartype(function)


def _holds_array(hint: Any) -> bool:
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return True
    return any(map(_holds_array, typing.get_args(hint)))

"""What is written down about a published model."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
    """One size: its config, made afresh, and how many parameters it has."""

    make: Callable[[], Any]
    parameters: int = 0  # exactly, as transformers counts them too; 0 where it has no class for the model
    printed: str = ''  # the same as authors or model hub print it: '6.74B', '559,214,592'


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """A family: its sizes by the name that `published` takes."""

    family: str
    sizes: Mapping[str, Fact]
    architecture: str = ''  # of transformers, that the published files name; '': there are none, or none that it reads
    lacks: str = ''  # what of the published model is not there: such sizes are for planning and training, not loading

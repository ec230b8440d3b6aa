"""What the runs of a sweep on one machine share: tokenized sources and trained tokenizers, each made once.

Both are the same whoever makes them, so sharing changes no number. (Compiled programs are shared through
JAX_COMPILATION_CACHE_DIR.)
"""

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tpu_llm import config as configs
from tpu_llm.config import is_config
from tpu_llm.data.documents import fingerprint
from tpu_llm.data.loader import Data, open_documents, open_tokenizer
from tpu_llm.data.tokenizer import TrainedBPE
from tpu_llm.train.run import Run

FOLDER = 'shared'


def share(config: Any, folder: Path) -> None:
    """Has every Data of a config keep its tokens in `folder`, unless it keeps none or says where."""
    for node in _nodes(config):
        if isinstance(node, Data) and node.cache and '://' not in node.cache:
            node.cache = os.path.join(folder.absolute(), node.cache)  # an absolute one stays


def prepare(config: Any, workdir: Path, folder: Path) -> None:
    """Gives a training run the tokenizer and the tokens of its data, which the first of these runs makes.

    The others wait for it rather than do the same work. Stages make their own: what they read may not be there yet.
    """
    if not isinstance(config, Run):
        return
    data = config.data
    own = fingerprint(*map(configs.digest, (data.mixture, data.tokenizer)), data.cache)
    place = folder / f'data-{own}'
    with _alone(place):
        if not (place / 'made').exists():
            tokenizer = open_tokenizer(data, place)
            open_documents(data, tokenizer, place)
            (place / 'made').touch()
    if isinstance(data.tokenizer, TrainedBPE) and not (workdir / 'tokenizer').exists():
        workdir.mkdir(parents=True, exist_ok=True)
        part = workdir / f'.tokenizer-{os.getpid()}'
        shutil.copytree(place / 'tokenizer', part)
        part.rename(workdir / 'tokenizer')


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """One process at a time, in a folder that is made; the lock goes with the process that holds it."""
    place.mkdir(parents=True, exist_ok=True)
    with open(place / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _nodes(value: Any) -> Iterator[Any]:
    """Every config in a config, itself included."""
    if is_config(value):
        yield value
        for field in dataclasses.fields(value):
            yield from _nodes(getattr(value, field.name))
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _nodes(item)

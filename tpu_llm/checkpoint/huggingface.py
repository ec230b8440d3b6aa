"""A Hugging Face folder as a model of ours, and a model of ours as such a folder.

`config.json` names the architecture; its entry in `ARCHITECTURES` says what the config's keys and the tensors' names
are here. Everything is checked before a tensor is read, and what does not fit is said all at once.
"""

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from tpu_llm.arrays import Array
from tpu_llm.checkpoint import fields, renaming, safetensors_file
from tpu_llm.checkpoint.family import Family, first
from tpu_llm.checkpoint.files import CheckpointError
from tpu_llm.checkpoint.hf_decoders import DENSE
from tpu_llm.checkpoint.hf_encoders import ENCODERS
from tpu_llm.checkpoint.hf_experts import EXPERTS
from tpu_llm.checkpoint.hf_gpt import GPT
from tpu_llm.checkpoint.hf_parallel import PARALLEL
from tpu_llm.checkpoint.hf_ssm import SSM
from tpu_llm.checkpoint.renaming import Bound
from tpu_llm.config import ConfigError
from tpu_llm.models.graph import ModelGraph

ARCHITECTURES: dict[str, Family] = {**DENSE, **GPT, **PARALLEL, **EXPERTS, **SSM, **ENCODERS}


@dataclasses.dataclass(frozen=True, slots=True)
class Folder:
    """A folder whose tensors are known by name and whose config is one of ours; nothing of the tensors is read yet."""

    path: epath.Path
    family: Family
    config: Any
    files: Mapping[str, safetensors_file.Reader]
    names: Mapping[str, str]  # of the tensors: the family's, and the files'

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return {known: self.files[name].tensors[name].shape for known, name in self.names.items()}

    def load(
        self,
        graph: ModelGraph,
        like: Mapping[str, jax.ShapeDtypeStruct],
        done: Callable[[str], None] = lambda name: None,
    ) -> dict[str, Array]:
        """Weights by path as `like` says: shape, dtype, sharding. Raises CheckpointError where they do not fit."""
        bound = [[each for each in group if not each.again or each.name in self.names] for group in self.bind(graph)]
        absent = {each.name: each.shape for group in bound for each in group if each.name not in self.names}

        def read(name: str) -> np.ndarray:
            return np.zeros(absent[name], np.float32) if name in absent else self.read(name)

        return renaming.load(bound, like, read, done)

    def bind(self, graph: ModelGraph) -> list[list[Bound]]:
        """Raises CheckpointError for tensors that are missing, left over or misshapen, all of them at once."""
        return self.family.checked(self.config, graph, self.tensors(), str(self.path))

    def read(self, name: str) -> np.ndarray:
        name = self.names[name]
        return self.files[name].read(name)


def is_folder(path: epath.PathLike) -> bool:
    """Whether there is a config.json, and not that of a run of ours, whose checkpoints are another matter."""
    path = epath.Path(path)
    return (path / 'config.json').exists() and not (path / 'fence').exists()


def open_folder(path: epath.PathLike) -> Folder:
    """Raises ConfigError for an architecture or a config that we do not have, CheckpointError for broken files."""
    path = epath.Path(path)
    try:
        said = json.loads((path / 'config.json').read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f'{path}/config.json is not JSON: {error}') from None
    if not isinstance(said, dict):
        raise CheckpointError(f'{path}/config.json is {type(said).__name__}, not an object of fields')
    family = find(said, path)
    try:
        config = fields.read(family.items, said, family.make)
        config.make(vocab_multiple=1)
    except ZeroDivisionError:
        raise ConfigError(f'{path}/config.json ({family.architecture}): one of its sizes is 0') from None
    except (ConfigError, KeyError, TypeError) as error:
        what = f'it has no {error.args[0]}' if isinstance(error, KeyError) else str(error)
        raise ConfigError(f'{path}/config.json ({family.architecture}): {what}') from None
    files = safetensors_file.open_folder(path)
    short = '' if any(name.startswith(family.prefix) for name in files) else family.prefix
    names = {short + family.now(name): name for name in files}
    return Folder(path, family, family.settle(config, names), files, names)


def find(said: Mapping[str, Any], path: epath.PathLike) -> Family:
    """The family that a config names. Raises ConfigError, with the nearest that there are."""
    names = said.get('architectures') or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in [*names, said.get('model_type') or '']):
        raise ConfigError(f'{path}/config.json: architectures and model_type are no names')
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    kinds = {family.model_type: family for family in reversed(ARCHITECTURES.values())}
    if not names and said.get('model_type') in kinds:
        return kinds[said['model_type']]
    name = names[0] if names else said.get('model_type')
    if name is None:
        raise ConfigError(f'{path}/config.json names no architecture')
    raise ConfigError(
        f'{path} is a {name}, which is not known here{_near(name)}; there are ' + ', '.join(ARCHITECTURES)
    )


def _near(name: str) -> str:
    """The architecture of a near name, by what stands before the ForCausalLM that all of them share."""
    names = {_body(each): each for each in reversed(ARCHITECTURES)}
    close = difflib.get_close_matches(_body(name), names, n=1, cutoff=0.7)
    return f' (did you mean {names[close[0]]!r}?)' if close else ''


def _body(name: str) -> str:
    return re.sub('(LMHead|For[A-Z]|Model).*', '', name).lower()


# ------------------------------------------------------------------------------------------------- and back


def expressible(config: Any, home: str = '') -> tuple[Family, dict[str, Any]]:
    """The first architecture that can say all of a config, and what it says; `home` is asked before the others.

    Raises ConfigError where there is none.
    """
    families = sorted(ARCHITECTURES.values(), key=lambda family: family.architecture != home)
    family, said = first(families, config, 'transformers')
    return family, {'architectures': [family.architecture], 'model_type': family.model_type, **said}


SHARD_BYTES = 5_000_000_000


def save(
    path: epath.PathLike,
    config: Any,
    graph: ModelGraph,
    weights: Mapping[str, Array],
    extra: Mapping[str, Any],
    *,
    home: str = '',
    done: Callable[[str], None] = lambda name: None,
) -> Family:
    """Writes config.json and safetensors files of at most 5 GB. `extra` joins the config: dtype, ids of marks.

    Raises ConfigError for a model that no architecture is.
    """
    path = epath.Path(path)
    family, said = expressible(config, home)
    bound = family.bind(config, graph)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {each.name: each for group in bound for each in group}
    dtypes = {name: np.dtype(weights[each.places[0].path].dtype) for name, each in tensors.items()}
    sizes = {name: math.prod(each.shape) * dtypes[name].itemsize for name, each in tensors.items()}

    def data(name: str) -> np.ndarray:
        array = renaming.theirs(tensors[name], weights)
        done(name)
        return array

    shards = _shards(sizes)
    for file, names in shards.items():
        listed = [(name, dtypes[name], tensors[name].shape) for name in names]
        safetensors_file.write(path / file, listed, data, {'format': 'pt'})
    if len(shards) > 1:
        places = {name: file for file, names in shards.items() for name in names}
        index = {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': places}
        (path / safetensors_file.INDEX).write_text(json.dumps(index, indent=2) + '\n')
    (path / 'config.json').write_text(json.dumps({**extra, **said}, indent=2) + '\n')
    return family


def _shards(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Names of tensors by file, in order, as many as SHARD_BYTES take."""
    groups: list[list[str]] = [[]]
    for name, size in sizes.items():
        if groups[-1] and sum(sizes[each] for each in groups[-1]) + size > SHARD_BYTES:
            groups.append([])
        groups[-1].append(name)
    if len(groups) == 1:
        return {safetensors_file.WHOLE: groups[0]}
    return {f'model-{i:05d}-of-{len(groups):05d}.safetensors': names for i, names in enumerate(groups, 1)}

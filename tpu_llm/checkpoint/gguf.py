"""A GGUF file as a model of ours, and a model of ours as such a file: llama.cpp's names for the same families.

Its metadata is one more config (keys less the architecture's name, `block_count` for `llama.block_count`), its tensors
one more table of rows (`gguf_decoders.py`).
"""

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from tpu_llm.arrays import Array
from tpu_llm.checkpoint import fields, gguf_file, renaming
from tpu_llm.checkpoint.family import Family, first
from tpu_llm.checkpoint.gguf_decoders import DENSE, PHI3, PRESENT, TIED
from tpu_llm.checkpoint.gguf_file import Reader
from tpu_llm.checkpoint.gguf_positions import TABLES, plain
from tpu_llm.checkpoint.renaming import Bound
from tpu_llm.config import ConfigError, nearest
from tpu_llm.config import load as load_config
from tpu_llm.data import tokenizer_gguf
from tpu_llm.data.tokenizer import Tokenizer
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.param import named_params
from tpu_llm.quant import ggml

ARCHITECTURES: dict[str, Family] = {**DENSE}


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    """A file whose config is one of ours; nothing of its tensors is read yet."""

    reader: Reader
    family: Family
    config: Any

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.reader.metadata

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.reader.tensors.items()}

    def load(
        self,
        graph: ModelGraph,
        like: Mapping[str, jax.ShapeDtypeStruct],
        done: Callable[[str], None] = lambda name: None,
    ) -> dict[str, Array]:
        """Weights by path as `like` says, decoded block by block. Raises CheckpointError where they do not fit."""
        return renaming.load(self.bind(graph), like, self.reader.read, done)

    def bind(self, graph: ModelGraph) -> list[list[Bound]]:
        """Raises CheckpointError for tensors that are missing, left over or misshapen, all of them at once."""
        return self.family.checked(self.config, graph, self.tensors(), str(self.reader.path))


def open_file(path: epath.PathLike) -> File:
    """Raises ConfigError for an architecture or a config that we do not have, and for a broken file."""
    reader = Reader(path)
    if reader.metadata.get('split.count', 1) > 1:
        raise ConfigError(
            f'{path} is one of {reader.metadata["split.count"]} parts; join them: llama-gguf-split --merge'
        )
    name = reader.metadata.get('general.architecture')
    if not isinstance(name, str):
        raise ConfigError(f'{path} does not say which architecture it is (general.architecture)')
    if name not in ARCHITECTURES:
        raise ConfigError(
            f'{path} is a {name!r}, which is not known here{nearest(name, ARCHITECTURES, cutoff=0.7)}; there are '
            + ', '.join(ARCHITECTURES)
        )
    family = ARCHITECTURES[name]
    try:
        config = fields.read(family.items, _said(reader, name), family.make)
        config.make(vocab_multiple=1)
    except (ConfigError, KeyError, TypeError) as error:
        what = f'it has no {error.args[0]}' if isinstance(error, KeyError) else str(error)
        raise ConfigError(f'{path} ({name}): {what}') from None
    return File(reader, family, config)


def _said(reader: Reader, name: str) -> dict[str, Any]:
    """The architecture's keys, and what only the tensors tell."""
    lead = f'{name}.'
    said = {key.removeprefix(lead): plain(value) for key, value in reader.metadata.items() if key.startswith(lead)}
    if 'token_embd.weight' in reader.tensors:
        said.setdefault('vocab_size', reader.tensors['token_embd.weight'].shape[0])
    said[TIED] = 'output.weight' not in reader.tensors
    said |= {key: True for key in PRESENT if key[1:-1] in reader.tensors}
    said |= {key: reader.read(key[1:-1]) for key in TABLES if key[1:-1] in reader.tensors}
    return said


# ------------------------------------------------------------------------------------------------- and back


def save(
    path: epath.PathLike,
    model: Any,
    tokenizer: Tokenizer | None,
    kind: str = 'F16',
    done: Callable[[str], None] = lambda name: None,
) -> Family:
    """Writes a file that llama.cpp loads: matrices as `kind`, or F16 where no block fits their rows, vectors and norms
    as F32.

    Raises ConfigError for a model that no architecture of llama.cpp is, or for a tokenizer that it does not have; warns
    of what llama.cpp passes over.
    """
    config = load_config(json.loads(model.described))
    family, said = first(list(ARCHITECTURES.values()), config, 'llama.cpp')
    if family is PHI3 and any(config.windows):
        # Its phi3.cpp: "Phi SWA is currently disabled". The file says the window nonetheless, as its converter's do.
        warnings.warn(
            f'{path}: llama.cpp passes over the window of {max(config.windows)} tokens; of longer texts it computes '
            'other numbers than the model',
            stacklevel=2,
        )
    tensors = {each.name: each for group in family.bind(config, ModelGraph(model)) for each in group}
    weights = {name: leaf.get_value() for name, leaf in named_params(model)}
    tables = {key[1:-1]: said[key] for key in TABLES if key in said}
    metadata = {
        'general.architecture': family.architecture,
        'general.name': epath.Path(path).stem,
        'general.file_type': _FILE_TYPES[kind],
        **{f'{family.architecture}.{key}': value for key, value in said.items() if key[0] != '('},
        **(tokenizer_gguf.to_metadata(tokenizer) if tokenizer else {'tokenizer.ggml.model': 'no_vocab'}),
    }
    listed = [(name, _kind(name, each.shape, kind), each.shape) for name, each in tensors.items()]
    listed += [(name, 'F32', table.shape) for name, table in tables.items()]

    def data(name: str) -> np.ndarray:
        array = tables[name] if name in tables else renaming.theirs(tensors[name], weights)
        done(name)
        return array

    gguf_file.write(path, metadata, listed, data)
    return family


_FILE_TYPES = {'F32': 0, 'F16': 1, 'Q4_0': 2, 'Q4_1': 3, 'Q8_0': 7, 'BF16': 32}  # llama.cpp's llama_ftype


def _kind(name: str, shape: Sequence[int], kind: str) -> str:
    if len(shape) == 1 or '_norm.' in name:
        return 'F32'
    return 'F16' if shape[-1] % ggml.FORMATS[kind].block_values else kind

"""A trained model, ready to use, from wherever it was saved."""

import dataclasses
from typing import Literal

import jax
from etils import epath

from tpu_llm import config
from tpu_llm.checkpoint import reader
from tpu_llm.config import ConfigError
from tpu_llm.data import tokenizer as tokenizers
from tpu_llm.data.tokenizer import Tokenizer
from tpu_llm.models.decoder import Decoder
from tpu_llm.models.graph import ModelGraph


def from_pretrained(
    path: epath.PathLike, dtype: Literal['float32', 'bfloat16'] | None = None
) -> tuple[Decoder, Tokenizer]:
    """(model, tokenizer) of a run's newest whole checkpoint, or of the one folder given; local or gs://.

    `dtype` is that of the computation (default: the run's own); parameters are float32. Every file is
    verified first. Raises ConfigError where there is no checkpoint, CheckpointError where none is whole.
    """
    checkpoint = reader.find(path)
    if checkpoint is None:
        raise ConfigError(f'{path} holds no finished checkpoint; give the workdir of a run that has saved one')
    manifest = checkpoint.manifest()
    model_config = config.load(manifest['config']['model'])
    if dtype is not None:
        model_config = dataclasses.replace(model_config, dtype=dtype)
    graph = ModelGraph(model_config.make(vocab_multiple=1))  # checkpoints hold no padding
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for name, x in graph.shapes().items()}
    restored = reader.load(checkpoint, {'params': like}, part=True)
    return graph.bind(restored.arrays['params']), _tokenizer(checkpoint.folder, manifest)


def _tokenizer(folder: epath.Path, manifest: dict) -> Tokenizer:
    saved = folder / 'tokenizer' / 'tokenizer.model'
    if saved.exists():
        return tokenizers.load(saved)
    # Tokenizers without a file are made from their config alone.
    return config.load(manifest['config']['data']['tokenizer']).make(iter(()), folder)

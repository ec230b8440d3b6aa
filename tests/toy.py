"""Toy models and batches that hide nothing: scales, biases, padded vocabulary and padding tokens are all noise."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpu_llm.arrays import Array, Batch
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.position import from_segments
from tpu_llm.optim.params import ParamInfo
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.parallel.rules import PRESETS
from tpu_llm.parallel.sharding import Layout


def config(**changes: Any) -> DecoderConfig:
    """Three layers of Llama, small enough to compile in a second; in float32 unless changed."""
    fields = {
        'vocab_size': 19,
        'width': 16,
        'layers': 3,
        'heads': 4,
        'kv_heads': 2,
        'head_dim': 6,
        'mlp_width': 20,
        'dtype': 'float32',
    }
    return DecoderConfig(**(fields | changes))


def graph(model: DecoderConfig, vocab_multiple: int = 8, **stages: Any) -> ModelGraph:
    return ModelGraph(model.make(vocab_multiple=vocab_multiple, **stages))


def weights(graph: ModelGraph, seed: int = 0) -> dict[str, Array]:
    """Unlike freshly drawn ones, these make an unused bias or scale, or a padded token that counts, show."""
    random = np.random.default_rng(seed)

    def draw(name: str, leaf: Any) -> Array:
        noise = random.standard_normal(leaf.shape)
        if name.endswith('.scale'):
            return jnp.asarray(leaf.get_metadata('init').value + 0.3 * noise, jnp.float32)
        if name.endswith('.bias'):
            return jnp.asarray(0.3 * noise, jnp.float32)
        dims, summed = leaf.get_metadata('dims'), leaf.get_metadata('summed')
        fan_in = np.prod([size for dim, size in zip(dims, leaf.shape, strict=True) if dim in (summed or 'D')])
        return jnp.asarray(noise * fan_in**-0.5, jnp.float32)

    return {name: draw(name, leaf) for name, leaf in graph.leaves.items()}


def infos(graph: ModelGraph) -> dict[str, ParamInfo]:
    """What the optimizer is told of a model's parameters."""
    metas = {name: leaf.get_metadata() for name, leaf in graph.leaves.items()}
    return {
        name: ParamInfo(meta['dims'], meta['summed'], padding=meta['padding'], nudge=meta['nudge'])
        for name, meta in metas.items()
    }


def batch(segments: Any, vocab_size: int = 19, seed: int = 0) -> Batch:
    """Random tokens, in the padding too; weights 1 outside it. Targets are random as well, not the next tokens."""
    random, segments = np.random.default_rng(seed), jnp.asarray(segments, jnp.int32)
    tokens, targets = random.integers(0, vocab_size, (2, *segments.shape))
    return Batch(
        tokens=jnp.asarray(tokens, jnp.int32),
        targets=jnp.asarray(targets, jnp.int32),
        weights=(segments > 0).astype(jnp.float32),
        segments=segments,
        positions=from_segments(segments),
    )


def layout(preset: str = 'zero3', **axes: int) -> Layout:
    """That many of the 8 devices; one, without axes."""
    mesh = Mesh(**({'fsdp': 1} | axes))
    count = int(np.prod(list(axes.values())))
    return Layout(mesh.make(jax.devices()[:count]), PRESETS[preset])

"""The layout matrix: a dense and an MoE model under every mesh axis, every pair and five triples, against one device.

python tests/parallel/matrix.py docs/layouts.md      measures all of it (minutes) and writes the page
"""

import dataclasses
import itertools
import os
import sys
from functools import cache
from pathlib import Path

if __name__ == '__main__':
    os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import jax
import jax.numpy as jnp
import numpy as np
import toy

from tpu_llm.arrays import Array
from tpu_llm.models.decoder_config import DecoderConfig, Dropout
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.mla import MLA
from tpu_llm.nn.moe import MoE
from tpu_llm.nn.rope_scaling import LongRope
from tpu_llm.nn.router import Router
from tpu_llm.objectives.ahead import Ahead
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.optim.optimizer import SGD
from tpu_llm.optim.schedule import Schedule
from tpu_llm.parallel.compile import Compiled
from tpu_llm.parallel.mesh import AXES
from tpu_llm.parallel.pipeline import Pipeline
from tpu_llm.parallel.sharding import Layout
from tpu_llm.train.frozen import start_frozen
from tpu_llm.train.state import abstract_state
from tpu_llm.train.step import make_step

SHAPE = {'vocab_size': 1000, 'heads': 16, 'kv_heads': 8, 'head_dim': 2, 'mlp_width': 24}
MODELS = {
    # Six layers do not divide over four stages, and every kind of dropout is on.
    'dense': toy.config(
        **SHAPE,
        layers=6,
        mlp='relu',
        norm='layer',
        bias=('qkv', 'out', 'mlp'),
        position='learned',
        max_length=16,
        dropout=Dropout(residual=0.1, attention=0.2, embedding=0.1),
    ),
    # Latent attention; and a balance loss over rows is the same however the batch is cut into microbatches.
    'moe': toy.config(
        **SHAPE | {'kv_heads': 16},
        layers=5,
        mla=MLA(kv_rank=16, query_rank=16, rope_dim=2, value_dim=2),
        moe=MoE(
            experts=8,
            chosen=2,
            expert_width=16,
            shared=1,
            first_dense=1,
            router=Router(balance_loss=0.1, balance_over='row', z_loss=1e-3, jitter=0.1),
        ),
    ),
    # One key-value head, which no axis splits.
    'parallel': toy.config(
        **SHAPE | {'kv_heads': 1}, layers=2, norm='layer_no_bias', norm_place='both', residual='parallel'
    ),
    # What scores gain by distance; norms over heads that are apart, over all at once and of each by its own scale.
    'alibi': toy.config(
        **SHAPE,
        layers=2,
        norm='layer',
        residual='parallel_two_norms',
        position='alibi',
        embed_norm=True,
        qk_norm='all_heads',
        qkv_clip=1.0,
        bias=('qkv', 'out', 'mlp', 'head'),
        logit_scale=4.0,  # gradients that a difference of weights of order 1 can show
    ),
    'relative': toy.config(
        **SHAPE | {'kv_heads': 1},
        layers=2,
        norm='rms_offset',
        norm_place='out',
        position='relative',
        norm_eps=0.1,  # heads of two numbers may have next to no length
        qk_norm='each_head',
        bias=('head',),
        logit_scale=2.0,
    ),
    'distances': toy.config(
        **SHAPE | {'kv_heads': 16}, layers=2, norm='layer', position='transformer_xl', logit_scale=4.0
    ),
    'two turns': toy.config(
        **SHAPE,
        layers=4,
        windows=(5, 0),
        local_rope_theta=100.0,
        rope_scaling=LongRope(short=(1.0,), long=(4.0,), original_length=6, attention_factor=1.1),
    ),
    # Two depths behind a layer of experts.
    'ahead': toy.config(
        **SHAPE | {'kv_heads': 16},
        layers=2,
        predict_ahead=2,
        mla=MLA(kv_rank=16, query_rank=16, rope_dim=2, value_dim=2),
        moe=MoE(
            experts=8, chosen=2, expert_width=16, router=Router(choice='sigmoid', balance_loss=0.1, balance_over='row')
        ),
        dropout=Dropout(residual=0.1),
        remat='full',
        logit_scale=4.0,
    ),
}
EVERYWHERE = ('dense', 'moe')  # on every layout
CIRCLES = {'moe': 2}
OBJECTIVES = {'ahead': Ahead(chunk=2, weight=2.0)}
BATCH = toy.batch(np.array([[1] * 5 + [2] * 7 + [0] * 4, [1] * 16] * 8), vocab_size=1000)

SINGLES = ({'data': 8}, {'fsdp': 8}, {'tensor': 8}, {'expert': 8}, {'seq': 8}, {'stage': 2})
PAIRS = tuple({a: 2, b: 4} if b != 'stage' else {a: 4, b: 2} for a, b in itertools.combinations(AXES, 2))
TRIPLES = tuple(
    dict.fromkeys(axes, 2)
    for axes in (
        ('data', 'fsdp', 'tensor'),
        ('stage', 'fsdp', 'tensor'),
        ('fsdp', 'expert', 'tensor'),
        ('fsdp', 'seq', 'tensor'),
        ('stage', 'expert', 'seq'),
    )
)
Params = dict[str, Array]


def title(axes: dict[str, int]) -> str:
    return ' x '.join(f'{axis} {size}' for axis, size in axes.items())


def make_graph(model: str, layout: Layout) -> ModelGraph:
    """On one device the 1000 tokens are not padded; on several they are, as a run pads them."""
    shape = layout.mesh.shape
    schedule = Pipeline(circles=CIRCLES.get(model, 1))
    multiple = 128 * shape['tensor'] if layout.mesh.size > 1 else 8
    return toy.graph(config(model, layout), multiple, stages=shape['stage'], schedule=schedule)


def config(model: str, layout: Layout) -> DecoderConfig:
    return MODELS[model]


def real(params: Params, graph: ModelGraph) -> dict[str, np.ndarray]:
    """Layers in their order, without the padding of stages and vocabulary."""
    arrays = {}
    for name, value in params.items():
        meta, array = graph.leaves[name].get_metadata(), np.asarray(value)
        if meta['dims'].startswith('L'):
            array = array[np.argsort(meta['layers'])[meta['layers'].count(-1) :]]
        arrays[name] = array
    for name in {'embed.table', 'head.kernel', 'head.bias'} & set(arrays):
        arrays[name] = arrays[name][:1000] if name != 'head.kernel' else arrays[name][:, :1000]
    return arrays


def placed(weights: dict[str, np.ndarray], graph: ModelGraph) -> Params:
    """One device's weights in a graph's order, with noise wherever it pads."""
    out = {}
    for name, noise in toy.weights(graph, seed=1).items():
        meta, given = graph.leaves[name].get_metadata(), weights[name]
        if meta['dims'].startswith('L'):
            rank = {layer: i for i, layer in enumerate(sorted(set(meta['layers']) - {-1}))}
            rows = [given[rank[layer]] if layer >= 0 else noise[i] for i, layer in enumerate(meta['layers'])]
            out[name] = jnp.stack(rows)
        else:
            out[name] = noise.at[tuple(slice(size) for size in given.shape)].set(given)
    return out


def one_step(model: str, layout: Layout, weights: dict[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients, the latter as the step of SGD at rate 1."""
    graph = make_graph(model, layout)
    tx = SGD(schedule=Schedule(peak=1.0, decay='constant'), clip=0.0, momentum=0.0).make(toy.infos(graph), 10)
    like = abstract_state(graph, tx, layout, ema=False)
    state = jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), like)
    params = {name: jax.device_put(w, like.params[name].sharding) for name, w in placed(weights, graph).items()}
    before = real(params, graph)
    step = Compiled(
        'step',
        make_step(graph, OBJECTIVES.get(model, NextToken(chunk=2)), tx, layout),
        donate=(0,),
        out_shardings=(jax.tree.map(lambda x: x.sharding, like), None),
    )
    place = layout.named(layout.rules.activations, 'BT', BATCH.tokens.shape)
    batch = jax.tree.map(lambda x: jax.device_put(x, place), BATCH)
    new, metrics = step(dataclasses.replace(state, params=params), start_frozen(1.0, 0, layout), batch)
    after = real(new.params, graph)
    return float(metrics['loss']), {name: before[name] - after[name] for name in before}


@cache
def alone(model: str) -> tuple[dict[str, np.ndarray], float, dict[str, np.ndarray]]:
    """The weights, and one device's loss and gradients with them."""
    layout = toy.layout()
    weights = {name: np.asarray(w) for name, w in toy.weights(make_graph(model, layout)).items()}
    return weights, *one_step(model, layout, weights)


def errors(model: str, preset: str, axes: dict[str, int]) -> tuple[float, float, str]:
    """Relative error of the loss, the largest error of a gradient over that gradient's largest entry, and whose.

    Some gradients are zero but for rounding (a bias of the keys): none counts as less than a hundredth of the largest.
    """
    weights, loss, gradients = alone(model)
    sharded_loss, sharded = one_step(model, toy.layout(preset, **axes), weights)
    sizes = {name: np.abs(g).max() for name, g in gradients.items()}
    floor = 0.01 * max(sizes.values())
    worst = {name: np.abs(sharded[name] - g).max() / max(sizes[name], floor) for name, g in gradients.items()}
    name = max(worst, key=worst.__getitem__)
    return abs(sharded_loss - loss) / loss, float(worst[name]), name


def page() -> str:
    rows = []
    for axes in SINGLES + PAIRS + TRIPLES:
        for model in EVERYWHERE:
            loss, gradient, name = errors(model, 'zero3', axes)
            rows.append(f'| {title(axes)} | {model} | {loss:.1e} | {gradient:.1e} | `{name}` |')
            print(rows[-1], flush=True)
    head = [
        '# Layouts',
        '',
        '    python tests/parallel/matrix.py docs/layouts.md',
        '',
        'One training step on 8 CPU devices against the same step on one, float32, preset `zero3`: the relative error',
        'of the loss, and the largest error of a gradient relative to the largest entry of that gradient (or a',
        'hundredth of the largest of all, for those that are zero but for rounding). What remains is the order of',
        'float32 sums. The tests (`tests/parallel/test_layouts.py`) allow 1e-6 for the loss and 1e-5 for gradients.',
        '',
        '| layout | model | loss | worst gradient | of |',
        '|---|---|---|---|---|',
    ]
    return '\n'.join([*head, *rows]) + '\n'


if __name__ == '__main__':
    Path(sys.argv[1]).write_text(page())

"""What every way to fine-tune few parameters keeps: add it to KINDS."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
import tuned
from tuned import TOKENS, noisy, says, wrapped

from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.param import named_params, param_sharding
from tpu_llm.parallel import sharding
from tpu_llm.parallel.pipeline import Pipeline
from tpu_llm.peft.adapters import Adapters
from tpu_llm.peft.ia3 import IA3
from tpu_llm.peft.lora import LoRA, QLoRA
from tpu_llm.peft.merging import adapted, bare, merge, unmerge
from tpu_llm.peft.prefix import Prefix
from tpu_llm.peft.prompts import SoftPrompts
from tpu_llm.peft.wrapping import count_trained

pytestmark = pytest.mark.usefixtures('quick_compile')

KINDS = {
    'lora': LoRA(targets=('.*',), rank=2, alpha=2.0),
    'dora': LoRA(rank=2, alpha=2.0, targets=('query', 'down'), dora=True),
    'qlora': QLoRA(rank=2),
    'ia3': IA3(),
    'adapters': Adapters(rank=4),
    'adapters behind MLPs': Adapters(rank=4, targets=('mlp.down',), activation='relu'),
    'soft prompts': SoftPrompts(length=3, most=2),
    'prefix': Prefix(length=3, most=2),
}
# On toy.config(): width 16, 3 layers, 4 heads over 2 of 6, MLP 20.
COUNTS = {
    'lora': 3 * 2 * (2 * (16 + 24) + 2 * (16 + 12) + 3 * (16 + 20)),
    'dora': 3 * (2 * (16 + 24) + 24 + 2 * (20 + 16) + 16),
    'qlora': 3 * 2 * (16 + 24 + 16 + 12),
    'ia3': 3 * (12 + 12 + 20),
    'adapters': 3 * 2 * (2 * 4 * 16 + 4 + 16),
    'adapters behind MLPs': 3 * (2 * 4 * 16 + 4 + 16),
    'soft prompts': 3 * 16,
    'prefix': 3 * 2 * 3 * 12,
}
EACH = pytest.mark.parametrize('name', KINDS)


@functools.cache
def bases():
    return says(tuned.base())


@EACH
def test_paths_and_counts(name):
    """Paths of the base stay; what trains is what is added; without weights it is the same."""
    kind, model = KINDS[name], wrapped(KINDS[name])
    paths = {path: leaf.get_metadata('added') for path, leaf in named_params(model)}
    assert {path for path, added in paths.items() if added} == {path for path in paths if kind.trains(path)}
    assert count_trained(model, kind) == COUNTS[name]
    held = tuned.base()
    kind.hold(held)
    assert set(dict(named_params(held))) == {path for path, added in paths.items() if not added}
    abstract = toy.config().make(vocab_multiple=8)
    kind.wrap(abstract)
    assert ModelGraph(abstract).shapes() == ModelGraph(model).shapes()


@pytest.mark.parametrize('name', [name for name in KINDS if name not in ('qlora', 'soft prompts', 'prefix')])
def test_it_starts_where_the_model_is(name):
    np.testing.assert_allclose(says(wrapped(KINDS[name])), bases(), rtol=1e-4, atol=1e-5)
    assert jnp.abs(says(noisy(wrapped(KINDS[name]))) - bases()).max() > 0.1


@EACH
def test_cached_is_uncached(name):
    """Also with layers one by one."""
    model = noisy(wrapped(KINDS[name]))
    graph, weights = ModelGraph(model), tuned.weights(model)

    @jax.jit
    def both(weights):
        model = graph.bind(weights)
        apart, tokens = model.unstacked(), jnp.asarray(TOKENS)
        ones, positions = jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(6)[None], (2, 6))
        cache, parts = apart.empty_cache(2, 6), []
        for cut in (slice(0, 4), slice(4, 5), slice(5, 6)):
            x, cache = apart.extend(tokens[:, cut], cache, segments=ones[:, cut], positions=positions[:, cut])
            parts.append(x)
        return model.hidden(tokens), jnp.concatenate(parts, axis=1)

    np.testing.assert_allclose(*both(weights), rtol=1e-4, atol=1e-4)


@EACH
def test_texts_of_a_row_do_not_see_each_other(name):
    model = noisy(wrapped(KINDS[name]))
    graph, weights = ModelGraph(model), tuned.weights(model)
    run = jax.jit(lambda weights, tokens, segments: graph.bind(weights).hidden(tokens, segments=segments))
    together = run(weights, jnp.asarray(TOKENS), jnp.asarray([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]]))
    alone = np.zeros_like(TOKENS)
    alone[0, :3], alone[1, :2] = TOKENS[0, 2:5], TOKENS[0, :2]
    apart = run(weights, jnp.asarray(alone), jnp.asarray([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]))
    np.testing.assert_allclose(together[0, 2:5], apart[0, :3], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(together[0, :2], apart[1, :2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['lora', 'dora', 'ia3'])
@pytest.mark.parametrize('bias', [(), ('qkv', 'out', 'mlp')])
def test_merging_keeps_what_it_says(name, bias):
    model = noisy(wrapped(KINDS[name], bias=bias))
    before = says(model)
    merge(model)
    np.testing.assert_allclose(says(model), before, rtol=1e-4, atol=1e-4)
    unmerge(model)
    np.testing.assert_allclose(says(model), before, rtol=1e-4, atol=1e-4)
    merge(model)
    bare(model)
    assert not adapted(model)
    np.testing.assert_allclose(says(model), before, rtol=1e-4, atol=1e-4)


def loss_and_gradients(name, layout=None, **changes):
    """Of what trains, after a step's worth of noise."""
    kind = KINDS[name]
    model = toy.config(**changes).make(vocab_multiple=8, **_stages(layout))
    base = ModelGraph(model)
    bound = base.bind(_weights(base))
    kind.wrap(bound)
    graph = ModelGraph(bound)
    values = {
        path: leaf.get_value() if not leaf.get_metadata('added') else jnp.asarray(_noise(path, leaf))
        for path, leaf in named_params(bound)
    }
    if layout is not None:
        values = {
            path: jax.device_put(x, param_sharding(layout, path, graph.leaves[path])) for path, x in values.items()
        }
    trained = {path: value for path, value in values.items() if kind.trains(path)}
    tokens = jnp.arange(8 * 6, dtype=jnp.int32).reshape(8, 6) % 19
    toward = jnp.asarray(np.random.default_rng(1).standard_normal((8, 6, 16)), jnp.float32)

    @jax.jit
    def run(trained, values):
        with sharding.use(layout):
            return jax.value_and_grad(lambda t: (graph.bind({**values, **t}).hidden(tokens) * toward).mean())(trained)

    loss, gradients = run(trained, values)
    return loss, {path: _in_order(graph.leaves[path], np.asarray(value)) for path, value in gradients.items()}


def _stages(layout):
    stages = layout.mesh.shape['stage'] if layout is not None else 1
    return {'stages': stages, 'schedule': Pipeline(microbatches=2)} if stages > 1 else {}


def _weights(graph):
    """The same numbers for a layer wherever it stands; none for a stage's place without layers."""
    plain = toy.graph(toy.config())
    values = toy.weights(plain)
    return {path: _placed(leaf, np.asarray(values[path])) for path, leaf in graph.leaves.items()}


def _noise(path, leaf):
    meta, random = leaf.get_metadata(), np.random.default_rng(len(path))
    count = max(meta['layers'], default=0) + 1
    shape = (count, *leaf.shape[1:]) if meta['dims'].startswith('L') else leaf.shape
    start = 1.0 if path.endswith('ia3_scale') else 0.0
    return _placed(leaf, (start + 0.2 * random.standard_normal(shape)).astype(np.float32))


def _placed(leaf, ordered):
    layers = leaf.get_metadata('layers')
    if not leaf.get_metadata('dims').startswith('L'):
        return jnp.asarray(ordered)
    return jnp.stack([jnp.asarray(ordered[i]) if i >= 0 else jnp.zeros(ordered.shape[1:]) for i in layers])


def _in_order(leaf, value):
    layers = leaf.get_metadata('layers')
    return value[np.argsort(layers)[-max(layers) - 1 :]] if leaf.get_metadata('dims').startswith('L') else value


@functools.cache
def alone(name):
    return loss_and_gradients(name)


@EACH
@pytest.mark.parametrize(
    ('preset', 'axes'),
    [
        ('zero3', {'data': 2, 'fsdp': 2, 'tensor': 2}),
        pytest.param('zero3_stream', {'fsdp': 4, 'tensor': 2}, marks=pytest.mark.full),
        pytest.param('zero1', {'data': 4, 'tensor': 2}, marks=pytest.mark.full),
        pytest.param('zero2', {'fsdp': 8}, marks=pytest.mark.full),
    ],
)
def test_sharded_is_unsharded(name, preset, axes):
    loss, gradients = loss_and_gradients(name, toy.layout(preset, **axes))
    want, those = alone(name)
    np.testing.assert_allclose(loss, want, rtol=1e-4, atol=1e-6)
    assert set(gradients) == set(those)
    for path, gradient in gradients.items():
        assert np.abs(those[path]).max() > 0, path
        np.testing.assert_allclose(
            gradient, those[path], atol=2e-5 * np.abs(those[path]).max(), rtol=1e-4, err_msg=path
        )


@pytest.mark.parametrize(
    'name', ['lora', *(pytest.param(name, marks=pytest.mark.full) for name in KINDS if name != 'lora')]
)
def test_stages_are_one_device(name):
    """Three layers over two stages: one of the places has no layer."""
    loss, gradients = loss_and_gradients(name, toy.layout(stage=2, tensor=2))
    want, those = alone(name)
    np.testing.assert_allclose(loss, want, rtol=1e-4, atol=1e-6)
    for path, gradient in gradients.items():
        np.testing.assert_allclose(
            gradient, those[path], atol=2e-5 * np.abs(those[path]).max(), rtol=1e-4, err_msg=path
        )

"""Low-rank adapters: float64 formulas on any map, where gradients flow, merging, swapping, and rows that choose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
import tuned
from tuned import TOKENS, noisy, program, says, wrapped

from tpu_llm.config import ConfigError, validate
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.einsum import Einsum
from tpu_llm.nn.mla import MLA
from tpu_llm.nn.param import named_params
from tpu_llm.peft import rows
from tpu_llm.peft.lora import LoRA, LoraEinsum, QLoRA, adapter, hold_several
from tpu_llm.peft.merging import adapted, bare, merge, unmerge
from tpu_llm.peft.wrapping import put

pytestmark = pytest.mark.usefixtures('quick_compile')

SPECS = {
    'BTD,DNH->BTNH': ('DR', 'RNH'),
    'BTNH,NHD->BTD': ('NHR', 'RD'),
    'BTD,DF->BTF': ('DR', 'RF'),
    'BECD,EDF->BECF': ('EDR', 'ERF'),
    'BTP,PR->BTR': ('Pr', 'rR'),
}
SIZES = {'D': 6, 'N': 3, 'H': 4, 'F': 5, 'E': 2, 'P': 7, 'R': 3}


def drawn(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize('dora', [False, True])
@pytest.mark.parametrize('spec', SPECS)
def test_any_linear_map_is_its_formula_in_float64(spec, dora):
    einsum = Einsum(spec, SIZES, bias=True)
    einsum.kernel = einsum.kernel.replace(jnp.asarray(drawn(einsum.kernel.shape, 1)))
    einsum.bias = einsum.bias.replace(jnp.asarray(drawn(einsum.bias.shape, 2)))
    config = LoRA(rank=2, alpha=6.0, dora=dora)
    map_ = LoraEinsum(einsum, config, 'mlp.up')
    down_dims, up_dims = SPECS[spec]
    assert map_.lora_down.get_metadata('dims') == down_dims
    assert map_.lora_up.get_metadata('dims') == up_dims
    down, up = drawn(map_.lora_down.shape, 3), drawn(map_.lora_up.shape, 4)
    map_.lora_down, map_.lora_up = map_.lora_down.replace(jnp.asarray(down)), map_.lora_up.replace(jnp.asarray(up))
    inputs, dims = spec.split('->')[0].split(',')
    x = drawn([SIZES.get(letter, 2) for letter in inputs], 5)
    kernel = np.asarray(einsum.kernel[...], np.float64)
    weight = kernel + 3.0 * np.einsum(f'{down_dims},{up_dims}->{dims}', np.float64(down), np.float64(up))
    if dora:
        extra = 0.2 * np.abs(drawn(map_.lora_magnitude.shape, 6))
        map_.lora_magnitude = map_.lora_magnitude.replace(jnp.asarray(extra))
        over = tuple(i for i, letter in enumerate(dims) if letter not in spec.split('->')[1])
        own, adapted = (np.sqrt((w**2).sum(over, keepdims=True)) for w in (kernel, weight))
        weight = (own + np.expand_dims(extra, over)) * weight / adapted
    bias = np.asarray(einsum.bias[...], np.float64)
    want = np.einsum(spec, np.float64(x), weight)
    want = want + bias.reshape((1,) * (want.ndim - bias.ndim) + bias.shape)
    np.testing.assert_allclose(map_(jnp.asarray(x)), want, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(map_.weight(), weight, rtol=2e-5, atol=2e-5)


def test_scales():
    assert LoRA(alpha=16.0).scale_of(8) == 2.0
    assert LoRA(alpha=16.0, rslora=True).scale_of(64) == 2.0


def test_targets_and_ranks_go_by_name():
    kind = LoRA(rank=2, targets=('query', r'mlp\..*'), rank_by={'mlp.down': 5})
    ranks = {each.name: each.lora_down.shape[-1] for each in adapted(wrapped(kind))}
    assert ranks == {'attention.query': 2, 'mlp.gate': 2, 'mlp.up': 2, 'mlp.down': 5}


def test_at_first_nothing_changes_bit_for_bit():
    """Of maps that are not multiplied together with others (`einsum.project`), where sums would have another order."""
    before = says(tuned.base())
    np.testing.assert_array_equal(says(wrapped(LoRA(targets=('out', 'down')))), before)
    np.testing.assert_allclose(says(wrapped(LoRA(targets=('.*',), dora=True))), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', [LoRA(targets=('.*',)), LoRA(rank=3, dora=True), QLoRA(targets=('query',))])
def test_gradients_flow_into_what_trains_and_nowhere_else(kind):
    model = noisy(wrapped(kind))
    graph, weights = ModelGraph(model), tuned.weights(model)
    trained = {path: value for path, value in weights.items() if kind.trains(path)}
    frozen = {path: value for path, value in weights.items() if not kind.trains(path)}
    assert trained
    assert all(value.size for value in frozen.values())
    gradient = jax.jit(jax.grad(lambda trained: (graph.bind({**frozen, **trained})(TOKENS) ** 2).mean()))(trained)
    assert all(np.abs(value).max() > 0 for value in gradient.values())
    assert {path for path, leaf in named_params(model) if leaf.get_metadata('added')} == set(trained)


@pytest.mark.parametrize(
    ('kind', 'changes'),
    [
        (LoRA(targets=('.*',)), {'bias': ('qkv', 'out', 'mlp')}),
        (LoRA(targets=('query', 'down'), dora=True, rslora=True), {}),
        (LoRA(targets=('.*',)), {'kv_heads': 4, 'mla': MLA(kv_rank=8, rope_dim=4, value_dim=6)}),
        (QLoRA(targets=('query', 'up'), base='int4'), {}),
    ],
    ids=['lora', 'dora', 'latent', 'int4'],
)
def test_merging_and_back(kind, changes):
    model = noisy(wrapped(kind, **changes))
    before = says(model)
    merge(model)
    merged = says(model)
    merge(model)
    np.testing.assert_array_equal(says(model), merged)
    np.testing.assert_allclose(merged, before, rtol=1e-4, atol=1e-4)
    unmerge(model)
    unmerge(model)
    np.testing.assert_allclose(says(model), before, rtol=1e-4, atol=1e-4)
    merge(model)
    bare(model)
    assert not adapted(model)
    np.testing.assert_allclose(says(model), before, rtol=1e-4, atol=1e-4)


def test_another_adapter_needs_no_new_program():
    model = wrapped(LoRA(targets=('query', 'down')))
    run, weights = program(model)
    first = run(weights)
    second = run({**weights, **adapter(noisy(model, 1))})
    assert np.abs(second - first).max() > 0.1
    assert run._cache_size() == 1
    np.testing.assert_array_equal(run(weights), first)


def test_each_row_has_its_adapter():
    kind = LoRA(rank=2, targets=('.*',))
    held = [adapter(noisy(wrapped(kind), seed)) for seed in (10, 90)]
    apart = []
    for each in held:
        model = wrapped(kind)
        put(model, each)
        apart.append(says(model))
    nobody = says(tuned.base())
    model = wrapped(kind)
    hold_several(model, held)
    graph, weights = ModelGraph(model), tuned.weights(model)

    @jax.jit
    def run(weights, index):
        with rows.choose(index):
            return graph.bind(weights)(TOKENS)

    for index in ([0, 1], [1, 0], [1, -1]):
        out = run(weights, jnp.asarray(index))
        want = [(nobody if i < 0 else apart[i])[row] for row, i in enumerate(index)]
        np.testing.assert_allclose(out, jnp.stack(want), rtol=1e-4, atol=1e-4)
    assert run._cache_size() == 1
    with pytest.raises(ValueError, match='has 2 adapters; say which each row takes'):
        model(TOKENS)
    with pytest.raises(ValueError, match=r'\[3\] numbers for 2 rows'), rows.choose(jnp.zeros(3, jnp.int32)):
        model(TOKENS)
    with pytest.raises(ConfigError, match='rows cannot choose one'):
        hold_several(wrapped(LoRA(dora=True)), held)


def test_wrapping_may_be_compiled():
    """As a run does it: codes are made of weights inside a compiled function, and what is added has no values yet."""
    graph, kind = toy.graph(toy.config()), QLoRA(targets=('query',))

    @jax.jit
    def made(weights):
        model = graph.bind(weights)
        kind.wrap(model)
        return {path: x for path, x in tuned.weights(model).items() if not isinstance(x, jax.ShapeDtypeStruct)}

    values, model = made(toy.weights(graph)), wrapped(kind)
    assert set(values) == {path for path in tuned.weights(model) if not kind.trains(path)}
    for path, value in values.items():
        np.testing.assert_allclose(value, tuned.weights(model)[path], rtol=1e-6, atol=1e-9, err_msg=path)


def test_dropout_is_of_the_step_and_of_training_only():
    model = noisy(wrapped(LoRA(dropout=0.5, targets=('query', 'down'))))
    graph, weights = ModelGraph(model), tuned.weights(model)
    hidden = jax.jit(lambda key: graph.bind(weights).hidden(TOKENS, key=key))
    one, again, other = (hidden(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3
    plain = noisy(wrapped(LoRA(targets=('query', 'down'))))
    np.testing.assert_allclose(graph.bind(weights).hidden(TOKENS), plain.hidden(TOKENS), rtol=1e-5, atol=1e-5)
    assert {path for path, _ in named_params(model)} == {path for path, _ in named_params(plain)}


@pytest.mark.parametrize('base', ['nf4', 'int4', 'int8'])
def test_a_base_of_codes_is_a_third_of_float32s(base):
    """Counted on the shapes of SmolLM2-135M, nothing allocated."""
    config = toy.config(
        vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64, mlp_width=1536, tied_embeddings=True
    )
    size = {}
    for kind in (LoRA(), QLoRA(base=base)):
        model = config.make(vocab_multiple=1)
        kind.wrap(model)
        leaves = [leaf.get_value() for _, leaf in named_params(model)]
        size[type(kind)] = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert size[QLoRA] / size[LoRA] < {'nf4': 0.14, 'int4': 0.14, 'int8': 0.26}[base]


@pytest.mark.parametrize(
    ('fields', 'said'),
    [
        ({'rank': 0}, 'rank = 0 must be at least 1'),
        ({'rank_by': {'up': 0}}, 'up = 0 must be at least 1'),
        ({'alpha': 0.0}, 'alpha = 0.0 must be more than 0'),
        ({'dropout': 1.0}, 'dropout is 1.0'),
        ({'targets': ()}, 'targets is empty'),
        ({'targets': ('(',)}, "'.' is no regular expression"),
    ],
)
def test_what_cannot_be_is_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        validate(LoRA(**fields))


def test_what_names_no_map_and_what_is_adapted_already():
    with pytest.raises(ConfigError, match=r"no linear map is 'q_proj'; there are attention.key, attention.out"):
        wrapped(LoRA(targets=('q_proj',)))
    with pytest.raises(ConfigError, match="no linear map is 'q_proj'"):
        wrapped(LoRA(rank_by={'q_proj': 2}))
    model = wrapped(LoRA())
    with pytest.raises(ConfigError, match='has an adapter already'):
        LoRA().wrap(model)

"""Every optimizer's steps against plain NumPy, and of one model however its layers are stacked and its vocabulary is
padded. A new optimizer is one more row of OPTIMIZERS: a config, and a function that gives the unscaled step of one
parameter of one layer, in float64, from its gradients so far.

Tolerance: 1e-5 of the step (float32 against float64); Muon's Newton-Schulz iteration, which magnifies rounding, 1e-3.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from tpu_llm.config import ConfigError
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.param import initialise
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.optim.optimizer import SGD, Adafactor, AdamW, Group, Lion, Muon
from tpu_llm.optim.params import ParamInfo
from tpu_llm.optim.schedule import Schedule
from tpu_llm.train.saved import Saved
from tpu_llm.train.state import abstract_state

pytestmark = pytest.mark.usefixtures('quick_compile')

FLAT = Schedule(peak=0.1, decay='constant')

# Stacked over two layers where dims begin with L, over six experts where E comes next.
PARAMS = {
    'embed.table': (ParamInfo(dims='VD', summed='', padding=3), (8, 4)),
    'stack.period.0.attention.query.kernel': (ParamInfo(dims='LDNH', summed='D'), (2, 4, 2, 3)),
    'stack.period.0.attention.query.bias': (ParamInfo(dims='LNH', summed=''), (2, 2, 3)),
    'stack.period.0.mlp_norm.scale': (ParamInfo(dims='LD', summed=''), (2, 4)),
    'stack.period.0.mlp.up.kernel': (ParamInfo(dims='LDF', summed='D'), (2, 4, 5)),
    'stack.period.0.moe.up.kernel': (ParamInfo(dims='LEDF', summed='D'), (2, 6, 4, 5)),
    'stack.period.0.moe.up.bias': (ParamInfo(dims='LEF', summed=''), (2, 6, 5)),
    'stack.period.0.moe.router.kernel': (ParamInfo(dims='LDE', summed='D'), (2, 4, 6)),
    'stack.period.0.moe.router.bias': (ParamInfo(dims='LE', summed=''), (2, 6)),
    'stack.suffix.0.mlp.down.kernel': (ParamInfo(dims='FD', summed='F'), (5, 4)),
    'stack.suffix.0.mlp.down.bias': (ParamInfo(dims='D', summed=''), (4,)),
    'norm.scale': (ParamInfo(dims='D', summed=''), (4,)),
}
INFOS = {name: info for name, (info, _) in PARAMS.items()}
DECAYED = {name for name in PARAMS if name.endswith(('.kernel', '.table'))}

_random = np.random.default_rng(0)
VALUES = {name: _random.standard_normal(shape) for name, (_, shape) in PARAMS.items()}
GRADIENTS = [{name: _random.standard_normal(shape) for name, (_, shape) in PARAMS.items()} for _ in range(3)]
for _each in (VALUES, *GRADIENTS):
    _each['embed.table'][5:] = 0.0  # as padding is


def adam(gradients, info, b1=0.9, b2=0.95, eps=1e-8):
    m = v = 0.0
    for g in gradients:
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    count = len(gradients)
    return m / (1 - b1**count) / (np.sqrt(v / (1 - b2**count)) + eps)


def sgd(gradients, info):
    m = 0.0
    for g in gradients:
        m = 0.9 * m + g
    return m


def nesterov(gradients, info):
    return gradients[-1] + 0.9 * sgd(gradients, info)


def lion(gradients, info):
    m = 0.0
    for g in gradients[:-1]:
        m = 0.99 * m + 0.01 * g
    return np.sign(0.9 * m + 0.1 * gradients[-1])


def adafactor(gradients, info):
    """A matrix of 4 rows and columns or more is factored; then RMS 1 at most."""
    if 'V' in info.dims and info.padding:
        real = adafactor([g[: -info.padding] for g in gradients], dataclasses.replace(info, padding=0))
        return np.pad(real, ((0, info.padding), (0, 0)))
    g = np.stack([as_matrix(g, info) for g in gradients])
    shape = gradients[0].shape
    factored = g.ndim == 3 and min(g.shape[1:]) >= 4
    second = 0.0
    for count, squares in enumerate(g**2 + 1e-30, 1):
        keep = 1 - count**-0.8
        second = keep * second + (1 - keep) * squares  # means of rows and columns are linear in it
    if factored:
        second = np.outer(second.mean(1), second.mean(0)) / second.mean()
    step = g[-1] / np.sqrt(second)
    return (step / max(1.0, np.sqrt((step**2).mean()))).reshape(shape)


def as_matrix(x, info):
    """Rows are what a linear map sums over, or a table's first dim; a bias is a vector."""
    if not info.summed:
        return x if info.dims == 'VD' else x.ravel()
    return x.reshape(math.prod(n for dim, n in zip(info.dims, x.shape, strict=True) if dim in info.summed), -1)


def muon(gradients, info):
    """Nesterov momentum, the matrix orthogonalised and scaled to an RMS of 0.2."""
    if not info.summed:
        return adam(gradients, info)
    momentum = 0.0
    for g in gradients:
        momentum = 0.95 * momentum + 0.05 * g
    count = len(gradients)
    m = 0.95 * momentum / (1 - 0.95 ** (count + 1)) + 0.05 * gradients[-1] / (1 - 0.95**count)
    x = as_matrix(m, info)
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return 0.2 * np.sqrt(max(x.shape)) * x.reshape(m.shape)


def each_alone(direction, gradients, info):
    """The step of a parameter whose layers and experts are stacked: of each by itself."""
    if info.dims[0] != 'L' and (info.dims[0] != 'E' or info.dims == 'E'):
        return direction(gradients, info)
    own = dataclasses.replace(info, dims=info.dims[1:])
    return np.stack([each_alone(direction, [g[i] for g in gradients], own) for i in range(len(gradients[0]))])


OPTIMIZERS = {
    # An eps under which entries with next to no gradient do not take whole steps by their rounding.
    'AdamW': (AdamW(schedule=FLAT, weight_decay=0.3, eps=1e-4), lambda g, i: adam(g, i, 0.9, 0.95, 1e-4)),
    'Adam': (AdamW(schedule=FLAT, b1=0.8, b2=0.7, eps=0.1), lambda g, i: adam(g, i, 0.8, 0.7, 0.1)),
    'SGD': (SGD(schedule=FLAT, weight_decay=0.3), sgd),
    'SGD, no momentum': (SGD(schedule=FLAT, momentum=0.0), lambda g, i: g[-1]),
    'SGD, Nesterov': (SGD(schedule=FLAT, nesterov=True), nesterov),
    'Lion': (Lion(schedule=FLAT, weight_decay=0.3), lion),
    'Adafactor': (Adafactor(schedule=FLAT, min_factored=4), adafactor),
    'Muon': (Muon(schedule=FLAT, weight_decay=0.3), muon),
}


def run(optimizer, gradients=GRADIENTS, infos=INFOS):
    """The parameters after each step."""
    tx = optimizer.make(infos, 100)

    step = jax.jit(lambda *args: tx(*args))

    def to_jax(values):
        return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}

    params = to_jax({name: VALUES[name] for name in infos})
    state = tx.init(params)
    history = []
    for count, g in enumerate(gradients):
        params, state, _ = step(to_jax(g), state, params, jnp.int32(count), FLAT.peak)
        history.append({name: np.asarray(value, np.float64) for name, value in params.items()})
    return history


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_three_steps_are_those_of_plain_numpy(name):
    optimizer, direction = OPTIMIZERS[name]
    history = run(dataclasses.replace(optimizer, clip=0.0))
    for path, info in INFOS.items():
        value, before = VALUES[path], VALUES[path]
        for count in range(1, 4):
            decay = optimizer.weight_decay * value if path in DECAYED else 0.0
            value = value - 0.1 * (each_alone(direction, [g[path] for g in GRADIENTS[:count]], info) + decay)
            tolerance = 1e-3 if name == 'Muon' else 1e-5
            np.testing.assert_allclose(history[count - 1][path], value, atol=tolerance, err_msg=f'{path}, step {count}')
        assert np.abs(value - before).max() > 0.01


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_decay_falls_on_matrices_alone(name):
    optimizer, _ = OPTIMIZERS[name]
    decayed = run(dataclasses.replace(optimizer, weight_decay=0.5), GRADIENTS[:1])[0]
    kept = run(dataclasses.replace(optimizer, weight_decay=0.0), GRADIENTS[:1])[0]
    for path in PARAMS:
        expected = 0.1 * 0.5 * VALUES[path] if path in DECAYED else 0.0
        np.testing.assert_allclose(kept[path] - decayed[path], expected + np.zeros_like(kept[path]), atol=1e-6)


def test_muon_steps_are_nearly_orthogonal_layer_by_layer():
    after = run(Muon(schedule=FLAT), GRADIENTS[:1])[0]
    path = 'stack.period.0.mlp.up.kernel'
    for layer in range(2):
        step = (VALUES[path] - after[path])[layer] / (0.1 * 0.2 * np.sqrt(5))
        singular = np.linalg.svd(step, compute_uv=False)
        assert singular.min() > 0.5
        assert singular.max() < 1.3


def test_gradients_are_clipped_by_their_global_norm():
    norm = np.sqrt(sum((g**2).sum() for g in GRADIENTS[0].values()))
    plain = SGD(schedule=FLAT, momentum=0.0)
    clipped = run(dataclasses.replace(plain, clip=norm / 2), GRADIENTS[:1])[0]
    below = run(dataclasses.replace(plain, clip=norm * 2), GRADIENTS[:1])[0]
    for path, value in VALUES.items():
        np.testing.assert_allclose(clipped[path], value - 0.1 * GRADIENTS[0][path] / 2, atol=1e-6)
        np.testing.assert_allclose(below[path], value - 0.1 * GRADIENTS[0][path], atol=1e-6)


def test_groups_change_rate_and_decay_of_what_they_match():
    groups = (
        Group(match=r'^embed\.', learning_rate=0.5),
        Group(match=r'attention|mlp\.up', weight_decay=0.0),
        Group(match=r'\.up\.', learning_rate=0.0),
    )
    optimizer = SGD(schedule=FLAT, momentum=0.0, clip=0.0, weight_decay=0.3, groups=groups)
    after = run(optimizer, GRADIENTS[:1])[0]
    for path, value in VALUES.items():
        rate = 0.05 if path == 'embed.table' else 0.0 if '.up.' in path else 0.1
        decay = 0.3 if path in DECAYED and 'attention' not in path and 'mlp.up' not in path else 0.0
        np.testing.assert_allclose(after[path], value - rate * (GRADIENTS[0][path] + decay * value), atol=1e-6)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_what_is_nudged_moves_against_the_sign_of_its_gradient_and_is_left_out_of_all_else(name):
    path = 'stack.period.0.moe.router.bias'
    gradients = [g | {path: 1e3 * g[path] * (np.arange(6) > 0)} for g in GRADIENTS]
    groups = (Group(match=r'\.bias$', learning_rate=3.0, weight_decay=7.0),)
    optimizer = dataclasses.replace(OPTIMIZERS[name][0], clip=1.0, groups=groups)
    after = run(optimizer, gradients, infos=INFOS | {path: dataclasses.replace(INFOS[path], nudge=0.02)})[-1]
    signs = sum(np.sign(g[path]) for g in gradients)
    np.testing.assert_allclose(after[path], VALUES[path] - 0.02 * signs, atol=1e-6)
    # As if it were not there: its gradient does not clip the others'.
    kept = [{name: g[name] for name in g if name != path} for g in GRADIENTS]
    alone = run(optimizer, kept, infos={name: info for name, info in INFOS.items() if name != path})[-1]
    for other, value in alone.items():
        np.testing.assert_allclose(after[other], value, rtol=1e-6, err_msg=other)


def test_the_norm_is_of_what_is_optimised_but_tells_of_all_that_is_not_finite():
    tx = SGD(schedule=FLAT).make({'a': ParamInfo('D', ''), 'b': ParamInfo('E', '', nudge=0.1)}, 10)
    assert tx.norm({'a': jnp.array([3.0, 4.0]), 'b': jnp.array([9.0])}) == 5.0
    assert jnp.isnan(tx.norm({'a': jnp.array([3.0, 4.0]), 'b': jnp.array([jnp.inf])}))


def test_a_group_of_nothing_but_what_is_nudged_is_an_error():
    with pytest.raises(ConfigError, match="optimizer group 'b' matches none of the 1 parameters"):
        AdamW(schedule=FLAT, groups=(Group(match='b'),)).make(
            {'a': ParamInfo('D', ''), 'b': ParamInfo('E', '', nudge=0.1)}, 10
        )


def test_the_rate_is_that_of_the_given_step():
    tx = SGD(schedule=Schedule(peak=0.1, warmup=3), momentum=0.0, clip=0.0).make(INFOS, 100)
    state = tx.init(VALUES)
    for step, expected in [(0, 0.1 / 3), (1, 0.2 / 3), (1, 0.2 / 3), (99, 0.01)]:
        after, state, rate = tx(GRADIENTS[0], state, VALUES, jnp.int32(step), 0.1)
        np.testing.assert_allclose(rate, expected, rtol=1e-6)
        for path, value in VALUES.items():
            np.testing.assert_allclose(after[path], value - expected * GRADIENTS[0][path], atol=1e-6)


def test_a_group_that_matches_nothing_is_an_error():
    optimizer = AdamW(schedule=FLAT, groups=(Group(match='embedding'),))
    with pytest.raises(ConfigError, match="optimizer group 'embedding' matches none of the 12 parameters"):
        optimizer.make(INFOS, 10)


def test_a_group_that_is_no_regular_expression_is_an_error():
    with pytest.raises(ConfigError, match=r"match = '\(' is not a regular expression: missing \), unterminated"):
        Group(match='(').validate()


WRONG = [
    (AdamW(schedule=FLAT, b1=1.0), 'b1 is 1.0; write a share to keep, from 0 to below 1'),
    (Lion(schedule=FLAT, b2=-0.1), 'b2 is -0.1; write a share to keep, from 0 to below 1'),
    (SGD(schedule=FLAT, momentum=1.5), 'momentum is 1.5; write a share to keep, from 0 to below 1'),
    (AdamW(schedule=FLAT, eps=0.0), 'eps is 0.0; it must be above 0'),
    (Adafactor(schedule=FLAT, decay_rate=0.0), 'decay_rate is 0.0; it must be above 0'),
    (Adafactor(schedule=FLAT, min_factored=0), 'min_factored is 0; it must be above 0'),
]


@pytest.mark.parametrize(('optimizer', 'message'), WRONG)
def test_settings_that_divide_by_zero_or_diverge_are_errors(optimizer, message):
    with pytest.raises(ConfigError, match=message):
        optimizer.validate()


@pytest.mark.parametrize('fields', [{'clip': -1.0}, {'weight_decay': -0.1}])
def test_negative_settings_are_errors(fields):
    with pytest.raises(ConfigError, match=r'clip = .* and weight_decay = .* must not be negative'):
        AdamW(schedule=FLAT, **fields).validate()


# ------------------------------------------------------------------------- one model, however it lies in memory

# No biases: that of a key has no gradient but rounding, which Adam magnifies.
CONFIG = toy.config(layers=3, norm='layer', position='learned', max_length=8)
BATCH = toy.batch([[1] * 5 + [2] * 3, [1] * 6 + [0] * 2])


class Form:
    """CONFIG's decoder as it lies in memory: how its layers are grouped, and its vocabulary padded."""

    def __init__(self, model):
        self.graph = ModelGraph(model)
        self.params = {name: leaf.get_value() for name, leaf in self.graph.leaves.items()}
        self.gradient = jax.jit(jax.grad(self.loss))

    def loss(self, params):
        return NextToken(chunk=4)(self.graph.bind(params), BATCH, frozen=None, key=None, step=jnp.int32(0))[0]

    def stepped(self, name):
        """The real weights of each layer after two steps."""
        tx = OPTIMIZERS[name][0].make(toy.infos(self.graph), 10)
        params, update = self.params, jax.jit(lambda *args: tx(*args))
        state = tx.init(params)
        for step in range(2):
            params, state, _ = update(self.gradient(params), state, params, jnp.int32(step), FLAT.peak)
        weights = {}
        for name, value in params.items():
            stack, group, _, rest = (*name.split('.', 3), '', '', '')[:4]
            if 'V' in self.graph.leaves[name].get_metadata('dims'):
                weights[name] = value[:19] if name == 'embed.table' else value[:, :19]
            elif stack == 'stack':
                weights[rest] = value if group == 'period' else jnp.stack([*weights.get(rest, []), value])
            else:
                weights[name] = value
        return weights


@pytest.fixture(scope='module')
def forms():
    def model(vocab_multiple=8):
        return initialise(CONFIG.make(vocab_multiple=vocab_multiple), 0)

    return {'stacked': Form(model()), 'one by one': Form(model().unstacked()), 'padded': Form(model(64))}


@pytest.mark.parametrize('form', ['one by one', 'padded'])
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_neither_the_stacking_of_layers_nor_padding_changes_a_step(forms, name, form):
    expected, weights = forms['stacked'].stepped(name), forms[form].stepped(name)
    assert weights.keys() == expected.keys()
    assert weights['mlp.up.kernel'].shape == (3, 16, 20)
    for path, value in expected.items():
        np.testing.assert_allclose(weights[path], value, atol=1e-5, err_msg=path)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_what_a_checkpoint_stores_has_no_padding(name):
    saved = []
    for multiple in (8, 64):
        graph = toy.graph(CONFIG, vocab_multiple=multiple)
        tx = OPTIMIZERS[name][0].make(toy.infos(graph), 10)
        tree = Saved(graph, abstract_state(graph, tx, toy.layout(), ema=False)).shapes()
        saved.append(jax.tree.map(lambda x: (x.shape, x.dtype), tree))
    assert saved[0] == saved[1]

"""Every optimizer's steps against plain NumPy. A new optimizer is one more row of OPTIMIZERS: a config, and a function
that gives the unscaled step of one parameter, in float64, from its gradients so far.

Tolerance: 1e-5 of the step (float32 against float64); Muon's Newton-Schulz iteration, which magnifies rounding, 1e-3.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tpu_llm.config import ConfigError
from tpu_llm.optim.optimizer import SGD, Adafactor, AdamW, Group, Lion, Muon, ParamInfo
from tpu_llm.optim.schedule import Schedule

pytestmark = pytest.mark.usefixtures('quick_compile')

FLAT = Schedule(peak=0.1, decay='constant')

# Stacked over two layers where dims begin with L.
PARAMS = {
    'embed.table': (ParamInfo(dims='VD', summed=''), (8, 4)),
    'stack.period.0.attention.query.kernel': (ParamInfo(dims='LDNH', summed='D'), (2, 4, 2, 3)),
    'stack.period.0.attention.query.bias': (ParamInfo(dims='LNH', summed=''), (2, 2, 3)),
    'stack.period.0.mlp_norm.scale': (ParamInfo(dims='LD', summed=''), (2, 4)),
    'stack.period.0.mlp.up.kernel': (ParamInfo(dims='LDF', summed='D'), (2, 4, 5)),
    'stack.suffix.0.mlp.down.kernel': (ParamInfo(dims='FD', summed='F'), (5, 4)),
    'stack.suffix.0.mlp.down.bias': (ParamInfo(dims='D', summed=''), (4,)),
    'norm.scale': (ParamInfo(dims='D', summed=''), (4,)),
}
INFOS = {name: info for name, (info, _) in PARAMS.items()}
DECAYED = {name for name in PARAMS if name.endswith(('.kernel', '.table'))}

_random = np.random.default_rng(0)
VALUES = {name: _random.standard_normal(shape) for name, (_, shape) in PARAMS.items()}
GRADIENTS = [{name: _random.standard_normal(shape) for name, (_, shape) in PARAMS.items()} for _ in range(3)]


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
    """Factored over the two longest dims where both have 4 entries or more; then RMS 1 at most."""
    shape = gradients[0].shape
    long = sorted(np.argsort(shape)[-2:].tolist()) if len(shape) > 1 and sorted(shape)[-2] >= 4 else None
    rows = columns = full = 0.0
    for count, g in enumerate(gradients, 1):
        keep, square = 1 - count**-0.8, g**2 + 1e-30
        full = keep * full + (1 - keep) * square
        if long:
            rows = keep * rows + (1 - keep) * square.mean(long[1], keepdims=True)
            columns = keep * columns + (1 - keep) * square.mean(long[0], keepdims=True)
    second = rows * columns / rows.mean(long[0], keepdims=True) if long else full
    step = gradients[-1] / np.sqrt(second)
    return step / max(1.0, np.sqrt((step**2).mean()))


def muon(gradients, info):
    """Nesterov momentum, each layer's matrix orthogonalised by itself and scaled to an RMS of 0.2."""
    if not info.summed:
        return adam(gradients, info)
    if info.dims[0] == 'L':
        layer = dataclasses.replace(info, dims=info.dims[1:])
        return np.stack([muon([g[i] for g in gradients], layer) for i in range(len(gradients[0]))])
    momentum = 0.0
    for g in gradients:
        momentum = 0.95 * momentum + 0.05 * g
    count = len(gradients)
    m = 0.95 * momentum / (1 - 0.95 ** (count + 1)) + 0.05 * gradients[-1] / (1 - 0.95**count)
    rows = math.prod(size for dim, size in zip(info.dims, m.shape, strict=True) if dim in info.summed)
    x = m.reshape(rows, -1)
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return 0.2 * np.sqrt(max(x.shape)) * x.reshape(m.shape)


OPTIMIZERS = {
    'AdamW': (AdamW(schedule=FLAT, weight_decay=0.3), adam),
    'Adam': (AdamW(schedule=FLAT, b1=0.8, b2=0.7, eps=0.1), lambda g, i: adam(g, i, 0.8, 0.7, 0.1)),
    'SGD': (SGD(schedule=FLAT, weight_decay=0.3), sgd),
    'SGD, no momentum': (SGD(schedule=FLAT, momentum=0.0), lambda g, i: g[-1]),
    'SGD, Nesterov': (SGD(schedule=FLAT, nesterov=True), nesterov),
    'Lion': (Lion(schedule=FLAT, weight_decay=0.3), lion),
    'Adafactor': (Adafactor(schedule=FLAT, min_factored=4), adafactor),
    'Muon': (Muon(schedule=FLAT, weight_decay=0.3), muon),
}


def run(optimizer, gradients=GRADIENTS, steps=100):
    """The parameters after each step."""
    tx = optimizer.make(INFOS, steps)

    @jax.jit
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    def to_jax(values):
        return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}

    params = to_jax(VALUES)
    state = tx.init(params)
    history = []
    for g in gradients:
        params, state = step(params, state, to_jax(g))
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
            value = value - 0.1 * (direction([g[path] for g in GRADIENTS[:count]], info) + decay)
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
        decay = 0.3 if path in ('embed.table', 'stack.suffix.0.mlp.down.kernel') else 0.0
        np.testing.assert_allclose(after[path], value - rate * (GRADIENTS[0][path] + decay * value), atol=1e-6)


def test_the_rate_is_that_of_the_step():
    optimizer = SGD(schedule=Schedule(peak=0.1, warmup=3), momentum=0.0, clip=0.0)
    first, second, _ = run(optimizer)
    path = 'norm.scale'
    np.testing.assert_allclose(VALUES[path] - first[path], 0.1 / 3 * GRADIENTS[0][path], atol=1e-6)
    np.testing.assert_allclose(first[path] - second[path], 0.2 / 3 * GRADIENTS[1][path], atol=1e-6)


def test_a_group_that_matches_nothing_is_an_error():
    optimizer = AdamW(schedule=FLAT, groups=(Group(match='embedding'),))
    with pytest.raises(ConfigError, match="optimizer group 'embedding' matches none of the 8 parameters"):
        optimizer.make(INFOS, 10)


def test_a_group_that_is_no_regular_expression_is_an_error():
    with pytest.raises(ConfigError, match=r"match = '\(' is not a regular expression: missing \), unterminated"):
        Group(match='(').validate()


@pytest.mark.parametrize('fields', [{'clip': -1.0}, {'weight_decay': -0.1}])
def test_negative_settings_are_errors(fields):
    with pytest.raises(ConfigError, match=r'clip = .* and weight_decay = .* must not be negative'):
        AdamW(schedule=FLAT, **fields).validate()

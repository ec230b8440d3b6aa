"""The step a competent researcher writes by hand in an hour: plain JAX, dictionaries, optax. The yardstick.

Llama-style, 4 layers, width 256, 4 heads, SwiGLU 1024, vocabulary 8192, float32. `layers='scan'` scans stacked
weights, `layers='loop'` unrolls them.
"""

import functools

import jax
import jax.numpy as jnp
import optax

LAYERS, WIDTH, HEADS, HIDDEN, VOCAB = 4, 256, 4, 1024, 8192
BLOCK = ('q', 'k', 'v', 'o', 'gate', 'up', 'down', 'norm1', 'norm2')


def init(key):
    shapes = {
        'embed': (VOCAB, WIDTH),
        'head': (WIDTH, VOCAB),
        **dict.fromkeys('qkvo', (LAYERS, WIDTH, WIDTH)),
        'gate': (LAYERS, WIDTH, HIDDEN),
        'up': (LAYERS, WIDTH, HIDDEN),
        'down': (LAYERS, HIDDEN, WIDTH),
    }
    keys = jax.random.split(key, len(shapes))
    params = {n: 0.02 * jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    ones = {'norm1': jnp.ones((LAYERS, WIDTH)), 'norm2': jnp.ones((LAYERS, WIDTH)), 'norm': jnp.ones(WIDTH)}
    return params | ones


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def rope(x):
    length, width = x.shape[1], x.shape[3]
    angles = jnp.arange(length)[:, None] * 10_000.0 ** (-jnp.arange(0, width, 2) / width)
    sin, cos = jnp.sin(angles)[None, :, None], jnp.cos(angles)[None, :, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def block(x, p):
    batch, length, _ = x.shape
    y = rms_norm(x, p['norm1'])
    q, k, v = ((y @ p[n]).reshape(batch, length, HEADS, -1) for n in 'qkv')
    scores = jnp.einsum('btnh,bsnh->bnts', rope(q), rope(k)) / q.shape[-1] ** 0.5
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e30)
    y = jnp.einsum('bnts,bsnh->btnh', jax.nn.softmax(scores), v).reshape(batch, length, WIDTH)
    x = x + y @ p['o']
    y = rms_norm(x, p['norm2'])
    return x + (jax.nn.silu(y @ p['gate']) * (y @ p['up'])) @ p['down']


def loss_fn(params, tokens, layers):
    x = params['embed'][tokens[:, :-1]]
    stacked = {name: params[name] for name in BLOCK}
    if layers == 'scan':
        x, _ = jax.lax.scan(lambda x, p: (block(x, p), None), x, stacked)
    else:
        for i in range(LAYERS):
            x = block(x, {name: w[i] for name, w in stacked.items()})
    logits = rms_norm(x, params['norm']) @ params['head']
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def make(layers):
    """(state, step) where step(state, tokens) -> (state, loss)."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.1))
    params = init(jax.random.key(0))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, tokens):
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens, layers)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return (params, optimizer.init(params)), step

"""State spaces against their recurrences, token by token in float64; packed rows, padding, and what a cache holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from tpu_llm.config import ConfigError
from tpu_llm.infer.generate import decode, for_decoding, pad_left
from tpu_llm.infer.sampling import Greedy
from tpu_llm.models.flops import forward_flops
from tpu_llm.nn.cache import StateCache
from tpu_llm.nn.mamba import Mamba, selective_scan
from tpu_llm.nn.mamba2 import Mamba2, chunk_scan
from tpu_llm.nn.moe import MoE
from tpu_llm.nn.param import initialise, named_params, param_sharding
from tpu_llm.nn.router import Router
from tpu_llm.nn.ssm import LogEven
from tpu_llm.parallel import sharding

BARE = {'layers': 2, 'heads': 0, 'kv_heads': 0, 'head_dim': 0, 'mlp_width': 0, 'position': 'none', 'mixers': ('ssm',)}
MAMBA = BARE | {'ssm': Mamba(state=5, conv=3, rank=2, chunk=4)}
MAMBA2 = BARE | {'ssm': Mamba2(state=5, head_dim=4, groups=2, chunk=4)}
HYBRID = {
    'layers': 3,
    'position': 'none',
    'mixers': ('ssm', 'attention'),
    'ssm': Mamba(state=3, norms=True, chunk=3),
    'moe': MoE(experts=3, chosen=2, expert_width=8, every=2, router=Router(choice='softmax_then_topk')),
}
pytestmark = pytest.mark.usefixtures('quick_compile')


def rows(seed=0, length=11):
    """x, step, decay, write, read, carries, state of Mamba: 2 rows, 3 channels, states of 4."""
    random = np.random.default_rng(seed)
    x, write, read = (random.standard_normal((2, length, size)) for size in (3, 4, 4))
    step, decay = random.uniform(0.1, 1.0, (2, length, 3)), -random.uniform(0.2, 2.0, (3, 4))
    carries = np.ones((2, length), bool)
    carries[0, [0, 5]] = carries[1, 7] = False
    return x, step, decay, write, read, carries, random.standard_normal((2, 3, 4))


def channel_by_channel(x, step, decay, write, read, carries, state):
    out = []
    for t in range(x.shape[1]):
        kept = np.exp(step[:, t, :, None] * decay) * carries[:, t, None, None]
        state = kept * state + (step[:, t] * x[:, t])[..., None] * write[:, t, None]
        out.append((state * read[:, t, None]).sum(-1))
    return np.stack(out, 1), state


def heads(seed=0, length=11):
    """The same of Mamba-2: 4 heads of 3 in 2 groups."""
    random = np.random.default_rng(seed)
    x, state = random.standard_normal((2, length, 4, 3)), random.standard_normal((2, 4, 3, 5))
    write, read = random.standard_normal((2, 2, length, 2, 5))
    step, decay = random.uniform(0.1, 1.0, (2, length, 4)), -random.uniform(0.2, 2.0, 4)
    return x, step, decay, write, read, rows(seed, length)[5], state


def head_by_head(x, step, decay, write, read, carries, state):
    write, read = np.repeat(write, 2, axis=2), np.repeat(read, 2, axis=2)
    out = []
    for t in range(x.shape[1]):
        kept = np.exp(step[:, t] * decay) * carries[:, t, None]
        added = (step[:, t, :, None] * x[:, t])[..., None] * write[:, t, :, None]
        state = kept[..., None, None] * state + added
        out.append((state * read[:, t, :, None]).sum(-1))
    return np.stack(out, 1), state


SCANS = pytest.mark.parametrize(
    ('scan', 'given', 'reference'),
    [(selective_scan, rows, channel_by_channel), (chunk_scan, heads, head_by_head)],
    ids=['mamba', 'mamba2'],
)


@SCANS
@pytest.mark.parametrize('chunk', [1, 4, 11, 64])
def test_a_scan_is_its_recurrence(scan, given, reference, chunk):
    """Chunks that divide the row, that do not, and that are longer; documents that begin within one and with one."""
    said = given()
    y, state = scan(*(jnp.asarray(x, x.dtype if x.dtype == bool else jnp.float32) for x in said), chunk)
    expected, last = reference(*said)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(state, last, rtol=0, atol=2e-5)


@SCANS
def test_its_gradient_is_that_of_the_recurrence(scan, given, reference):
    """Against central differences of the reference in float64, along random directions."""
    *said, carries, state = given()
    random = np.random.default_rng(1)
    pull = random.standard_normal(reference(*said, carries, state)[0].shape)
    moved = [*said, state]

    def loss(arrays):
        *given, state = arrays
        return (scan(*given, jnp.asarray(carries), state, 4)[0] * pull.astype(np.float32)).sum()

    gradients = jax.grad(loss)([jnp.asarray(x, jnp.float32) for x in moved])
    for i, gradient in enumerate(gradients):
        way = random.standard_normal(moved[i].shape)

        def at(distance, i=i, way=way):
            there = [x + distance * way if j == i else x for j, x in enumerate(moved)]
            return (reference(*there[:-1], carries, there[-1])[0] * pull).sum()

        assert np.vdot(np.asarray(gradient, np.float64), way) == pytest.approx((at(1e-5) - at(-1e-5)) / 2e-5, rel=1e-4)


def test_long_rows_of_steep_decays_stay_finite():
    """What is left of a token after hundreds of steps is 0, not a ratio of numbers that underflow."""
    x, step, decay, write, read, carries, state = (jnp.asarray(each) for each in heads(length=256))
    args = (x, 10 * step, 20 * decay, write, read, carries, state)
    args = tuple(each if each.dtype == bool else each.astype(jnp.float32) for each in args)
    y, pull = jax.vjp(lambda step: chunk_scan(args[0], step, *args[2:], 128)[0], args[1])
    assert np.isfinite(y).all()
    assert np.isfinite(pull(jnp.ones_like(y))[0]).all()


# The hybrid has layers of Mamba, too.
KINDS = [
    pytest.param(MAMBA, id='mamba', marks=pytest.mark.full),
    pytest.param(MAMBA2, id='mamba2'),
    pytest.param(HYBRID, id='hybrid'),
]


@pytest.fixture(scope='module', params=KINDS)
def model(request):
    """Calls a function of the model and arrays, compiled as one."""
    graph = toy.graph(toy.config(**request.param))
    weights = toy.weights(graph)

    def call(function, *args):
        return jax.jit(lambda weights, *args: function(graph.bind(weights), *args))(weights, *args)

    return call


def test_documents_of_a_row_do_not_see_each_other(model):
    tokens = np.random.default_rng(0).integers(0, 19, (1, 13))

    def packed_and_apart(decoder, tokens):
        packed = decoder(tokens, segments=np.array([[1] * 6 + [2] * 5 + [0] * 2]))
        return packed, decoder(tokens[:, :6]), decoder(tokens[:, 6:11])

    packed, first, second = model(packed_and_apart, tokens)
    np.testing.assert_allclose(packed[:, :6], first, rtol=0, atol=1e-5)
    np.testing.assert_allclose(packed[:, 6:11], second, rtol=0, atol=1e-5)


def test_a_cache_says_the_same_however_the_row_comes(model):
    """In pieces of 1 token and more, with padding on the left of any piece."""
    tokens = np.random.default_rng(0).integers(0, 19, (1, 11))

    def in_pieces(decoder, tokens):
        cache, parts, start = decoder.empty_cache(1, 16), [], 0
        for size, padding in ((5, 0), (1, 2), (5, 1)):
            row = jnp.pad(tokens[:, start : start + size], ((0, 0), (padding, 0)), constant_values=7)
            segments = jnp.asarray((np.arange(size + padding) >= padding)[None], jnp.int32)
            positions = jnp.maximum(start + jnp.cumsum(segments, axis=1) - 1, 0)
            hidden, cache = decoder.extend(row, cache, segments=segments, positions=positions)
            parts.append(decoder.logits(hidden)[:, padding:])
            start += size
        return jnp.concatenate(parts, axis=1), decoder(tokens)

    pieces, whole = model(in_pieces, tokens)
    np.testing.assert_allclose(pieces, whole, rtol=0, atol=1e-4)


def test_a_cached_state_begins_anew_with_a_document(model):
    tokens = np.random.default_rng(0).integers(0, 19, (1, 9))

    def in_parts(decoder, tokens):
        cache, parts = decoder.empty_cache(1, 9), []
        for part, ids, at in ((slice(0, 4), [1, 1, 1, 1], 0), (slice(4, 5), [2], 0), (slice(5, 9), [2, 2, 3, 3], 1)):
            segments = jnp.asarray([ids])
            positions = at + jnp.arange(len(ids))[None]
            hidden, cache = decoder.extend(tokens[:, part], cache, segments=segments, positions=positions)
            parts.append(decoder.logits(hidden))
        whole = decoder(tokens, segments=jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 3, 3]]))
        return jnp.concatenate(parts, axis=1), whole

    parts, whole = model(in_parts, tokens)
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-4)


def test_rows_of_a_batch_are_continued_as_each_alone(model):
    """By the model that decodes on a CPU: its layers one by one, its maps joined."""
    prompts = [np.arange(3), np.arange(5, 12)]

    def greedy(decoder, tokens, segments):
        options = {'max_new': 4, 'sampling': Greedy(), 'eos': -1, 'vocab_size': 19}
        return decode(for_decoding(decoder), tokens, segments, jax.random.key(0), **options)

    together = model(greedy, *pad_left(prompts, rows=2, pad=0))
    # Of one shape, so that they compile once.
    apart = [model(greedy, *pad_left([prompt], rows=2, pad=0))[:1] for prompt in prompts]
    np.testing.assert_array_equal(together, np.concatenate(apart))


def test_a_state_is_of_one_size_and_in_float32():
    decoder = toy.config(**MAMBA2, dtype='bfloat16').make()
    short, long = decoder.empty_cache(2, 8), decoder.empty_cache(2, 4096)
    assert jax.tree.map(jnp.shape, short.layers) == jax.tree.map(jnp.shape, long.layers)
    (layers,) = short.layers
    assert isinstance(layers, StateCache)
    assert layers.state.shape == (2, 2, 8, 4, 5)
    assert layers.state.dtype == jnp.float32
    assert [each.dtype for each in layers.inputs] == [jnp.bfloat16] * 3


@pytest.mark.parametrize(
    'changes',
    [MAMBA2, pytest.param(MAMBA, marks=pytest.mark.full), pytest.param(HYBRID, marks=pytest.mark.full)],
    ids=['mamba2', 'mamba', 'hybrid'],
)
def test_layouts_compute_what_one_device_does(changes):
    """Loss gradients over fsdp and tensor, of packed rows, and logits after a cached prompt."""
    changes = changes | {'width': 32, 'remat': 'full'}
    graph = toy.graph(toy.config(**changes))
    weights = toy.weights(graph)
    batch = toy.batch([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12, [1] * 3 + [2] * 9, [0] * 2 + [1] * 10])

    def run(weights, layout):
        def loss(weights):
            logits = graph.bind(weights)(batch.tokens, segments=batch.segments)
            return (jnp.sin(logits) * batch.weights[..., None]).mean()

        def both(weights):
            with sharding.use(layout):
                value, gradients = jax.value_and_grad(loss)(weights)
            with sharding.use(layout and layout.decoding):
                decoder = graph.bind(weights)
                hidden, _ = decoder.extend(
                    batch.tokens, decoder.empty_cache(4, 16), segments=batch.segments, positions=batch.positions
                )
            return value, gradients, hidden

        return jax.jit(both)(weights)

    value, gradients, hidden = run(weights, None)
    layout = toy.layout(fsdp=2, tensor=2)
    placed = {
        name: jax.device_put(weights[name], param_sharding(layout, name, leaf)) for name, leaf in graph.leaves.items()
    }
    there_value, there, there_hidden = run(placed, layout)
    assert float(there_value) == pytest.approx(float(value), abs=1e-6)  # a mean of sines
    real = np.asarray(batch.segments) > 0
    np.testing.assert_allclose(np.asarray(there_hidden)[real], np.asarray(hidden)[real], rtol=0, atol=1e-4)
    for name, gradient in gradients.items():
        scale = float(jnp.abs(gradient).max())
        assert np.isfinite(gradient).all(), name
        assert scale > 0, name
        np.testing.assert_allclose(there[name], gradient, rtol=0, atol=1e-4 * scale, err_msg=name)


def test_it_begins_as_published():
    """Steps between 0.001 and 0.1, and decays that differ."""
    decoder = initialise(toy.config(**MAMBA).make(), 0)
    drawn = {name.split('ssm.')[-1]: leaf.get_value() for name, leaf in named_params(decoder)}
    steps = np.asarray(jax.nn.softplus(drawn['step_bias']))
    assert steps.min() > 0.0009
    assert steps.max() < 0.11
    assert np.log(steps).std() > 1
    np.testing.assert_allclose(np.exp(drawn['log_decay'][0, 0]), np.arange(1, 6), rtol=1e-6)
    decays = np.exp(LogEven()(jax.random.key(0), (4096,)))
    assert decays.min() >= 1
    assert decays.max() <= 16
    assert decays.mean() == pytest.approx(8.5, rel=0.02)


def test_flops_by_hand():
    """Of Mamba a layer maps 16 to 2 x 32 and back, 32 to 2 + 5 + 5 and 2 to 32; its state has 32 x 5 numbers."""
    config = toy.config(**MAMBA)
    maps = 16 * 64 + 32 * 12 + 2 * 32 + 32 * 16
    assert forward_flops(config, 64) == 2 * 16 * 19 + 2 * (2 * maps + 4 * 32 * 5)
    maps = 16 * (2 * 32 + 2 * 2 * 5 + 8) + 32 * 16
    assert forward_flops(toy.config(**MAMBA2), 64) == 2 * 16 * 19 + 2 * (2 * maps + 4 * 32 * 5)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (MAMBA | {'heads': 4}, r"heads, kv_heads and head_dim are 0 then, and position = 'none' \(they are 4, 0, 0"),
        (MAMBA | {'ssm': None, 'mlp_width': 20}, 'mixers = .* with ssm = None; write one mixer a layer'),
        ({'ssm': Mamba()}, 'mixers = .* with ssm = Mamba'),
        ({'mlp_width': 0}, 'mlp_width is 0; it must be at least 1'),
        (MAMBA | {'norm_place': 'both'}, 'mlp_width = 0 leaves the MLP out'),
        (BARE | {'ssm': Mamba(conv=1)}, 'ssm.conv is 1; it must be at least 2'),
        (BARE | {'ssm': Mamba(rank=-1)}, 'ssm.rank is -1'),
        (BARE | {'ssm': Mamba2(head_dim=5)}, 'ssm.head_dim = 5 and groups = 1 do not divide expand x width = 32'),
        (BARE | {'ssm': Mamba2(head_dim=8, groups=3)}, 'ssm.head_dim = 8 and groups = 3 do not divide'),
        (MAMBA | {'sequence': 'ring', 'attention': 'splash'}, "set sequence = 'gather'"),
    ],
)
def test_what_cannot_be_says_so(changes, message):
    with pytest.raises(ConfigError, match=message):
        toy.config(**changes).make()


def test_rows_of_a_state_space_are_not_split():
    mesh = {'data': 1, 'fsdp': 1, 'expert': 1, 'seq': 2, 'tensor': 1, 'stage': 1}
    with pytest.raises(ConfigError, match=r'mesh.seq = 2 splits rows, but a state space .* set mesh.seq = 1'):
        toy.config(**MAMBA).check_split(64, mesh)

"""Programs counted against closed forms, as XLA compiles them for 8 CPU devices and, with `-m full`, for TPUs."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tpu_llm.parallel import chips
from tpu_llm.plan import program

AXES = {'x': 2, 'y': 2, 'z': 2}
TPU = pytest.param(
    'tpu',
    marks=[
        pytest.mark.full,
        pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason="needs pip install -e '.[plan]'"),
    ],
)


@pytest.fixture(params=['cpu', TPU])
def mesh(request):
    """2 x 2 x 2 devices; those of TPUs are none that exist."""
    if request.param == 'cpu':
        devices = jax.devices()
    else:
        from tpu_llm.plan.compile import devices as abstract

        devices = abstract(chips.find('v5e-8'))
    return Mesh(np.array(devices).reshape(2, 2, 2), tuple(AXES), axis_types=(AxisType.Auto,) * 3)


def compiled(function, mesh, *shapes, specs=None):
    """The program of a function of float32 arrays (or of arrays given) that every device has whole, or as specs say."""
    specs = specs or [P()] * len(shapes)
    args = [
        jax.ShapeDtypeStruct(
            getattr(shape, 'shape', shape), getattr(shape, 'dtype', jnp.float32), sharding=NamedSharding(mesh, spec)
        )
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    out = NamedSharding(mesh, P())
    done = program.read(jax.jit(function, out_shardings=out).lower(*args).compile().as_text())
    assert done.module.devices == 8
    if mesh.devices.flat[0].platform == 'tpu':
        assert done.cycles > 0
    return done


# ------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ('spec', 'shapes'),
    [
        ('MD,DF->MF', [(128, 256), (256, 384)]),
        ('BMD,DF->BMF', [(4, 128, 256), (256, 128)]),
        ('BKTH,BKSH->BKTS', [(2, 3, 128, 64), (2, 3, 256, 64)]),
        ('BTD,DNH->BTNH', [(2, 128, 256), (256, 4, 128)]),
        ('BTNH,NHD->BTD', [(2, 128, 4, 128), (4, 128, 256)]),
        ('BTD,BTF->DF', [(2, 128, 256), (2, 128, 384)]),
    ],
)
def test_dots(mesh, spec, shapes):
    letters = {
        letter: size
        for term, s in zip(spec.split('->')[0].split(','), shapes, strict=True)
        for letter, size in zip(term, s, strict=True)
    }
    done = compiled(lambda a, b: jnp.einsum(spec, a, b), mesh, *shapes)
    assert done.flops == 2 * np.prod(list(letters.values()))


def tanh_layers(x, kernels):
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]


def test_a_scan_is_what_it_is_unrolled(mesh):
    def unrolled(x, kernels):
        for i in range(6):
            x = jnp.tanh(x @ kernels[i])
        return x

    shapes = (128, 256), (6, 256, 256)
    scanned, flat = (compiled(f, mesh, *shapes) for f in (tanh_layers, unrolled))
    assert scanned.flops == pytest.approx(flat.flops, rel=0.02)
    assert scanned.flops == 6 * 2 * 128 * 256 * 256
    assert scanned.uncounted == ()


def test_nested_scans(mesh):
    def outer(x, kernels):
        return jax.lax.scan(lambda x, _: (tanh_layers(x, kernels), None), x, length=5)[0]

    assert compiled(outer, mesh, (128, 256), (6, 256, 256)).flops == 5 * 6 * 2 * 128 * 256 * 256


def test_a_loop_that_starts_late_and_steps_by_more(mesh):
    def loop(x):
        return jax.lax.while_loop(lambda c: c[0] < 20, lambda c: (c[0] + 3, jnp.tanh(c[1] @ c[1])), (7, x))[1]

    assert compiled(loop, mesh, (256, 256)).flops == 5 * 2 * 256**3


def test_the_gradient_of_a_scan_does_twice_its_work_more(mesh):
    def gradient(x, kernels):
        return jax.grad(lambda k: tanh_layers(x, k).sum())(kernels)

    done = compiled(gradient, mesh, (128, 256), (6, 256, 256))
    # The gradient of the first layer's input is nobody's; in a loop it is computed all the same.
    assert done.flops == 6 * 3 * 2 * 128 * 256 * 256


def test_a_loop_that_data_ends_is_counted_once_and_named(mesh):
    def loop(x, n):
        return jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, jnp.tanh(c[1] @ c[1])), (0, x))[1]

    done = compiled(loop, mesh, (256, 256), jax.ShapeDtypeStruct((), jnp.int32))
    assert done.flops == 2 * 256**3
    assert done.uncounted == ('jit(loop)/while',)


def test_of_a_conditional_the_costliest_branch(mesh):
    def either(x, i):
        branches = [lambda x: x @ x, lambda x: x + 1.0, lambda x: jnp.tanh(x @ x) @ x]
        return jax.lax.switch(i, branches, x)

    done = compiled(either, mesh, (256, 256), jax.ShapeDtypeStruct((), jnp.int32))
    assert done.flops == 2 * 2 * 256**3


@pytest.mark.parametrize(
    'options',
    [
        {'window_strides': (1, 1), 'padding': 'VALID'},
        {'window_strides': (2, 1), 'padding': 'SAME'},
        {'window_strides': (1, 2), 'padding': 'SAME', 'rhs_dilation': (2, 1)},
        {'window_strides': (1, 1), 'padding': [(2, 1), (0, 3)], 'lhs_dilation': (2, 3)},
        {'window_strides': (1, 1), 'padding': 'VALID', 'feature_group_count': 4},
    ],
)
def test_convolutions_count_real_inputs_only(options):
    """On one device: what XLA makes of them for several is another matter."""
    groups = options.get('feature_group_count', 1)
    image, kernel = (2, 8, 12, 14), (16, 8 // groups, 3, 5)

    def convolve(x, k):
        return jax.lax.conv_general_dilated(x, k, **options)

    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (image, kernel)]
    text = jax.jit(convolve).lower(*args).compile().as_text()
    # With ones for inputs, each output is the number of its multiply-adds.
    ones = convolve(jnp.ones(image), jnp.ones(kernel))
    assert program.read(text).flops == 2 * int(ones.sum())


# ------------------------------------------------------------------------------------------------- collectives

SETS = [('x',), ('y',), ('z',), ('x', 'z'), ('y', 'z'), ('x', 'y', 'z')]


def traffic(body, mesh, shape, axes, out=None):
    def mapped(x):
        return jax.shard_map(body, mesh=mesh, in_specs=P(axes), out_specs=out or P(), check_vma=False)(x)

    arg = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(axes)))
    text = jax.jit(mapped).lower(arg).compile().as_text()
    return [(each.kind, each.axes, each.count, each.bytes) for each in program.read(text).traffic(AXES)]


@pytest.mark.parametrize('axes', SETS, ids='-'.join)
def test_all_gather(mesh, axes):
    found = traffic(lambda x: jax.lax.all_gather(x, axes, tiled=True), mesh, (1024, 128), axes)
    assert found == [('all-gather', axes, 1, 1024 * 128 * 4)]


@pytest.mark.parametrize('axes', SETS, ids='-'.join)
def test_the_partitioners_own_all_gather(mesh, axes):
    """It prints the groups of devices in other ways than one's own."""
    done = compiled(lambda x: x * 2, mesh, (1024, 128), specs=[P(axes)])
    assert [(each.kind, each.axes, each.bytes) for each in done.traffic(AXES)] == [('all-gather', axes, 1024 * 128 * 4)]


@pytest.mark.parametrize('axes', SETS, ids='-'.join)
def test_all_reduce(mesh, axes):
    found = traffic(lambda x: jax.lax.psum(x, axes), mesh, (1024, 128), ())
    assert found == [('all-reduce', axes, 1, 1024 * 128 * 4)]


def test_reduce_scatter_as_printed(mesh):
    """One that the TPU compiler writes as an all-reduce and a slice has the bytes of the former."""
    (found,) = traffic(lambda x: jax.lax.psum_scatter(x, 'y', tiled=True), mesh, (1024, 128), (), P('y'))
    assert found in [('reduce-scatter', ('y',), 1, 512 * 128 * 4), ('all-reduce', ('y',), 1, 1024 * 128 * 4)]


def test_all_to_all(mesh):
    found = traffic(lambda x: jax.lax.all_to_all(x, 'y', 1, 0, tiled=True), mesh, (1024, 256), 'y', P(None, 'y'))
    assert found == [('all-to-all', ('y',), 1, 1024 * 128 * 4)]


@pytest.mark.parametrize('axis', AXES)
def test_permute(mesh, axis):
    found = traffic(lambda x: jax.lax.ppermute(x, axis, [(0, 1), (1, 0)]), mesh, (1024, 128), axis, P(axis))
    assert found == [('collective-permute', (axis,), 1, 512 * 128 * 4)]


def test_a_collective_in_a_loop_counts_as_often_as_it_turns(mesh):
    def body(x):
        step = lambda x, _: (jnp.tanh(jax.lax.all_gather(x, 'z', tiled=True))[:512], None)  # noqa: E731
        return jax.lax.scan(step, x, length=7)[0]

    assert traffic(body, mesh, (1024, 128), 'z', P('z')) == [('all-gather', ('z',), 7, 7 * 1024 * 128 * 4)]


TURNS = 6
IN_A_LOOP = {
    # What a turn does with a device's [256, 128], and what it is: kind, axes, bytes of its result.
    'all-gather': (lambda x: jax.lax.all_gather(x, ('x', 'z'), tiled=True)[:256], ('x', 'z'), 1024 * 128 * 4),
    'reduce-scatter': (
        lambda x: jnp.tile(jax.lax.psum_scatter(x, ('x', 'y'), tiled=True), (4, 1)), ('x', 'y'), 64 * 128 * 4
    ),
    'all-to-all': (lambda x: jax.lax.all_to_all(x, ('y', 'z'), 0, 0, tiled=True), ('y', 'z'), 256 * 128 * 4),
    'collective-permute': (
        lambda x: jax.lax.ppermute(x, ('x', 'z'), [(i, (i + 1) % 4) for i in range(4)]), ('x', 'z'), 256 * 128 * 4
    ),
}  # fmt: skip


@pytest.mark.parametrize('kind', IN_A_LOOP)
def test_collectives_over_two_axes_in_a_loop_are_counted_exactly(mesh, kind):
    one, axes, size = IN_A_LOOP[kind]

    def body(x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(one(x)), None), x, length=TURNS)[0]

    everywhere = P(('x', 'y', 'z'))
    found = traffic(body, mesh, (2048, 128), ('x', 'y', 'z'), everywhere)
    expected = [[(kind, axes, TURNS, TURNS * size)]]
    if kind == 'reduce-scatter':  # the TPU compiler's: the sum whole, and a slice of it
        expected.append([('all-reduce', axes, TURNS, TURNS * 256 * 128 * 4)])
    assert found in expected


def test_no_test_of_tpus_leaves_the_platform_changed():
    assert os.environ['JAX_PLATFORMS'] == 'cpu'
    assert jax.devices()[0].platform == 'cpu'

"""A run's own step, compiled for slices that are not there."""

import importlib.util
from collections import Counter

import jax
import pytest

from configs import pretrain
from configs.pods import llama2_7b_v5e_256, mixtral_8x7b_v6e_256
from tpu_llm.config import ConfigError
from tpu_llm.data.tokenizer import Bytes
from tpu_llm.parallel.chips import CHIPS, find
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.plan import compile as planned
from tpu_llm.train.setup import Feed, abstract_batch, make_graph, make_layout, make_train_step, param_infos
from tpu_llm.train.state import abstract_state

HAS_LIBTPU = importlib.util.find_spec('libtpu') is not None
needs_libtpu = pytest.mark.skipif(not HAS_LIBTPU, reason="needs pip install -e '.[plan]'")


def small(page=llama2_7b_v5e_256):
    """A smoke run with rows and heads as wide as TPU kernels want them."""
    run = page.get_config('smoke')
    run.model.head_dim, run.model.width, run.data.seq_len, run.model.dtype = 128, 256, 256, 'bfloat16'
    return run


def test_the_abstract_batch_is_what_the_feed_gives(tmp_path):
    run = llama2_7b_v5e_256.get_config('smoke')
    run.data.tokenizer = Bytes()
    layout = make_layout(run)
    feed = Feed(run, layout, tmp_path)
    batch, _, _ = feed.next(None, None)
    expected = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), abstract_batch(run, layout)) == expected


@pytest.mark.skipif(HAS_LIBTPU, reason='libtpu is here')
def test_without_libtpu_one_line_says_how_to_install_it():
    with pytest.raises(ConfigError, match=r"compiling for TPUs needs libtpu: pip install -e '\.\[plan\]'"):
        planned.devices(find('v5e-4'))


@needs_libtpu
@pytest.mark.full
@pytest.mark.parametrize('name', CHIPS)
def test_devices_are_those_of_the_slice(name):
    """… and the chip table knows what jax calls them."""
    where = find(f'{name}-4')
    found = planned.devices(where)
    assert len(found) == where.devices
    assert found[0].device_kind in where.chip.kinds


@needs_libtpu
@pytest.mark.full
def test_a_step_compiles_for_a_slice():
    step = planned.compile_step(small(), find('v5e-4'))
    assert step.mesh['fsdp'] == 4
    assert 0 < step.peak_bytes < 2**28
    program = step.program()
    assert program.cycles > 0
    assert program.uncounted == ()
    # A gather of each layer's weights forward and backward, and the sum of their gradients.
    assert {each.kind for each in program.traffic(step.mesh)} >= {'all-gather', 'all-reduce'}
    assert {each.axes for each in program.traffic(step.mesh)} == {('fsdp',)}
    assert {kernel.name.split('_')[0] for kernel in program.kernels} == {'splash'}


def options(run, devices):
    """What the step's compile is given on them."""
    layout = make_layout(run, devices)
    graph = make_graph(run, layout)
    tx = run.optimizer.make(param_infos(graph), 20)
    return make_train_step(run, graph, tx, layout, abstract_state(graph, tx, layout, ema=False)).options


@needs_libtpu
@pytest.mark.full
def test_weights_that_tensor_splits_as_well_are_gathered_whole():
    """By itself the compiler hands them round fsdp, with a small matmul for each part of them."""
    run = pretrain.get_config('size=1b')
    run.model.layers, run.model.remat, run.data.global_batch = 2, 'full', 512
    run.mesh = Mesh(fsdp=32, tensor=2)
    traffic = planned.compile_step(run, find('v6e-64')).program().traffic({'fsdp': 32, 'tensor': 2})
    kinds = {each.kind for each in traffic if each.axes == ('fsdp',)}
    assert kinds == {'all-gather', 'all-reduce'}


@needs_libtpu
@pytest.mark.full
def test_what_the_mesh_asks_of_the_compiler_stands_behind_what_the_config_asks():
    run, there, name = small(), planned.devices(find('v5e-4')), 'xla_jf_spmd_threshold_for_windowed_einsum_mib'
    for mesh in (Mesh(fsdp=4), Mesh(fsdp=1, tensor=4), Mesh(data=2, fsdp=1, tensor=2)):
        run.mesh = mesh
        assert options(run, there) == {}
    run.mesh = Mesh(fsdp=2, tensor=2)
    assert options(run, jax.devices('cpu')[:4]) == {}
    assert list(options(run, there)) == [name]
    run.compiler_options = {name: '8', 'xla_tpu_scoped_vmem_limit_kib': '32768'}
    assert options(run, there) == run.compiler_options


@needs_libtpu
@pytest.mark.full
@pytest.mark.parametrize('axis', ['fsdp', 'expert'])
def test_a_step_with_experts_is_charged_for_its_grouped_matmuls(axis):
    run = small(mixtral_8x7b_v6e_256)
    run.mesh = Mesh(**({'fsdp': 1} | {axis: 4}))
    step = planned.compile_step(run, find('v6e-4'))
    program, layers = step.program(), run.model.layers
    # Gate, up and down; gate and up again, since nothing is saved; the gradients of three inputs and three kernels.
    times = Counter()
    for kernel in program.kernels:
        times[kernel.name] += kernel.times
        assert kernel.name.startswith('splash') or kernel.charge.flops >= kernel.declared.flops > 0
    assert (times['gmm'], times['tgmm']) == (8 * layers, 3 * layers)
    exchanged = {each.axes for each in program.traffic(step.mesh) if each.kind == 'ragged-all-to-all'}
    assert exchanged == ({('expert',)} if axis == 'expert' else set())


@needs_libtpu
@pytest.mark.full
def test_what_a_slice_cannot_hold():
    run = small()
    run.mesh = Mesh(fsdp=8)
    with pytest.raises(ConfigError, match=r'mesh \(fsdp=8\) needs 8 devices but there are 4'):
        planned.compile_step(run, find('v5e-4'))
    run.mesh, run.data.global_batch = Mesh(), 6
    with pytest.raises(ConfigError, match='6 rows are not divisible'):
        planned.compile_step(run, find('v5e-4'))

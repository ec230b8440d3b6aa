"""What is read from steps compiled for TPUs, against closed forms; nothing is run. Needs pip install -e '.[plan]'."""

import importlib.util

import jax
import pytest

from configs.pods import llama2_7b_v5e_256, mixtral_8x7b_v6e_256
from tpu_llm.models.flops import attention_maps, feed_forward_maps, train_flops
from tpu_llm.parallel.chips import find
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.parallel.pipeline import Pipeline, overhead
from tpu_llm.plan import cost, hbm
from tpu_llm.plan.compile import CompileError, compile_step, devices
from tpu_llm.plan.overlap import transfers
from tpu_llm.train.setup import abstract_batch, make_graph, make_layout, param_infos
from tpu_llm.train.state import abstract_state

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason="needs pip install -e '.[plan]'"),
]
V5E = find('v5e-4')


def small(page=llama2_7b_v5e_256, layers=4, remat='none'):
    """A smoke run with rows and heads as wide as TPU kernels want them; 2 rows of 256 tokens on each of 4 devices."""
    run = page.get_config('smoke')
    run.model.head_dim, run.model.width, run.data.seq_len, run.model.dtype = 128, 256, 256, 'bfloat16'
    run.model.layers, run.model.remat = layers, remat
    return run


@pytest.fixture(scope='module')
def plain():
    return compile_step(small(), V5E)


@pytest.fixture(scope='module')
def unrolled():
    run = small()
    run.model.unroll = 0
    return compile_step(run, V5E)


@pytest.fixture(scope='module')
def remat():
    return compile_step(small(remat='full'), V5E)


@pytest.fixture(scope='module')
def offloaded():
    run = small(remat='gate+up@host')
    run.model.mlp_width = 512
    return compile_step(run, V5E)


@pytest.fixture(scope='module')
def experts():
    return compile_step(small(mixtral_8x7b_v6e_256, layers=2, remat='full'), find('v6e-4'))


def pipelined():
    run = small()
    run.mesh, run.pipeline = Mesh(stage=2, fsdp=2), Pipeline(microbatches=4)
    return run


@pytest.fixture(scope='module')
def staged():
    return compile_step(pipelined(), V5E)


@pytest.fixture(params=['plain', 'unrolled', 'remat', 'offloaded', 'experts', 'staged'])
def step(request):
    return request.getfixturevalue(request.param)


def costs(step, run):
    tokens = run.data.global_batch * run.data.seq_len / 4
    return cost.cost(step.program(), step.torus, step.mesh, needed=train_flops(run.model, run.data.seq_len) * tokens)


@pytest.mark.parametrize(('name', 'count'), [('v5e-1', 1), ('v6e-1', 1), ('tpu7x-1', 2), ('2xv5e-1', 2)])
def test_devices_of_a_single_chip(name, count):
    assert len(devices(find(name))) == count


# ------------------------------------------------------------------------------------- executed FLOPs, closed forms


def matmuls(run, layers_passes, rotations, down=0):
    """FLOPs of a device: its tokens through the layers' maps so many times, and thrice through the head.

    On TPUs heads are rotated by a matmul with a permutation (`nn/position.py`).
    """
    model = run.model
    tokens = run.data.global_batch * run.data.seq_len // 4
    maps = attention_maps(model) + (
        feed_forward_maps(model, 0) if model.moe is None else model.width * model.moe.experts
    )
    turned = (model.heads + model.kv_heads) * model.head_dim**2
    layer = layers_passes * maps + rotations * turned - down
    return 2 * tokens * (model.layers * layer + 3 * model.width * model.vocab_size)


def splash(run, forward, pairs):
    """FLOPs of a device's attention: 2 maps forward, 3 and 4 backward, over pairs of a query and a key."""
    model = run.model
    rows = run.data.global_batch // 4
    return (2 * forward + 3 + 4) * 2 * model.layers * rows * model.heads * pairs * model.head_dim


def test_a_dense_step_executes_thrice_its_forward_pass(plain):
    """A row of 256 tokens is one block of attention, so its masked half is computed as well."""
    run, program = small(), plain.program()
    assert program.flops == matmuls(run, layers_passes=3, rotations=2)
    assert sum(each.times * each.charge.flops for each in program.kernels) == splash(run, 1, 256**2)


def test_with_full_remat_all_of_a_layer_runs_once_more_but_its_last_matmul(remat):
    """Nobody asks for the result of `down` again."""
    run, program = small(remat='full'), remat.program()
    down = run.model.width * run.model.mlp_width
    assert program.flops == matmuls(run, layers_passes=4, rotations=3, down=down)
    assert sum(each.times * each.charge.flops for each in program.kernels) == splash(run, 2, 256**2)
    found = costs(remat, run)
    again = program.flops - matmuls(run, layers_passes=3, rotations=2) + splash(run, 2, 256**2) - splash(run, 1, 256**2)
    assert found.losses['recomputed for the backward pass'] * V5E.chip.flops == pytest.approx(again)


def test_a_step_with_experts(experts):
    """Attention and router are matmuls; what the experts do are kernels, each token's rows twice through three maps."""
    run, program = small(mixtral_8x7b_v6e_256, layers=2, remat='full'), experts.program()
    assert program.flops == matmuls(run, layers_passes=4, rotations=3)
    moe, rows = run.model.moe, 2 * 256 * 2
    declared = sum(k.times * k.declared.flops for k in program.kernels if k.name in ('gmm', 'tgmm'))
    # Three maps forward, two again, and two gradients of each.
    assert declared == 2 * rows * run.model.width * moe.expert_width * run.model.layers * (3 + 2 + 6)


def test_a_pipeline_executes_its_bubble(staged):
    run, program = pipelined(), staged.program()
    ratio = overhead(run.model.layers, 2, 1, 4)
    assert ratio == 5 / 4
    head = 3 * 2 * 512 * run.model.width * run.model.vocab_size
    assert program.flops - head == pytest.approx(ratio * (matmuls(run, 3, 2) - head), rel=0.01)
    kernels = sum(each.times * each.charge.flops for each in program.kernels)
    assert kernels == pytest.approx(ratio * splash(run, 1, 256**2), rel=0.01)


# ---------------------------------------------------------------------------------------------- scanned and unrolled


def test_a_step_is_what_it_is_unrolled(plain, unrolled):
    """Matmuls, kernels and what travels; not all cycles, for only a loop reads from stacks and writes to them."""
    run = small()
    scanned, flat = costs(plain, run), costs(unrolled, run)
    assert plain.program().flops == unrolled.program().flops
    assert scanned.flops == flat.flops
    assert scanned.kernel_cycles == pytest.approx(flat.kernel_cycles)
    assert scanned.kernels.keys() == flat.kernels.keys()
    for kind in ('all-gather', 'all-reduce'):
        sizes = [sum(each.bytes for each in found.traffic if each.kind == kind) for found in (scanned, flat)]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.02)
    assert plain.program().uncounted == unrolled.program().uncounted == ()


# -------------------------------------------------------------------------------------------- what holds of all steps


def test_the_parts_of_a_step_add_up(step):
    program = step.program()
    found = cost.cost(program, step.torus, step.mesh, needed=1e9)
    assert sum(found.losses.values()) == pytest.approx(found.seconds)
    assert sum(each.flops for each in found.shares) == pytest.approx(found.flops)
    kernels = sum(each.times * each.charge.flops for each in program.kernels)
    assert found.flops == pytest.approx(program.flops + kernels)


def test_collectives_are_the_same_by_either_way_of_counting(step):
    program = step.program()
    walked = sorted((each.kind, each.count, each.bytes) for each in program.traffic(step.mesh))
    sums = {}
    for each in transfers(program, step.slice.chip):
        count, size = sums.get(each.kind, (0, 0))
        sums[each.kind] = count + each.times, size + each.times * each.bytes
    by_kind = {}
    for kind, count, size in walked:
        before = by_kind.get(kind, (0, 0))
        by_kind[kind] = before[0] + count, before[1] + size
    assert sums == by_kind


def test_no_instruction_moves_more_than_hbm_could_in_the_compilers_own_estimate(step):
    program, chip = step.program(), step.slice.chip
    home = {name: each for each in program.module.computations.values() for name in each.instructions}
    for each in program.executed:
        if each.cycles:
            moved = each.times * hbm.moved(program.module, home[each.instruction.name], each.instruction)
            # … and a microsecond for what it leaves out of very small ones.
            assert moved / chip.hbm_bandwidth <= 1.01 * each.cycles / chip.clock + 1e-6, each.instruction.name


def test_what_waits_on_the_host_goes_there_and_back(offloaded):
    found = costs(offloaded, small())
    size = 4 * 2 * 256 * 512 * 2  # L B T F in bfloat16
    assert found.host_bytes == 2 * size
    assert found.host_seconds == size / V5E.chip.pcie_bandwidth
    assert offloaded.memory.host == size


# ------------------------------------------------------------------------------------------------------------ memory


def on_a_device(tree):
    return sum(
        x.dtype.itemsize * jax.numpy.prod(jax.numpy.array(x.sharding.shard_shape(x.shape))).item()
        for x in jax.tree.leaves(tree)
    )


def test_state_and_batch_take_what_their_shapes_say(plain):
    run = small()
    layout = make_layout(run, devices(V5E))
    graph = make_graph(run, layout)
    state = abstract_state(graph, run.optimizer.make(param_infos(graph), 20), layout, ema=False)
    kinds = plain.memory.kinds
    assert kinds['parameters'] == on_a_device(state.params)
    assert kinds['optimizer state'] == on_a_device(state.optimizer)
    assert kinds['batch'] == on_a_device(abstract_batch(run, layout))


def test_kinds_are_within_what_is_allocated(step):
    memory = step.memory
    assert sum(memory.kinds.values()) == memory.peak <= memory.allocated <= step.slice.chip.hbm
    assert sum(each.bytes for each in memory.buffers) <= memory.peak
    sizes = [each.bytes for each in memory.buffers]
    assert sizes == sorted(sizes, reverse=True)


def large(rows):
    run = small(layers=2)
    run.model.mlp_width, run.data.seq_len, run.data.global_batch = 2048, 2048, 4 * rows
    run.tokens = 20 * run.data.global_batch * run.data.seq_len
    return run


@pytest.mark.parametrize(('rows', 'most'), [(103, 16.2), (107, 17.5), (157, 26)])
def test_what_does_not_fit_is_explained_in_seconds(rows, most):
    """103 rows need 40 MiB more than there are."""
    step = compile_step(large(rows), V5E)
    assert step.text == ''
    assert 'Ran out of memory' in step.reason
    assert step.slice.chip.hbm < step.memory.allocated < most * 2**30
    assert step.cpu_seconds < 20
    largest = step.memory.buffers[0]
    assert (largest.kind, largest.where) == ('activations', 'mlp BTD,DF->BTF')
    assert largest.bytes == 2 * rows * 2048 * 2048 * 2  # L B T F in bfloat16
    assert step.memory.kinds['activations'] > 0.8 * step.memory.peak


def test_a_compile_that_dies_says_why_in_a_line():
    run = small()
    run.compiler_options = {'xla_tpu_nonsense': '1'}
    with pytest.raises(CompileError, match=r"gave up: .*No such compile option: 'xla_tpu_nonsense'") as error:
        compile_step(run, V5E)
    assert '\n' not in str(error.value)

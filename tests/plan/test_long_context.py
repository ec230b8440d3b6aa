"""A row of a million tokens over 512 chips: the program fits, compiles soon, and sends keys while kernels compute."""

import importlib.util

import pytest

from benchmarks.long_context import LENGTH, SLICE, make_run, needed, work
from tpu_llm.plan.compile import compile_step
from tpu_llm.plan.hlo import Shape, parse
from tpu_llm.plan.kernels import Kernel


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason="needs libtpu: pip install -e '.[plan]'")
def test_a_million_tokens_compile_for_a_pod():
    run = make_run(layers=2)
    step = compile_step(run, SLICE)
    assert LENGTH == 1_048_576
    assert step.mesh['seq'] == 128
    assert step.peak_bytes < 24 * 2**30
    assert step.cpu_seconds < 180
    cycles, flops = work(step, layers=2)
    assert cycles < 4e9
    # Nine matmuls where six are needed: scores are computed twice again, and the gradient of the weights once.
    assert flops == pytest.approx(1.5 * needed(run), rel=1e-3)
    hops = 0
    for computation in parse(step.text).computations.values():
        order = [each.opcode for each in computation.instructions.values()]
        if 'collective-permute-start' in order and 'conditional' in order:  # a hop of the ring and its visit
            visit = order.index('conditional')
            sent = [i for i, opcode in enumerate(order) if opcode == 'collective-permute-start']
            arrived = [i for i, opcode in enumerate(order) if opcode == 'collective-permute-done']
            assert max(sent) < visit < min(arrived), computation.name
            hops += 1
    assert hops == 2  # forward and backward


def test_a_table_that_is_computed_charges_half_of_its_blocks():
    """As a device sees in zig-zag order of each share of keys that comes by: four blocks of eight, of two heads."""
    x, table = Shape('bf16', (2, 1024, 128)), Shape('s32', (1, 2, 4))
    sizes = {'block_q': 512, 'block_kv': 256}
    visit = Kernel('splash_mha_fwd_segmented_residuals', (table, table, x, x, x), (x,), 1, None, sizes)
    assert visit.charge.flops == 2 * 2 * 2 * 4 * 512 * 256 * 128

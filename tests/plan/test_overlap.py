"""What goes on while a collective is under way, and which collectives are one: from text, no libtpu is needed."""

import dataclasses

import pytest

from tpu_llm.parallel.chips import CHIPS
from tpu_llm.plan import cost, program
from tpu_llm.plan.links import Torus
from tpu_llm.plan.overlap import transfers

# Of 4 devices. From the gather's start to its end: a fusion (100 cycles), a loop of 5 turns (50 each), a conditional
# (30 or 70) and a kernel. Then a permutation with nothing beside it, and three sums in fusions, all called channel 1.
TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=4

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %a_and_b = bf16[] add(%a, %b)
}

%square (x: bf16[64,128]) -> bf16[64,128] {
  %x = bf16[64,128]{1,0} parameter(0)
  ROOT %dot = bf16[64,128]{1,0} multiply(%x, %x), metadata={op_name="jit(step)/jvp()/while/body/closed_call/mlp/mul"}
}

%matmul (x.1: bf16[64,64]) -> bf16[64,64] {
  %x.1 = bf16[64,64]{1,0} parameter(0)
  %product = bf16[64,64]{1,0} dot(%x.1, %x.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(step)/jvp()/attention/dot_general"}
  ROOT %sum = bf16[64,64]{1,0} add(%product, %x.1), metadata={op_name="jit(step)/jvp()/norm/add"}
}

%body (state: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %state = (s32[], bf16[64,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %y = bf16[64,128]{1,0} get-tuple-element(%state), index=1
  %z = bf16[64,128]{1,0} fusion(%y), kind=kLoop, calls=%square, backend_config={"window_config":{"estimated_cycles":"50"}}
  ROOT %next = (s32[], bf16[64,128]{1,0}) tuple(%i, %z)
}

%condition (state.1: (s32[], bf16[64,128])) -> pred[] {
  %state.1 = (s32[], bf16[64,128]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

%cheap (x.2: bf16[64,128]) -> bf16[64,128] {
  %x.2 = bf16[64,128]{1,0} parameter(0)
  ROOT %f.2 = bf16[64,128]{1,0} fusion(%x.2), kind=kLoop, calls=%square, backend_config={"window_config":{"estimated_cycles":"30"}}
}

%dear (x.3: bf16[64,128]) -> bf16[64,128] {
  %x.3 = bf16[64,128]{1,0} parameter(0)
  ROOT %f.3 = bf16[64,128]{1,0} fusion(%x.3), kind=kLoop, calls=%square, backend_config={"window_config":{"estimated_cycles":"70"}}
}

%all-reduce-scatter (input: bf16[256,128]) -> bf16[64,128] {
  %input = bf16[256,128]{1,0} parameter(0)
  %all-reduce.1 = bf16[256,128]{1,0} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %mine = bf16[64,128]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={64,128}
}

%all-reduce-scatter.2 (input.2: bf16[256,128]) -> bf16[64,128] {
  %input.2 = bf16[256,128]{1,0} parameter(0)
  %all-reduce.2 = bf16[256,128]{1,0} all-reduce(%input.2), channel_id=1, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%add
  %zero.2 = u32[] constant(0)
  ROOT %mine.2 = bf16[64,128]{1,0} dynamic-slice(%all-reduce.2, %zero.2, %zero.2), dynamic_slice_sizes={64,128}
}

%summed (input.3: bf16[256,128]) -> bf16[256,128] {
  %input.3 = bf16[256,128]{1,0} parameter(0)
  %all-reduce.3 = bf16[256,128]{1,0} all-reduce(%input.3), channel_id=1, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%add
  ROOT %squared = bf16[256,128]{1,0} multiply(%all-reduce.3, %all-reduce.3)
}

ENTRY %main (p: bf16[64,128], w: bf16[256,128], v: bf16[64,64], c: pred[], n: s32[]) -> bf16[64,128] {
  %p = bf16[64,128]{1,0} parameter(0)
  %w = bf16[256,128]{1,0} parameter(1)
  %v = bf16[64,64]{1,0} parameter(2)
  %c = pred[] parameter(3)
  %n = s32[] parameter(4)
  %gather-start = (bf16[64,128]{1,0}, bf16[256,128]{1,0}) all-gather-start(%p), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}, use_global_device_ids=true, metadata={op_name="jit(step)/jvp()/mlp/all_gather"}
  %m = bf16[64,64]{1,0} fusion(%v), kind=kOutput, calls=%matmul, metadata={op_name="jit(step)/jvp()/norm/add"}, backend_config={"window_config":{"estimated_cycles":"100"}}
  %start = (s32[], bf16[64,128]{1,0}) tuple(%n, %p)
  %loop = (s32[], bf16[64,128]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %either = bf16[64,128]{1,0} conditional(%c, %p, %p), true_computation=%dear, false_computation=%cheap
  %kernel.1 = bf16[64,128]{1,0} custom-call(%p), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/transpose(jvp())/attention/pallas_call"}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"197000000","transcendentals":"0","bytes_accessed":"400"}}}
  %gather-done = bf16[256,128]{1,0} all-gather-done(%gather-start)
  %permute-start = (bf16[64,128]{1,0}, bf16[64,128]{1,0}, u32[], u32[]) collective-permute-start(%either), channel_id=8, source_target_pairs={{0,1},{1,0}}
  %permute-done = bf16[64,128]{1,0} collective-permute-done(%permute-start)
  %scattered = bf16[64,128]{1,0} fusion(%w), kind=kCustom, calls=%all-reduce-scatter, backend_config={"collective_algorithm_config":{"emitter":"SingleInputAllReduceScatterFusion","strategy":"StrategyRing"}}
  %between = bf16[64,128]{1,0} fusion(%p), kind=kLoop, calls=%square, backend_config={"window_config":{"estimated_cycles":"10"}}
  %scattered.2 = bf16[64,128]{1,0} fusion(%w), kind=kCustom, calls=%all-reduce-scatter.2, backend_config={"collective_algorithm_config":{"emitter":"SingleInputAllReduceScatterFusion","strategy":"StrategyRing"}}
  %told = bf16[256,128]{1,0} fusion(%w), kind=kCustom, calls=%summed
  ROOT %out = bf16[64,128]{1,0} fusion(%scattered), kind=kLoop, calls=%square, backend_config={"window_config":{"estimated_cycles":"10"}}
}
"""  # noqa: E501

CHIP = CHIPS['v5e']
TORUS = Torus(CHIP, (2, 2), ((0, 0), (0, 1), (1, 0), (1, 1)))
MESH = {'data': 2, 'fsdp': 2}
KERNEL = 1500  # cycles: a microsecond at the peak
WHOLE = 256 * 128 * 2


@pytest.fixture(scope='module')
def step():
    return program.read(TEXT)


@pytest.fixture(scope='module')
def found(step):
    return transfers(step, CHIP)


def test_meanwhile_are_fusions_loops_the_costlier_branch_and_kernels(found):
    (gather,) = (each for each in found if each.kind == 'all-gather')
    assert gather.meanwhile == pytest.approx(100 + 5 * 50 + 70 + KERNEL)
    assert (gather.hidden, gather.bytes, gather.group) == (True, WHOLE, (0, 1, 2, 3))
    # 3 hops of a microsecond, less the 1,920 cycles of 1.5 GHz that are computed.
    assert gather.exposed(TORUS) == pytest.approx(2e-6 - 1920 / 1.5e9)


def test_for_what_starts_and_ends_at_once_the_device_waits(found):
    (permute,) = (each for each in found if each.kind == 'collective-permute')
    assert (permute.meanwhile, permute.hidden, permute.group) == (0, False, (0, 1))
    assert permute.exposed(TORUS) == permute.seconds(TORUS)


def test_fusions_that_share_a_channel_are_collectives_of_their_own(step, found):
    sums = [each for each in found if each.kind == 'all-reduce']
    assert [each.meanwhile for each in sums] == [0, 0, 0]
    (traffic,) = (each for each in step.traffic(MESH) if each.kind == 'all-reduce')
    assert traffic == program.Traffic('all-reduce', ('data', 'fsdp'), 3, 3 * WHOLE)


def test_a_sum_of_which_each_keeps_a_part_goes_round_once(found):
    scattered, scattered_too, told = sorted(
        (each for each in found if each.kind == 'all-reduce'), key=lambda each: not each.scatters
    )
    assert (scattered.scatters, scattered_too.scatters, told.scatters) == (True, True, False)
    size = 400_000_000
    once, twice = (dataclasses.replace(each, bytes=size).seconds(TORUS) for each in (scattered, told))
    assert twice == pytest.approx(2 * once)
    assert once == pytest.approx(size * 3 / 4 / 100e9)


def fused(number, target=''):
    """A fusion's computation with an all-reduce of channel 1 that starts or ends there, or goes on."""
    mark = f'  %mark.{number} = u32[] custom-call(%reduce.{number}), custom_call_target="{target}"\n' if target else ''
    return (
        f'%fused.{number} (x.{number}: f32[8]) -> f32[8] {{\n  %x.{number} = f32[8] parameter(0)\n'
        f'  %reduce.{number} = f32[8] all-reduce(%x.{number}), channel_id=1, replica_groups={{{{0,1}}}}\n{mark}'
        f'  ROOT %y.{number} = f32[8] negate(%reduce.{number})\n}}\n'
    )


def call(number):
    cycles = 'backend_config={"window_config":{"estimated_cycles":"100"}}'
    return f'  %f.{number} = f32[8] fusion(%x), kind=kCustom, calls=%fused.{number}, {cycles}\n'


def both(text):
    """How often the program has it, and the transfers."""
    step = program.read(f'HloModule m, num_partitions=2\n\n{text}')
    (traffic,) = step.traffic({'data': 2})
    return traffic.count, transfers(step, CHIP)


def test_the_end_of_one_frees_its_channel():
    """Started, carried on, ended; then two more of the same channel."""
    targets = ('AsyncCollectiveStart', '', 'AsyncCollectiveDone', '', '')
    count, found = both(
        '\n'.join(fused(i, target) for i, target in enumerate(targets))
        + f'\nENTRY %main (x: f32[8]) -> f32[8] {{\n  %x = f32[8] parameter(0)\n{"".join(map(call, range(5)))}'
        + '  ROOT %out = f32[8] negate(%f.4)\n}\n'
    )
    assert count == 3
    assert [each.meanwhile for each in found] == [100, 0, 0]


def test_one_that_a_loop_carries_on_is_one():
    count, found = both(
        '\n'.join((fused(0, 'AsyncCollectiveStart'), fused(1), fused(2, 'AsyncCollectiveDone')))
        + f'\n%body (x: f32[8]) -> f32[8] {{\n  %x = f32[8] parameter(0)\n{call(1)}'
        + '  ROOT %turn = f32[8] negate(%f.1)\n}\n'
        + '\n%condition (y: f32[8]) -> pred[] {\n  %y = f32[8] parameter(0)\n  ROOT %yes = pred[] constant(true)\n}\n'
        + f'\nENTRY %main (x: f32[8]) -> f32[8] {{\n  %x = f32[8] parameter(0)\n{call(0)}'
        + '  %loop = f32[8] while(%x), condition=%condition, body=%body, '
        + 'backend_config={"known_trip_count":{"n":"7"}}\n'
        + f'{call(2)}  ROOT %out = f32[8] negate(%f.2)\n}}\n'
    )
    assert count == 1
    assert [(each.times, each.meanwhile) for each in found] == [(1, 700)]


# ------------------------------------------------------------------------------------------------------- the cost


@pytest.fixture(scope='module')
def costed(step):
    return cost.cost(step, TORUS, MESH, needed=0.5 * 197e6)


def test_a_step_takes_what_it_computes_and_what_it_waits_for(step, found, costed):
    assert costed.cycles == step.cycles == 100 + 5 * 50 + 70 + 10 + 10
    assert costed.kernel_cycles == pytest.approx(KERNEL)
    waits = sum(each.exposed(TORUS) for each in found)
    assert waits > 0
    assert costed.seconds == pytest.approx((440 + KERNEL) / 1.5e9 + waits)
    assert costed.flops == 197e6 + 2 * 64**3
    assert costed.kernels == {'kernel': 1}


def test_losses_and_shares_add_up(costed):
    assert sum(costed.losses.values()) == pytest.approx(costed.seconds)
    assert costed.losses['model'] == pytest.approx(0.5e-6)
    computed = costed.seconds - costed.losses['waiting for other devices']
    assert sum(each.seconds for each in costed.shares) == pytest.approx(computed)
    assert sum(each.flops for each in costed.shares) == costed.flops
    assert sum(each.bytes for each in costed.shares) == costed.bytes


@pytest.mark.parametrize('bubble', [0.0, 0.3])
def test_a_bubble_is_a_share_of_what_the_layers_execute(step, bubble):
    costed = cost.cost(step, TORUS, MESH, needed=0.5 * 197e6, bubble=bubble)
    assert costed.losses['pipeline bubble'] == pytest.approx(bubble * costed.flops / CHIP.flops)
    assert sum(costed.losses.values()) == pytest.approx(costed.seconds)


def test_work_is_of_the_part_that_its_matmul_is_of(costed):
    seconds = {(each.part, each.phase): each.seconds for each in costed.shares}
    assert seconds['attention', 'forward'] == pytest.approx(100 / 1.5e9)  # the fusion itself is called norm
    assert seconds['attention', 'backward'] == pytest.approx(1e-6)
    # A fusion without a name is of what is in it.
    assert seconds['mlp', 'forward'] == pytest.approx((5 * 50 + 70 + 10 + 10) / 1.5e9)
    assert set(seconds) == {
        ('attention', 'forward'),
        ('attention', 'backward'),
        ('mlp', 'forward'),
        ('other', 'update'),
    }


def test_traffic_is_what_the_program_has(step, costed):
    assert {(each.kind, each.axes, each.count, each.bytes) for each in costed.traffic} == {
        (each.kind, each.axes, each.count, each.bytes) for each in step.traffic(MESH)
    }
    (gather,) = (each for each in costed.traffic if each.kind == 'all-gather')
    assert (gather.part, gather.hidden) == ('mlp', WHOLE)

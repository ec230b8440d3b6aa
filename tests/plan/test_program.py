"""What only the TPU compiler prints, read from text: no libtpu is needed."""

import dataclasses

import pytest

from tpu_llm.config import ConfigError
from tpu_llm.parallel.chips import CHIPS
from tpu_llm.plan import arithmetic, collectives, hlo, program
from tpu_llm.plan.kernels import Charge, charged_cycles
from tpu_llm.plan.links import Torus
from tpu_llm.plan.overlap import Transfer, transfers

# Ten turns of a loop that gathers weights while it multiplies, then a kernel that is run once.
TEXT = r"""HloModule jit_step, is_scheduled=true, entry_computation_layout={()->f32[]}, num_partitions=8

%start (param: bf16[1,16,64]) -> (bf16[1,16,64], bf16[1,128,64]) {
  %param = bf16[1,16,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[1,128,64]{2,1,0:T(8,128)(2,1)} all-gather(%param), channel_id=5, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={1}, use_global_device_ids=true
  ROOT %custom-call.1 = (bf16[1,16,64]{2,1,0}, bf16[1,128,64]{2,1,0}, /*index=2*/u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%carry (param.1: bf16[1,16,64], param.2: f32[256,128]) -> (f32[256,128], bf16[1,128,64]) {
  %param.1 = bf16[1,16,64]{2,1,0} parameter(0)
  %param.2 = f32[256,128]{1,0} parameter(1)
  %all-gather.2 = bf16[1,128,64]{2,1,0} all-gather(%param.1), channel_id=5, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={1}, use_global_device_ids=true
  %convolution.1 = f32[256,128]{1,0} convolution(%param.2, %param.2), dim_labels=fb_io->bf, metadata={op_name="jit(step)/while/body/dot_general" stack_frame_id=3}, backend_config={"window_config":{"estimated_cycles":"77"}}
  ROOT %tuple.1 = (f32[256,128]{1,0}, bf16[1,128,64]{2,1,0}) tuple(%convolution.1, %all-gather.2)
}

%done (param.3: bf16[1,16,64]) -> bf16[1,128,64] {
  %param.3 = bf16[1,16,64]{2,1,0} parameter(0)
  %all-gather.3 = bf16[1,128,64]{2,1,0} all-gather(%param.3), channel_id=5, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={1}, use_global_device_ids=true
  ROOT %custom-call.2 = bf16[1,128,64]{2,1,0} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%body (state: (s32[], bf16[1,16,64], f32[256,128])) -> (s32[], bf16[1,16,64], f32[256,128]) {
  %state = (s32[]{:T(128)}, bf16[1,16,64]{2,1,0}, f32[256,128]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %copy.1 = s32[]{:T(128)} copy(%i)
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%copy.1, %two)
  %w = bf16[1,16,64]{2,1,0} get-tuple-element(%state), index=1
  %x = f32[256,128]{1,0} get-tuple-element(%state), index=2
  %async-collective-start = (bf16[1,16,64]{2,1,0}, bf16[1,128,64]{2,1,0}, u32[]{:S(2)}) fusion(%w), kind=kCustom, calls=%start
  %fusion.1 = (f32[256,128]{1,0}, bf16[1,128,64]{2,1,0}) fusion(%w, %x), kind=kOutput, calls=%carry, backend_config={"window_config":{"kernel_window_bounds":[],"estimated_cycles":"1000","iteration_bounds":["1"]}}
  %async-collective-done = bf16[1,128,64]{2,1,0} fusion(%w), kind=kCustom, calls=%done
  %y = f32[256,128]{1,0} get-tuple-element(%fusion.1), index=0
  ROOT %tuple.2 = (s32[]{:T(128)}, bf16[1,16,64]{2,1,0}, f32[256,128]{1,0}) tuple(%next, %w, %y)
}

%compare (p: s32[], q: s32[]) -> pred[] {
  %p = s32[] parameter(0)
  %q = s32[] parameter(1)
  ROOT %lt = pred[]{:T(512)} compare(%q, %p), direction=GT
}

%condition (state.1: (s32[], bf16[1,16,64], f32[256,128])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, bf16[1,16,64]{2,1,0}, f32[256,128]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(22)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %fusion.2 = pred[] fusion(%i.1, %limit), kind=kLoop, calls=%compare
}

ENTRY %main (w.1: bf16[1,16,64], x.1: f32[256,128]) -> f32[256,128] {
  %w.1 = bf16[1,16,64]{2,1,0} parameter(0)
  %x.1 = f32[256,128]{1,0} parameter(1), sharding={replicated}
  %three = s32[]{:T(128)} constant(3)
  %copy.2 = s32[]{:T(128)} copy(%three)
  %tuple.3 = (s32[]{:T(128)}, bf16[1,16,64]{2,1,0}, f32[256,128]{1,0}) tuple(%copy.2, %w.1, %x.1)
  %while.1 = (s32[]{:T(128)}, bf16[1,16,64]{2,1,0}, f32[256,128]{1,0}) while(%tuple.3), condition=%condition, body=%body, metadata={op_name="jit(step)/while" stack_frame_id=1}
  %z = f32[256,128]{1,0} get-tuple-element(%while.1), index=2
  %permute-start = (f32[256,128]{1,0}, f32[256,128]{1,0}, u32[], u32[]) collective-permute-start(%z), channel_id=9, source_target_pairs={{0,4},{4,0}}
  %permute-done = f32[256,128]{1,0} collective-permute-done(%permute-start)
  ROOT %mine.2.clone.1 = f32[256,128]{1,0} custom-call(%permute-done, %w.1), custom_call_target="tpu_custom_call", operand_layout_constraints={f32[256,128]{1,0}, bf16[1,16,64]{2,1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\"block_q\": 512, \"fused\": false}"
}}, metadata={op_name="jit(step)/mine/pallas_call" stack_frame_id=7}, backend_config={"custom_call_config":{"body":"TUzvUgFNTElS","cost_estimate":{"flops":"6000","transcendentals":"0","bytes_accessed":"400","remote_bytes_transferred":"0"}}}
}
"""  # noqa: E501


@pytest.fixture(scope='module')
def step():
    return program.read(TEXT)


def test_a_loop_that_depends_on_data_is_counted_once_or_as_often_as_is_said():
    text = TEXT.replace('constant(22)', 'get-tuple-element(%state.1), index=0')
    once, often = program.read(text), program.read(text, turns=7)
    assert (once.cycles, often.cycles) == (1000, 7000)
    assert len(once.uncounted) == len(often.uncounted) == 1


def test_cycles_are_those_of_whole_fusions_as_often_as_they_run(step):
    assert step.cycles == 10 * 1000
    assert step.uncounted == ()


def test_flops_of_dots_inside_fusions(step):
    assert step.flops == 10 * 2 * 256 * 128 * 256


def test_a_collective_spread_over_fusions_is_one(step):
    gather, permute = step.traffic({'data': 2, 'fsdp': 4})
    assert gather == program.Traffic('all-gather', ('data', 'fsdp'), 10, 10 * 128 * 64 * 2)
    assert permute == program.Traffic('collective-permute', ('data',), 1, 256 * 128 * 4)


def test_a_kernel_by_name_with_what_it_says_of_itself(step):
    (kernel,) = step.kernels
    assert (kernel.name, kernel.times, kernel.metadata) == ('mine', 1, {'block_q': 512, 'fused': False})
    assert list(map(str, kernel.operands)) == ['f32[256,128]', 'bf16[1,16,64]']
    assert list(map(str, kernel.results)) == ['f32[256,128]']
    assert kernel.charge == Charge(6000.0, 400.0)
    chip = CHIPS['v5e']
    assert charged_cycles(step.kernels, chip) == pytest.approx(1.5e9 * max(6000 / 197e12, 400 / 819e9))


def test_a_kernel_of_unknown_cost_is_an_error(step):
    with pytest.raises(ConfigError, match=r'the kernel mine declares no cost; give its pallas_call a pl\.CostEstimate'):
        _ = dataclasses.replace(step.kernels[0], declared=None).charge


def test_a_collective_under_way_while_the_device_computes(step):
    """… and one for which it waits. On v5e:2x4 a group of all 8 has two lines of 50 GB/s, a pair one."""
    chip = CHIPS['v5e']
    torus = Torus(chip, (2, 4), tuple((x, y) for x in range(2) for y in range(4)))
    gather, permute = sorted(transfers(step, chip), key=lambda each: each.kind)
    everyone = tuple(range(8))
    assert gather == Transfer('all-gather', '', bytes=128 * 64 * 2, group=everyone, times=10, meanwhile=1000)
    assert permute == Transfer('collective-permute', '', bytes=256 * 128 * 4, group=(0, 4), times=1, meanwhile=0)
    assert (gather.hidden, permute.hidden) == (True, False)
    assert permute.exposed(torus) == pytest.approx(256 * 128 * 4 / 50e9)
    large = dataclasses.replace(gather, bytes=8_000_000)
    assert large.exposed(torus) == pytest.approx(10 * (7_000_000 / 100e9 - 1000 / chip.clock))
    twice = dataclasses.replace(large, kind='all-reduce')
    assert twice.exposed(torus) == pytest.approx(10 * (14_000_000 / 100e9 - 1000 / chip.clock))
    assert dataclasses.replace(large, meanwhile=200_000).exposed(torus) == 0.0


def test_text_of_something_else():
    with pytest.raises(ValueError, match='not the text of a compiled program'):
        program.read('module @jit_f attributes {}')


# ------------------------------------------------------------------------------------------- groups of devices


def of(groups, opcode='all-gather', name='replica_groups'):
    instruction = hlo.Instruction(
        'a', hlo.Shape('f32', (8,)), opcode, (), '', f', channel_id=1, {name}={groups}, dimensions={{0}}'
    )
    return sorted(tuple(sorted(group)) for group in collectives.groups(instruction, devices=8))


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('{{0,4},{1,5},{2,6},{3,7}}', [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ('{}', [(0, 1, 2, 3, 4, 5, 6, 7)]),
        ('[2,4]<=[8]', [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ('[4,2]<=[2,4]T(1,0)', [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ('[4,2]<=[2,2,2]T(0,2,1)', [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ("mesh['a'=2,'b'=1,'c'=4] {'a'}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ("mesh['a'=2,'b'=2,'c'=2], device_ids=([4,2]T(1,0)) {'a','b'}", [(0, 1, 4, 5), (2, 3, 6, 7)]),
        ("mesh['a'=2,'b'=4] {'b':(2)2}", [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ("mesh['a'=8] {'a':(1)2,'a':(4)2}", [(0, 1, 4, 5), (2, 3, 6, 7)]),
        ("mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", [(0, 2), (1, 3)]),
    ],
)  # fmt: skip
def test_forms_of_replica_groups(text, expected):
    assert of(text) == expected


def test_axes_are_those_along_which_a_group_differs():
    mesh = {'data': 2, 'fsdp': 2, 'seq': 1, 'tensor': 2}
    assert collectives.axes([(0, 4), (1, 5), (2, 6), (3, 7)], mesh) == ('data',)
    assert collectives.axes([(0, 1, 2, 3), (4, 5, 6, 7)], mesh) == ('fsdp', 'tensor')
    assert collectives.axes([(0, 0), (1, 1), (2, 4)], mesh) == ('data', 'fsdp')
    assert collectives.axes([(0,), (1,)], mesh) == ()


# ----------------------------------------------------------------------------------------------- shapes and dots


def test_bytes_of_shapes():
    assert hlo.Shape('bf16', (3, 5)).bytes == 30
    assert hlo.Shape('s4', (3,)).bytes == 2
    assert hlo.Shape('f8e4m3fn', (4, 4)).bytes == 16
    assert hlo.Shape('pred', ()).bytes == 1


@pytest.mark.parametrize(
    ('lhs', 'rhs', 'out', 'attributes', 'terms'),
    [
        # Batched attention: each of 4 x 32 heads its own window place.
        ((4, 32, 2048, 128), (4, 32, 2048, 128), (4, 32, 2048, 2048), 'window={size=4x32 stride=3x31 lhs_dilate=4x32}, dim_labels=01bf_01oi->01bf', (4, 32, 2048, 2048, 128)),  # noqa: E501
        # A projection onto heads: the kernel slides over padding and meets the one place there is.
        ((4, 2048, 4096, 1), (4096, 32, 128, 1), (4, 2048, 32, 128), 'window={size=1x32 pad=0_0x31_31 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f', (4, 2048, 4096, 32, 128)),  # noqa: E501
        # The gradient of a weight: sums over batch and tokens.
        ((4, 2048, 4096), (4, 2048, 11008), (4096, 11008, 1), 'window={size=4}, dim_labels=0fb_0io->bf0', (4, 2048, 4096, 11008)),  # noqa: E501
    ],
)  # fmt: skip
def test_dots_as_the_tpu_compiler_writes_them(lhs, rhs, out, attributes, terms):
    instruction = hlo.Instruction('c', hlo.Shape('f32', out), 'convolution', ('a', 'b'), '%a, %b', f', {attributes}')
    flops = arithmetic.flops(instruction, [hlo.Shape('bf16', lhs), hlo.Shape('bf16', rhs)])
    expected = 2
    for size in terms:
        expected *= size
    assert flops == expected


# ------------------------------------------------------------------------------------------------ splash attention


def splash(phase, results, extra=(), table=(2, 4), **metadata):
    """2 heads of 4 queries to a key, 1024 tokens, width 128, in blocks of 512 x 256: of 8 blocks a head, 6 are seen."""
    query, key = hlo.Shape('bf16', (2, 4, 1024, 128)), hlo.Shape('bf16', (2, 1024, 128))
    table = hlo.Shape('s8', (1, *table))
    return program.Kernel(
        name=f'splash_mqa_{phase}_no_residuals',
        operands=(table, query, key, key, *extra),
        results=results,
        times=3,
        declared=None,
        metadata=metadata,
    )


def test_splash_is_charged_for_the_blocks_that_a_causal_mask_shows():
    query, key = hlo.Shape('bf16', (2, 4, 1024, 128)), hlo.Shape('bf16', (2, 1024, 128))
    pairs = 8 * 6 * 512 * 256
    forward = splash('fwd', (query,), block_q=512, block_kv=256)
    assert forward.charge.flops == 2 * 2 * pairs * 128
    assert forward.charge.bytes == 2 * query.bytes + 8 * 6 * 256 * 2 * 128 * 2
    log_sums = hlo.Shape('f32', (2, 4, 1, 1024))
    to_queries = splash('dq', (query,), (log_sums, query, log_sums), block_q_dq=512, block_kv_dq=256)
    assert to_queries.charge.flops == 3 * 2 * pairs * 128
    assert to_queries.charge.bytes == 3 * query.bytes + 2 * log_sums.bytes + 8 * 6 * 256 * 2 * 128 * 2
    to_keys = splash('dkv', (key, key), (log_sums, query, log_sums), block_q_dkv=512, block_kv_dkv=256)
    assert to_keys.charge.flops == 4 * 2 * pairs * 128
    assert to_keys.charge.bytes == 4 * key.bytes + 8 * 6 * 512 * (2 * 128 * 2 + 2 * 4)


def test_a_window_narrows_what_splash_visits():
    query = hlo.Shape('bf16', (2, 4, 1024, 128))
    windowed = splash('fwd', (query,), table=(2, 2), block_q=512, block_kv=256)
    assert windowed.charge.flops == 2 * 2 * 8 * (2 + 2) * 512 * 256 * 128


# -------------------------------------------------------------------------------------------------- grouped matmul


@pytest.mark.parametrize('name', ['gmm', 'tgmm'])
def test_a_grouped_matmul_is_charged_for_every_tile_that_it_may_visit(name):
    """Mixtral's, 98,304 rows in tiles of 1,024: 96 tiles, and as many more as 8 groups may end inside of one."""
    rows, deep, wide, groups, tile = 98_304, 4096, 14_336, 8, 1024
    visits = rows // tile + groups - 1
    counts = [hlo.Shape('s32', dims) for dims in ((), (groups + 1,), (visits,), (visits,), (1,))]
    left, right = hlo.Shape('bf16', (rows, deep)), hlo.Shape('bf16', (groups, deep, wide))
    kernel = program.Kernel(
        name=name,
        operands=(*counts, left, right),
        results=(hlo.Shape('bf16', (rows, wide)),),
        times=1,
        declared=Charge(2.0 * rows * deep * wide, 7.0),
        metadata={},
    )
    assert kernel.charge.flops == 2 * visits * tile * deep * wide
    assert kernel.charge.bytes == 7.0

"""Bytes that instructions move, from lines as the TPU compiler writes them: S(1) is fast memory, S(5) the host's."""

import pytest

from tpu_llm.plan import hbm, hlo

LAYER = 64 * 128 * 2
STACK = 8 * LAYER

TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=4

%slice_and_square (stack: bf16[8,64,128], i: s32[]) -> bf16[64,128] {
  %stack = bf16[8,64,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %view = bf16[8,64,128]{2,1,0} bitcast(%stack)
  %one = bf16[1,64,128]{2,1,0} dynamic-slice(%view, %i, %zero, %zero), dynamic_slice_sizes={1,64,128}
  %flat = bf16[64,128]{1,0} bitcast(%one)
  ROOT %square = bf16[64,128]{1,0} multiply(%flat, %flat)
}

%slice_and_sum (stack.1: bf16[8,64,128], i.1: s32[]) -> bf16[] {
  %stack.1 = bf16[8,64,128]{2,1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %one.1 = bf16[1,64,128]{2,1,0} dynamic-slice(%stack.1, %i.1, %zero.1, %zero.1), dynamic_slice_sizes={1,64,128}
  %all = bf16[] reduce(%stack.1, %one.1), dimensions={0,1,2}
  ROOT %sum = bf16[] add(%all, %all)
}

%update (stack.2: bf16[8,64,128], layer.2: bf16[1,64,128], i.2: s32[]) -> bf16[8,64,128] {
  %stack.2 = bf16[8,64,128]{2,1,0} parameter(0)
  %layer.2 = bf16[1,64,128]{2,1,0} parameter(1)
  %i.2 = s32[] parameter(2)
  %zero.2 = s32[] constant(0)
  ROOT %written.2 = bf16[8,64,128]{2,1,0} dynamic-update-slice(%stack.2, %layer.2, %i.2, %zero.2, %zero.2)
}

%update_fast (stack.3: bf16[8,64,128], layer.3: bf16[1,64,128], i.3: s32[]) -> (bf16[8,64,128], bf16[1,64,128]) {
  %stack.3 = bf16[8,64,128]{2,1,0:S(1)} parameter(0)
  %layer.3 = bf16[1,64,128]{2,1,0} parameter(1)
  %i.3 = s32[] parameter(2)
  %zero.3 = s32[] constant(0)
  %written.3 = bf16[8,64,128]{2,1,0:S(1)} dynamic-update-slice(%stack.3, %layer.3, %i.3, %zero.3, %zero.3)
  ROOT %both = (bf16[8,64,128]{2,1,0:S(1)}, bf16[1,64,128]{2,1,0}) tuple(%written.3, %layer.3)
}

%nested (stack.4: bf16[8,64,128], i.4: s32[]) -> f32[64,128] {
  %stack.4 = bf16[8,64,128]{2,1,0} parameter(0)
  %i.4 = s32[] parameter(1)
  %inner = bf16[64,128]{1,0} fusion(%stack.4, %i.4), kind=kLoop, calls=%slice_and_square
  ROOT %wide = f32[64,128]{1,0} convert(%inner)
}

%start (part: bf16[16,128]) -> (bf16[16,128], bf16[64,128]) {
  %part = bf16[16,128]{1,0} parameter(0)
  %gathered = bf16[64,128]{1,0} all-gather(%part), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %token = (bf16[16,128]{1,0}, bf16[64,128]{1,0}) custom-call(%gathered), custom_call_target="AsyncCollectiveStart"
}

%carry (part.1: bf16[16,128], y: bf16[64,128]) -> (bf16[64,128], bf16[64,128]) {
  %part.1 = bf16[16,128]{1,0} parameter(0)
  %y = bf16[64,128]{1,0} parameter(1)
  %gathered.1 = bf16[64,128]{1,0} all-gather(%part.1), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  %meanwhile = bf16[64,128]{1,0} multiply(%y, %y)
  ROOT %pair = (bf16[64,128]{1,0}, bf16[64,128]{1,0}) tuple(%meanwhile, %gathered.1)
}

%done (part.2: bf16[16,128]) -> bf16[64,128] {
  %part.2 = bf16[16,128]{1,0} parameter(0)
  %gathered.2 = bf16[64,128]{1,0} all-gather(%part.2), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %there = bf16[64,128]{1,0} custom-call(%gathered.2), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter (input: bf16[64,128]) -> bf16[16,128] {
  %input = bf16[64,128]{1,0} parameter(0)
  %all-reduce = bf16[64,128]{1,0} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %zero.5 = u32[] constant(0)
  ROOT %mine = bf16[16,128]{1,0} dynamic-slice(%all-reduce, %zero.5, %zero.5), dynamic_slice_sizes={16,128}
}

ENTRY %main (w: bf16[8,64,128], x: bf16[1,64,128], n: s32[], p: bf16[16,128], q: bf16[64,128]) -> bf16[64,128] {
  %w = bf16[8,64,128]{2,1,0} parameter(0)
  %x = bf16[1,64,128]{2,1,0} parameter(1)
  %n = s32[] parameter(2)
  %p = bf16[16,128]{1,0} parameter(3)
  %q = bf16[64,128]{1,0} parameter(4)
  %sliced = bf16[64,128]{1,0} fusion(%w, %n), kind=kLoop, calls=%slice_and_square
  %summed = bf16[] fusion(%w, %n), kind=kLoop, calls=%slice_and_sum
  %updated = bf16[8,64,128]{2,1,0} fusion(%w, %x, %n), kind=kLoop, calls=%update
  %fast = bf16[8,64,128]{2,1,0:S(1)} copy(%w)
  %updated_fast = (bf16[8,64,128]{2,1,0:S(1)}, bf16[1,64,128]{2,1,0}) fusion(%fast, %x, %n), kind=kLoop, calls=%update_fast
  %within = f32[64,128]{1,0} fusion(%w, %n), kind=kLoop, calls=%nested
  %product = bf16[64,64]{1,0} dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %zero.9 = s32[] constant(0)
  %bare = bf16[1,64,128]{2,1,0} dynamic-slice(%w, %n, %zero.9, %zero.9), dynamic_slice_sizes={1,64,128}
  %bare_fast = bf16[1,64,128]{2,1,0:S(1)} dynamic-slice(%w, %n, %zero.9, %zero.9), dynamic_slice_sizes={1,64,128}
  %bare_update = bf16[8,64,128]{2,1,0} dynamic-update-slice(%w, %x, %n, %zero.9, %zero.9)
  %update_from_fast = bf16[8,64,128]{2,1,0} dynamic-update-slice(%w, %bare_fast, %n, %zero.9, %zero.9)
  %slice-start = ((bf16[8,64,128]{2,1,0}), bf16[1,64,128]{2,1,0:S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:1], [0:64], [0:128]}
  %slice-done = bf16[1,64,128]{2,1,0:S(1)} slice-done(%slice-start)
  %copy-start = (bf16[64,128]{1,0:S(1)}, bf16[64,128]{1,0}, u32[]{:S(2)}) copy-start(%q)
  %copy-done = bf16[64,128]{1,0:S(1)} copy-done(%copy-start)
  %copy-start.1 = (bf16[64,128]{1,0:S(5)}, bf16[64,128]{1,0}, u32[]{:S(2)}) copy-start(%q)
  %copy-done.1 = bf16[64,128]{1,0:S(5)} copy-done(%copy-start.1)
  %copy-start.2 = (bf16[64,128]{1,0}, bf16[64,128]{1,0:S(5)}, u32[]{:S(2)}) copy-start(%copy-done.1)
  %kept = bf16[8,64,128]{2,1,0:S(5)} custom-call(), custom_call_target="AllocateBuffer"
  %offload-start = ((bf16[8,64,128]{2,1,0:S(5)}, bf16[1,64,128]{2,1,0}, s32[]), bf16[8,64,128]{2,1,0:S(5)}, u32[]{:S(2)}) dynamic-update-slice-start(%kept, %x, %n, %zero.9, %zero.9)
  %offload-done = bf16[8,64,128]{2,1,0:S(5)} dynamic-update-slice-done(%offload-start)
  %reload-start = ((bf16[8,64,128]{2,1,0:S(5)}, s32[]), bf16[1,64,128]{2,1,0}, u32[]{:S(2)}) dynamic-slice-start(%offload-done, %n, %zero.9, %zero.9), dynamic_slice_sizes={1,64,128}
  %gather-start = (bf16[16,128]{1,0}, bf16[64,128]{1,0}) all-gather-start(%p), channel_id=2, replica_groups={{0,1,2,3}}, dimensions={0}
  %gather-done = bf16[64,128]{1,0} all-gather-done(%gather-start)
  %reduce-start = bf16[64,128]{1,0} all-reduce-start(%q), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%add
  %both-start = (bf16[64,128]{1,0}, bf16[16,128]{1,0}) all-reduce-start(%q, %p), channel_id=4, replica_groups={{0,1,2,3}}, to_apply=%add
  %permute-start = (bf16[64,128]{1,0}, bf16[64,128]{1,0}, u32[], u32[]) collective-permute-start(%q), channel_id=5, source_target_pairs={{0,1}}
  %async-collective-start = (bf16[16,128]{1,0}, bf16[64,128]{1,0}) fusion(%p), kind=kCustom, calls=%start
  %carried = (bf16[64,128]{1,0}, bf16[64,128]{1,0}) fusion(%p, %q), kind=kOutput, calls=%carry
  %async-collective-done = bf16[64,128]{1,0} fusion(%p), kind=kCustom, calls=%done
  %scattered = bf16[16,128]{1,0} fusion(%q), kind=kCustom, calls=%all-reduce-scatter
  %room = bf16[64,128]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %kernel = bf16[64,128]{1,0} custom-call(%q, %p), custom_call_target="tpu_custom_call"
  ROOT %out = bf16[64,128]{1,0} bitcast(%gather-done)
}
"""  # noqa: E501


@pytest.fixture(scope='module')
def module():
    return hlo.parse(TEXT)


def figure(of, module, name):
    instruction = module.entry.instructions[name]
    return of(module, module.entry, instruction) if of is hbm.moved else of(module.entry, instruction)


INDEX = 4  # bytes of the slice's place, which is an operand as others are
PART = 16 * 128 * 2


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('sliced', LAYER + INDEX + LAYER),
        ('summed', STACK + INDEX + 2),  # what is read whole besides is read whole, once
        ('updated', LAYER + INDEX + LAYER),
        ('updated_fast', LAYER + INDEX),  # read; what it writes is a slice in fast memory, and what it was given
        ('within', LAYER + INDEX + 2 * LAYER),
        ('fast', STACK),
        ('product', 2 * LAYER + 64 * 64 * 2),
        ('bare', 2 * LAYER),
        ('bare_fast', LAYER),
        ('bare_update', 2 * LAYER),
        ('update_from_fast', LAYER),
        ('slice-start', LAYER),
        ('copy-start', LAYER),
        ('copy-start.1', LAYER),
        ('copy-start.2', LAYER),
        ('offload-start', LAYER),
        ('reload-start', LAYER),
        ('gather-start', PART + LAYER),
        ('reduce-start', 2 * LAYER),
        ('both-start', 2 * (LAYER + PART)),
        ('permute-start', 2 * LAYER),
        ('kernel', 2 * LAYER + PART),
        ('async-collective-start', PART + LAYER),
        ('carried', 2 * LAYER),  # what it carries on was counted at the start
        ('scattered', LAYER + PART),
        *((name, 0) for name in ('slice-done', 'copy-done', 'gather-done', 'async-collective-done', 'room', 'out')),
    ],
)  # fmt: skip
def test_bytes_read_from_hbm_and_written_to_it(module, name, expected):
    assert figure(hbm.moved, module, name) == expected


@pytest.mark.parametrize(
    ('name', 'expected'),
    [('copy-start.1', LAYER), ('copy-start.2', LAYER), ('offload-start', LAYER), ('reload-start', LAYER)]
    + [(name, 0) for name in ('copy-start', 'slice-start', 'offload-done', 'sliced', 'gather-start')],
)
def test_bytes_to_the_host_and_from_it(module, name, expected):
    assert figure(hbm.to_host, module, name) == expected

"""Steps compiled for two slices by libtpu: what goes over the network between them."""

import importlib.util

import pytest

from configs.pods import llama2_7b_v5e_256
from tpu_llm.models.graph import ModelGraph
from tpu_llm.parallel.chips import find
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.plan import collectives
from tpu_llm.plan import compile as planned

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason="needs pip install -e '.[plan]'"),
]


BETWEEN = ' between slices'


def crossing(mesh):
    """What a step for two slices of 2 x 2 chips sends from one to the other (kind, bytes, times), and the bytes of the
    gradients that a device holds.
    """
    where = find('2xv5e-4')
    assert {device.slice_index for device in planned.devices(where)} == {0, 1}
    run = llama2_7b_v5e_256.get_config('smoke')
    run.model.head_dim, run.model.width, run.data.seq_len, run.model.dtype = 128, 256, 256, 'bfloat16'
    run.mesh, run.data.global_batch, run.tokens, run.steps = mesh, 16, 0, 100
    step = planned.compile_step(run, where)
    program = step.program()
    # Of XLA's own collectives none leaves a slice: what does is handed to the runtime of the network.
    inside = {each.axes for each in program.traffic(step.mesh) if not each.kind.endswith(BETWEEN)}
    assert inside == {('fsdp',)}
    sent = []
    for each in program.executed:
        kind = collectives.kind(each.instruction) or ''
        if kind.endswith(BETWEEN):
            sent.append((kind.removesuffix(BETWEEN), collectives.result_bytes(each.instruction), each.times))
    gradients = 2 * ModelGraph(run.model.make()).count() // 4  # bytes on a device: a quarter, in bfloat16
    return sent, gradients


def test_hybrid_sharding_sums_gradients_across_and_no_more():
    sent, gradients = crossing(Mesh(data=2))
    assert {kind for kind, _, _ in sent} == {'all-reduce'}
    assert {times for _, _, times in sent} == {1}, 'once a step, not once a layer'
    # Once each; of the head's the compiler sends twice as much.
    assert gradients <= sum(size for _, size, _ in sent) <= 1.2 * gradients


def test_a_pipeline_hands_activations_across():
    """Two stages and four microbatches: five ticks forward and five backward."""
    sent, gradients = crossing(Mesh(stage=2))
    rows = 4 * 256 * 256 * 2  # of a microbatch of four rows in bfloat16, T and D 256
    assert [(kind, size, times) for kind, size, times in sent if times > 1] == [('one-to-one', rows // 4, 5)] * 2
    # Once a step the batch comes in and goes out, and the gradients of embedding and head are summed; no layer's are.
    assert {kind for kind, _, times in sent if times == 1} == {'all-gather', 'reduce-scatter', 'all-reduce'}
    assert sum(size for kind, size, _ in sent if kind == 'all-reduce') < gradients / 2

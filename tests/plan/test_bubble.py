"""What a pipelined step executes, read from its compiled program, is what the bubble's formula says."""

import pytest

from configs.pretrain import get_config
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.parallel.pipeline import Pipeline, overhead
from tpu_llm.plan.program import read
from tpu_llm.train.setup import abstract_batch, make_graphs, make_layout, make_train_step, param_infos
from tpu_llm.train.state import abstract_state
from tpu_llm.train.weights import abstract_frozen

pytestmark = pytest.mark.usefixtures('quick_compile')
LAYERS = 8


def executed(stages, circles=1):
    """Matmul FLOPs a device and step, without the head's: forward and twice backward, none of it recomputed."""
    run = get_config('smoke')
    run.model.layers, run.model.attention = LAYERS, 'reference'
    run.data.seq_len, run.data.global_batch = 64, 64
    run.mesh, run.pipeline = Mesh(stage=stages, data=8 // stages, fsdp=1), Pipeline(microbatches=8, circles=circles)
    layout = make_layout(run)
    graphs = make_graphs(run, layout)
    tx = run.optimizer.make(param_infos(graphs.model), 10)
    state = abstract_state(graphs.model, tx, layout, ema=False)
    args = state, abstract_frozen(run, graphs, layout), abstract_batch(run, layout)
    step = make_train_step(run, graphs.model, tx, layout, state).program(*args)
    head = 6 * run.data.global_batch * run.data.seq_len * run.model.width * run.model.vocab_size / 8
    return read(step.as_text()).flops - head


@pytest.fixture(scope='module')
def needed():
    return executed(1)


@pytest.mark.parametrize('circles', [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_pipeline_executes_what_the_formula_says(needed, circles):
    assert executed(4, circles) / needed == pytest.approx(overhead(LAYERS, 4, circles, 8), rel=0.03)

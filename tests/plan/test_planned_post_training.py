"""Plans of runs that hold more than what trains: a reference, weights under adapters, the programs of a rollout.

Compiled for TPUs, nothing is run. Needs pip install -e '.[plan]'.
"""

import importlib.util
import math

import jax
import pytest

from configs.pods import llama31_8b_grpo_v6e_64, llama31_70b_dpo_v5p_128
from tpu_llm.models.flops import attention_maps, feed_forward_maps, forward_flops, train_flops
from tpu_llm.parallel.chips import find
from tpu_llm.plan.compile import compile_step, devices
from tpu_llm.plan.plan import load, make_plan, needed_flops, plain
from tpu_llm.train.setup import make_graphs, make_layout, param_infos
from tpu_llm.train.state import abstract_state
from tpu_llm.train.weights import abstract_frozen

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason="needs pip install -e '.[plan]'")
V5E = find('v5e-4')


def small(page, arg='smoke'):
    """A smoke run with rows and heads as wide as TPU kernels want them; 2 rows of 256 tokens on each of 4 devices."""
    run = page.get_config(arg)
    run.model.head_dim, run.model.width, run.data.seq_len, run.model.dtype = 128, 256, 256, 'bfloat16'
    run.model.remat = 'none'
    return run


def held(run):
    """Bytes of a device that parameters, optimizer, frozen weights and reference take by their shapes."""
    layout = make_layout(run, devices(V5E))
    graphs = make_graphs(run, layout)
    state = abstract_state(graphs.model, run.optimizer.make(param_infos(graphs.model), 20), layout, ema=False)
    frozen = abstract_frozen(run, graphs, layout)
    trees = (state.params, state.optimizer, frozen.base, frozen.other)
    return tuple(
        sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
        for tree in trees
    )


@pytest.fixture(scope='module')
def policy():
    return make_plan(small(llama31_8b_grpo_v6e_64), V5E)


@pytest.fixture(scope='module')
def preference():
    return compile_step(small(llama31_70b_dpo_v5p_128), V5E)


@pytest.fixture(scope='module')
def adapted():
    return make_plan(small(llama31_8b_grpo_v6e_64, 'smoke,lora=16'), V5E)


# ------------------------------------------------------------------------------------------------- without a compile


def test_a_reference_that_the_objective_reads_goes_forward_once_more():
    run = small(llama31_70b_dpo_v5p_128)
    own, once = train_flops(run.model, 256), forward_flops(run.model, 256)
    assert needed_flops(run) == pytest.approx(own + once)


def test_a_reference_whose_log_probs_come_with_the_batch_does_not():
    run = small(llama31_8b_grpo_v6e_64)
    assert run.reference is not None
    assert needed_flops(run) == train_flops(run.model, 256)


def test_weights_under_adapters_have_no_gradient():
    run = small(llama31_70b_dpo_v5p_128, 'smoke,lora=16')
    assert needed_flops(run) == pytest.approx(3 * forward_flops(run.model, 256))


# ---------------------------------------------------------------------------------------------------------- compiled


@needs_libtpu
@pytest.mark.full
def test_a_policy_is_planned_with_its_rollout_and_the_reference_it_holds_meanwhile(policy):
    run = small(llama31_8b_grpo_v6e_64)
    parameters, optimizer, _, reference = held(run)
    assert policy.fits
    # The step reads the reference's log-probs in the batch, and the device holds its weights all the same.
    kinds = policy.memory.kinds
    assert (kinds['parameters'], kinds['optimizer state']) == (parameters, optimizer)
    assert kinds['reference'] == reference == parameters / 2  # bfloat16
    rollout, scoring = policy.others
    assert (rollout.name, rollout.tokens, scoring.name, scoring.tokens) == ('rollout', 16, 'scoring', 0)
    for each in policy.others:
        found = each.memory.kinds
        assert (found['parameters'], found['optimizer state'], found['reference']) == (parameters, optimizer, reference)
        assert each.memory.allocated >= parameters + optimizer + reference
        assert each.seconds > 0


@needs_libtpu
@pytest.mark.full
def test_a_longer_response_takes_longer(policy):
    run = small(llama31_8b_grpo_v6e_64)
    run.rollout.max_new_tokens = 64
    longer = make_plan(run, V5E).others[0]
    assert longer.tokens == 64
    assert longer.seconds > 2 * policy.others[0].seconds


@needs_libtpu
@pytest.mark.full
def test_preferences_are_planned_with_the_reference_on_the_same_mesh(preference):
    run = small(llama31_70b_dpo_v5p_128)
    parameters, optimizer, _, reference = held(run)
    kinds = preference.memory.kinds
    assert preference.others == ()
    assert (kinds['parameters'], kinds['optimizer state']) == (parameters, optimizer)
    assert kinds['reference'] == reference == parameters / 2
    # The policy's maps thrice, the reference's once; on TPUs heads are rotated by a matmul, forward and back.
    model, tokens = run.model, run.data.global_batch * 256 // 4
    maps = 4 * (attention_maps(model) + feed_forward_maps(model, 0))
    turned = 3 * (model.heads + model.kv_heads) * model.head_dim**2
    head = 4 * model.width * 384  # of a vocabulary in whole lanes
    assert preference.program().flops == 2 * tokens * (model.layers * (maps + turned) + head)


@needs_libtpu
@pytest.mark.full
def test_adapters_are_planned_with_the_weights_that_they_stand_on_once(adapted):
    run = small(llama31_8b_grpo_v6e_64, 'smoke,lora=16')
    parameters, optimizer, base, reference = held(run)
    assert reference == 0
    assert 'reference' not in adapted.memory.kinds
    kinds = adapted.memory.kinds
    assert (kinds['parameters'], kinds['optimizer state'], kinds['frozen weights']) == (parameters, optimizer, base)
    assert parameters < base / 4
    for each in adapted.others:
        assert each.memory.kinds['parameters'] == parameters + base
        assert 'frozen weights' not in each.memory.kinds


@needs_libtpu
@pytest.mark.full
def test_such_a_plan_is_what_its_json_says(policy):
    assert load(plain(policy)) == policy

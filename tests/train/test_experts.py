"""The worst layer's numbers, and one clear warning where a layer uses few of its experts."""

import json
import math
import re

import jax
import numpy as np
import pytest
import tiny
import toy

from tpu_llm.nn.moe import MoE
from tpu_llm.nn.router import Router
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.optim.optimizer import SGD
from tpu_llm.optim.schedule import Schedule
from tpu_llm.train import metrics
from tpu_llm.train.experts import CollapseAlarm, effective_number, worst_layer
from tpu_llm.train.frozen import start_frozen
from tpu_llm.train.loop import fit
from tpu_llm.train.state import create_state
from tpu_llm.train.step import StepOptions, make_step

pytestmark = pytest.mark.usefixtures('quick_compile')

EVEN, TWO, ONE = [0.25] * 4, [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]


def test_the_effective_number_of_experts():
    assert effective_number(EVEN) == pytest.approx(4)
    assert effective_number(TWO) == pytest.approx(2)
    assert effective_number(ONE) == 1
    assert 1 < effective_number([0.9, 0.1, 0.0, 0.0]) < 2
    assert math.isnan(effective_number([math.nan] * 4))


def test_each_number_is_that_of_its_own_worst_layer():
    numbers = {'loss': 1.0, 'expert_load': [EVEN, TWO], 'expert_entropy': [0.1, 0.7], 'expert_dropped': [0.2, 0.0]}
    expected = {'experts_used': pytest.approx(2), 'expert_entropy_min': 0.1, 'expert_dropped_max': 0.2}
    assert worst_layer(numbers) == expected
    assert worst_layer({'loss': 1.0}) == {}


@pytest.fixture
def alarm():
    """Of a model whose layers 2 and 4 have four experts."""
    moe = MoE(experts=4, chosen=1, expert_width=4, first_dense=1, every=2, router=Router(bias_rate=0.001))
    return CollapseAlarm(toy.config(layers=5, moe=moe))


def ring(alarm, step, *loads):
    for load in loads:
        alarm.add(load)
    return alarm.due(step)


def test_a_collapsed_layer_is_named_with_what_to_try(alarm):
    expected = (
        'warning: step 1,200: layer 4 uses 1.0 of its 4 experts; raise router.balance_loss (now 0.01) or '
        'router.bias_rate (now 0.001), or lower the learning rate'
    )
    assert ring(alarm, 1200, [EVEN, ONE]) == [expected]


def test_it_rings_below_half_of_the_experts(alarm):
    assert ring(alarm, 60, [TWO, [0.6, 0.4, 0.0, 0.0]])[0].startswith('warning: step 60: layer 4 uses 2.0 of')
    assert ring(alarm, 70, [TWO, EVEN]) == []


def test_it_is_silent_in_the_first_steps(alarm):
    assert ring(alarm, 49, [ONE, ONE]) == []
    assert len(ring(alarm, 50, [ONE, ONE])) == 2


def test_a_layer_rings_once_in_a_thousand_steps(alarm):
    assert len(ring(alarm, 100, [ONE, EVEN])) == 1
    assert [line.split(':')[2] for line in ring(alarm, 200, [ONE, ONE])] == [
        ' layer 4 uses 1.0 of its 4 experts; raise router.balance_loss (now 0.01) or router.bias_rate (now 0.001), '
        'or lower the learning rate'
    ]
    assert ring(alarm, 1099, [ONE, ONE]) == []
    assert len(ring(alarm, 1100, [ONE, EVEN])) == 1


def test_the_load_is_averaged_since_the_last_line(alarm):
    others = [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]
    assert ring(alarm, 100, [ONE, EVEN], [others[0], EVEN], [others[1], EVEN]) == []
    assert len(ring(alarm, 110, [ONE, EVEN])) == 1


def test_steps_that_are_not_finite_are_passed_over(alarm):
    broken = [[math.nan] * 4] * 2
    assert ring(alarm, 100, broken) == []
    assert len(ring(alarm, 110, broken, [ONE, EVEN])) == 1


# ------------------------------------------------------------------------------------------------- a whole run


def test_a_run_logs_its_layers_warns_of_collapse_and_reports_them(text, tmp_path, capsys):
    """A bias that moves by 1 a step outweighs every probability: each step the tokens crowd with an expert or two."""
    run = tiny.get_config(f'text={text},steps=52,every=100')
    router = Router(choice='softmax_then_topk', balance_loss=0.0, bias_rate=1.0)
    run.model.layers = 2
    run.model.moe = MoE(experts=8, chosen=1, expert_width=16, first_dense=1, router=router)
    run.hooks, run.report = (), True
    fit(run, tmp_path)
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if 'warning' in line]
    assert re.match(r'warning: step 50: layer 1 uses [12]\.\d of its 8 experts; raise router.balance_loss', warning)
    lines = metrics.read(tmp_path / 'metrics.jsonl')
    assert len(lines) == 52
    for line in lines:
        (load,) = line['expert_load']
        assert sum(load) == pytest.approx(1, abs=1e-3)
        assert line['experts_used'] == effective_number(load)
        assert line['expert_dropped'] == [0.0]
        assert [line['expert_entropy_min']] == line['expert_entropy']
        assert line['balance'] == 0.0
    summary = json.loads((tmp_path / 'summary.json').read_text())
    assert summary['active_parameters'] == summary['parameters'] - 7 * 3 * 32 * 16
    assert 'Load per expert' in (tmp_path / 'report.html').read_text()


# -------------------------------------------------------------------------------------------------- one step


@pytest.fixture(scope='module')
def after():
    """State and metrics after a step with a bias of rate 0.01, by the number of microbatches."""
    moe = MoE(experts=4, chosen=2, expert_width=8, router=Router(bias_rate=0.01, balance_loss=0.5, balance_over='row'))
    graph, layout = toy.graph(toy.config(layers=2, moe=moe)), toy.layout()
    tx = SGD(schedule=Schedule(peak=0.1, decay='constant')).make(toy.infos(graph), 10)
    batch = toy.batch([[1] * 5 + [2] * 3, [1] * 6 + [0] * 2, [1] * 2 + [0] * 6, [1] * 8])
    frozen = start_frozen(0.1, 0, layout)

    def step(count):
        options = StepOptions(accumulate=count, ema=0.75)
        state = create_state(graph.bind(graph.shapes()), graph, tx, layout, seed=0, ema=True)
        return jax.jit(make_step(graph, NextToken(chunk=4), tx, layout, options))(state, frozen, batch)

    return {count: step(count) for count in (1, 2)}


def test_a_step_moves_the_bias_against_the_excess_load(after):
    state, numbers = after[1]
    bias = state.params['stack.period.0.moe.router.bias']
    np.testing.assert_allclose(bias, -0.01 * np.sign(numbers['expert_load'] - 0.25), rtol=1e-6)
    np.testing.assert_allclose(state.ema['stack.period.0.moe.router.bias'], 0.25 * bias, rtol=1e-6)


def test_the_losses_of_the_experts_are_part_of_the_loss(after):
    _, numbers = after[1]
    assert numbers['balance'] > 0.5 * 2 * 0.99  # of two layers, each 1 at best but for chance
    np.testing.assert_allclose(numbers['loss'], numbers['nll'] + numbers['balance'], rtol=1e-6)


def test_microbatches_change_nothing(after):
    (state, numbers), (other, parts) = after[1], after[2]
    for name, value in numbers.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-5, err_msg=name)
    for name, value in state.params.items():
        np.testing.assert_allclose(other.params[name], value, atol=1e-6, err_msg=name)

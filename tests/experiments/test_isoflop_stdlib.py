"""The ladder: what its runs are, without running them."""

import pytest

from experiments.isoflop_stdlib import config as ladder
from tpu_llm.config import validate
from tpu_llm.models.flops import train_flops
from tpu_llm.nn.param import count_parameters


@pytest.mark.parametrize('arg', ['', 'largest', 'rates', 'smoke'])
def test_runs_are_sound_and_cost_their_budget(arg):
    runs = list(ladder.sweep(arg))
    assert len({name for name, _, _ in runs}) == len(runs)
    for _, run, labels in runs:
        validate(run)
        cost = run.data.global_batch * run.data.seq_len * train_flops(run.model, run.data.seq_len)
        assert abs(run.steps * cost - labels['budget']) <= cost / 2


def test_there_are_four_budgets_of_five_sizes_from_a_tenth_to_some_millions():
    runs = list(ladder.sweep())
    sizes = {labels['budget']: set() for _, _, labels in runs}
    for _, run, labels in runs:
        sizes[labels['budget']].add(count_parameters(run.model.make()))
    assert len(sizes) >= 4
    assert min(map(len, sizes.values())) >= 5
    everything = set.union(*sizes.values())
    assert min(everything) >= 1e5
    assert 4e6 < max(everything) < 5e6


def test_the_run_that_checks_is_larger_than_any_that_is_fitted():
    most = max(labels['budget'] for _, _, labels in ladder.sweep())
    [(_, run, labels)] = ladder.sweep('largest')
    assert labels['budget'] >= 4 * most
    assert run.data == next(iter(ladder.sweep()))[1].data

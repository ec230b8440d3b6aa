"""What the pod pages cost is what tests/golden/pods says, and each fits its slice.

After a change that is meant: JAX_PLATFORMS=cpu python benchmarks/pods.py --write
"""

import importlib
import importlib.util

import pytest

from benchmarks import pods
from tpu_llm.plan import budget
from tpu_llm.plan.compile import versions

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason="needs libtpu: pip install -e '.[plan]'"
)
PAGES = pods.pages()
FAST = {'llama2_7b_v5e_256'}  # the others take minutes each


def marked(name):
    return pytest.param(name, marks=pytest.mark.full if name in FAST else pytest.mark.nightly)


@pytest.mark.parametrize('name', PAGES)
def test_a_page_fits_its_slice(name):
    """By the figures that are kept, which `test_a_page_costs_what_is_kept` makes again."""
    module = importlib.import_module(f'configs.pods.{name}')
    figures, chip = pods.kept(name), pods.where(name).chip
    assert pods.where(name).name == module.SLICE, 'the name of a page ends with its slice'
    assert figures['slice'] == str(pods.where(name))
    assert 0 < figures['peak_bytes'] <= chip.hbm
    assert figures['flops'] / chip.flops < figures['seconds']
    for other in ('rollout', 'scoring'):
        assert (other in figures) == hasattr(module.get_config(), 'rollout')
        assert 0 <= figures.get(other, {'peak_bytes': 0})['peak_bytes'] <= chip.hbm


def test_goals_that_are_reached_stay_reached():
    """Those that are not are in benchmarks/README.md."""
    for name in ('llama2_7b_v5e_256', 'llama2_70b_v5p_512', 'mixtral_8x7b_v6e_256'):
        figures, goal = pods.kept(name), pods.GOALS[name]
        assert figures['cycles'] <= goal.cycles
        assert figures['peak_bytes'] <= goal.gib * pods.GIB
    seven = pods.kept('llama2_7b_v5e_256')
    travels = sum(each['bytes'] for each in seven['collectives'].values())
    assert travels <= 1.001 * pods.GOALS['llama2_7b_v5e_256'].peer_gigabytes * 1e9
    assert seven['kernels']['splash_mha_fwd_segmented_residuals'] <= 2 * 32


@needs_libtpu
@pytest.mark.parametrize('name', [marked(name) for name in PAGES])
def test_a_page_costs_what_is_kept(name):
    kept = pods.kept(name)
    if versions() != kept['versions']:
        pytest.skip(f'the figures are of {kept["versions"]}, here is {versions()}')
    assert list(budget.differences(kept, budget.of(pods.planned(name)))) == []


# ------------------------------------------------------------------------------------------------ what changed


def changed(**fields):
    old = pods.kept('llama2_7b_v5e_256')
    return list(budget.differences(old, {**old, **fields}))


def test_what_changed_is_said_in_words():
    old = pods.kept('llama2_7b_v5e_256')
    assert changed() == []
    assert changed(cycles=round(old['cycles'] * 1.001)) == []
    grown = old['cycles'] * 1.1
    assert changed(cycles=grown) == [
        f'cycles without kernels: {old["cycles"] / 1e9:.3f}e9 became {grown / 1e9:.3f}e9 (+10.0%)'
    ]
    assert changed(peak_bytes=15 * 2**30)[0].endswith('became 15.00 GiB')
    more = {**old['collectives'], 'mlp all-gather over tensor': {'bytes': 1_200_000_000, 'count': 32}}
    assert changed(collectives=more) == ['mlp all-gather over tensor appeared: +1.20 GB a step']
    name, first = next(iter(old['collectives'].items()))
    rest = {key: value for key, value in old['collectives'].items() if key != name}
    assert changed(collectives=rest) == [f'{name} disappeared: {-first["bytes"] / 1e9:+.2f} GB a step']
    twice = {**old['collectives'], name: {'bytes': 2 * first['bytes'], 'count': 2 * first['count']}}
    assert changed(collectives=twice) == [
        f'{name}: {first["bytes"] / 1e9:+.2f} GB a step ({first["count"]} times became {2 * first["count"]})'
    ]
    assert changed(kernels={'gmm': 3})[0].startswith('kernels: ')
    assert changed(rollout={'peak_bytes': 3 * 2**30, 'seconds': 1.5}) == [
        'peak HBM of the rollout: 0.00 GiB became 3.00 GiB', 'seconds of the rollout: 0 became 1.5'
    ]  # fmt: skip

"""Judge against people: values from the literature, from SciPy and from the definitions."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from tpu_llm.config import ConfigError
from tpu_llm.evals import __main__ as command
from tpu_llm.evals.agreement import measure


def of_table(table, values):
    """Items whose (label, verdict) occur as often as the table says."""
    pairs = [
        (a, b) for a, row in zip(values, table, strict=True) for b, n in zip(values, row, strict=True) for _ in range(n)
    ]
    return [a for a, _ in pairs], [b for _, b in pairs]


def test_kappa_of_a_table_by_hand():
    """Agreement 35 / 50, by chance 0.5: kappa is 0.4."""
    found = measure(*of_table([[20, 5], [10, 15]], ['yes', 'no']))
    assert found.agreement.value == pytest.approx(0.7)
    assert found.kappa.value == pytest.approx(0.4)
    assert math.isnan(found.spearman.value)
    assert math.isnan(found.quadratic.value)


def weighted_kappa(labels, verdicts, power):
    """By its definition: 1 − Σ w O / Σ w E over all pairs of values."""
    values = np.unique([*labels, *verdicts])
    observed = np.array([[np.sum((labels == a) & (verdicts == b)) for b in values] for a in values]) / len(labels)
    expected = observed.sum(1)[:, None] * observed.sum(0)[None, :]
    weights = abs(values[:, None] - values[None, :]) ** power
    return 1 - (weights * observed).sum() / (weights * expected).sum()


@pytest.mark.parametrize('steps', [4, 1000])
def test_ordered_verdicts_against_scipy_and_the_definition(steps):
    random = np.random.default_rng(1)
    labels = random.integers(1, steps, 60).astype(float) / 2
    verdicts = np.round(np.clip(labels + random.normal(0, steps / 5, 60), 0, steps))
    found = measure(labels, verdicts, draws=1)
    assert found.spearman.value == pytest.approx(stats.spearmanr(labels, verdicts).statistic, abs=1e-12)
    assert found.agreement.value == np.mean(labels == verdicts)
    assert found.kappa.value == pytest.approx(weighted_kappa(labels, verdicts, 1e-9), abs=1e-6)
    assert found.linear.value == pytest.approx(weighted_kappa(labels, verdicts, 1), abs=1e-12)
    assert found.quadratic.value == pytest.approx(weighted_kappa(labels, verdicts, 2), abs=1e-12)


def test_a_step_of_the_scale_that_never_occurs_is_as_wide_as_ever():
    """A scale of 1 to 5 in which nobody gives a 3: 2 and 4 are two apart, not one."""
    labels, verdicts = [1, 2, 4, 5, 5], [1, 4, 4, 5, 2]
    assert measure(labels, verdicts, draws=1).linear.value == pytest.approx(
        weighted_kappa(np.array(labels), np.array(verdicts), 1)
    )


def test_perfect_and_opposite_judges():
    labels = [1, 2, 3, 4, 5] * 4
    perfect, opposite = measure(labels, labels), measure(labels, [6 - label for label in labels])
    for name in ('agreement', 'kappa', 'linear', 'quadratic', 'spearman'):
        estimate = getattr(perfect, name)
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx((1, 1, 1))
    assert opposite.spearman.value == pytest.approx(-1)
    assert opposite.quadratic.value == pytest.approx(-1)


def test_where_all_is_one_value_only_agreement_is_defined():
    found = measure([2.0, 2.0, 2.0], [2.0, 2.0, 2.0])
    assert found.agreement.value == 1
    assert all(math.isnan(getattr(found, name).value) for name in ('kappa', 'linear', 'quadratic', 'spearman'))


def test_intervals_hold_the_truth_as_often_as_they_say():
    """A judge that is right 4 times of 5 on two equally frequent labels: agreement 0.8, kappa 0.6."""
    random, held = np.random.default_rng(0), []
    for _ in range(60):
        labels = random.integers(0, 2, 80)
        verdicts = np.where(random.random(80) < 0.8, labels, 1 - labels)
        kappa = measure(labels, verdicts, draws=80).kappa
        held.append(kappa.low <= 0.6 <= kappa.high)
    assert 0.86 <= np.mean(held) <= 1.0
    assert np.std(held) > 0, 'an interval that always holds it says nothing'


def test_items_without_a_verdict_are_counted_and_left_out():
    found = measure(['a', 'b', 'tie', 'a'], ['a', None, 'tie', None])
    assert (found.items, found.without) == (2, 2)
    assert found.agreement.value == 1


def test_what_cannot_be_compared_is_said():
    with pytest.raises(ConfigError, match='1 of 2 items have a verdict; agreement takes at least 2'):
        measure([1, 2], [1, None])
    with pytest.raises(ConfigError, match=r"numbers and texts \(2 and 'good'\); write both alike"):
        measure([1, 2], [3, 'good'])
    with pytest.raises(ConfigError, match='draws is 0'):
        measure([1, 2], [1, 2], draws=0)


@pytest.fixture
def ask(capsys):
    def run(*args):
        code = command.main([str(arg) for arg in args])
        return code, *capsys.readouterr()

    return run


def test_from_the_command_line(ask, tmp_path):
    file = tmp_path / 'verdicts.jsonl'
    records = [{'human': n % 3, 'score': n % 3 if n % 4 else 0, 'judge': 'x' if n < 20 else 'y'} for n in range(40)]
    records[7]['score'] = None
    file.write_text('\n'.join(map(json.dumps, records)))
    fields = ('--label=human', '--verdict=score', '--by=judge', '--draws=50')
    code, out, _ = ask('agreement', file, *fields)
    assert code == 0
    assert out.startswith('x: 19 items, 1 without a verdict left out\n  agreement')
    assert 'Spearman' in out
    _, out, _ = ask('agreement', file, *fields, '--json')
    told = json.loads(out)
    given = [record for record in records if record['score'] is not None and record['judge'] == 'y']
    assert told['y']['items'] == 20
    assert told['y']['agreement']['value'] == np.mean([record['human'] == record['score'] for record in given])
    code, _, err = ask('agreement', file, '--label=humam', '--verdict=score')
    assert (code, err) == (
        2,
        f"error: {file}, line 1 has no 'humam' (did you mean 'human'?); its fields are human, score, judge\n",
    )
    file.write_text('{"label": 1, "verdict": 1}\n[1]\n')
    assert ask('agreement', file)[2].startswith(f'error: {file}, line 2 is no JSON object but list')

"""Ratings of battles: published estimates, closed forms, and graphs that have no likeliest rating."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from scipy import optimize

from tpu_llm.config import ConfigError
from tpu_llm.evals import __main__ as command
from tpu_llm.evals.arena import MEAN, SCALE, Battle, rate, ratings_of

# Wins of a row against a column in 1987, and the estimates of Agresti, Categorical Data Analysis (1990), section 10.6.
TEAMS = ('Milwaukee', 'Detroit', 'Toronto', 'New York', 'Boston', 'Cleveland', 'Baltimore')
WINS = [
    [0, 7, 9, 7, 7, 9, 11],
    [6, 0, 7, 5, 11, 9, 9],
    [4, 6, 0, 7, 7, 8, 12],
    [6, 8, 6, 0, 6, 7, 10],
    [6, 2, 6, 7, 0, 7, 12],
    [4, 4, 5, 6, 6, 0, 6],
    [2, 4, 1, 3, 1, 7, 0],
]
PUBLISHED = [1.581, 1.436, 1.294, 1.248, 1.108, 0.684, 0.0]


def battles(wins, names):
    return [
        Battle(a, b, 1.0)
        for a, row in zip(names, wins, strict=True)
        for b, n in zip(names, row, strict=True)
        for _ in range(n)
    ]


def values(found):
    return {each.model: each.rating.value for island in found.islands for each in island}


def test_published_estimates_of_baseball():
    ratings = ratings_of(np.array(WINS, float))
    np.testing.assert_allclose((ratings - ratings[-1]) / SCALE, PUBLISHED, atol=6e-4)
    assert ratings.mean() == pytest.approx(MEAN)
    found = rate(battles(WINS, TEAMS), draws=100)
    assert [each.model for each in found.islands[0]] == list(TEAMS)
    assert [each.rating.value for each in found.islands[0]] == pytest.approx(list(ratings))
    assert [each.battles for each in found.islands[0]] == [78] * 7
    assert found.warnings == ()
    assert found.islands[0][0].rank == 1
    assert found.islands[0][-1].rank > 4


def test_two_models_have_the_odds_of_their_points():
    """7 wins, 1 tie and 2 losses: 7.5 points to 2.5, log10(3) x 400 apart."""
    given = [*[Battle('x', 'y', 1.0)] * 6, Battle('y', 'x', 0.0), *[Battle('y', 'x', 1.0)] * 2, Battle('x', 'y', 0.5)]
    found = values(rate(given, draws=10))
    assert found['x'] - found['y'] == pytest.approx(400 * math.log10(3))
    assert found['x'] + found['y'] == pytest.approx(2 * MEAN)


def test_the_likelihood_has_its_maximum_there():
    random = np.random.default_rng(3)
    points = (
        random.integers(0, 6, (9, 9)) * (random.random((9, 9)) < 0.6) + 0.5 * np.eye(9, k=1) + 0.5 * np.eye(9, k=-1)
    )
    np.fill_diagonal(points, 0.0)

    def loss(odds):
        return (points * np.logaddexp(0, odds[None, :] - odds[:, None])).sum() + odds.sum() ** 2

    expected = optimize.minimize(loss, np.zeros(9), method='BFGS', tol=1e-9).x
    np.testing.assert_allclose((ratings_of(points) - MEAN) / SCALE, expected, atol=2e-5)


def test_a_thousand_to_one_is_solved_too():
    """Newton's steps alone would overshoot."""
    points = np.array([[0, 1e6, 0], [1, 0, 1e6], [0, 1, 0]], float)
    ratings = ratings_of(points)
    assert ratings[0] - ratings[1] == pytest.approx(400 * 6)
    assert ratings[1] - ratings[2] == pytest.approx(400 * 6)


def test_intervals_hold_the_truth_as_often_as_they_say():
    truth, random, held = np.array([1.0, 0.3, -1.3]), np.random.default_rng(0), []
    for _ in range(40):
        pairs = random.integers(0, 3, (240, 2))
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        wins = random.random(len(pairs)) < 1 / (1 + np.exp(truth[pairs[:, 1]] - truth[pairs[:, 0]]))
        given = [Battle('abc'[a], 'abc'[b], float(won)) for (a, b), won in zip(pairs, wins, strict=True)]
        for each in rate(given, draws=50).islands[0]:
            true = MEAN + SCALE * truth['abc'.index(each.model)]
            held.append(each.rating.low <= true <= each.rating.high)
    assert 0.85 <= np.mean(held) < 1.0


def test_islands_are_named_and_rated_by_themselves():
    given = [Battle('a', 'b', 0.5), Battle('b', 'c', 0.5), Battle('x', 'y', 0.5)]
    found = rate(given, draws=5)
    assert [[each.model for each in island] for island in found.islands] == [['a', 'b', 'c'], ['x', 'y']]
    assert list(values(found).values()) == pytest.approx([MEAN] * 5)
    (warning,) = found.warnings
    assert warning.endswith('no battle connects these 2 islands, and ratings compare only within one: a, b, c; x, y')


def test_who_never_lost_has_no_finite_rating():
    """a and b won and lost against each other, all won against them, and low lost to them."""
    core = [Battle('a', 'b', 1.0), Battle('b', 'a', 1.0)]
    found = rate([*core, Battle('all', 'a', 1.0), Battle('b', 'low', 1.0)], draws=20)
    assert values(found) == pytest.approx({'all': math.inf, 'a': MEAN, 'b': MEAN, 'low': -math.inf})
    assert 'all: lost or tied no battle with the models below' in found.warnings[0]
    assert 'low: won or tied no battle with the models above' in found.warnings[1]
    beside = rate([*core, Battle('all', 'a', 1.0), Battle('all', 'other', 1.0)], draws=5)
    assert math.isnan(values(beside)['other'])
    assert 'other: has no place' in ' '.join(beside.warnings)


def test_a_resample_without_the_only_loss_opens_the_interval():
    given = [*[Battle('a', 'b', 1.0)] * 9, Battle('b', 'a', 1.0)]
    best = rate(given, draws=200).islands[0][0]
    assert best.rating.value == pytest.approx(MEAN + 200 * math.log10(9))
    assert best.rating.low < best.rating.value
    always = rate([Battle('a', 'b', 1.0), Battle('b', 'a', 1.0)], draws=50)
    assert always.islands[0][0].rating.high == math.inf
    (warning,) = always.warnings
    assert warning.startswith('a, b: in some resamples no finite rating is the likeliest')


def test_what_is_no_battle_is_said(tmp_path, capsys):
    with pytest.raises(ConfigError, match="'a' fights itself"):
        rate([Battle('a', 'a', 1.0)])
    with pytest.raises(ConfigError, match='there is no battle'):
        rate([])
    file = tmp_path / 'battles.jsonl'
    for record, told in (
        ({'a': 'x', 'b': 'y', 'winner': 'x'}, "line 2: winner is 'x'; write 'a', 'b', 'tie', or null"),
        ({'a': 'x', 'b': 'x', 'winner': 'a'}, "line 2: 'x' fights itself"),
        ({'a': 'x', 'winner': 'a'}, "line 2 has no 'b'"),
        ({'a': 'x', 'b': 3, 'winner': 'a'}, 'line 2: b is 3; write the name of a model'),
    ):
        file.write_text('\n' + json.dumps(record))
        assert command.main(['arena', str(file)]) == 2
        assert told in capsys.readouterr().err


def test_who_reads_no_further_ends_it_in_silence():
    end, start = os.pipe()
    os.close(end)
    asked = [sys.executable, '-m', 'tpu_llm.evals', 'arena', '--help']
    done = subprocess.run(asked, stdout=start, stderr=subprocess.PIPE, check=True)
    os.close(start)
    assert done.stderr == b''


def test_from_the_command_line(tmp_path, capsys):
    file = tmp_path / 'battles.jsonl'
    rows = [{'a': 'x', 'b': 'y', 'winner': winner} for winner in ('a', 'a', 'a', 'b', 'tie', None)]
    file.write_text('\n'.join(map(json.dumps, [*rows, {'a': 'p', 'b': 'q', 'winner': 'a'}])))
    assert command.main(['arena', str(file), '--draws=40']) == 0
    told = capsys.readouterr()
    assert told.out.startswith('6 battles, 1 without a verdict left out\n')
    assert 'rank  model' in told.out
    assert '2 islands' in told.err
    assert command.main(['arena', str(file), str(file), '--draws=40']) == 0
    assert capsys.readouterr().out.startswith('12 battles, 2 without')
    assert command.main(['arena', str(file), '--draws=40', '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    x, y = found['islands'][0]
    assert (x['model'], x['battles'], x['points']) == ('x', 5, 3.5)
    assert x['rating'] - y['rating'] == pytest.approx(400 * math.log10(3.5 / 1.5))
    assert {row['rating'] for row in found['islands'][1]} == {1000.0, 'inf'}

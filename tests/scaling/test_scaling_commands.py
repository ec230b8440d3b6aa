"""`python -m tpu_llm.scaling`, command by command."""

import json

import numpy as np
import pytest

from tests.scaling.law_data import TRUE, grid, loss
from tpu_llm.parallel.chips import find
from tpu_llm.scaling import saved
from tpu_llm.scaling.__main__ import main
from tpu_llm.scaling.spend import MFU, flops_of, guess


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A table of runs that follow the law, two of which did not finish, and its fit."""
    place = tmp_path_factory.mktemp('runs')
    runs = grid(noise=1e-3)
    lines = ['name,parameters,tokens,flops,loss,status']
    lines += [
        f'{name},{n},{d},{c},{value},finished'
        for name, n, d, c, value in zip(runs.names, runs.parameters, runs.tokens, runs.flops, runs.loss, strict=True)
    ]
    lines += ['bad,1e6,1e8,6e14,nan,diverged', 'gone,1e6,1e8,6e14,,failed']
    (place / 'table.csv').write_text('\n'.join(lines))
    return place


@pytest.fixture(scope='module')
def fit_json(folder):
    path = folder / 'fit.json'
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr('builtins.print', lambda text, **_: printed.append(text))
        assert main(['fit', str(folder / 'table.csv'), '--json', '--hold-out=2', '--bootstraps=50']) == 0
    path.write_text(printed[0])
    return path


def test_fit_prints_constants_and_the_error_of_the_largest_runs(folder, capsys):
    assert main(['fit', str(folder / 'table.csv'), '--hold-out=2', '--bootstraps=20', '--budgets=1e20']) == 0
    said = capsys.readouterr().out
    assert '64 runs (1 diverged, 1 failed left out), 2 held out' in said
    rows = [line.split() for line in said.splitlines()]
    held = [row for row in rows if row[:2] in (['run', '64'], ['run', '63'], ['run', '56'])]
    assert len(held) == 2
    assert all(abs(float(row[-1].rstrip('%'))) < 1 for row in held)
    assert any(row[:1] == ['1e+20'] for row in rows)


def test_a_fit_that_was_saved_is_the_same_fit(fit_json):
    found = json.loads(fit_json.read_text())
    assert found['left_out'] == {'diverged': 1, 'failed': 1}
    assert [abs(each['error']) < 0.01 for each in found['held_out']] == [True, True]
    fit = saved.load(fit_json)
    assert fit.draws.shape == (50, 5)
    np.testing.assert_allclose(fit.constants, TRUE, rtol=0.1)
    runs = grid()
    np.testing.assert_allclose(fit.predict(runs), runs.loss, rtol=2e-3)


def test_valleys_of_a_table(tmp_path, capsys):
    rows = ['N,D,loss,budget']
    for c in (1e15, 1e16, 1e17):
        for n in (c / 120) ** 0.5 * np.geomspace(0.3, 3, 5):
            rows.append(f'{n},{c / 6 / n},{loss(n, c / 6 / n)},{c}')
    (tmp_path / 'valleys.csv').write_text('\n'.join(rows))
    assert main(['valleys', str(tmp_path / 'valleys.csv'), '--bootstraps=50']) == 0
    said = capsys.readouterr().out
    assert '5 of 5' in said
    assert 'N = ' in said
    assert main(['fit', str(tmp_path / 'valleys.csv'), '--bootstraps=0', '--json']) == 0
    assert len(json.loads(capsys.readouterr().out)['valleys']['minima']) == 3


def test_repeats_build_on_a_fit(folder, fit_json, capsys):
    assert main(['fit', str(folder / 'table.csv'), '--law=repeats', f'--base={fit_json}', '--bootstraps=0']) == 0
    assert 'R_D' in capsys.readouterr().out
    assert main(['fit', str(folder / 'table.csv'), '--law=repeats']) == 2
    assert '--base=FIT.json' in capsys.readouterr().err


def test_serving_takes_fewer_parameters(fit_json, capsys):
    assert main(['serve', f'--fit={fit_json}', '--flops=1e21', '--served=1e12']) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    costs = [float(row[-1]) for row in rows if row and row[0] in ('compute-optimal', 'for')]
    assert costs[1] < costs[0]


def test_a_pod_is_spent_by_its_peak(fit_json, capsys):
    assert main(['budget', f'--fit={fit_json}', '--chips=v5e-256', '--hours=24']) == 0
    said = capsys.readouterr().out
    assert f'{256 * 197e12 * MFU * 24 * 3600:.3g}' in said
    assert '6,144' in said


def test_a_pod_is_spent_on_the_best_of_the_candidates(fit_json, capsys):
    """Of 125m and 1b the law takes the larger one for 4 chips and 240 hours; arithmetic says how it would lie there."""
    sizes = [f'--config=configs/pretrain.py:size={size}' for size in ('125m', '1b')]
    assert main(['budget', f'--fit={fit_json}', '--chips=v5e-4', '--hours=240', *sizes]) == 0
    said = capsys.readouterr().out
    assert 'candidate   configs/pretrain.py:size=1b' in said
    assert '--config.mesh.fsdp=' in said
    assert 'a guess in closed form' in said


def test_batch_and_rate_are_those_of_the_published_laws():
    about = guess(1e20)
    assert about.batch_tokens == pytest.approx(0.2920 * 1e20**0.3271)
    assert 1e6 < about.batch_tokens < 1.1e6
    assert about.learning_rate == pytest.approx(9.86e-4, rel=1e-3)


def test_count_of_a_config(capsys):
    assert main(['count', '--config=configs/quickstart.py']) == 0
    said = capsys.readouterr().out
    assert '3,344,064' in said.replace('parameters', '')
    assert main(['count', '--config=configs/quickstart.py', '--config.model.tied_embeddings=true']) == 0
    assert '2,557,632' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('command', 'message'),
    [
        (['fit', '{table}', '--columns=N'], 'write N=COLUMN'),
        (['fit', '{table}', '--hold-out=nobody'], "no finished run 'nobody'"),
        (['fit', '{table}', '--budgets=many'], "--budgets = 'many'"),
        (['fit', '{table}', '--base=x'], '--base is for --law=repeats'),
        (['fit', '/nowhere.csv'], 'there is no file /nowhere.csv'),
        (['serve', '--fit=/nowhere.json', '--flops=1e21', '--served=1'], 'there is no file /nowhere.json'),
        (['envelope', '{table}'], 'a row a moment'),
        (['envelope', '{folder}', '--at-least=steps=3'], 'are for a table'),
        (['serve', '--fit={table}', '--flops=1e21', '--served=1'], 'is no fit'),
        (['budget', '--fit={fit}', '--chips=v5e-256', '--hours=-1'], "--hours = '-1'"),
        (['budget', '--fit={fit}', '--chips=v9-256', '--hours=1'], 'v9'),
        (['budget', '--fit={fit}', '--chips=v5e-256', '--hours=1', '--compiles=2'], 'name one or more: --config'),
    ],
)
def test_a_mistake_is_one_line(folder, fit_json, command, message, capsys):
    named = [word.format(table=folder / 'table.csv', folder=folder, fit=fit_json) for word in command]
    assert main(named) == 2
    said = capsys.readouterr().err
    assert said.startswith('error: ')
    assert said.count('\n') == 1
    assert message in said


def test_too_few_runs_say_what_is_left_out(tmp_path, capsys):
    (tmp_path / 'few.csv').write_text('N,D,loss,status\n1e6,1e8,3.0,finished\n2e6,1e8,nan,diverged\n')
    assert main(['fit', str(tmp_path / 'few.csv')]) == 2
    said = capsys.readouterr().err
    assert 'at least 6 finished runs' in said
    assert '1 run (1 diverged left out)' in said


def test_a_law_whose_powers_are_not_above_0_has_no_optimum(tmp_path, capsys):
    rows = [
        'N,D,loss',
        *(f'{n},{d},{2 + 1e-2 * n**0.3 + 300 / d**0.4}' for n in (1e5, 1e6, 1e7) for d in (1e7, 1e8, 1e9)),
    ]
    (tmp_path / 'up.csv').write_text('\n'.join(rows))
    assert main(['fit', str(tmp_path / 'up.csv'), '--bootstraps=20']) == 0
    said = capsys.readouterr().out
    assert 'no compute optimum: alpha = -0.3' in said
    assert 'nan' not in said
    assert main(['fit', str(tmp_path / 'up.csv'), '--bootstraps=0', '--json']) == 0
    (tmp_path / 'up.json').write_text(capsys.readouterr().out)
    assert main(['serve', f'--fit={tmp_path}/up.json', '--flops=1e21', '--served=1e12']) == 2
    assert 'no compute optimum' in capsys.readouterr().err


def test_flops_of_a_slice_count_chips():
    assert flops_of(find('v5p-8'), 1.0, 0.5) == 8 * 459e12 * 1800

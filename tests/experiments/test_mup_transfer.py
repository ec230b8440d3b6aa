"""The table of best rates: of a whole grid, and into a folder that is named."""

import json

import pytest

pytest.importorskip('matplotlib', reason="needs matplotlib: pip install -e '.[plot]'")

from experiments.mup_transfer import optima


@pytest.fixture
def workdir(tmp_path):
    """Two widths, two rates and four steps, all finished."""
    runs = {}
    for mup, width in ((False, 32), (False, 64), (True, 64)):
        for rate in (0.1, 0.2):
            name = f'mup={mup},width={width},rate={rate}'
            runs[name] = {'status': 'finished'}
            (tmp_path / 'runs' / name).mkdir(parents=True)
            lines = [{'step': step, 'loss': 5.0 - step - rate} for step in range(1, 5)]
            (tmp_path / 'runs' / name / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    (tmp_path / 'sweep.json').write_text(json.dumps({'runs': runs}))
    return tmp_path


def test_the_workdir_keeps_the_results_and_the_mean_is_told(workdir, capsys):
    optima.main([str(workdir)])
    assert len((workdir / 'results.csv').read_text().splitlines()) == 7
    first = (workdir / 'rates.svg').read_bytes()
    said = capsys.readouterr().out
    assert '| standard | 32 | 2.400 | 2.300 | 0.2 (end of the grid) | 2.300 |' in said
    assert 'losses are means of the last 4 steps' in said
    optima.main([str(workdir), f'--into={workdir}/other'])
    assert (workdir / 'other/rates.svg').read_bytes() == first


@pytest.mark.parametrize('status', ['diverged', 'waiting'])
def test_a_grid_with_holes_is_refused(workdir, status):
    found = json.loads((workdir / 'sweep.json').read_text())
    found['runs']['mup=True,width=64,rate=0.2']['status'] = status
    (workdir / 'sweep.json').write_text(json.dumps(found))
    with pytest.raises(SystemExit, match=f'run mup=True,width=64,rate=0.2 is {status}; '):
        optima.main([str(workdir)])
    assert not (workdir / 'results.csv').exists()

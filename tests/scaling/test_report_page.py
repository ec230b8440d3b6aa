"""The page of a sweep: what it says of runs whose numbers are known, and what a browser makes of it."""

import itertools
import json
import math
import re
import sys

import numpy as np
import pytest

from tests.browser import look, needs_chromium
from tpu_llm.config import ConfigError
from tpu_llm.scaling import __main__ as command
from tpu_llm.scaling import drawn, figures, table
from tpu_llm.scaling.points import read
from tpu_llm.scaling.report import write_report
from tpu_llm.scaling.varied import settings

WIDTHS = (32, 64, 128, 256, 512)
BUDGETS = (1e15, 4e15, 16e15)
BATCH = 1000  # tokens of a step


def law(parameters, tokens):
    return 1.7 + 400 / parameters**0.34 + 1000 / tokens**0.36


def run(name, width, tokens, loss, *, rate=0.01, status='finished', reason='', labels=None):
    """A row of the table, and the config that it is from."""
    config = {'model': {'width': width, 'heads': width // 16}, 'optimizer': {'peak': rate}, 'seed': 0}
    parameters = 12 * width**2 * 100
    row = {'name': name, 'status': status, 'reason': reason, 'tries': 1, 'config_hash': name}
    row |= {'parameters': parameters, 'tokens': tokens, 'flops': 6 * parameters * tokens, 'steps': tokens // BATCH}
    row |= {'loss': loss, 'loss_of': 'heldout_loss', 'seconds': 90.0, 'goodput': 0.5} | (labels or {})
    row |= {'config.model.width': width, 'config.model.heads': width // 16, 'config.optimizer.peak': rate}
    return row | {'config.seed': 0, 'ledger.step': 45.0, 'ledger.compile': 30.0, 'ledger.sample': 0.0}, config


def write_sweep(folder, runs, lines=None):
    """Its files, as a sweep leaves them; each run logs `lines` of (step, loss), by default a curve to its loss."""
    folder.mkdir(parents=True)
    rows = [row for row, _ in runs]
    table.write(rows, folder)
    about = {row['name']: {'status': row['status'], 'labels': {}, 'config': config} for row, config in runs}
    (folder / 'sweep.json').write_text(json.dumps({'sweep': 'x.py', 'overrides': [], 'runs': about}))
    for row, config in runs:
        for stage in config.get('stages', {'': None}):
            write_metrics(folder / 'runs' / row['name'] / stage, lines or curve(row))
    return folder


def curve(row, points=20):
    steps = [max(1, round(row['steps'] * (i + 1) / points)) for i in range(points)]
    end = row['loss'] if isinstance(row['loss'], float) else math.nan
    return [{'step': s, 'tokens': BATCH * s, 'loss': end + 3 * (1 - s / steps[-1])} for s in steps] + [
        {'step': steps[-1], 'heldout_loss': end}
    ]


def write_metrics(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    text = '\n'.join(json.dumps({name: str(v) if v != v else v for name, v in line.items()}) for line in lines)
    (folder / 'metrics.jsonl').write_text(text + '\n')


def profile_runs():
    for budget, width in itertools.product(BUDGETS, WIDTHS):
        tokens = round(budget / (6 * 1200 * width**2) / BATCH) * BATCH
        name = f'{budget:g}-{width}'
        yield run(name, width, tokens, law(1200 * width**2, tokens), labels={'budget': budget})


@pytest.fixture(scope='module')
def sweep(tmp_path_factory):
    """Three valleys, a run of four times the highest budget, one that diverged and one that failed."""
    held = run('6.4e+16-128', 128, 542_500_000, law(1200 * 128**2, 542_500_000), labels={'budget': 6.4e16})
    diverged = run('wild', 64, 10_000, math.nan, status='diverged', reason='<nan>', labels={'budget': 1e15})
    failed = run('lost', 64, 10_000, None, status='failed', reason='out of memory', labels={'budget': 1e15})
    return write_sweep(tmp_path_factory.mktemp('sweeps') / 'ladder', [*profile_runs(), held, diverged, failed])


@pytest.fixture(scope='module')
def html(sweep):
    return write_report(sweep).read_text()


def drawings(html):
    """The figures of a page by their titles."""
    found = re.findall(r'<h3>(.*?)</h3>.*?<script type="application/json">(.*?)</script>', html, re.DOTALL)
    return {title: json.loads(text) for title, text in found}


def text(html):
    """What stands in the tables and cards, tags taken out."""
    return re.sub(r'<[^>]+>', ' ', re.sub(r'<(script|style)>.*?</\1>', '', html, flags=re.DOTALL))


# ---------------------------------------------------------------------------------------------------------- the page


def test_the_headline_says_what_became_of_the_runs(html):
    best = f'{law(1200 * 128**2, 542_500_000):.4g}'
    for words in ('<dd>16<small class="bad">1 diverged, 1 failed', f'<dd>{best}<small>6.4e+16-128', '5 sizes', '27:00'):
        assert words in html
    assert '50% of it training steps' in html


def test_curves_can_be_seen_by_steps_tokens_and_flops(html):
    curves = drawings(html)['All runs']['curves']
    assert set(curves['metrics']) == {'heldout_loss', 'loss'}
    track = curves['metrics']['loss'][0]
    assert track[1] == [BATCH * step for step in track[0]]
    assert curves['flops'][0] == pytest.approx(6 * 1200 * 32**2)
    for name in ('steps', 'tokens', 'FLOPs'):
        assert re.search(f'<option( selected)?>{name}</option>', html)
    assert set(curves['groups']) == {'budget', 'model.width', 'run'}
    assert len({color for _, color, _ in curves['groups']['model.width']}) == len(WIDTHS)


def test_what_is_not_finite_leaves_no_point(html):
    spec = drawings(html)['All runs']
    names = [trace['name'] for trace in spec['data']]
    assert 'wild' not in names  # it logged no finite loss
    assert 'NaN' not in json.dumps(spec)


def test_settings_are_those_that_others_do_not_decide(sweep, html):
    rows = [row for row, _ in profile_runs()]
    assert settings(rows) == {'budget': 'budget', 'config.model.width': 'model.width'}  # heads follow from the width
    by_width = drawings(html)['model.width']
    assert by_width['layout']['xaxis']['type'] == 'log'
    assert by_width['layout']['xaxis']['tickvals'] == list(WIDTHS)
    lines = [trace for trace in by_width['data'] if trace['mode'] == 'lines+markers']
    assert [trace['x'] for trace in lines] == [list(WIDTHS)] * 3  # one a budget
    assert 'Without a value, or not finished: wild, lost.' in html


def test_random_draws_are_settings_each():
    draws = [run(f'r{i}', 32 + 16 * i, 1000, 3.0, rate=0.001 * (i + 1))[0] for i in range(6)]
    for i, row in enumerate(draws):
        row['config.decay'] = (0.3, 0.1, 0.6, 0.2, 0.5, 0.4)[i]
    assert list(settings(draws)) == [
        'config.model.width',
        'config.model.heads',
        'config.optimizer.peak',
        'config.decay',
    ]


def test_valleys_and_the_law_are_those_of_the_runs(sweep, html):
    found = drawings(html)
    valleys = [trace for trace in found['Valleys']['data'] if trace['mode'] == 'markers' and len(trace['x']) == 1]
    exact = [  # the best size of N D = C / 6 for this law
        (0.34 * 400 / (0.36 * 1000) * (budget / 6) ** 0.36) ** (1 / 0.70) for budget in BUDGETS
    ]
    assert [trace['x'][0] for trace in valleys] == pytest.approx(exact, rel=0.15)
    assert 'held out' in {trace.get('name') for trace in found['Law and runs']['data']}
    told = text(html)
    assert '16 runs (1 diverged, 1 failed left out), 1 held out' in ' '.join(told.split())
    held = re.search(r'6\.4e\+16-128 .*?([+-]\d+\.\d+)%', ' '.join(told.partition('held out  ')[2].split()))
    assert abs(float(held[1])) < 0.2


def test_the_table_has_every_run_and_what_it_took(html):
    rows = html.partition('<div class="panel runs">')[2]
    assert rows.count('<tr>') == 1 + 18
    assert '<th scope="col" class="number">compile, s</th>' in rows
    assert 'sample, s' not in rows  # nobody sampled
    assert 'failed<small>out of memory</small>' in rows
    assert '&lt;nan&gt;' in rows
    assert '<data value="1.6e+16">1.6e+16</data>' in rows


def test_nothing_is_fetched(html):
    assert "default-src 'none'" in html
    assert not re.search(r'<(script|img|link|iframe)[^>]* (src|href)=', html)


def test_stages_have_curves_of_their_own(tmp_path):
    runs = []
    for rate in (0.1, 0.2):
        row, _ = run(f'rate={rate}', 32, 1000, 3.0, rate=rate)
        runs.append((row, {'type': 'Stages', 'stages': {'sft': {'steps': 1}, 'dpo': {'steps': 1}}}))
    folder = write_sweep(tmp_path / 's', runs, [{'step': s, 'loss': 4.0 - s, 'reward': s / 10} for s in (1, 2)])
    html = write_report(folder).read_text()
    curves = drawings(html)['All runs']['curves']
    assert set(curves['metrics']) == {'sft: loss', 'sft: reward', 'dpo: loss', 'dpo: reward'}
    assert '<option>FLOPs</option>' not in html
    assert '<option>tokens</option>' not in html  # none were counted
    assert 'a valley needs at least 3 finished runs' in html
    assert 'Valleys' not in drawings(html)


def test_another_metric_may_be_better_when_higher(tmp_path):
    runs = [run(f'r{i}', 32, 1000, 3.0 - i, rate=0.1 * (i + 1)) for i in range(3)]
    for i, (row, _) in enumerate(runs):
        row['final.reward'] = (0.2, 0.9, 0.5)[i]
    html = write_report(write_sweep(tmp_path / 's', runs), 'final.reward', highest=True).read_text()
    assert '<dt>highest reward</dt><dd>0.9<small>r1' in html
    assert '<h2>Reward by setting</h2>' in html


def test_a_long_curve_is_drawn_by_medians(tmp_path):
    lines = [{'step': s, 'tokens': BATCH * s, 'loss': 100.0 if s == 500 else 3.0} for s in range(1, 2001)]
    html = write_report(write_sweep(tmp_path / 's', [run('a', 32, 2_000_000, 3.0)], lines)).read_text()
    steps, _, values = drawings(html)['All runs']['curves']['metrics']['loss'][0]
    assert len(steps) == 100
    assert set(values) == {3.0}


def test_too_few_runs_of_valleys_say_how_many_a_law_needs(tmp_path):
    few = [made for made in profile_runs() if made[0]['budget'] == BUDGETS[0]]
    for row, _ in few:
        row['tokens'] = 1000
    write_sweep(tmp_path / 's', few)
    html = drawn.law(read(tmp_path / 's/table.csv'))
    assert 'IsoFLOP valleys' in html
    assert 'No law is fitted: Chinchilla has 5 constants (E, A, B, alpha, beta): it needs at least 6' in html


# ----------------------------------------------------------------------------------------------------------- mistakes


def said(capsys, *words):
    status = command.main(['report', *map(str, words)])
    return status, capsys.readouterr()


def test_the_command_writes_the_page(sweep, capsys):
    status, out = said(capsys, sweep)
    assert (status, out.out) == (0, f'{sweep}/report.html\n')


def test_a_folder_of_no_sweep_is_refused(tmp_path, capsys):
    status, out = said(capsys, tmp_path / 'nowhere')
    assert status == 2
    assert out.err == (
        f'error: {tmp_path}/nowhere/sweep.json does not exist: is {tmp_path}/nowhere the workdir of a sweep?\n'
    )


def test_a_sweep_without_a_finished_run_is_refused(tmp_path, capsys):
    runs = [run('a', 32, 1000, None, status='failed'), run('b', 64, 1000, None, status='waiting')]
    status, out = said(capsys, write_sweep(tmp_path / 's', runs))
    assert status == 2
    assert out.err.startswith(f'error: no run of {tmp_path}/s has finished (1 failed, 1 waiting)')


def test_an_unknown_metric_is_refused_with_the_nearest(sweep, capsys):
    status, out = said(capsys, sweep, '--metric=step')
    assert status == 2
    assert "no numbers in a column 'step' (did you mean 'steps'?)" in out.err


def test_without_plotly_the_command_says_what_to_install(sweep, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'plotly', None)
    status, out = said(capsys, sweep)
    assert (status, out.err.count('\n')) == (2, 1)
    assert "pip install -e '.[report]'" in out.err
    with pytest.raises(ConfigError, match='drawn by plotly'):
        figures.plotly()


# ------------------------------------------------------------------------------------------------------------ colours

# What linear RGB becomes to those without a kind of cones: Machado, Oliveira and Fernandes (2009), table 1, severity 1.
SEEN = {
    'all cones': np.eye(3),
    'protanopia': [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    'deuteranopia': [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    'tritanopia': [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def oklab(linear):
    """Björn Ottosson's space, in which distances are about as large as they look."""
    cones = [[0.41222, 0.53633, 0.05145], [0.2119, 0.68070, 0.10740], [0.0883, 0.28172, 0.62998]]
    lab = [[0.21045, 0.79362, -0.00407], [1.978, -2.42859, 0.45059], [0.0259, 0.78277, -0.80868]]
    return np.array(lab) @ np.cbrt(np.array(cones) @ np.clip(linear, 0, 1))


def linear(color):
    level = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize('eyes', list(SEEN))
@pytest.mark.parametrize('theme', [figures._LIGHT, figures._DARK], ids=['light', 'dark'])
def test_hues_differ_to_all_eyes(theme, eyes):
    seen = [oklab(np.array(SEEN[eyes]) @ linear(color)) for color in theme['hue']]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 0.06


# ------------------------------------------------------------------------------------------------------ a real browser

PROBE = """
const figures = [...document.querySelectorAll('figure.chart')], all = figures[0];
const plot = name => figures.find(figure => figure.querySelector('h3').innerText === name).querySelector('.drawing');
const paths = drawing => drawing.querySelectorAll('.scatterlayer .trace').length;
const pick = (name, value) => {
  const field = all.querySelector(`[name=${name}]`);
  field.value = value;
  field.dispatchEvent(new Event('change'));
  return all.querySelector('.drawing').data[0];
};
const seen = {
  drawn: figures.map(figure => figure.querySelectorAll('.main-svg').length > 0 && paths(figure) > 0),
  text: Math.min(...[...document.querySelectorAll('.xtick text')].map(
    text => parseFloat(getComputedStyle(text).fontSize))),
  wide: Math.max(...figures.map(figure => figure.querySelector('.main-svg').getBoundingClientRect().right)),
  traces: paths(all),
};
seen.first = pick('axis', 'steps').x[0];
seen.flops = pick('axis', 'FLOPs').x[0];
seen.groups = (pick('color', 'model.width'), all.querySelectorAll('.legend button').length);
all.querySelector('.legend button').click();
seen.hidden = paths(all);
all.querySelector('.legend button').dispatchEvent(new MouseEvent('dblclick'));
seen.alone = paths(all);
const sorted = () => [...document.querySelectorAll('.runs tbody tr')].map(row => row.cells[0].innerText);
[...document.querySelectorAll('.runs th')].find(head => head.innerText.startsWith('loss')).click();
seen.sorted = sorted();
const color = () => [plot('Valleys').layout.font.color, plot('Valleys').data[0].marker.color];
seen.before = color();
await turn(matchMedia('(prefers-color-scheme: dark)').matches ? 'light' : 'dark');
seen.after = color();
return seen;
"""


@needs_chromium
@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [1280, 390])
def test_the_page_works_in_a_browser(html, tmp_path, width, scheme):
    page = look(html, tmp_path, width, PROBE, scheme)
    seen = page.seen
    assert page.width == width
    assert page.overflow <= 0
    assert page.fetched == page.console == []
    assert seen['drawn'] == [True] * 7
    assert seen['text'] >= 11
    assert seen['wide'] <= width
    assert seen['traces'] == 16
    assert seen['flops'] == pytest.approx(seen['first'] * BATCH * 6 * 1200 * 32**2)
    assert seen['groups'] == len(WIDTHS)
    assert (seen['hidden'], seen['alone']) == (13, 3)  # three budgets of the least width
    assert seen['sorted'][0] == '6.4e+16-128'
    assert set(seen['sorted'][-2:]) == {'wild', 'lost'}
    light, dark = ['#5a6270', figures._LIGHT['shade'][0]], ['#9aa4b2', figures._DARK['shade'][0]]
    assert [seen['before'], seen['after']] == ([light, dark] if scheme == 'light' else [dark, light])


@needs_chromium
def test_a_browser_tells_of_errors_and_requests(tmp_path):
    bad = '<script>console.error("wrong")</script><img src="http://127.0.0.1:9/there.png">'
    page = look(bad, tmp_path, 390, 'return innerWidth')
    assert page.seen == 390
    assert any('wrong' in line for line in page.console)
    assert page.fetched == ['http://127.0.0.1:9/there.png']

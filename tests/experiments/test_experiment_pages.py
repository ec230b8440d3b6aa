"""The pages of experiments: their README, and the numbers of results.csv."""

import json
import re

import pytest

from experiments import report
from tests.browser import look, needs_chromium

README = """# What & why

    python train.py

**Question.** See [the rules](../../docs/rules.md) and [a paper](https://arxiv.org/abs/1). <b>not bold</b>

| stage | right |
|---|---|
| sft | 0.5 |

![the curves](curves.svg)
"""
ROWS = 'stage,run,step,metric,value\n' + ''.join(
    f'{stage},{run},{step},{metric},{value + step / 100}\n'
    for stage, metric in (('pretrain', 'heldout_loss'), ('sft', 'heldout_right'), ('dpo', 'heldout_right'))
    for run, value in (('s0', 0.1), ('s1', 0.2), ('s2', 0.6))
    for step in (10, 20)
)


@pytest.fixture
def experiment(tmp_path):
    """A folder of one, and where its page goes."""
    folder = tmp_path / 'experiments/small'
    folder.mkdir(parents=True)
    (folder / 'README.md').write_text(README)
    return folder, tmp_path / 'runs/reports'


def drawings(html):
    found = re.findall(r'<h3>(.*?)</h3>.*?<script type="application/json">(.*?)</script>', html, re.DOTALL)
    return {title: json.loads(text) for title, text in found}


def test_a_readme_alone_is_a_small_page(experiment):
    html = report.write(*experiment).read_text()
    assert len(html) < 30_000
    assert '<h1>What &amp; why</h1>' in html
    assert '<a href="../../docs/rules.md">' in html
    assert '<a href="https://arxiv.org/abs/1">' in html
    assert '<a href="../../experiments/small/curves.svg">the curves</a>' in html
    assert '&lt;b&gt;not bold' in html
    assert '<td>0.5</td>' in html


def test_stages_have_the_seeds_their_median_and_the_spread(experiment):
    (experiment[0] / 'results.csv').write_text(ROWS)
    html = report.write(*experiment).read_text()
    assert '<a href="#measured">the curves</a>' in html
    found = drawings(html)
    assert list(found) == ['pretrain', 'sft', 'dpo']
    (traces, ends), *rest = found['sft']['choices'].values()
    assert rest == []  # it was not asked for its loss
    band, *seeds, median = traces
    assert band['y'] == pytest.approx([0.2, 0.3, 0.8, 0.7])
    assert [trace['name'] for trace in seeds] == ['s0', 's1', 's2']
    assert median['y'] == pytest.approx([0.3, 0.4])
    assert ends[0] < 0.2 < 0.8 < ends[1]
    assert '0.4 (0.3 to 0.8)' in html


def test_a_table_of_runs_shows_what_its_settings_do(experiment):
    lines = [f'{mup},{width},{3 + width / 100}' for mup in (True, False) for width in (32, 64)]
    (experiment[0] / 'results.csv').write_text('mup,width,loss\n' + '\n'.join(lines) + '\n')
    html = report.write(*experiment).read_text()
    assert list(drawings(html)) == ['mup', 'width']
    assert 'A ring is round the lowest, mup True, width 32.' in html


def test_the_ladder_s_page_says_what_its_readme_says(tmp_path, capsys):
    assert report.main(['isoflop_stdlib', f'--into={tmp_path}']) == 0
    assert capsys.readouterr().out == f'{tmp_path}/isoflop_stdlib.html\n'
    html = (tmp_path / 'isoflop_stdlib.html').read_text()
    told = ' '.join(re.sub('<[^>]+>', ' ', html.partition('Scaling law</h2>')[2]).split())
    assert '2.4e13-0.31m 309k 10.8M 2.4e+13 2.4732 2.6377 2.4725 to 2.8074 +6.65%' in told
    assert {'Valleys', 'Minima', 'Least loss', 'Law and runs'} <= set(drawings(html))


def test_an_unknown_experiment_is_refused_with_the_nearest(capsys):
    assert report.main(['arithmetics']) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: there is no experiment 'arithmetics' (did you mean 'arithmetic'?)")


@needs_chromium
@pytest.mark.parametrize('width', [1280, 390])
def test_the_metric_that_is_picked_is_drawn(experiment, tmp_path, width):
    (experiment[0] / 'results.csv').write_text(ROWS)
    probe = """
    const drawn = () => [...document.querySelectorAll('.drawing')].map(
      canvas => canvas.checkVisibility() ? canvas.querySelectorAll('.scatterlayer .trace').length : 0);
    const seen = [drawn()], field = document.querySelector('select');
    field.value = 'heldout_loss';
    field.dispatchEvent(new Event('change'));
    return [...seen, drawn()];
    """
    page = look(report.write(*experiment).read_text(), tmp_path, width, probe)
    assert page.seen == [[0, 5, 5], [5, 0, 0]]
    assert page.overflow <= 0
    assert page.fetched == page.console == []

"""The report holds a run's numbers and texts, escaped, on one page that fetches nothing."""

import json
import math
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from tests.browser import look, needs_chromium
from tpu_llm.train.chart import BUCKETS, Series, chart, number, smooth, thin, ticks
from tpu_llm.train.report import write_report

STEPS = 800
PROMPTS = {
    'def read(self, ': 'size=-1):\n    """Read up to size bytes."""\n    raise ValueError("<closed> & done")\n',
    'The import statement ': 'binds the name of the module in the local namespace to the module object.',
    'import os\n': 'import sys\nfrom collections import namedtuple\n\n__all__ = ["getopt"]\n',
}


def write_lines(path, records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))


def training(noise):
    """A run's metrics: a falling loss, warmup and cosine, a spike in the gradient, a step that was not finite."""
    for step in range(1, STEPS + 1):
        floor = 2.55 + 6.4 * math.exp(-step / 40) + 1.2 * math.exp(-step / 320)
        yield {
            'step': step,
            'loss': 'nan' if step == 300 else floor + noise.gauss(0, 0.09),
            'learning_rate': 1e-3 * min(step / 40, 1) * (0.55 + 0.45 * math.cos(math.pi * step / STEPS)),
            'grad_norm': 0.5 + 4 * math.exp(-step / 30) + (40.0 if step == 480 else 0.0),
            'tokens': 2048 * step,
            'tokens_per_second': 2650 + noise.gauss(0, 60),
        }
        if step % 100 == 0:
            yield {'step': step, 'heldout_loss': floor + 0.05, 'bits_per_byte': 0.62 * floor}


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    """What a run of 800 steps, killed once on its way, leaves behind."""
    workdir = tmp_path_factory.mktemp('runs') / 'quickstart-3f9a1c27de'
    workdir.mkdir()
    write_lines(workdir / 'metrics.jsonl', training(random.Random(0)))
    start = {'host': 'host-0', 'pid': 1, 'token': 1, 'start': '2026-01-02T10:12:00.000+00:00'}
    times = {'init': 3.0, 'compile': 9.0, 'data_wait': 1.0, 'step': 105.0, 'eval': 9.0, 'save': 2.0}
    starts = [(0, 420), (400, 800)]
    write_lines(
        workdir / 'ledger.jsonl', [start | {'start_step': b, 'end_step': e, 'seconds': times} for b, e in starts]
    )
    samples = [{'step': s, 'prompt': p, 'text': t} for s in (400, 800) for p, t in PROMPTS.items()]
    write_lines(workdir / 'samples.jsonl', samples)
    config = {'model': {'type': 'Decoder', 'width': 256}, 'betas': [0.9, 0.95], 'corpus': '<stdlib> & topics'}
    (workdir / 'config.json').write_text(json.dumps(config))
    summary = {'bits_per_byte': 1.724, 'gzip_bits_per_byte': 1.911, 'tokens': 2048 * STEPS}
    (workdir / 'summary.json').write_text(json.dumps(summary | {'parameters': 7345408, 'seconds': 236.4}))
    return workdir


class Page(HTMLParser):
    """Checks that tags nest, and collects the text outside scripts and what the page would fetch."""

    VOID = ('meta', 'input', 'br', 'link', 'img')

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.fetched, self.ids = [], '', [], set()
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.fetched += [attrs[name] for name in ('src', 'href', 'data', 'action') if name in attrs]
        self.ids.add(attrs.get('id'))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ('script', 'style'):
            self.text += data


@pytest.fixture(scope='module')
def html(workdir):
    return write_report(workdir).read_text()


@pytest.fixture(scope='module')
def page(html):
    return Page(html)


def test_nothing_is_fetched(html, page):
    assert page.fetched == []
    assert not re.search(r'https?:|url\(|@import|fetch\(', html)
    assert "default-src 'none'" in html


def test_the_headline_numbers_are_there(page):
    for text in ('quickstart-3f9a1c27de', '1.724', '10% below gzip -9 (1.911)', '7,345,408', '800 steps', '4:18'):
        assert text in page.text


def test_a_model_worse_than_gzip_is_not_praised(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / 'run')
    (tmp_path / 'run/summary.json').write_text('{"bits_per_byte": 2.0, "gzip_bits_per_byte": 1.6}')
    html = write_report(tmp_path / 'run').read_text()
    assert '25% above gzip -9 (1.600)' in html
    assert 'class="good"' not in html


def test_a_part_scored_on_the_way_is_told_from_the_whole(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / 'run')
    with (tmp_path / 'run/metrics.jsonl').open('a') as file:
        file.write('{"step": 800, "heldout_loss_all": 2.75, "bits_per_byte_all": 1.724}\n')
    (tmp_path / 'run/summary.json').write_text('{"bits_per_byte": 1.724, "heldout_loss": 2.75}')
    text = Page(write_report(tmp_path / 'run').read_text()).text
    for words in ('held-out loss2.75', 'the held-out text scored on the way', 'bits per byte, all documents'):
        assert words in text


def test_every_chart_is_there_and_says_what_it_shows(html, page):
    for title in ('Loss', 'Bits per byte', 'Learning rate', 'Gradient norm', 'Tokens per second'):
        assert f'<h3>{title}</h3>' in html
    assert html.count('role="img"') == 5
    assert 'held-out from 4.003 at step 100' in html
    assert 'gzip -9 1.911' in page.text
    assert '1 not finite' in page.text
    assert 'highest 40.5, off the chart' in page.text


def test_the_load_of_each_expert_is_there(tmp_path):
    even, skewed = [0.25] * 4, [0.9, 0.1, 0.0, 0.0]
    lines = [{'step': 10, 'experts_used': 4.0, 'expert_load': [even, skewed]}]
    lines.append({'step': 20, 'experts_used': 'nan', 'expert_load': [['nan'] * 4] * 2})
    write_lines(tmp_path / 'metrics.jsonl', lines)
    assert 'layer 0' in Page(write_report(tmp_path).read_text()).text  # without a config, they are just counted
    (tmp_path / 'config.json').write_text(json.dumps({'model': {'moe': {'first_dense': 1, 'every': 2}}}))
    html = write_report(tmp_path).read_text()
    page = Page(html)
    assert page.fetched == []
    assert re.findall(r'layer \d', page.text) == ['layer 2', 'layer 4']
    assert 'Load per expert, last step; 1 is an even share, 3 or more full colour: from 0 to 3.6' in html
    assert sum(d.count('M') for d in re.findall(r'd="([^"]*h1v1h-1z)"', html)) == 8
    assert 'alarm 2' in page.text


def test_samples_are_escaped_and_only_the_latest_are_open(html, page):
    assert 'raise ValueError("<closed> & done")' in page.text
    assert '<closed>' not in html
    opened = html.partition('Earlier samples (3)')[0]
    assert opened.count('<figure class="panel sample">') == 3
    assert 'step 400' not in opened.partition('<h2>Samples')[2]


def test_the_ledger_counts_lost_steps(page):
    assert 'steps done twice: 20' in page.text
    assert 'Goodput 79.5%' in page.text  # 210 s of steps, 20 of 420 in 105 s lost, of 258 s


def test_the_config_is_there_and_can_be_filtered(html, page):
    assert 'config.model.width' in page.text
    assert '"<stdlib> & topics"' in page.text
    assert set(re.findall(r'data-filters="(\w+)"', html)) <= page.ids


def test_light_and_dark_are_both_defined_alike(html):
    light, dark = (set(re.findall(r'(--[\w-]+):', part)) for part in re.findall(r':root \{(.*?)\}', html, re.DOTALL))
    assert light == dark
    assert set(re.findall(r'var\((--[\w-]+)\)', html)) <= light


def test_further_metrics_have_charts(tmp_path):
    lines = [
        {'step': step, 'loss': 0.1, 'reward': step / 10, 'kl_written': 0.1, 'once' if step == 1 else 'kl': 1.0}
        for step in range(1, 4)
    ]
    write_lines(tmp_path / 'metrics.jsonl', [*lines, {'step': 3, 'heldout_reward': 0.5}])
    html = write_report(tmp_path).read_text()
    text = Page(html).text
    assert 'What else was measured' in text
    assert html.count('<h3>Reward</h3>') == html.count('<h3>KL written</h3>') == html.count('<h3>KL</h3>') == 1
    assert 'Once' not in text
    assert 'nats per token' not in text  # that is not what its loss is


def test_metrics_alone_make_a_page(tmp_path):
    write_lines(tmp_path / 'metrics.jsonl', [{'step': 1, 'loss': 3.0}])
    page = Page(write_report(tmp_path).read_text())
    assert 'Loss' in page.text
    for absent in ('Samples', 'Time', 'Config', 'Bits per byte', 'Gradient norm'):
        assert absent not in page.text


def test_a_run_without_a_finite_loss_makes_a_page(tmp_path):
    write_lines(tmp_path / 'metrics.jsonl', [{'step': step, 'loss': 'nan'} for step in (1, 2)])
    page = Page(write_report(tmp_path).read_text())
    assert 'Training' in page.text
    assert 'nan' not in page.text
    assert 'Loss' not in page.text, 'there is no curve to draw'


def test_no_metrics_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r'metrics\.jsonl does not exist: is .* the workdir of a run\?'):
        write_report(tmp_path)


def test_the_command_writes_the_page_of_a_run_that_was_killed(tmp_path):
    write_lines(tmp_path / 'metrics.jsonl', [{'step': 1, 'loss': 3.0}])
    command = [sys.executable, '-m', 'tpu_llm.train', 'report']
    done = subprocess.run([*command, tmp_path], capture_output=True, text=True)
    assert done.stdout == f'{tmp_path / "report.html"}\n'
    assert 'Loss' in Page((tmp_path / 'report.html').read_text()).text
    done = subprocess.run([*command, tmp_path / 'nowhere'], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith('error: ')
    assert done.stderr.count('\n') == 1


def test_a_long_run_makes_a_small_page(tmp_path):
    lines = [{'step': step, 'loss': 3 + math.sin(step), 'grad_norm': 1.0} for step in range(1, 50_001)]
    write_lines(tmp_path / 'metrics.jsonl', lines)
    assert write_report(tmp_path).stat().length < 250_000


# ------------------------------------------------------------------------------------------------------- charts


def test_thinning_keeps_the_extremes_and_the_order():
    points = [(float(x), math.sin(x)) for x in range(10_000)]
    points[1234] = (1234.0, 50.0)
    points[7000] = (7000.0, -50.0)
    kept = thin(points)
    assert len(kept) <= 2 * BUCKETS
    assert {(1234.0, 50.0), (7000.0, -50.0)} <= set(kept)
    assert kept == sorted(kept)
    assert set(kept) <= set(points)


def test_a_short_series_is_drawn_whole():
    points = [(float(x), 1.0) for x in range(2 * BUCKETS)]
    assert thin(points) == points


def test_smoothing_has_no_lag_and_no_trace_of_a_spike():
    line = [(float(x), 2.0 * x) for x in range(1000)]
    assert all(abs(y - 2.0 * x) <= 2.0 for x, y in smooth(line))
    line[500] = (500.0, 1e9)
    line[501] = (501.0, math.nan)
    assert max(y for _, y in smooth(line)) < 2000


@pytest.mark.parametrize(('low', 'high'), [(0, 1), (1, 800), (2.55, 9.7), (0, 1e-3), (-3, 4), (1, 5e6), (1, 2)])
def test_ticks_are_few_round_and_inside(low, high):
    marks = ticks(low, high)
    assert 2 <= len(marks) <= 11
    assert all(low <= mark <= high for mark in marks)
    assert all(len(f'{abs(mark):.12e}'.split('e')[0].rstrip('0')) <= 4 for mark in marks)


@pytest.mark.parametrize(
    ('value', 'text'), [(2.71828, '2.718'), (11234, '11.2k'), (3e-4, '0.0003'), (2.5e-5, '2.5e-5'), (0.0, '0')]
)
def test_number(value, text):
    assert number(value) == text


def test_one_point_and_a_flat_line_can_be_drawn():
    for points in ([(5.0, 1.0)], [(1.0, 0.0), (2.0, 0.0)]):
        assert '<path' in chart('t', 'u', [Series(name='s', points=points)])


def test_a_chart_without_points_is_left_out():
    assert chart('t', 'u', [Series(name='s', points=[(1.0, math.nan)])]) == ''


def test_names_cannot_break_out_of_the_page():
    html = chart('<t>', '"u"', [Series(name='</script><b>', points=[(1.0, 1.0), (2.0, 2.0)])], [('<m>', 1.0)])
    assert '</script><b>' not in html
    assert '<t>' not in html
    assert '<m>' not in html


# ----------------------------------------------------------------------------------------------- a real browser

PROBE = """
const plot = document.querySelector('.plot'), box = plot.getBoundingClientRect();
plot.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width / 2, clientY: box.top}));
const field = document.querySelector('input');
field.value = 'WIDTH';
field.dispatchEvent(new Event('input'));
return {
  readout: plot.querySelector('.readout').innerText,
  rows: [...document.querySelectorAll('#config tr')].filter(row => !row.hidden).length,
};
"""


@needs_chromium
@pytest.mark.parametrize('width', [1280, 390])
def test_the_page_works_in_a_browser(html, tmp_path, width):
    page = look(html.replace('<details>', '<details open>'), tmp_path, width, PROBE)
    assert re.match(r'step [34]\d\d\ntrain \d\.\d+( \(step [34]\d\d\))?\nheld-out \d\.\d+', page.seen['readout'])
    assert page.seen['rows'] == 1
    assert page.overflow <= 0
    assert page.fetched == page.console == []

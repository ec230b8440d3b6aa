"""What a plan says, on a terminal and as a page, in every case: fits, does not, kept on the host, no price, experts."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from tests.browser import look, needs_chromium
from tpu_llm.config import ConfigError
from tpu_llm.plan import memory, show
from tpu_llm.plan import plan as plans
from tpu_llm.plan.compile import OtherProgram
from tpu_llm.plan.cost import Cost, Share, Traffic
from tpu_llm.plan.memory import Buffer, Memory
from tpu_llm.plan.page import write_page
from tpu_llm.plan.plan import Plan
from tpu_llm.plan.show import GIB

LOSSES = {
    'model': 1.5,
    'recomputed for the backward pass': 0.2,
    'pipeline bubble': 0.0,
    'masked or padded': -0.05,
    'matmuls below the peak': 0.25,
    'kernels below the peak': 0.1,
    'memory-bound operations': 0.2,
    'waiting for other devices': 0.3,
}
COST = Cost(
    cycles=3_000_000_000,
    kernel_cycles=3e8,
    flops=4e14,
    bytes=4e11,
    host_bytes=0.0,
    host_seconds=0.0,
    seconds=2.5,
    shares=(
        Share(part='mlp', phase='backward', seconds=0.8, flops=2e14, bytes=1e11),
        Share(part='mlp', phase='forward', seconds=0.4, flops=1e14, bytes=1e11),
        Share(part='attention', phase='remat', seconds=1.0, flops=1e14, bytes=1e11),
        Share(part='embed', phase='update', seconds=1e-4, flops=0.0, bytes=1e9),
    ),
    traffic=(
        Traffic(
            kind='all-gather', axes=('fsdp',), part='mlp', count=1192, bytes=17e9, hidden=17e9, seconds=0.09,
            exposed=0.0,
        ),
        Traffic(
            kind='all-reduce between slices', axes=('data', 'fsdp'), part='attention', count=64, bytes=7e9, hidden=0.0,
            seconds=0.3, exposed=0.3,
        ),
        Traffic(kind='all-to-all', axes=('expert',), part='other', count=1, bytes=1e6, hidden=0, seconds=0, exposed=0),
    ),
    kernels={'splash': 32},
    losses=LOSSES,
    uncounted=(),
)  # fmt: skip
SAVED = Buffer(bytes=3 * GIB, kind='activations', where='mlp BTD,DF->BTF', shape='bf16[32,4,2048,11008]')
WEIGHT = Buffer(
    bytes=2 * GIB, kind='optimizer state', where='stack.period.0.moe.experts.gate.kernel', shape='f32[32,8,16,14336]'
)
MEMORY = Memory(
    allocated=12 * GIB,
    peak=11 * GIB,
    kinds={'activations': 7 * GIB, 'optimizer state': 3 * GIB, 'parameters': GIB, 'counters': 20},
    buffers=(SAVED, SAVED, WEIGHT),
)
FITS = Plan(
    config='configs/pods/some.py:size=7b --config.model.remat=gate+up --config.name=<b>&',
    slice='v5e:16x16',
    devices=256,
    mesh={'fsdp': 256},
    choices={'data.global_batch': 1024, 'accumulate': 1, 'model.remat': 'gate+up'},
    parameters=6_738_415_616,
    active_parameters=6_738_415_616,
    tokens_per_step=2_097_152,
    steps=953_675,
    memory=MEMORY,
    cost=COST,
    reason='',
    versions='jax 1.2, libtpu 0.4',
    cpu_seconds=61.0,
)
FULL = dataclasses.replace(
    FITS,
    memory=dataclasses.replace(MEMORY, allocated=22 * GIB, peak=20 * GIB),
    cost=None,
    reason='RESOURCE_EXHAUSTED: temporaries (22.00G) exceed available HBM (15.75G).HloModule jit_step, is_scheduled',
)
HOST = dataclasses.replace(
    FITS,
    memory=dataclasses.replace(MEMORY, host=5 * GIB),
    cost=dataclasses.replace(COST, host_bytes=44e9, host_seconds=1.375),
)
SLOW_HOST = dataclasses.replace(HOST, cost=dataclasses.replace(COST, host_bytes=96e9, host_seconds=3.0))
EXPERTS = dataclasses.replace(FITS, parameters=46_700_000_000, active_parameters=12_900_000_000)
EPOCHS = dataclasses.replace(FITS, steps=0)
SMALL = dataclasses.replace(
    FITS,
    slice='v5e:1x1',
    devices=1,
    mesh={},
    cost=dataclasses.replace(
        COST,
        seconds=0.022,
        traffic=(),
        losses={name: seconds / 100 for name, seconds in LOSSES.items()} | {'waiting for other devices': 0.0},
        shares=tuple(dataclasses.replace(each, seconds=each.seconds / 100) for each in COST.shares),
        uncounted=('while.7',),
    ),
)
ROLLOUT = OtherProgram(name='rollout', memory=MEMORY, tokens=1024, seconds=12.5, reason='')
SCORING = OtherProgram(name='scoring', memory=MEMORY, tokens=0, seconds=0.9, reason='')
POLICY = dataclasses.replace(FITS, others=(ROLLOUT, SCORING))
LONG = OtherProgram(name='rollout', memory=FULL.memory, tokens=1024, seconds=0.0, reason=FULL.reason)
LONG_POLICY = dataclasses.replace(FITS, others=(LONG, SCORING))
ALL = {
    'fits': FITS, 'full': FULL, 'host': HOST, 'slow host': SLOW_HOST, 'experts': EXPERTS, 'epochs': EPOCHS,
    'small': SMALL, 'policy': POLICY, 'long policy': LONG_POLICY,
}  # fmt: skip


def text(plan, price=1.2, width=100):
    console = Console(width=width, force_terminal=False, force_jupyter=False)
    with console.capture() as captured:
        console.print(show.show(plan, price))
    return captured.get()


class Page(HTMLParser):
    """Checks that tags nest, and collects headings, text and what the page would fetch."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.fetched, self.sections = [], '', [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ('src', 'href', 'data', 'action')]
        if tag not in ('meta', 'wbr'):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ('script', 'style'):
            self.text += data
            if self.open[-1] == 'h2':
                self.sections.append(data)


@pytest.fixture
def html(tmp_path):
    def write(plan, price=1.2):
        write_page(plan, tmp_path / 'plan.html', price)
        return (tmp_path / 'plan.html').read_text()

    return write


# ------------------------------------------------------------------------------------------------------- a terminal


def test_the_answers_come_first():
    lines = [line.rstrip() for line in text(dataclasses.replace(FITS, config='some.py')).splitlines()[:6]]
    assert lines == [
        'some.py',
        '  on v5e:16x16: 256 chips, fsdp 256',
        '  6.74B parameters; 2,097,152 tokens a step',
        '  fits: 12.0 of 15.8 GiB, 24% to spare',
        '  predicted: 2.50 s a step, 3,277 tokens/s a chip, 60% of the peak (MFU)',
        '  the run: 2T tokens in 953,675 steps, 27.6 days, 170,000 chip-hours, $203,000 at $1.20',
    ]


@pytest.mark.parametrize('name', ALL)
def test_no_row_of_a_table_is_wrapped_or_cut(name):
    shown = text(ALL[name])
    assert max(map(len, shown.splitlines())) <= 100
    assert '…' not in shown
    tables, wide = (each.split('\n\n')[1:-1] for each in (shown, text(ALL[name], width=300)))
    assert [table.count('\n') for table in tables] == [table.count('\n') for table in wide]
    assert len(tables) >= 2


def test_each_loss_is_a_row_and_they_add_up_to_the_step():
    shown = text(FITS)
    rows = re.findall(r'^([a-z -]+?) +(-?\d\.\d{3}) +(-?\d+\.\d%)', shown.partition('a step on one')[2], re.MULTILINE)
    rows = {name: (float(seconds), share) for name, seconds, share in rows}
    assert rows.pop('the step') == (2.5, '100.0%')
    assert rows['model'] == (1.5, '60.0%')
    assert rows['masked or padded'] == (-0.05, '-2.0%')
    assert 'pipeline bubble' not in rows  # there is none
    assert sum(seconds for seconds, _ in rows.values()) == pytest.approx(2.5)


def test_parts_and_passes_are_a_table():
    shown = text(FITS)
    assert re.search(r'seconds by part +forward +remat +backward +update +in all +of the step', shown)
    assert re.search(r'mlp +0\.400 +0\.800 +1\.200 +48\.0%', shown)
    assert re.search(r'attention +1\.000 +1\.000 +40\.0%', shown)
    assert 'embed' not in shown  # less than a two-thousandth


def test_collectives_say_what_is_hidden_and_what_is_waited_for():
    shown = text(FITS)
    assert re.search(r'all-gather +fsdp +mlp +17\.00 +100% +1,192 +0\.090 *$', shown, re.MULTILINE)
    assert re.search(r'all-reduce between slices +data, fsdp +attention +7\.00 +0% +64 +0\.300 +0\.300', shown)
    assert 'all-to-all' not in shown  # a thousandth of the bytes, and not waited for


def test_what_does_not_fit_is_explained_by_its_largest_buffers():
    shown = text(FULL)
    assert 'does not fit: 22.0 of 15.8 GiB, 6.2 too much' in shown
    assert re.search(r'activations: mlp BTD,DF->BTF +3\.00 +x 2 +bf16\[32,4,2048,11008\]', shown)
    assert re.search(r'between buffers +2\.00', shown)
    assert 'Most of the memory: activations, 7.0 of 22.0 GiB.' in shown
    assert '--fix' in shown
    for absent in ('tokens/s', 'collective', 'bottleneck', 'counters'):
        assert absent not in shown


def test_a_compiler_that_gives_up_below_the_limit_is_not_said_to_be_above_it():
    plan = dataclasses.replace(FULL, memory=MEMORY)
    assert show.fit(plan) == 'does not fit: 12.0 of 15.8 GiB'


def test_memory_of_the_host_is_told():
    shown = text(HOST)
    assert "to the host's memory and back: 44.0 GB a step, 1.38 s of PCIe" in shown
    assert re.search(r"on the host, for the device's program +5\.00", shown)
    assert 'fits: ' in shown
    assert 'does not fit' not in shown


def test_a_host_that_cannot_keep_up_does_not_fit():
    shown = ' '.join(text(SLOW_HOST).split())
    assert 'does not fit: 12.0 of 15.8 GiB, but the host cannot keep up: 3.00 s of PCIe a step of 2.50 s' in shown
    assert 'Keep less on the host: --config.model.remat' in shown
    assert 'the largest buffers' in shown
    assert 'The bottleneck' in shown


def test_a_policy_has_its_rollout_beside_the_step_whose_time_is_told_apart():
    shown = text(POLICY)
    assert POLICY.fits
    assert 'rollout fits: 12.0 of 15.8 GiB, 24% to spare; predicted: 12.5 s where a response has all of 1,024' in shown
    assert 'scoring fits: 12.0 of 15.8 GiB, 24% to spare; predicted: 0.900 s\n' in shown
    assert 'predicted without rollout and scoring: 2.50 s a step' in shown
    assert 'the run without rollout and scoring: 2T tokens' in shown


def test_a_rollout_that_does_not_fit_is_a_run_that_does_not(html):
    shown = text(LONG_POLICY)
    assert not LONG_POLICY.fits
    assert '\n  fits: 12.0 of 15.8 GiB, 24% to spare' in shown
    assert 'rollout does not fit: 22.0 of 15.8 GiB, 6.2 too much\n' in shown
    assert 'Keep less on the host' not in shown
    assert 'rolloutdoes not fit22.0 of 15.8 GiB, 6.2 too much' in Page(html(LONG_POLICY)).text


def test_what_the_run_holds_beside_a_program_needs_room_as_well():
    """The compiler took the program, and knows nothing of a reference that it does not read."""
    beside = memory.among(MEMORY, {'optimizer state': 3 * GIB, 'reference': 4 * GIB})
    assert beside.allocated == 16 * GIB
    assert beside.peak == 15 * GIB
    assert beside.kinds['reference'] == 4 * GIB
    assert beside.buffers[0] == Buffer(bytes=4 * GIB, kind='reference', where='not in this program', shape='')
    plan = dataclasses.replace(FITS, memory=beside)
    assert not plan.fits
    assert 'does not fit: 16.0 of 15.8 GiB, 0.25 too much' in text(plan)


def test_what_a_program_is_given_twice_is_held_once():
    once = memory.among(MEMORY, {'parameters': GIB, 'optimizer state': GIB})
    assert (once.allocated, once.kinds['optimizer state']) == (10 * GIB, GIB)
    assert once.buffers == MEMORY.buffers


def test_without_a_price_or_a_length_nothing_is_said_of_them():
    assert '$' not in text(FITS, price=None)
    assert '170,000 chip-hours' in text(FITS, price=None)
    for absent in ('the run', 'chip-hours', '$'):
        assert absent not in text(EPOCHS)


def test_experts_have_parameters_that_a_token_does_not_meet():
    assert '46.7B parameters, of which a token meets 12.9B; ' in text(EXPERTS)
    assert 'of which a token' not in text(FITS)


def test_a_short_step_on_one_chip_is_in_milliseconds_and_has_no_collectives():
    shown = text(SMALL)
    assert 'v5e:1x1: 1 chip, one device' in shown
    assert '22.0 ms a step' in shown
    assert re.search(r'the step +22\.00 +100\.0%', shown)
    assert re.search(r'a step on one device +ms ', shown)
    assert 'collective ' not in shown
    assert 'A loop whose turns depend on data is counted once: while.7' in shown


def test_the_bottleneck_is_the_largest_loss_and_communication_names_the_collective():
    advice = list(show.advice(FITS))
    assert advice[0].startswith('The bottleneck: waiting for other devices, 12% of the step. What helps: more rows')
    assert advice[1] == 'Most of it: all-reduce between slices over data, fsdp for attention, 0.300 s.'


@pytest.mark.parametrize('loss', [name for name in LOSSES if name != 'model'])
def test_there_is_advice_and_a_colour_for_every_loss(loss, html):
    losses = {**dict.fromkeys(LOSSES, 0.0), 'model': 1.5, loss: 1.0}
    plan = dataclasses.replace(FITS, cost=dataclasses.replace(COST, losses=losses))
    assert next(iter(show.advice(plan))).startswith(f'The bottleneck: {loss}, 40% of the step. What helps: ')
    assert loss in Page(html(plan)).text


@pytest.mark.parametrize(
    ('number', 'rounded'),
    [(169_613, '170,000'), (203_536, '204,000'), (85.23, '85'), (10, '10'), (3.21, '3.2'), (0, '0')],
)
def test_rounded(number, rounded):
    assert show.rounded(number) == rounded


@pytest.mark.parametrize(
    ('time', 'shown'), [(2.5, '2.50 s'), (123.4, '123 s'), (0.1234, '0.123 s'), (0.0413, '41.3 ms'), (0.0, '0.00 s')]
)
def test_seconds(time, shown):
    assert show.seconds(time) == shown


# ------------------------------------------------------------------------------------------------------------ a page


@pytest.mark.parametrize('name', ALL)
def test_the_page_is_whole_and_fetches_nothing(name, html):
    made = html(ALL[name])
    page = Page(made)
    assert page.fetched == []
    assert not re.search(r'https?:|url\(|@import|fetch\(', made)
    assert '<b>&' not in made
    assert '--config.name=<b>&' in page.text
    assert made.count(show.LATER) == 2
    assert 'jax 1.2, libtpu 0.4' in page.text


def test_a_plan_that_fits_leads_with_time(html):
    page = Page(html(FITS))
    assert page.sections == [
        'What to look at',
        'Where the time goes',
        'By part of the model',
        'Collectives',
        'Memory of one device, when most is in use',
        'The largest buffers',
        'Choices',
    ]
    for words in ('memoryfits', '2.50 s', '3,277', 'MFU60%', '27.6 days', '170,000', '$203,000 at $1.20', 'gate+up'):
        assert words in page.text


@pytest.mark.parametrize('plan', [FULL, SLOW_HOST])
def test_a_plan_that_does_not_fit_leads_with_memory(plan, html):
    made = html(plan)
    page = Page(made)
    assert page.sections[:3] == ['What to look at', 'Memory of one device, when most is in use', 'The largest buffers']
    assert ('Where the time goes' in page.sections) == (plan is SLOW_HOST)
    assert '<small class="bad">' in made
    assert '<small class="good">' not in made


def test_the_compiler_has_its_word_in_short(html):
    page = Page(html(FULL))
    assert 'The compiler: RESOURCE_EXHAUSTED: temporaries (22.00G) exceed available HBM (15.75G).' in page.text
    assert 'HloModule' not in page.text


def test_the_waterfall_goes_from_the_model_to_the_step(html):
    fall = html(FITS).partition('<ol class="fall">')[2].partition('</ol>')[0]
    bars = [(float(x), float(w)) for x, w in re.findall(r'<rect x="([\d.]+)" y="2" width="([\d.]+)"', fall)]
    assert len(bars) == 8  # seven losses that are not zero, and the step
    assert bars[0] == (0.0, 600.0)
    assert bars[-1] == (0.0, 1000.0)
    assert bars[1] == (600.0, 80.0)
    assert bars[2] == (660.0, 20.0)  # what is negative goes back
    assert bars[3][0] == 660.0
    assert sum(bars[-2]) == pytest.approx(1000.0)
    assert re.findall(r'<em>(.*?)</em>', fall)[:3] == ['60.0%', '8.0%', '-2.0%']


def test_the_tower_names_large_buffers_and_what_is_left(html):
    tower = html(FITS).partition('<div class="tower"')[2].partition('</div>')[0]
    for words in ('<b>6.0 GiB</b> mlp BTD,DF-&gt;BTF × 2', '>3.8 GiB to spare<', '>15.8 GiB<', '>12.0 GiB<'):
        assert words in tower
    assert '<b>1.0 GiB</b> more activations' in tower
    assert 'var(--color-9)' not in tower
    assert 'aria-label="12.0 GiB of 15.8 GiB, 3.8 GiB to spare; ' in tower


def test_the_tower_marks_what_is_beyond_the_limit(html):
    tower = html(FULL).partition('<div class="tower"')[2].partition('</div>')[0]
    beyond = re.search(r'<rect y="0.0" width="10" height="([\d.]+)" style="fill:var\(--color-9\)', tower)
    assert float(beyond[1]) == pytest.approx(1000 * (1 - 15.75 / 22), abs=0.1)
    assert '>6.2 GiB too much<' in tower


def test_without_a_price_or_collectives_the_page_is_silent_of_them(html):
    assert 'no price given' in Page(html(FITS, price=None)).text
    assert 'Collectives' not in Page(html(SMALL)).sections
    assert 'chip-hours' not in Page(html(EPOCHS)).text
    assert 'host traffic44.0 GB1.38 s of PCIe' in Page(html(HOST)).text


def test_every_colour_is_defined(html):
    made = html(FITS)
    light, dark = (set(re.findall(r'(--[\w-]+):', part)) for part in re.findall(r':root \{(.*?)\}', made, re.DOTALL))
    used = set(re.findall(r'var\((--[\w-]+)\)', made))
    assert used <= light
    assert light == dark


@needs_chromium
@pytest.mark.parametrize('width', [1280, 390])
def test_the_page_is_no_wider_than_the_window(html, tmp_path, width):
    page = look(html(SLOW_HOST), tmp_path, width)
    assert page.overflow <= 0
    assert page.fetched == page.console == []


# -------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize('name', ALL)
def test_a_plan_is_what_its_json_says(name):
    values = json.loads(json.dumps(plans.plain(ALL[name])))
    assert plans.load(values) == ALL[name]
    assert ('predicted' in values) == (name != 'full')


def test_json_holds_what_follows_from_the_plan():
    found = plans.plain(FITS)['predicted']
    assert found['step_seconds'] == 2.5
    assert found['tokens_per_second_per_chip'] == pytest.approx(2_097_152 / 2.5 / 256)
    assert found['mfu'] == pytest.approx(0.6)
    assert found['chip_hours'] == pytest.approx(953_675 * 2.5 * 256 / 3600)


def test_json_of_another_version_is_refused():
    values = plans.plain(FITS)
    del values['memory']
    with pytest.raises(ConfigError, match=r"no plan of this version \('memory'\); make it again with launch/plan.py"):
        plans.load(values)
    with pytest.raises(ConfigError, match='no plan of this version'):
        plans.load({**plans.plain(FITS), 'more': 1})


def test_a_plan_without_a_program_has_no_seconds():
    with pytest.raises(ConfigError, match='does not fit v5e:16x16: RESOURCE_EXHAUSTED'):
        _ = FULL.seconds

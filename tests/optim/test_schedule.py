"""The learning rate at the ends and the joints of every schedule."""

import math

import pytest

from tpu_llm.config import ConfigError
from tpu_llm.optim.schedule import Schedule


def rates(steps, **fields):
    schedule = Schedule(peak=2.0, **fields)
    schedule.validate()
    rate = schedule.make(steps)
    return [schedule.peak * float(rate(step)) for step in range(steps)]


@pytest.mark.parametrize('decay', ['cosine', 'linear', 'wsd', 'constant'])
@pytest.mark.parametrize('warmup', [0, 1, 4])
def test_it_rises_to_the_peak_never_rises_again_and_arrives(decay, warmup):
    values = rates(12, warmup=warmup, decay=decay, final=0.25)
    assert values[:warmup] == pytest.approx([2.0 * (i + 1) / warmup for i in range(warmup)])
    assert values[warmup] == pytest.approx(2.0)
    assert all(a >= b for a, b in zip(values[warmup:], values[warmup + 1 :], strict=False))
    assert values[-1] == pytest.approx(2.0 if decay == 'constant' else 0.5)


def test_cosine_is_half_a_cosine():
    values = rates(11, decay='cosine', final=0.0)
    assert values == pytest.approx([1 + math.cos(math.pi * i / 10) for i in range(11)], abs=1e-6)


def test_linear_is_a_line():
    assert rates(5, decay='linear', final=0.5) == pytest.approx([2.0, 1.75, 1.5, 1.25, 1.0])


def test_wsd_is_flat_until_its_last_share_of_the_steps():
    values = rates(20, warmup=3, decay='wsd', cooldown=0.25, final=0.0)
    assert values[3:15] == pytest.approx([2.0] * 12)
    assert values[14:] == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4, 0.0], abs=1e-6)


def test_wsd_that_cools_down_longer_than_it_lasts_still_arrives():
    values = rates(10, warmup=5, decay='wsd', cooldown=1.0, final=0.0)
    assert values[5:] == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0], abs=1e-6)


@pytest.mark.parametrize('decay', ['cosine', 'linear', 'wsd', 'constant'])
def test_a_single_step_takes_the_peak(decay):
    assert rates(1, decay=decay) == [2.0]


@pytest.mark.parametrize('steps', [4, 5])
def test_a_warmup_that_leaves_no_step_is_an_error(steps):
    with pytest.raises(ConfigError, match=f'schedule: warmup = 5 does not end within the {steps} steps; lower one '):
        Schedule(peak=1.0, warmup=5).make(steps)


WRONG = [
    ({'peak': -1.0}, r'peak = -1.0 and warmup = 0 must not be negative'),
    ({'peak': 1.0, 'warmup': -1}, r'peak = 1.0 and warmup = -1 must not be negative'),
    ({'peak': 1.0, 'final': 1.5}, r'final = 1.5 and cooldown = 0.2 are shares from 0 to 1'),
    ({'peak': 1.0, 'cooldown': 0.0}, r'final = 0.1 and cooldown = 0.0 are shares from 0 to 1'),
]


@pytest.mark.parametrize(('fields', 'message'), WRONG)
def test_a_schedule_that_cannot_be_says_why(fields, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(**fields).validate()


def test_a_warmup_below_one_is_a_share_of_the_steps():
    share, whole = (Schedule(peak=1.0, warmup=warmup).make(200) for warmup in (0.05, 10))
    assert [float(share(step)) for step in range(200)] == [float(whole(step)) for step in range(200)]
    assert float(Schedule(peak=1.0, warmup=0.05).make(10)(0)) == 1.0  # half a step is none


def test_a_warmup_of_part_of_a_step_is_refused():
    with pytest.raises(ConfigError, match=r'warmup = 2\.5; write whole steps, or a share of all steps below 1'):
        Schedule(peak=1.0, warmup=2.5).validate()

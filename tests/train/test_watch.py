"""What is logged is what was done: the learning rate of each step, and why a run was stopped."""

import dataclasses
import math
import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tpu_llm.objectives.next_token import NextToken
from tpu_llm.optim.optimizer import SGD
from tpu_llm.optim.schedule import Schedule
from tpu_llm.train import ledger, metrics
from tpu_llm.train.loop import fit
from tpu_llm.train.watch import Diverged

pytestmark = pytest.mark.usefixtures('quick_compile')

SCHEDULE = Schedule(peak=0.5, warmup=4, final=0.0)


@dataclasses.dataclass(kw_only=True, slots=True)
class Faulty(NextToken):
    """The loss becomes `value` times itself at some steps, which count from 0."""

    at: tuple[int, ...]
    value: float = math.inf

    def __call__(self, model, batch, *, frozen, key, step):
        loss, weight, sums = NextToken.__call__(self, model, batch, frozen=frozen, key=key, step=step)
        return loss * jnp.where(jnp.isin(step, jnp.array(self.at)), self.value, 1.0), weight, sums


@dataclasses.dataclass(kw_only=True, slots=True)
class Weights:
    """Keeps every step's weights; preempts the run after one of them, as a SIGTERM would."""

    stop: int

    def due(self, step, steps):
        return True

    def open(self, session):
        def call(step, weights):
            KEPT[step] = {name: np.asarray(value, np.float64) for name, value in weights.items()}
            if step == self.stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return {}

        return call


KEPT = {}


@dataclasses.dataclass(kw_only=True, slots=True)
class Ledgers:
    """Keeps the last step of the ledger on disk, as a kill at each step would leave it."""

    def due(self, step, steps):
        return True

    def open(self, session):
        def call(step, weights):
            KEPT[step] = ledger.load(session.workdir)[-1]['end_step']
            return {}

        return call


def test_a_kill_costs_the_ledger_nothing_that_was_logged(text, tmp_path):
    KEPT.clear()
    run = tiny.get_config(f'text={text},steps=4')
    run.hooks = (Ledgers(),)
    fit(run, tmp_path)
    assert list(KEPT.items()) == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_the_logged_rate_is_the_applied_one_whatever_was_skipped_or_resumed(text, tmp_path):
    """Plain SGD: the weights change by the rate times the gradient, whose norm is logged too."""
    skipped = (3, 4, 8)
    KEPT.clear()
    for stop in (6, 0):
        run = tiny.get_config(f'text={text}')
        run.optimizer = SGD(schedule=SCHEDULE, momentum=0.0, clip=0.0)
        run.objective = Faulty(at=tuple(step - 1 for step in skipped))
        run.ema, run.hooks = 0.0, (Weights(stop=stop),)
        fit(run, tmp_path)
    lines = {line['step']: line for line in metrics.read(tmp_path / 'metrics.jsonl')}
    assert list(lines) == list(range(1, 13))
    assert 6 in KEPT
    for step in range(2, 13):
        change = math.sqrt(sum(np.square(KEPT[step][name] - KEPT[step - 1][name]).sum() for name in KEPT[step]))
        if step in skipped:
            assert change == 0.0
        else:
            applied = change / lines[step]['grad_norm']
            np.testing.assert_allclose(lines[step]['learning_rate'], applied, rtol=1e-3, atol=1e-6)
        expected = SCHEDULE.peak * SCHEDULE.make(12)(step - 1)
        np.testing.assert_allclose(lines[step]['learning_rate'], expected, rtol=1e-6, atol=1e-9)


def stopped(text, tmp_path, objective, **changes):
    run = tiny.get_config(f'text={text},steps=120')
    run.objective, run.hooks, run.checkpoints.every = objective, (), 200
    for name, value in changes.items():
        setattr(run, name, value)
    with pytest.raises(Diverged) as error:
        fit(run, tmp_path)
    return str(error.value)


def test_a_run_that_stops_for_spikes_says_so(text, tmp_path):
    message = stopped(text, tmp_path, Faulty(at=tuple(range(105, 120)), value=100.0), spike=8.0, bad_steps=3)
    assert (
        'stopped at step 108: 3 steps in a row had too high a loss and were skipped (spike = 8.0; the last' in message
    )
    assert 'finite' not in message


def test_a_loss_that_is_not_finite_though_its_modules_are_says_so(text, tmp_path):
    message = stopped(text, tmp_path, Faulty(at=(0, 1)), bad_steps=2)
    assert 'stopped at step 2: 2 steps in a row had a non-finite loss or gradient and were skipped' in message
    assert "every module's output is finite, but the loss made of them is not" in message

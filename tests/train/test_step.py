"""The step of a model small enough to know every number: one weight a token, pulled towards its targets.

Tolerance where sums are taken in another order: 1e-6 relative, float32.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import toy
from flax import nnx

from tpu_llm.arrays import Batch
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.param import Constant, param
from tpu_llm.optim.optimizer import SGD, AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.parallel.compile import Compiled
from tpu_llm.train.frozen import start_frozen
from tpu_llm.train.setup import abstract_batch, make_graphs, make_layout, make_train_step, param_infos
from tpu_llm.train.state import TrainState, abstract_state, create_state
from tpu_llm.train.step import StepOptions, make_step
from tpu_llm.train.weights import abstract_frozen

pytestmark = pytest.mark.usefixtures('quick_compile')

FLAT = Schedule(peak=0.5, decay='constant')
PLAIN = SGD(schedule=FLAT, momentum=0.0, clip=0.0)
TRAP = 4


class Table(nnx.Module):
    """A number for each of five tokens."""

    def __init__(self):
        self.value = param('V', (5,), Constant(0.0))


class Pull:
    """(value − target)² / 2 at every position; at the TRAP, the root of the value, whose gradient at 0 is infinite."""

    def __call__(self, model, batch, *, frozen, key, step):
        value = model.value[...][batch.tokens]
        target = batch.targets.astype(jnp.float32) + (0.0 if frozen is None else frozen)
        trapped = batch.tokens == TRAP
        error = jnp.where(trapped, jnp.sqrt(jnp.where(trapped, value, 1.0)), (value - target) ** 2 / 2)
        noise = jax.random.uniform(key) * batch.weights.sum()
        return (
            (error * batch.weights).sum(),
            batch.weights.sum(),
            {'noise': noise, 'targets': (target * batch.weights).sum()},
        )


GRAPH = ModelGraph(Table())


def make_batch(tokens, targets, weights=None) -> Batch:
    tokens, targets = jnp.asarray(tokens, jnp.int32), jnp.asarray(targets, jnp.int32)
    weights = jnp.ones(tokens.shape) if weights is None else jnp.asarray(weights, jnp.float32)
    return Batch(tokens=tokens, targets=targets, weights=weights, segments=tokens * 0 + 1, positions=tokens * 0)


BATCH = make_batch(
    [[0, 1], [2, 3], [1, 1], [0, 0]],
    [[2, 1], [1, 3], [3, 2], [0, 4]],
    [[1, 1], [0, 2], [1, 0.5], [0, 0]],
)
NAN = dataclasses.replace(BATCH, weights=BATCH.weights.at[0, 0].set(jnp.nan))
# Finite loss, infinite gradient.
INFINITE = dataclasses.replace(BATCH, tokens=BATCH.tokens.at[0, 0].set(TRAP))


class Trainer:
    """A state, and the compiled step that changes it."""

    def __init__(self, optimizer=PLAIN, *, layout=None, seed=0, **options):
        layout = layout or toy.layout()
        self.frozen = start_frozen(optimizer.schedule.peak, seed, layout)
        tx = optimizer.make(toy.infos(GRAPH), 1000)
        model = GRAPH.bind(GRAPH.shapes())
        self.state: TrainState = create_state(model, GRAPH, tx, layout, seed=0, ema=options.get('ema', 0) > 0)
        step = make_step(GRAPH, Pull(), tx, layout, StepOptions(**options))
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        self.step = Compiled('step', step, donate=(0,), out_shardings=(shardings, None))

    def __call__(self, batch=BATCH, other=None):
        self.state, metrics = self.step(self.state, dataclasses.replace(self.frozen, other=other), batch)
        return {name: float(value) for name, value in metrics.items()}

    @property
    def value(self):
        return np.asarray(self.state.params['value'])

    def arrays(self):
        """Everything but the counters."""
        kept = dataclasses.replace(self.state, step=None, bad_in_a_row=None, skipped=None)
        return [np.asarray(x) for x in jax.tree.leaves(kept)]

    def set(self, **fields):
        changed = {name: jnp.asarray(value, getattr(self.state, name).dtype) for name, value in fields.items()}
        self.state = dataclasses.replace(self.state, **changed)


def test_the_update_is_the_weighted_mean_of_the_gradients():
    trainer = Trainer()
    metrics = trainer()
    # Sums of weight x target by token, over a total weight of 5.5.
    np.testing.assert_allclose(trainer.value, 0.5 * np.array([2, 1 + 3 + 1, 0, 6, 0]) / 5.5, rtol=1e-6)
    np.testing.assert_allclose(metrics['loss'], (4 + 1 + 2 * 9 + 9 + 0.5 * 4) / 2 / 5.5, rtol=1e-6)
    np.testing.assert_allclose(metrics['grad_norm'], np.linalg.norm([2, 5, 6]) / 5.5, rtol=1e-6)
    assert metrics['weight'] == 5.5
    assert metrics['targets'] == pytest.approx((2 + 1 + 6 + 3 + 1) / 5.5)


@pytest.mark.parametrize('count', [2, 4])
def test_microbatches_change_nothing(count):
    whole, parts = Trainer(AdamW(schedule=FLAT)), Trainer(AdamW(schedule=FLAT), accumulate=count)
    for _ in range(3):
        expected, actual = whole(), parts()
        for name in ('loss', 'weight', 'grad_norm', 'targets'):
            np.testing.assert_allclose(actual[name], expected[name], rtol=1e-6)
        np.testing.assert_allclose(parts.value, whole.value, rtol=1e-6)


def test_microbatches_of_a_sharded_batch_change_nothing():
    whole, parts = Trainer(), Trainer(layout=toy.layout(data=2), accumulate=2)
    whole(), parts()
    np.testing.assert_allclose(parts.value, whole.value, rtol=1e-6)


def test_weights_that_sum_to_less_than_one_divide_as_well():
    light, trainer = dataclasses.replace(BATCH, weights=BATCH.weights / 100), Trainer()
    metrics = trainer(light)
    expected = Trainer()
    np.testing.assert_allclose(metrics['loss'], expected()['loss'], rtol=1e-5)
    np.testing.assert_allclose(trainer.value, expected.value, rtol=1e-5)


def test_a_batch_of_padding_has_no_gradient():
    trainer = Trainer()
    metrics = trainer(dataclasses.replace(BATCH, weights=BATCH.weights * 0))
    assert (metrics['loss'], metrics['weight'], metrics['skipped']) == (0.0, 0.0, 0.0)
    assert not trainer.value.any()


@pytest.mark.parametrize('bad', [NAN, INFINITE], ids=['NaN loss', 'infinite gradient'])
@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_bad_step_changes_no_bit_and_is_counted(bad, accumulate):
    trainer = Trainer(AdamW(schedule=FLAT), ema=0.9, accumulate=accumulate)
    trainer()
    before = trainer.arrays()
    for count in (1, 2):
        metrics = trainer(bad)
        assert (metrics['bad_in_a_row'], metrics['skipped'], int(trainer.state.step)) == (count, count, 1 + count)
        for now, then in zip(trainer.arrays(), before, strict=True):
            np.testing.assert_array_equal(now, then)
    metrics = trainer()
    assert (metrics['bad_in_a_row'], metrics['skipped'], int(trainer.state.step)) == (0, 2, 4)
    assert any((now != then).any() for now, then in zip(trainer.arrays(), before, strict=True))


@pytest.mark.parametrize('optimizer', [PLAIN, AdamW(schedule=FLAT)])
def test_a_skipped_step_does_not_shift_the_schedule(optimizer):
    schedule = Schedule(peak=0.5, warmup=4)
    trainer, twin = (Trainer(dataclasses.replace(optimizer, schedule=schedule)) for _ in range(2))
    rates = [trainer(batch)['learning_rate'] for batch in (BATCH, NAN, NAN, BATCH)]
    np.testing.assert_allclose(rates, [0.125, 0.25, 0.375, 0.5], rtol=1e-6)
    twin()
    twin.set(step=3)  # the same two updates, with no step skipped between them
    twin()
    np.testing.assert_array_equal(trainer.value, twin.value)
    assert trainer.value.any()


def test_a_loss_far_above_its_moving_mean_is_skipped_from_step_100_on():
    mean = Trainer()()['loss']
    for step, above, skipped in [(100, 2.9, 0), (100, 3.1, 1), (99, 3.1, 0)]:
        trainer = Trainer(spike=3.0)
        trainer.set(step=step, loss_mean=mean - 0.1 * above, loss_variance=0.01)
        assert trainer()['skipped'] == skipped
        assert trainer.value.any() == (not skipped)


def test_without_a_limit_no_loss_is_a_spike():
    trainer = Trainer()
    trainer.set(step=100, loss_mean=-1e6)
    assert trainer()['skipped'] == 0


def test_the_moving_mean_starts_at_the_first_good_loss():
    trainer = Trainer()
    trainer(NAN)
    first = trainer()['loss']
    assert (float(trainer.state.loss_mean), float(trainer.state.loss_variance)) == (np.float32(first), 0.0)
    second = trainer()['loss']
    mean = 0.99 * first + 0.01 * second
    np.testing.assert_allclose(trainer.state.loss_mean, mean, rtol=1e-6)
    np.testing.assert_allclose(trainer.state.loss_variance, 0.01 * (second - mean) ** 2, rtol=1e-4)


def test_the_average_follows_the_parameters():
    trainer = Trainer(ema=0.75)
    average = 0.0
    for _ in range(3):
        trainer()
        average = 0.75 * average + 0.25 * trainer.value
        np.testing.assert_allclose(trainer.state.ema['value'], average, rtol=1e-6)


def test_noise_depends_on_the_seed_the_step_and_the_microbatch():
    def noise(**options):
        trainer = Trainer(**options)
        return [trainer()['noise'] for _ in range(2)]

    assert noise() == noise()
    assert len({*noise(), *noise(seed=1), *noise(accumulate=2)}) == 6


@pytest.mark.parametrize('optimizer', [SGD, AdamW])
def test_runs_at_other_rates_and_seeds_are_one_program(optimizer):
    kinds = [(0.5, 0), (0.125, 1)]
    trainers = [Trainer(optimizer(schedule=Schedule(peak=peak, warmup=4)), seed=seed) for peak, seed in kinds]
    first, second = (each.step.lower(each.state, each.frozen, BATCH).as_text() for each in trainers)
    assert first == second
    metrics = [each() for each in trainers]
    assert metrics[0]['noise'] != metrics[1]['noise']
    assert [each['learning_rate'] for each in metrics] == [0.125, 0.03125]
    np.testing.assert_array_equal(trainers[0].value, 4 * trainers[1].value)
    assert trainers[0].value.any()


def test_the_step_of_a_run_knows_neither_rate_nor_seed():
    """Nor whether it is lowered for the arrays of a run or for their shapes."""

    def program(peak, seed, frozen_of):
        run = tiny.get_config()
        run.optimizer.schedule.peak, run.seed = peak, seed
        layout = make_layout(run)
        graphs = make_graphs(run, layout)
        tx = run.optimizer.make(param_infos(graphs.model), run.steps)
        state = abstract_state(graphs.model, tx, layout, ema=True)
        step = make_train_step(run, graphs.model, tx, layout, state)
        return step.lower(state, frozen_of(run, graphs, layout), abstract_batch(run, layout)).as_text()

    def started(run, graphs, layout):
        return start_frozen(run.optimizer.schedule.peak, run.seed, layout)

    assert program(1e-2, 0, abstract_frozen) == program(3e-3, 5, started)


def test_what_is_frozen_enters_as_an_argument_and_survives():
    trainer, other = Trainer(), jnp.ones(())
    shifted = trainer(other=other)['targets']
    assert shifted == pytest.approx(Trainer()()['targets'] + 1)
    trainer(other=other + 1)
    assert trainer.step.compiles == 1
    assert not other.is_deleted()
    assert not trainer.frozen.key.is_deleted()


def test_the_state_is_donated_and_the_step_compiles_once():
    trainer = Trainer(AdamW(schedule=FLAT), ema=0.5)
    before = trainer.state
    for _ in range(3):
        trainer()
    assert all(x.is_deleted() for x in jax.tree.leaves(before))
    assert trainer.step.compiles == 1

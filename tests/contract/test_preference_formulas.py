"""Each formula of preferences and rewards from log-probs and scores alone: against NumPy, TRL, and at its edges."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import numpy_preferences
import pytest
import toy

from tpu_llm.arrays import Batch, ScoredBatch
from tpu_llm.config import ConfigError
from tpu_llm.objectives.kto import KTO, mismatched
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.objectives.preference import CPO, DPO, IPO, ORPO, Hinge, Preference, RobustDPO, SimPO
from tpu_llm.objectives.reward_model import PairReward, RankReward, StepReward
from tpu_llm.objectives.texts import Said, check_kind, in_pairs, per_text

TRL = np.load(pathlib.Path(__file__).parents[1] / 'golden' / 'preferences' / 'trl.npz')
BETA, SMOOTHING, GAMMA = 0.3, 0.15, 0.8  # as make.py's there
METHODS = {
    'dpo': (DPO(beta=BETA), {}),
    'robust_dpo': (RobustDPO(beta=BETA, label_smoothing=SMOOTHING), {'smoothing': SMOOTHING}),
    'hinge': (Hinge(beta=BETA), {}),
    'ipo': (IPO(beta=BETA), {}),
    'cpo': (CPO(beta=BETA, imitate=0.0), {'imitate': 0.0}),
    'simpo': (SimPO(beta=BETA, gamma=GAMMA), {'gamma': GAMMA}),
    'orpo': (ORPO(beta=BETA), {}),
}
# Equal log-probs; a response of one token; one that says nothing new; ratios of e±40 either way; near-certain tokens.
EDGES = np.array(
    [
        # log π(w), log π(l), log μ(w), log μ(l), |w|, |l|
        [-3.0, -3.0, -3.0, -3.0, 3, 3],
        [-0.7, -5.0, -0.9, -4.0, 1, 4],
        [-2.0, -6.0, -2.0, -6.0, 2, 5],
        [-1.0, -41.0, -41.0, -1.0, 4, 4],
        [-41.0, -1.0, -1.0, -41.0, 4, 4],
        [-0.001, -0.002, -0.5, -0.1, 2, 2],
    ]
)


def texts(pairs):
    """(chosen, rejected) as the formulas take them, of rows of `EDGES`."""
    columns = jnp.asarray(pairs, jnp.float32)[None]
    return tuple(
        Said(log_prob=columns[..., i], reference=columns[..., 2 + i], length=columns[..., 4 + i]) for i in (0, 1)
    )


def published():
    """TRL's pairs as rows of `EDGES`."""
    own, reference, size = (TRL[name].sum(-1) for name in ('policy', 'reference', 'mask'))
    return np.concatenate([own, reference, size], axis=1)


@pytest.mark.parametrize('name', METHODS)
def test_it_says_what_trl_says(name):
    method, _ = METHODS[name]
    losses = method.losses(*texts(published()), jnp.zeros((1, 6)))[0]
    if name == 'orpo':  # TRL gives what is added to -log p a token
        chosen = TRL['policy'][:, 0].sum(-1) / TRL['mask'][:, 0].sum(-1)
        np.testing.assert_allclose(losses, -chosen - TRL['loss_orpo'], rtol=2e-6)
    else:
        np.testing.assert_allclose(losses, TRL[f'loss_{name}'], rtol=2e-5, atol=1e-6)


def test_kto_says_what_trl_says():
    own, reference, size = (TRL[name][:, :1].sum(-1) for name in ('policy', 'reference', 'mask'))
    given = Said(
        **{
            n: jnp.asarray(x, jnp.float32)
            for n, x in zip(('log_prob', 'reference', 'length'), (own, reference, size), strict=True)
        }
    )
    labels, kl = (jnp.asarray(TRL[name][:, None], jnp.float32) for name in ('labels', 'divergence'))
    losses = KTO(beta=BETA, good=1.2, bad=0.7).losses(given, labels, jnp.maximum(kl, 0.0))
    np.testing.assert_allclose(losses[:, 0], TRL['loss_kto'], rtol=1e-5, atol=1e-6)


def test_reward_of_pairs_says_what_trl_says():
    """The scores of a row's positions are two texts of one position each."""
    scores = TRL['policy'][..., 0]
    ones, values = np.ones((6, 2), np.float32), np.repeat(TRL['margins'][:, None], 2, 1)
    batch = judged(segments=np.tile([1, 2], (6, 1)), marks=ones, values=values, examples=ones)
    found = PairReward(centre=0.05).judge(jnp.asarray(scores, jnp.float32), batch)
    assert found.there.all()
    np.testing.assert_allclose(found.losses[:, 0], TRL['loss_reward'], rtol=1e-5)


def judged(segments, marks, values, examples):
    plain = toy.batch(segments)
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(Batch)}
    marks, values = jnp.asarray(marks, jnp.float32), jnp.asarray(values, jnp.float32)
    examples = jnp.asarray(examples, jnp.int32)
    return ScoredBatch(**fields, marks=marks, values=values, examples=examples, reference=jnp.zeros_like(marks))


@pytest.mark.parametrize('name', METHODS)
def test_formula_and_gradient_at_the_edges(name):
    """Of both log-probs, against float64 and its central differences."""
    method, numbers = METHODS[name]
    formula = functools.partial(getattr(numpy_preferences, name), beta=BETA, **numbers)
    gradients = jax.grad(lambda pairs: method.losses(*texts(pairs), jnp.zeros((1, len(EDGES)))).sum())(
        jnp.asarray(EDGES, jnp.float32)
    )
    losses = method.losses(*texts(EDGES), jnp.zeros((1, len(EDGES))))[0]
    for i, pair in enumerate(EDGES):
        np.testing.assert_allclose(losses[i], formula(*pair, 0.0), rtol=1e-4, atol=1e-5, err_msg=str(pair))
        for side in (0, 1):
            step = np.zeros(6)
            step[side] = 1e-6
            slope = (formula(*(pair + step), 0.0) - formula(*(pair - step), 0.0)) / 2e-6
            np.testing.assert_allclose(gradients[i, side], slope, rtol=1e-3, atol=1e-5, err_msg=str(pair))


@pytest.mark.parametrize('name', METHODS)
def test_a_response_without_tokens_is_finite(name):
    """Such a pair is masked; a gradient that were not finite would pass the mask as NaN."""
    method, _ = METHODS[name]
    empty = np.zeros((1, 6))
    losses, gradients = jax.value_and_grad(lambda pairs: method.losses(*texts(pairs), jnp.zeros((1, 1))).sum())(
        jnp.asarray(empty, jnp.float32)
    )
    assert jnp.isfinite(losses)
    assert jnp.isfinite(gradients).all()


def test_smoothing_and_an_offset_are_those_of_numpy():
    method = DPO(beta=BETA, label_smoothing=0.2, offset=0.5)
    losses = method.losses(*texts(EDGES), jnp.full((1, len(EDGES)), 3.0))[0]
    options = {'beta': BETA, 'smoothing': 0.2, 'offset': 0.5}
    expected = [numpy_preferences.dpo(*pair, 3.0, **options) for pair in EDGES]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_robust_is_unbiased():
    """Of labels flipped with the probability of the smoothing, its mean is DPO's loss of the true ones."""
    wrong = 0.3
    method, plain = RobustDPO(beta=BETA, label_smoothing=wrong), DPO(beta=BETA)
    swapped = EDGES[:, [1, 0, 3, 2, 5, 4]]
    zero = jnp.zeros((1, len(EDGES)))
    mean = (1 - wrong) * method.losses(*texts(EDGES), zero) + wrong * method.losses(*texts(swapped), zero)
    np.testing.assert_allclose(mean, plain.losses(*texts(EDGES), zero), rtol=1e-4, atol=1e-5)


def test_imitation_is_a_token_s_mean():
    both, none = CPO(beta=BETA, imitate=2.0), CPO(beta=BETA, imitate=0.0)
    zero = jnp.zeros((1, len(EDGES)))
    more = both.losses(*texts(EDGES), zero) - none.losses(*texts(EDGES), zero)
    np.testing.assert_allclose(more[0], -2 * EDGES[:, 0] / EDGES[:, 4], rtol=1e-4, atol=1e-5)


@dataclasses.dataclass(kw_only=True, slots=True)
class Exponential(Preference):
    def losses(self, chosen, rejected, margin):
        return jnp.exp(self.reward(rejected) - self.reward(chosen))

    def reward(self, text):
        return self.beta * text.per_token(text.log_prob)


def test_a_method_of_one_s_own_is_a_formula():
    """The example of docs/post_training.md."""
    losses = Exponential().losses(*texts(EDGES), jnp.zeros((1, len(EDGES))))[0]
    expected = np.exp(0.1 * (EDGES[:, 1] / EDGES[:, 5] - EDGES[:, 0] / EDGES[:, 4]))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------- texts


def test_sums_of_texts():
    x = jnp.arange(10.0).reshape(2, 5)
    segments = jnp.array([[1, 1, 2, 2, 0], [1, 2, 3, 4, 5]])
    np.testing.assert_array_equal(per_text(x, segments), [[1, 5, 0, 0, 0], [5, 6, 7, 8, 9]])
    first, second = in_pairs(per_text(x, segments))
    np.testing.assert_array_equal(first, [[1, 0], [5, 7]])
    np.testing.assert_array_equal(second, [[5, 0], [6, 8]])


def test_mismatched_rows_are_those_of_python():
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 0, 0], [1, 1, 1, 1, 2, 2, 0, 0, 0, 0, 0, 0], [0] * 12])
    weights = [[0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0], [0] * 12]
    batch = dataclasses.replace(toy.batch(segments), weights=jnp.asarray(weights, jnp.float32))
    found = jax.jit(mismatched)(batch)
    for row, texts in enumerate(numpy_preferences.mismatched(batch)):
        for number, (tokens, targets, counted) in enumerate(texts, 1):
            here = found.segments[row] == number
            np.testing.assert_array_equal(found.tokens[row][here], tokens)
            np.testing.assert_array_equal(found.targets[row][here], targets)
            np.testing.assert_array_equal(found.weights[row][here], counted)
            np.testing.assert_array_equal(found.positions[row][here], np.arange(len(tokens)))
        assert int(found.segments[row].max()) == len(texts)
        assert (found.segments[row] > 0).sum() == (segments[row] > 0).sum()
        assert not found.weights[row][found.segments[row] == 0].any()


def test_the_divergence_is_a_row_s_own_and_of_a_single_text_nothing():
    """Neither the rows beside it nor their order change it."""
    graph = toy.graph(toy.config(layers=1))
    model, frozen = (graph.bind(toy.weights(graph, seed)) for seed in (1, 0))
    segments = [[1, 1, 1, 1, 2, 2, 2, 2], [1] * 8, [1, 1, 2, 2, 3, 3, 3, 0]]
    weights = [[0, 0, 1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 0, 1, 1, 0]]
    batch = dataclasses.replace(toy.batch(segments), weights=jnp.asarray(weights, jnp.float32))
    run = jax.jit(lambda batch: KTO().divergence(model, frozen, batch)[:, 0])
    whole = run(batch)
    assert whole[1] == 0.0
    assert (whole >= 0).all()
    assert whole.max() > 0
    turned = run(jax.tree.map(lambda x: x[::-1], batch))
    np.testing.assert_allclose(turned[::-1], whole, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------- rewards


def test_rankings_are_counted_by_their_neighbours():
    segments = [[1, 2, 3, 4, 5, 0]]
    ones = np.array([[1, 1, 1, 1, 1, 0]])
    batch = judged(segments, ones, 0 * ones, [[1, 1, 1, 2, 2, 0]])
    scores = jnp.array([[3.0, 1.0, 2.0, -1.0, 5.0, 9.0]])
    found = RankReward().judge(scores, batch)
    assert found.there.tolist() == [[True, True, False, False, False, False]]
    np.testing.assert_allclose(found.told['accuracy'][0, :2], [0.5, 0.0])
    np.testing.assert_allclose(found.score[0, :2], [2.0, 2.0])
    expected = [numpy_preferences.rank_reward(np.asarray(scores[:, :3]), cut(batch, 0, 3))]
    expected += [numpy_preferences.rank_reward(np.asarray(scores[:, 3:5]), cut(batch, 3, 5))]
    np.testing.assert_allclose(found.losses[0, :2], expected, rtol=1e-5)


def cut(batch, start, stop):
    return jax.tree.map(lambda x: x[:, start:stop], batch)


def test_calibration_is_the_brier_score():
    ones = np.ones((1, 4))
    batch = judged([[1, 2, 3, 4]], ones, 0 * ones, [[1, 1, 2, 2]])
    found = PairReward().judge(jnp.array([[2.0, 0.0, -1.0, 0.0]]), batch)
    sure = 1 / (1 + np.exp([-2.0, 1.0]))
    np.testing.assert_allclose(found.told['brier'][0], (1 - sure) ** 2, rtol=1e-5)
    np.testing.assert_array_equal(found.told['accuracy'][0], [1.0, 0.0])
    step = StepReward().judge(jnp.array([[2.0, -1.0]]), judged([[1, 1]], [[1, 1]], [[1.0, -1.0]], [[1, 1]]))
    np.testing.assert_allclose(step.told['brier'][0], [(1 - sure[0]) ** 2, sure[1] ** 2], rtol=1e-5)
    np.testing.assert_array_equal(step.told['accuracy'][0], [1.0, 1.0])


# ------------------------------------------------------------------------------------------------------ what cannot be


@pytest.mark.parametrize(
    ('objective', 'said'),
    [
        (DPO(beta=0.0), r'beta is 0\.0; it must be above 0'),
        (DPO(label_smoothing=0.5), r'label_smoothing is 0\.5; write a share from 0 to below 0\.5'),
        (RobustDPO(label_smoothing=0.7), r'label_smoothing is 0\.7; write a share'),
        (DPO(offset=-1.0), r'offset is -1\.0; it must not be negative'),
        (CPO(imitate=-1.0), r'imitate is -1\.0; it must not be negative'),
        (SimPO(gamma=-0.1), r'gamma is -0\.1; it must not be negative'),
        (KTO(bad=0.0), r'bad is 0\.0; it must be above 0'),
        (PairReward(centre=-0.1), r'centre is -0\.1; it must not be negative'),
    ],
)
def test_settings_that_cannot_be_say_why(objective, said):
    with pytest.raises(ConfigError, match=said):
        objective.validate()


def test_an_objective_names_the_examples_that_it_learns_from():
    check_kind(DPO(), 'mine', 'preference')
    check_kind(NextToken(), 'mine', 'text')
    said = (
        r"source 'mine' is of labelled examples, and objective DPO learns from preference examples; change one of them"
    )
    with pytest.raises(ConfigError, match=said):
        check_kind(DPO(), 'mine', 'labelled')


def test_only_those_beside_a_model_need_one():
    assert DPO().needs_frozen
    assert not DPO(reference='stored').needs_frozen
    assert not ORPO().needs_frozen
    assert KTO().needs_frozen

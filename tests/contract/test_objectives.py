"""What every objective must do. A new one is one more row of OBJECTIVES: the objective with a model and a batch, its
formula in float64 NumPy, and its value per token where all logits are equal.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy_ahead
import numpy_decoder
import numpy_encoder
import numpy_preferences
import numpy_transformer
import pytest
import toy

from tpu_llm.arrays import Array, Batch, MaskedBatch, PrefixBatch, ScoredBatch, SourceBatch, TaughtBatch
from tpu_llm.config import ConfigError
from tpu_llm.models.decoder_config import Dropout
from tpu_llm.models.encoder import EncoderConfig
from tpu_llm.models.encoder_decoder import EncoderDecoderConfig
from tpu_llm.models.graph import ModelGraph
from tpu_llm.models.projected import ProjectedConfig
from tpu_llm.models.scalar_head import ScalarConfig
from tpu_llm.objectives.ahead import Ahead
from tpu_llm.objectives.denoise import Denoise
from tpu_llm.objectives.distill import Distill, DistillStored
from tpu_llm.objectives.kto import KTO
from tpu_llm.objectives.masked import Masked
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.objectives.noisy import Noisy
from tpu_llm.objectives.preference import DPO, ORPO
from tpu_llm.objectives.prefix import PrefixLM
from tpu_llm.objectives.reward_model import PairReward, RankReward, ScoreReward, StepReward

pytestmark = pytest.mark.usefixtures('quick_compile')

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 0, 0], [1] * 8])
BATCH = dataclasses.replace(
    toy.batch(SEGMENTS), weights=jnp.array([[1, 1, 1, 0, 1, 2, 0, 0], [0, 0, 1, 0.5, 1, 1, 1, 1]], jnp.float32)
)
FIELDS = {field.name: getattr(BATCH, field.name) for field in dataclasses.fields(BATCH)}
PREFIX = PrefixBatch(**FIELDS, prefix=jnp.array([[1, 1, 0, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]], bool))
HIDDEN = MaskedBatch(
    **FIELDS, token_types=jnp.array([[0, 0, 0, 1, 1, 1, 0, 0], [1] * 8], jnp.int32), unrelated=jnp.array([1, 0])
)
SOURCE = SourceBatch(
    **FIELDS,
    source=jnp.array([[3, 4, 5, 6, 7, 0], [8, 9, 10, 11, 12, 13]], jnp.int32),
    source_segments=jnp.array([[1, 1, 2, 2, 2, 0], [1] * 6], jnp.int32),
)

# As likely as all tokens are to a model of equal logits.
TAUGHT = TaughtBatch(
    **FIELDS,
    likely=jnp.asarray(
        np.random.default_rng(1).permuted(np.tile(np.arange(19), (2, 8, 1)), axis=-1)[..., :3], jnp.int32
    ),
    likely_log_probs=jnp.full((2, 8, 3), -np.log(19), jnp.float32),
    rest=jnp.full((2, 8), np.log(16 / 19), jnp.float32),
)


def scored(segments, responses, values, marks, examples, seed=0):
    """Rows of judged texts; responses are the positions that count."""
    plain = dataclasses.replace(toy.batch(segments, seed=seed), weights=jnp.asarray(responses, jnp.float32))
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    numbers = {'values': values, 'marks': marks, 'reference': np.zeros(np.shape(segments))}
    numbers = {name: jnp.asarray(x, jnp.float32) for name, x in numbers.items()}
    return ScoredBatch(**fields, **numbers, examples=jnp.asarray(examples, jnp.int32))


# Two pairs, then one, of which a response is a single token, and one that has none and is no pair.
TEXTS = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4, 4], [1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 0]])
ENDS = np.array([[0, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 1], [0, 0, 0, 1, 0, 1, 0, 1, 0, 0, 1, 0]])
PAIRS = scored(
    TEXTS,
    [[0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0]],
    ENDS * [[0.5] * 7 + [0.0] * 5, [1.5] * 6 + [0.0] * 6],
    ENDS,
    [[1] * 7 + [2] * 5, [1] * 6 + [2] * 5 + [0]],
)
# Four texts, good and bad, from which the policy diverges, and a row of a single one.
LABELLED = scored(
    [TEXTS[0], [1] * 7 + [0] * 5],
    [PAIRS.weights[0], [0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0]],
    [ENDS[0] * [1, 1, 1, -1, -1, -1, -1, -1, -1, 1, 1, 1], [0] * 6 + [-1] + [0] * 5],
    [ENDS[0], [0] * 6 + [1] + [0] * 5],
    [TEXTS[0], [1] * 7 + [0] * 5],
    seed=2,
)
# A ranking of four and one of three; a text of each row is a ranking of one, which is none.
RANKED = dataclasses.replace(
    PAIRS, values=jnp.zeros((2, 12)), examples=jnp.array([[1] * 12, [1] * 8 + [2] * 3 + [0]], jnp.int32)
)
STEPS = dataclasses.replace(
    PAIRS,
    values=jnp.asarray(ENDS * [[1.0] * 6 + [-1.0] * 6, [0.5] * 4 + [0.0] * 4 + [1.0] * 4], jnp.float32),
    segments=jnp.asarray(TEXTS > 0, jnp.int32),
)

DECODER = toy.config(layers=1, logit_softcap=3.0, dropout=Dropout(residual=0.3))
AHEAD = dataclasses.replace(DECODER, predict_ahead=2)
SCALAR = ScalarConfig.of(toy.config(layers=1, dropout=Dropout(residual=0.3)))
ENCODER = EncoderConfig(
    vocab_size=19,
    width=16,
    layers=1,
    heads=4,
    mlp_width=20,
    mlp='gelu',
    max_length=8,
    pooler=True,
    next_sentence=True,
    dropout=Dropout(residual=0.3),
    dtype='float32',
)
ENCODER_DECODER = EncoderDecoderConfig(
    vocab_size=19,
    width=16,
    encoder_layers=1,
    decoder_layers=1,
    heads=4,
    head_dim=4,
    mlp_width=20,
    bias=('mlp',),
    embed_scale=4.0,
    dropout=Dropout(residual=0.3),
    dtype='float32',
)


def next_token(logits, batch, *, z_loss=0.0, label_smoothing=0.0):
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z[..., None] - logits
    target = np.take_along_axis(nll, np.asarray(batch.targets)[..., None], -1)[..., 0]
    loss = (1 - label_smoothing) * target + label_smoothing * nll.mean(-1) + z_loss * log_z**2
    return (loss * np.asarray(batch.weights)).sum()


def decoded(weights, batch, **options):
    prefix = batch.prefix if isinstance(batch, PrefixBatch) else None
    logits = numpy_decoder.logits(DECODER, weights, batch.tokens, batch.segments, batch.positions, prefix)
    return next_token(logits, batch, **options)


def predicted_ahead(weights, batch):
    """The targets of each depth stand further on, if they do so in the same segment; 0.3 for their mean."""
    loss, share = decoded(weights, batch), 0.3 / AHEAD.predict_ahead
    for k, (logits, inside) in enumerate(
        numpy_ahead.depths(AHEAD, weights, batch.tokens, batch.segments, batch.positions), 1
    ):
        targets, counted = np.zeros(inside.shape, int), np.zeros(inside.shape)
        for row, at in np.argwhere(inside):
            targets[row, at], counted[row, at] = batch.targets[row, at + k], batch.weights[row, at + k]
        loss += share * next_token(logits, dataclasses.replace(batch, targets=targets, weights=counted))
    return loss


def masked(weights, batch, *, next_sentence=False):
    """A row's pair weighs what its tokens do."""
    hidden = numpy_encoder.hidden(ENCODER, weights, batch.tokens, batch.segments, batch.positions, batch.token_types)
    loss = next_token(numpy_encoder.masked_logits(ENCODER, weights, hidden), batch)
    if not next_sentence:
        return loss
    logits = numpy_encoder.pair_logits(weights, hidden)
    odds = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return loss - sum(np.asarray(batch.weights)[row].sum() * np.log(odds[row, batch.unrelated[row]]) for row in (0, 1))


def denoised(weights, batch):
    """Segment by segment; what is in none has no weight."""
    logits = np.zeros((*batch.tokens.shape, ENCODER_DECODER.vocab_size))
    for row in range(2):
        for segment in range(1, int(batch.segments[row].max()) + 1):
            here = np.asarray(batch.segments[row] == segment)
            source = np.asarray(batch.source[row])[np.asarray(batch.source_segments[row] == segment)]
            target = np.asarray(batch.tokens[row])[here]
            logits[row, here] = numpy_transformer.logits(ENCODER_DECODER, weights, source, target)
    return next_token(logits, batch)


def target_log_probs(weights, batch):
    logits = numpy_decoder.logits(DECODER, weights, batch.tokens, batch.segments, batch.positions)
    return numpy_preferences.log_probs(logits, batch)


def preferred(formula, **numbers):
    def loss(weights, batch, reference=None):
        own, other = target_log_probs(weights, batch), target_log_probs(reference or weights, batch)
        return sum(formula(*pair, **numbers) for pair in numpy_preferences.pairs(own, other, batch))

    return loss


def matched(weights, batch, reference, *, labels, share):
    """With an identity for a head, the logits are the hidden states."""
    bare = dataclasses.replace(DECODER, vocab_size=DECODER.width, logit_softcap=0.0)
    own, other = (
        numpy_decoder.logits(
            bare, {**w, 'head.kernel': np.eye(DECODER.width)}, batch.tokens, batch.segments, batch.positions
        )
        for w in (weights, reference)
    )
    own = own @ np.asarray(weights['project'], np.float64)
    apart = ((own - other) ** 2).sum(-1) / (other**2).sum(-1)
    rest = distilled(weights, batch, reference, kind='forward', warm=1.0, labels=labels)
    return rest + share * (apart * np.asarray(batch.weights)).sum()


def from_stored(weights, batch):
    """Of three tokens and the rest, KL(student ‖ teacher)."""
    own = numpy_decoder.logits(DECODER, weights, batch.tokens, batch.segments, batch.positions)
    q = np.exp(own) / np.exp(own).sum(-1, keepdims=True)
    first = np.take_along_axis(q, np.asarray(batch.likely), -1)
    q = np.concatenate([first, 1 - first.sum(-1, keepdims=True)], -1)
    p = np.exp(np.concatenate([batch.likely_log_probs, batch.rest[..., None]], -1, dtype=np.float64))
    p = p / p.sum(-1, keepdims=True)
    return ((q * np.log(q / p)).sum(-1) * np.asarray(batch.weights)).sum() + next_token(own, batch)


def distilled(weights, batch, reference, *, kind, warm, labels, beta=0.5):
    own, other = (
        numpy_decoder.logits(DECODER, w, batch.tokens, batch.segments, batch.positions) for w in (weights, reference)
    )
    q, p = (np.exp(x / warm) / np.exp(x / warm).sum(-1, keepdims=True) for x in (own, other))
    m = beta * p + (1 - beta) * q
    each = {
        'forward': p * np.log(p / q),
        'reverse': q * np.log(q / p),
        'jensen_shannon': beta * p * np.log(p / m) + (1 - beta) * q * np.log(q / m),
    }
    apart = (each[kind].sum(-1) * np.asarray(batch.weights)).sum()
    return warm**2 * apart + labels * next_token(own, batch)


def good_or_bad(weights, batch, reference, **numbers):
    """The divergence is of the weights as they are: it has no gradient. Each mismatched text is a row by itself."""
    policy = toy.weights(toy.graph(DECODER))
    total = 0.0
    texts = [numpy_preferences.texts(target_log_probs(w, batch), batch) for w in (weights, reference)]
    for own, other, mixed in zip(*texts, numpy_preferences.mismatched(batch), strict=True):
        ratios = []
        for tokens, targets, counted in mixed:
            ones = jnp.ones((1, len(tokens)), jnp.int32)
            alone = toy.batch(ones)
            alone = dataclasses.replace(alone, tokens=jnp.asarray([tokens]), targets=jnp.asarray([targets]))
            each = [(target_log_probs(w, alone)[0] * counted).sum() for w in (policy, reference)]
            ratios.append(each[0] - each[1])
        z = np.mean(ratios) if len(ratios) > 1 else 0.0
        (mine, _, labels), theirs = zip(*own, strict=True), [log_prob for log_prob, *_ in other]
        total += numpy_preferences.kto(np.array(mine), np.array(theirs), labels, z, **numbers).sum()
    return total


def judged(formula, **numbers):
    """With an identity for a head, the logits are the hidden states."""
    bare = dataclasses.replace(SCALAR, vocab_size=SCALAR.width)

    def loss(weights, batch):
        weights = {**weights, 'head.kernel': np.eye(SCALAR.width)}
        hidden = numpy_decoder.logits(bare, weights, batch.tokens, batch.segments, batch.positions)
        return formula(hidden @ np.asarray(weights['score'], np.float64), batch, **numbers)

    return loss


@dataclasses.dataclass(frozen=True)
class Row:
    """`unused`: parameters that have no part in it. `flat`: those that, at zero, make all logits (or scores) equal.

    `weight`: what the loss is divided by, if it is not the sum of the batch's weights, in which it then is not linear.
    """

    objective: Any
    config: Any
    batch: Batch
    formula: Callable[..., Any]
    uniform: float
    flat: tuple[str, ...]
    unused: tuple[str, ...] = ()
    weight: float = 0.0

    @property
    def graph(self) -> ModelGraph:
        return toy.graph(self.config)


LOG_V, LOG_2 = float(np.log(19)), float(np.log(2))
HEAD, SCORE = ('head.kernel',), ('score',)
MASKED_HEAD = ('masked.norm.scale', 'masked.norm.bias', 'masked.out.bias')
PAIR = ('pair.kernel', 'pair.bias')
LAST = ('decoder.stack.period.0.mlp_norm.scale', 'decoder.stack.period.0.mlp_norm.bias')

OBJECTIVES = {
    'next token': Row(NextToken(chunk=4), DECODER, BATCH, decoded, LOG_V, HEAD),
    'smoothed, with z-loss': Row(
        NextToken(label_smoothing=0.1, z_loss=0.01),
        DECODER,
        BATCH,
        lambda weights, batch: decoded(weights, batch, label_smoothing=0.1, z_loss=0.01),
        LOG_V + 0.01 * LOG_V**2,
        HEAD,
    ),
    'noisy': Row(Noisy(), DECODER, BATCH, decoded, LOG_V, HEAD),
    'prefix': Row(PrefixLM(), DECODER, PREFIX, decoded, LOG_V, HEAD),
    # Of all weights, 11.5, those of targets one and two further on: 10.5 and 8.5.
    'ahead': Row(Ahead(), AHEAD, BATCH, predicted_ahead, LOG_V * (1 + 0.15 * (10.5 + 8.5) / 11.5), HEAD),
    'masked': Row(Masked(), ENCODER, HIDDEN, masked, LOG_V, MASKED_HEAD, (*PAIR, 'pooler.kernel', 'pooler.bias')),
    'masked, next sentence': Row(
        Masked(next_sentence=True),
        ENCODER,
        HIDDEN,
        lambda weights, batch: masked(weights, batch, next_sentence=True),
        LOG_V + LOG_2,
        (*MASKED_HEAD, *PAIR),
    ),
    'denoise': Row(Denoise(), ENCODER_DECODER, SOURCE, denoised, LOG_V, LAST),
    'DPO': Row(
        DPO(beta=0.3, label_smoothing=0.2, offset=0.7),
        DECODER,
        PAIRS,
        preferred(numpy_preferences.dpo, beta=0.3, smoothing=0.2, offset=0.7),
        float(np.mean([0.8 * np.logaddexp(0, 0.7 * m) + 0.2 * np.logaddexp(0, -0.7 * m) for m in (0.5, 0.0, 1.5)])),
        HEAD,
        weight=3.0,
    ),
    'ORPO': Row(
        ORPO(beta=0.5),
        DECODER,
        PAIRS,
        preferred(numpy_preferences.orpo, beta=0.5),
        LOG_V + 0.5 * LOG_2,
        HEAD,
        weight=3.0,
    ),
    'KTO': Row(
        KTO(beta=0.5, good=1.2, bad=0.8),
        DECODER,
        LABELLED,
        functools.partial(good_or_bad, beta=0.5, good=1.2, bad=0.8),
        (2 * 0.6 + 3 * 0.4) / 5,
        HEAD,
        weight=5.0,
    ),
    'distill': Row(
        Distill(temperature=2.0, labels=0.5, chunk=4),
        DECODER,
        BATCH,
        functools.partial(distilled, kind='forward', warm=2.0, labels=0.5),
        0.5 * LOG_V,
        HEAD,
    ),
    'distill, reverse': Row(
        Distill(divergence='reverse', labels=0.1),
        DECODER,
        BATCH,
        functools.partial(distilled, kind='reverse', warm=1.0, labels=0.1),
        0.1 * LOG_V,
        HEAD,
    ),
    'distill, Jensen-Shannon': Row(
        Distill(divergence='jensen_shannon', beta=0.3, temperature=0.7, labels=1.0),
        DECODER,
        BATCH,
        functools.partial(distilled, kind='jensen_shannon', beta=0.3, warm=0.7, labels=1.0),
        LOG_V,
        HEAD,
    ),
    'distill, hidden states': Row(
        Distill(labels=1.0, hidden=0.7),
        ProjectedConfig.of(DECODER, DECODER.width),
        BATCH,
        functools.partial(matched, labels=1.0, share=0.7),
        LOG_V + 0.7,
        (*HEAD, 'project'),
    ),
    'distill, stored': Row(
        DistillStored(divergence='reverse', labels=1.0, chunk=4),
        DECODER,
        TAUGHT,
        from_stored,
        LOG_V,
        HEAD,
    ),
    # A pair is one by its texts, whatever of them counts as response.
    'reward of pairs': Row(
        PairReward(centre=0.1),
        SCALAR,
        PAIRS,
        judged(numpy_preferences.pair_reward, centre=0.1),
        float(np.mean(np.logaddexp(0, [0.5, 0.0, 1.5, 0.0]))),
        SCORE,
        HEAD,
        weight=4.0,
    ),
    'reward of scores': Row(
        ScoreReward(),
        SCALAR,
        PAIRS,
        judged(numpy_preferences.score_reward),
        (2 * 0.5**2 + 2 * 1.5**2) / 8,
        SCORE,
        HEAD,
        weight=8.0,
    ),
    'reward of rankings': Row(
        RankReward(),
        SCALAR,
        RANKED,
        judged(numpy_preferences.rank_reward),
        float(np.log(24) + np.log(6)) / 2,
        SCORE,
        HEAD,
        weight=2.0,
    ),
    'reward of steps': Row(
        StepReward(), SCALAR, STEPS, judged(numpy_preferences.step_reward), LOG_2, SCORE, HEAD, weight=8.0
    ),
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    row: Row
    weights: dict[str, Array]
    gradient: Callable[..., Any]
    reference: dict[str, Array] | None  # weights of the frozen model, where there is one

    def formula(self, weights: Any) -> Any:
        return self.row.formula(weights, self.row.batch, *([self.reference] if self.reference else []))


@pytest.fixture(scope='module', params=OBJECTIVES)
def made(request):
    """The row with weights, and its objective with the gradient, compiled once."""
    row = OBJECTIVES[request.param]
    graph = row.graph
    reference = toy.weights(graph, seed=1) if row.objective.needs_frozen else None

    def loss(weights, batch, key=None, reference=reference):
        frozen = reference and graph.bind(reference)
        loss, weight, sums = row.objective(graph.bind(weights), batch, frozen=frozen, key=key, step=jnp.int32(0))
        return loss, (weight, sums)

    return Compiled(row, toy.weights(graph), jax.jit(jax.value_and_grad(loss, has_aux=True)), reference)


def test_it_gives_finite_float32_sums(made):
    (loss, (weight, sums)), gradients = made.gradient(made.weights, made.row.batch)
    for value in (loss, weight, *sums.values()):
        assert value.shape == ()
        assert value.dtype == jnp.float32
        assert jnp.isfinite(value)
    assert weight == (made.row.weight or BATCH.weights.sum())
    for name, gradient in gradients.items():
        assert jnp.isfinite(gradient).all()
        assert (jnp.abs(gradient).max() > 0) != (name in made.row.unused), f'{name} does not learn, or should not'


def test_loss_is_that_of_plain_numpy(made):
    (loss, _), _ = made.gradient(made.weights, made.row.batch)
    np.testing.assert_allclose(loss, made.formula(made.weights), rtol=1e-6)


def test_tokens_of_weight_zero_change_nothing(made):
    batch = made.row.batch
    other = dataclasses.replace(batch, targets=jnp.where(batch.weights == 0, (batch.targets + 1) % 19, batch.targets))
    assert (other.targets != batch.targets).any()
    same = jax.tree.map(np.array_equal, made.gradient(made.weights, batch), made.gradient(made.weights, other))
    assert jax.tree.all(same), same


def test_it_drops_where_it_is_given_a_key(made):
    whole, _ = made.gradient(made.weights, made.row.batch)
    dropped, _ = made.gradient(made.weights, made.row.batch, jax.random.key(0))
    assert abs(dropped[0] - whole[0]) > 0.05


def test_a_batch_is_the_sum_of_its_parts(made):
    """Loss, weight and gradients are linear in the weights; or, where these only say what counts, in the rows."""
    batch = made.row.batch
    if made.row.weight:
        parts = [jax.tree.map(lambda x, row=row: x.at[row].set(0), batch) for row in (0, 1)]
    else:
        parts = [dataclasses.replace(batch, weights=batch.weights * share) for share in (0.25, 0.75)]
    (loss, (weight, _)), gradients = made.gradient(made.weights, batch)
    (losses, (weights, _)), partial = jax.tree.map(jnp.add, *(made.gradient(made.weights, part) for part in parts))
    np.testing.assert_allclose((losses, weights), (loss, weight), rtol=1e-6)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(partial[name], gradient, atol=1e-5)


def test_equal_logits_give_the_closed_form(made):
    flat = made.weights | {name: jnp.zeros_like(made.weights[name]) for name in made.row.flat}
    frozen = made.reference and made.reference | {name: flat[name] for name in made.row.flat}
    (loss, (weight, sums)), _ = made.gradient(flat, made.row.batch, reference=frozen)
    np.testing.assert_allclose(loss / weight, made.row.uniform, rtol=1e-6)
    if 'nll' in sums:
        np.testing.assert_allclose(sums['nll'] / weight, LOG_V, rtol=1e-6)


def test_gradient_is_that_of_float64_differences(made):
    """Along random directions in one parameter at a time; central differences of 1e-5 are off by about 1e-9."""
    _, gradients = made.gradient(made.weights, made.row.batch)
    random = np.random.default_rng(0)
    for name, gradient in gradients.items():
        direction = random.standard_normal(gradient.shape)
        direction /= np.linalg.norm(direction)
        whole = np.asarray(made.weights[name], np.float64)
        ends = [made.formula({**made.weights, name: whole + sign * 1e-5 * direction}) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-4, err_msg=name)


def test_next_sentence_says_how_often_it_is_right():
    """Of two rows, weighed by their tokens: a constant answer is right for one of them."""
    row = OBJECTIVES['masked, next sentence']
    graph = row.graph
    flat = {name: jnp.zeros_like(w) if name in PAIR else w for name, w in toy.weights(graph).items()}

    @jax.jit
    def run(weights):
        return row.objective(graph.bind(weights), HIDDEN, frozen=None, key=None, step=jnp.int32(0))

    for answer in (0, 1):
        weights = flat | {'pair.bias': jnp.array([1.0 - answer, float(answer)])}
        _, weight, sums = run(weights)
        rows = HIDDEN.weights.sum(1)
        assert sums['next_sentence_right'] == rows[HIDDEN.unrelated == answer].sum()
        nll = -np.log(1 / (1 + np.exp(-1.0))), -np.log(1 / (1 + np.exp(1.0)))
        expected = sum(rows[i] * nll[int(HIDDEN.unrelated[i] != answer)] for i in (0, 1))
        np.testing.assert_allclose(sums['next_sentence_nll'], expected, rtol=1e-6)
        assert weight == rows.sum()


WRONG = [
    ({'label_smoothing': 1.0}, r'label_smoothing is 1.0; write a number from 0 to below 1'),
    ({'label_smoothing': -0.1}, r'label_smoothing is -0.1; write a number from 0 to below 1'),
    ({'z_loss': -1e-4}, r'z_loss = -0.0001 and chunk = 0 must not be negative'),
    ({'chunk': -8}, r'z_loss = 0.0 and chunk = -8 must not be negative'),
]


@pytest.mark.parametrize(('fields', 'message'), WRONG)
def test_settings_that_cannot_be_say_why(fields, message):
    with pytest.raises(ConfigError, match=message):
        NextToken(**fields).validate()


def test_ahead_needs_a_weight():
    with pytest.raises(ConfigError, match=r'weight = 0\.0 must be above 0; without further tokens, use NextToken'):
        Ahead(weight=0.0).validate()
    with pytest.raises(ConfigError, match=r'label_smoothing is 1\.0'):
        Ahead(label_smoothing=1.0).validate()


def test_ahead_says_of_each_depth_how_often_it_is_right():
    """Targets are what the first depth holds likeliest; the second is right where it happens to say the same."""
    graph = toy.graph(AHEAD)
    weights = toy.weights(graph)
    said = numpy_ahead.depths(AHEAD, weights, BATCH.tokens, BATCH.segments, BATCH.positions)
    likeliest = [logits.argmax(-1) for logits, _ in said]
    targets = np.roll(likeliest[0], 1, axis=1)
    batch = dataclasses.replace(BATCH, targets=jnp.asarray(targets))
    _, _, sums = jax.jit(lambda weights: Ahead()(graph.bind(weights), batch, frozen=None, key=None, step=jnp.int32(0)))(
        weights
    )
    assert sums['ahead_1_right'] == 10.5
    right = [
        BATCH.weights[row, at + 2]
        for row, at in np.argwhere(said[1][1])
        if likeliest[1][row, at] == targets[row, at + 2]
    ]
    assert sums['ahead_2_right'] == sum(right) < 8.5

"""What is learned from judged texts, in float64 NumPy: text by text, pair by pair, from log-probs and scores."""

import itertools

import numpy as np


def log_probs(logits, batch):
    """log p of each target [B, T]."""
    log_z = np.log(np.exp(logits).sum(-1))
    return np.take_along_axis(logits, np.asarray(batch.targets)[..., None], -1)[..., 0] - log_z


def texts(x, batch):
    """(sum of x over what counts, how many tokens count, value) of each text, row by row."""
    rows = []
    for row, segments in enumerate(np.asarray(batch.segments)):
        found = []
        for segment in range(1, segments.max(initial=0) + 1):
            here = (segments == segment) & (np.asarray(batch.weights)[row] > 0)
            value = (np.asarray(batch.values)[row] * np.asarray(batch.marks)[row])[segments == segment].sum()
            found.append((x[row][here].sum(), int(here.sum()), value))
        rows.append(found)
    return rows


def pairs(own, reference, batch):
    """(log π(w), log π(l), log μ(w), log μ(l), |w|, |l|, margin) of each pair."""
    for mine, theirs in zip(texts(own, batch), texts(reference, batch), strict=True):
        for i in range(0, len(mine) - 1, 2):
            (w, w_size, margin), (rejected, l_size, _) = mine[i : i + 2]
            if w_size and l_size:
                yield w, rejected, theirs[i][0], theirs[i + 1][0], w_size, l_size, margin


def log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def dpo(w, rejected, w_ref, l_ref, w_size, l_size, margin, *, beta, smoothing=0.0, offset=0.0):
    h = beta * ((w - w_ref) - (rejected - l_ref)) - offset * margin
    return -(1 - smoothing) * log_sigmoid(h) - smoothing * log_sigmoid(-h)


def robust_dpo(w, rejected, w_ref, l_ref, *_, beta, smoothing):
    h = beta * ((w - w_ref) - (rejected - l_ref))
    return (-(1 - smoothing) * log_sigmoid(h) + smoothing * log_sigmoid(-h)) / (1 - 2 * smoothing)


def hinge(w, rejected, w_ref, l_ref, *_, beta):
    return max(0.0, 1 - beta * ((w - w_ref) - (rejected - l_ref)))


def ipo(w, rejected, w_ref, l_ref, w_size, l_size, *_, beta):
    return ((w - w_ref) / w_size - (rejected - l_ref) / l_size - 1 / (2 * beta)) ** 2


def cpo(w, rejected, w_ref, l_ref, w_size, *_, beta, imitate):
    return -log_sigmoid(beta * (w - rejected)) - imitate * w / w_size


def simpo(w, rejected, w_ref, l_ref, w_size, l_size, *_, beta, gamma):
    return -log_sigmoid(beta * (w / w_size - rejected / l_size) - gamma)


def orpo(w, rejected, w_ref, l_ref, w_size, l_size, *_, beta):
    def log_odds(mean):
        return mean - np.log(1 - np.exp(mean))

    return -w / w_size - beta * log_sigmoid(log_odds(w / w_size) - log_odds(rejected / l_size))


def kto(own, reference, labels, divergence, *, beta, good, bad):
    """Of texts with log-probs [n], labels 1 or -1 and their row's divergence [n]."""
    z = np.maximum(divergence, 0.0)
    gains = 1 / (1 + np.exp(-beta * (own - reference - z)))
    losses = 1 / (1 + np.exp(-beta * (z - (own - reference))))
    return np.where(np.asarray(labels) > 0, good * (1 - gains), bad * (1 - losses))


def mismatched(batch):
    """Rows in which each text's prompt has the response of the next: lists of (tokens, targets, weights) of texts."""
    rows = []
    for row, segments in enumerate(np.asarray(batch.segments)):
        parts = []
        for segment in range(1, segments.max(initial=0) + 1):
            here = segments == segment
            tokens, targets, weights = (np.asarray(x)[row][here] for x in (batch.tokens, batch.targets, batch.weights))
            first = int(np.argmax(weights > 0))
            parts.append(([*tokens[: first + 1]], [*targets[:first]], [*tokens[first + 1 :]], targets[first:], weights))
        made = []
        for own, other in zip(parts, parts[1:] + parts[:1], strict=True):
            answer = other[3]
            weights = np.concatenate([np.zeros(len(own[1])), other[4][-len(answer) :]])
            made.append((own[0] + other[2], own[1] + [*answer], weights))
        rows.append(made)
    return rows


def marked(scores, batch):
    """(score, value, example) at each mark of each row."""
    for row, marks in enumerate(np.asarray(batch.marks)):
        at = np.flatnonzero(marks)
        yield [(scores[row, i], float(batch.values[row, i]), int(batch.examples[row, i])) for i in at]


def pair_reward(scores, batch, *, centre=0.0):
    total = 0.0
    for found in marked(scores, batch):
        for (chosen, margin, _), (rejected, _, _) in zip(found[::2], found[1::2], strict=True):
            total += -log_sigmoid(chosen - rejected - margin) + centre * (chosen + rejected) ** 2
    return total


def score_reward(scores, batch):
    return sum((score - value) ** 2 for found in marked(scores, batch) for score, value, _ in found)


def rank_reward(scores, batch):
    total = 0.0
    for found in marked(scores, batch):
        for _, texts in itertools.groupby(found, key=lambda text: text[2]):
            ranking = [score for score, _, _ in texts]
            for k in range(len(ranking)):
                total -= np.log(np.exp(ranking[k]) / np.exp(ranking[k:]).sum())
    return total


def step_reward(scores, batch):
    total = 0.0
    for found in marked(scores, batch):
        for score, value, _ in found:
            right = (1 + value) / 2
            total -= right * log_sigmoid(score) + (1 - right) * log_sigmoid(-score)
    return total

"""From judged responses to rows that train: NumPy on the host, the same on every host."""

from collections.abc import Sequence

import numpy as np

from tpu_llm.rl import advantages
from tpu_llm.rl.prompts import Prompt
from tpu_llm.rl.rewards import Judged
from tpu_llm.rl.run import Run
from tpu_llm.rl.sampler import Written

Rows = dict[str, np.ndarray]


def rows(prompts: Sequence[Prompt], written: Written, judged: Judged, length: int, pad: int) -> Rows:
    """Prompt and response of each sample as pairs of input and target, [B, T] each, and `sampled` [B, A].

    Prompts end, and responses begin, at the same column of all rows, so that the last A columns hold whatever was
    written. Weight 1 where the target is the response's, of those that were judged.
    """
    count, room = written.tokens.shape
    made: Rows = {name: np.zeros((count, length), np.int32) for name in ('targets', 'segments', 'positions')}
    made['tokens'] = np.full((count, length), pad, np.int32)
    made['weights'] = np.zeros((count, length), np.float32)
    made['sampled'] = np.where(np.arange(room) < written.lengths[:, None], written.log_probs, 0.0).astype(np.float32)
    begin = length - room  # the column of a prompt's last token, whose target is the response's first
    for row, prompt in enumerate(prompts):
        ids = np.concatenate([prompt.ids, written.tokens[row, : written.lengths[row]]])
        n, start = len(ids) - 1, begin - (len(prompt.ids) - 1)
        at = slice(start, start + n)
        made['tokens'][row, at], made['targets'][row, at] = ids[:-1], ids[1:]
        made['segments'][row, at], made['positions'][row, at] = 1, np.arange(n)
        made['weights'][row, begin : start + n] = not judged.failed[row]
    return made


def weigh(run: Run, made: Rows, judged: Judged, kl_weight: float) -> tuple[Rows, dict[str, float]]:
    """The rows with advantages and returns, and the divergence from the reference a token and a response.

    The divergence is k1, unbiased, as rewards must be; where the trainer did not score the policy's own tokens, the
    sampler's log-probs stand for its.
    """
    rollout, group = run.rollout, run.rollout.group
    sampled = made['sampled']
    mask = made['weights'][:, -sampled.shape[1] :]
    rewards = np.where(judged.failed, 0.0, judged.total)
    told: dict[str, float] = {}
    kl = np.zeros(mask.shape)
    if 'reference' in made:
        kl = np.where(mask > 0, made.get('old', sampled).astype(np.float64) - made['reference'], 0.0)
        told = {'kl_written': float(kl.sum() / max(mask.sum(), 1.0)), 'kl_response': float(kl.sum(axis=1).mean())}
    match rollout.advantages:
        case 'grpo' | 'dr_grpo':
            each = advantages.grpo(filled(rewards, judged.failed, group), group, scale=rollout.advantages == 'grpo')
        case 'rloo':
            each = advantages.rloo(filled(rewards, judged.failed, group), group)
        case 'reinforce++':
            given = advantages.per_token(rewards, kl, mask, kl_weight)
            each = advantages.whiten(advantages.returns_to_go(given, mask, rollout.discount), mask)
        case 'gae':
            given = advantages.per_token(rewards, kl, mask, kl_weight)
            each, returns = advantages.gae(given, made['values'], mask, discount=rollout.discount, decay=rollout.decay)
            each = advantages.whiten(each, mask)
            made = made | {'returns': returns.astype(np.float32)}
    by_token = each if each.ndim == 2 else each[:, None] * (mask > 0)
    return made | {'advantages': by_token.astype(np.float32)}, told


def filled(rewards: np.ndarray, failed: np.ndarray, group: int) -> np.ndarray:
    """With the group's mean in place of what failed, which then says nothing of the others."""
    by_prompt, bad = rewards.reshape(-1, group), failed.reshape(-1, group)
    mean = (by_prompt * ~bad).sum(axis=1, keepdims=True) / np.maximum((~bad).sum(axis=1, keepdims=True), 1)
    return np.where(bad, mean, by_prompt).reshape(-1)


def flat_groups(total: np.ndarray, group: int) -> np.ndarray:
    """bool[P]: the prompts whose responses are all worth the same, so that comparing them teaches nothing."""
    by_prompt = total.reshape(-1, group)
    return (np.nanmax(by_prompt, axis=1) - np.nanmin(by_prompt, axis=1)) == 0


Part = tuple[list[Prompt], Written, Judged]


def replace_groups(old: Part, new: Part, flat: np.ndarray, group: int) -> Part:
    """The old rollout, its flat groups replaced by groups of the new one that are not flat, as far as these go."""
    good = np.flatnonzero(~flat_groups(new[2].total, group))
    at = np.flatnonzero(flat)[: len(good)]
    source = np.arange(len(flat))
    source[at] = len(flat) + good[: len(at)]
    take = (source[:, None] * group + np.arange(group)).reshape(-1)

    def joined(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.concatenate([a, b])[take]

    prompts = [(old[0] + new[0])[i] for i in take]
    fields = ('tokens', 'log_probs', 'lengths', 'finished')
    written = Written(*(joined(getattr(old[1], name), getattr(new[1], name)) for name in fields))
    each = {name: joined(values, new[2].each[name]) for name, values in old[2].each.items()}
    return prompts, written, Judged(joined(old[2].total, new[2].total), each)


def about(written: Written, judged: Judged, group: int) -> dict[str, float]:
    """Metrics of a rollout."""
    good = ~judged.failed
    told = {'reward': float(judged.total[good].mean()) if good.any() else 0.0}
    told |= {f'reward_{name}': float(np.nanmean(values)) for name, values in judged.each.items() if good.any()}
    told['reward_spread'] = float(judged.total[good].std()) if good.any() else 0.0
    told['response_tokens'] = float(written.lengths.mean())
    told['finished'] = float(written.finished.mean())
    told['failed'] = float(judged.failed.mean())
    if group > 1:
        told['flat_groups'] = float(flat_groups(np.where(good, judged.total, 0.0), group).mean())
    return told

"""How much better a response was than was to be expected: what policy gradients are weighed by.

Pure NumPy in float64, on the host: rewards are few. `rewards` are one a response, `group` responses to one prompt
standing together: float[P * group].
"""

import numpy as np

from tpu_llm.arrays import Float

Rewards = Float[np.ndarray, ' B']
_EPS = 1e-4  # what GRPO's publishers add to a deviation (DeepSeekMath's reference implementation in TRL)


def grpo(rewards: Rewards, group: int, *, scale: bool = True) -> Rewards:
    """(r - mean) / deviation within each group (Shao et al., 2024, arXiv 2402.03300, eq. 4); 0 where all are equal.

    Without `scale` only r - mean: Dr. GRPO (Liu et al., 2025, arXiv 2503.20783). The deviation is the sample's.
    """
    by_prompt = rewards.astype(np.float64).reshape(-1, group)
    centred = by_prompt - by_prompt.mean(axis=1, keepdims=True)
    if scale:
        centred = centred / (by_prompt.std(axis=1, ddof=1, keepdims=True) + _EPS)
    return centred.reshape(-1)


def rloo(rewards: Rewards, group: int) -> Rewards:
    """r - mean of the others in the group (Ahmadian et al., 2024, arXiv 2402.14740)."""
    return grpo(rewards, group, scale=False) * group / (group - 1)


def whiten(values: np.ndarray, mask: np.ndarray, *, shift: bool = True) -> np.ndarray:
    """To deviation 1 over where `mask` is, and mean 0 if `shift`; 0 elsewhere."""
    where = mask > 0
    mean, deviation = values[where].mean(), values[where].std()
    scaled = (values - mean) / (deviation + 1e-8) + (0.0 if shift else mean)
    return np.where(where, scaled, 0.0)


def per_token(rewards: Rewards, kl: np.ndarray, mask: np.ndarray, weight: float) -> np.ndarray:
    """float64[B, T]: -weight * KL at each token of a response, and its reward at the last (Ouyang et al., 2022, arXiv
    2203.02155, eq. 2). Responses are where `mask` is; a row without any gets nothing.
    """
    given = -weight * kl.astype(np.float64) * (mask > 0)
    last = mask.shape[1] - 1 - (mask[:, ::-1] > 0).argmax(axis=1)
    given[np.arange(len(rewards)), last] += rewards * (mask > 0).any(axis=1)
    return given


def returns_to_go(rewards: np.ndarray, mask: np.ndarray, discount: float = 1.0) -> np.ndarray:
    """float64[B, T]: the discounted sum of rewards from each token on: what REINFORCE++ (Hu, 2025, arXiv 2501.03262)
    whitens over the batch.
    """
    total, out = np.zeros(len(rewards)), np.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        total = rewards[:, t] + discount * total
        out[:, t] = total
    return np.where(mask > 0, out, 0.0)


def gae(
    rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, *, discount: float = 1.0, decay: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """(advantages, returns), float64[B, T]: generalized advantage estimation (Schulman et al., 2015, arXiv 1506.02438,
    eq. 16) with λ = `decay`. A response ends where its mask does; what follows is worth 0. Returns are advantages +
    values: what the critic is to learn.
    """
    rewards, values = rewards.astype(np.float64), np.where(mask > 0, values, 0.0).astype(np.float64)
    after = np.concatenate([values[:, 1:], np.zeros((len(values), 1))], axis=1)
    delta = np.where(mask > 0, rewards + discount * after - values, 0.0)
    running, out = np.zeros(len(values)), np.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        running = delta[:, t] + discount * decay * running * (mask[:, t] > 0)
        out[:, t] = running
    return out, np.where(mask > 0, out + values, 0.0)

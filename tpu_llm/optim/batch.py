"""What else changes with the batch: learning rate, momenta and warm-up; and how large a batch is worth its tokens."""

import dataclasses
import math

from tpu_llm.config import ConfigError
from tpu_llm.optim.optimizer import SGD, AdamW, Optimizer


def for_batch(optimizer: Optimizer, times: float) -> Optimizer:
    """The optimizer for batches `times` as large and as many fewer steps, that goes the same way over the same tokens.

    AdamW: the rate grows by the square root, b1 and b2 remember as many tokens, and eps shrinks as the noise does (the
    square root rule of Malladi et al., 2022, arXiv 2205.10287); the decay of weights is as much over the same tokens.
    SGD: the rate grows with the batch (Goyal et al., 2017, arXiv 1706.02677). Either holds while the noise of a batch
    outweighs its gradient, which `noise_scale` tells.
    Raises ConfigError where a momentum would forget all of a step, and for optimizers that no rule is known for.
    """
    if not 0 < times < math.inf:
        raise ConfigError(f'times = {times}; write how many times the batch is as large, such as 4, or 0.25')
    new = dataclasses.replace(optimizer)
    if isinstance(new, AdamW):
        longest = round(1 / (1 - min(new.b1, new.b2)), 9)
        if times >= longest:
            raise ConfigError(
                f'a batch {times:g} times as large would forget more than all there is with b1 = {new.b1} and b2 = '
                f'{new.b2}; keep it below {longest:g} times, or sweep the rate anew'
            )
        new.b1, new.b2 = 1 - times * (1 - new.b1), 1 - times * (1 - new.b2)
        new.eps /= times**0.5
        new.weight_decay *= times**0.5
        rate = times**0.5
    elif isinstance(new, SGD):
        rate = times
    else:
        raise ConfigError(
            f'no rule is known for {type(optimizer).__name__} at another batch size: there are those of AdamW and SGD; '
            'sweep the rate anew'
        )
    warmup = new.schedule.warmup
    warmup = max(1, round(warmup / times)) if warmup >= 1 else warmup  # whole steps, or a share of all of them
    new.schedule = dataclasses.replace(new.schedule, peak=new.schedule.peak * rate, warmup=warmup)
    return new


def noise_scale(small: tuple[float, float], large: tuple[float, float]) -> float:
    """B_simple = tr(Σ) / |G|² from two batch sizes: each (size, the mean over batches of the gradient's squared norm).

    In the unit of the sizes. Steps on batches well below it take twice the steps for half the batch, well above it they
    take no fewer steps however large the batch (McCandlish et al., 2018, arXiv 1812.06162, appendix A.1). Raises
    ConfigError where the means are too noisy to tell.
    """
    (a, square_a), (b, square_b) = small, large
    if not 0 < a < b:
        raise ConfigError(f'batch sizes {a:g} and {b:g}; give the smaller first, and two that differ')
    signal = (b * square_b - a * square_a) / (b - a)
    noise = (square_a - square_b) / (1 / a - 1 / b)
    if signal <= 0 or noise <= 0:
        raise ConfigError(
            f'squared norms {square_a:g} at {a:g} and {square_b:g} at {b:g} leave no signal or no noise; take the mean '
            'over more batches'
        )
    return noise / signal

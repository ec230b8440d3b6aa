"""What so many chips for so many hours are best spent on: FLOPs, size, tokens, a first guess of batch, and a layout.

The share of the peak is a guess until the very step is planned (`tpu_llm/plan`). With candidates at hand the size is
one of theirs, by its own count of FLOPs; its step is planned, and what that is predicted to reach takes the guess's
place.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from tpu_llm.config import ConfigError
from tpu_llm.models.flops import train_flops
from tpu_llm.nn.param import count_parameters
from tpu_llm.parallel.chips import Slice
from tpu_llm.plan.cache import Cache
from tpu_llm.plan.roofline import estimate
from tpu_llm.plan.search import Changes, best, candidates, chosen, flags, space, varied, whole
from tpu_llm.scaling.fit import Fit
from tpu_llm.scaling.points import points
from tpu_llm.train.run import Run

MFU = 0.4  # of the peak: what dense decoders of billions of parameters usually reach on TPUs
_MOST_SEARCHED = 4  # microbatches


def flops_of(where: Slice, hours: float, mfu: float) -> float:
    """What a slice computes of a model. Raises ConfigError for hours or a share that are none."""
    if not hours > 0 or not 0 < mfu <= 1:
        raise ConfigError(f'hours = {hours} and mfu = {mfu}: hours are above 0, and the share of the peak is at most 1')
    return where.devices * where.chip.flops * mfu * hours * 3600


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Guess:
    """Batch in tokens and peak learning rate for a budget: laws of one family of models on one corpus.

    B = 0.2920 C^0.3271 and 0.3118 C^-0.1250 (DeepSeek-AI, 2024, arXiv 2401.02954, section 3.1), fitted to runs of 1e17
    to 2e19 FLOPs with AdamW. First guesses, not laws for everyone: sweep them for a run that matters.
    """

    batch_tokens: float
    learning_rate: float


def guess(flops: float) -> Guess:
    return Guess(batch_tokens=0.2920 * flops**0.3271, learning_rate=0.3118 * flops**-0.1250)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A candidate with all of a budget's FLOPs, by its own count."""

    spec: str
    run: Run
    parameters: int
    tokens: float
    loss: float


def choices(fit: Fit, runs: Mapping[str, Any], flops: float) -> list[Choice]:
    """The candidates, the least predicted loss first. Raises ConfigError for what is no training run of a decoder."""
    found = []
    for spec, run in runs.items():
        if not isinstance(run, Run):
            raise ConfigError(f'{spec} is a {type(run).__name__}; candidates are training runs')
        size = count_parameters(run.model.make())
        tokens = flops / train_flops(run.model, run.data.seq_len)
        loss = float(fit.predict(points([size], [tokens], [1.0]))[0])
        found.append(Choice(spec=spec, run=run, parameters=size, tokens=tokens, loss=loss))
    return sorted(found, key=lambda each: each.loss)


def with_batch(run: Run, batch_tokens: float, where: Slice) -> Run:
    """A copy of the run with about that batch, of as many rows for each device of the slice, one at least."""
    rows = batch_tokens / run.data.seq_len / where.devices
    return chosen(run, {'data.global_batch': where.devices * max(1, round(rows))})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a run lies on a slice: the fields to set and the seconds of a step; a guess unless it was `compiled`."""

    changes: tuple[str, ...]
    seconds: float
    mfu: float
    compiled: bool


def layout(run: Run, where: Slice, *, compiles: int, cache: Cache | None = None) -> Layout:
    """The fastest: of so many that are compiled, or with none of them the best guess in closed form.

    Raises ConfigError where no layout fits, or where compiling needs libtpu and there is none.
    """
    found = _compiled(run, where, compiles, cache) if compiles else _guessed(run, where)
    if not found:
        more = f' of {compiles} that were compiled' if compiles else ''
        raise ConfigError(
            f'no layout{more} holds that model on {where} with {run.data.global_batch} rows; take more chips, a '
            'smaller model or more --compiles'
        )
    return min(found, key=lambda each: each.seconds)


def _space(run: Run, where: Slice) -> Iterator[Changes]:
    """What a plan's search looks through, and more microbatches: nobody chose the batch for that slice."""
    for changes in space(run, where):
        yield changes
        if changes['accumulate'] == _MOST_SEARCHED:
            yield from ({**changes, 'accumulate': more} for more in (8, 16, 32, 64))


def _compiled(run: Run, where: Slice, compiles: int, cache: Cache | None) -> list[Layout]:
    found = []
    ranked = varied(candidates(run, where, _space(run, where)))
    for tried in best(run, where, ranked, compiles, cache):
        if tried.plan is not None and tried.fits:
            changes = tuple(flags(tried.candidate.changes))
            found.append(Layout(changes=changes, seconds=tried.plan.seconds, mfu=tried.plan.mfu, compiled=True))
    return found


def _guessed(run: Run, where: Slice) -> list[Layout]:
    """By arithmetic alone, without what knows the devices: a layout may turn out to be none."""
    tokens = run.data.global_batch * run.data.seq_len
    needed = tokens * train_flops(run.model, run.data.seq_len) / where.devices / where.chip.flops
    weights, found = count_parameters(run.model.make()), []
    for changes in _space(run, where):
        changed, sizes = chosen(run, changes), whole(changes['mesh'], where)
        parts = math.prod(sizes[axis] for axis in ('stage', 'data', 'fsdp', 'expert'))
        if run.data.global_batch / changed.accumulate % parts:
            continue
        guessed = estimate(changed, where, sizes, weights)
        if guessed.bytes <= where.chip.hbm:
            mfu = needed / guessed.seconds
            found.append(Layout(changes=tuple(flags(changes)), seconds=guessed.seconds, mfu=mfu, compiled=False))
    return found


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Spending:
    """A budget spent on one of the candidates: with `layout`'s share of the peak, so that it ends in time."""

    flops: float
    choice: Choice
    batch_tokens: int
    learning_rate: float
    layout: Layout

    @property
    def steps(self) -> int:
        return max(1, round(self.choice.tokens / self.batch_tokens))


def spend(
    fit: Fit, runs: Mapping[str, Any], where: Slice, hours: float, mfu: float, *, compiles: int, cache: Cache | None
) -> Spending:
    """The best candidate at a guessed share of the peak, with as many tokens as its planned step allows."""
    flops = flops_of(where, hours, mfu)
    first = choices(fit, runs, flops)[0]
    about = guess(flops)
    run = with_batch(first.run, about.batch_tokens, where)
    laid = layout(run, where, compiles=compiles, cache=cache)
    flops = flops_of(where, hours, min(1.0, laid.mfu))
    last = next(each for each in choices(fit, runs, flops) if each.spec == first.spec)
    batch = run.data.global_batch * run.data.seq_len
    return Spending(flops=flops, choice=last, batch_tokens=batch, learning_rate=about.learning_rate, layout=laid)

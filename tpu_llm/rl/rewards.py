"""What a response is worth: a weighted sum of rewards, each logged by itself.

A reward is a config whose `open(surroundings)` gives a function from samples to numbers, one a sample. It may look at
the text and at the prompt's record (`answer`, …). NaN, an exception or too long a wait is an error that names the
reward, the sample and its prompt's place; `on_error` stops the run there, or leaves the sample out, counts it and says
each cause once. What is at fault from the beginning, a record without the field that a reward reads, is refused at the
start (`check`).
"""

import abc
import dataclasses
import json
import logging
import math
import os
import sysconfig
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import numpy as np

from tpu_llm.config import ConfigError, RunError
from tpu_llm.data.documents import Documents

OnError = Literal['stop', 'skip']
logger = logging.getLogger('tpu_llm')
_NONE = 'None; did it return a number?'
_LIBRARIES = (
    '<frozen ',
    os.path.join(Path(__file__).parents[1], ''),
    *(os.path.join(sysconfig.get_path(name), '') for name in ('stdlib', 'platstdlib', 'purelib', 'platlib')),
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A response to be judged."""

    prompt: str
    response: str  # without the mark that ended it
    record: Mapping[str, Any]  # the prompt's, with whatever fields it has besides
    finished: bool  # it ended itself, and was not cut
    ids: np.ndarray  # int32[n], prompt and response
    tokens: int  # of the response
    where: Callable[[], str] = str  # the prompt's file and line, which are looked for when they are needed


Scores = Callable[[Sequence[Sample]], Sequence[float] | np.ndarray]  # one a sample


class Reward(Protocol):
    """A kind of reward. Its `name` is unique within a run: the metric is `reward_<name>`.

    One that runs a model on the mesh, which takes every host, says so with a class attribute `on_mesh = True`. One that
    can tell beforehand what it could never judge has `check(record)`, of a prompt's record: it raises ValueError where
    that is at fault, ConfigError where the reward's own config is.
    """

    name: str
    weight: float

    def open(self, surroundings: Any) -> Scores:
        """`surroundings` are the session of the run: its tokenizer, layout, workdir."""
        ...


class RewardError(RunError):
    """A reward did not give a number."""


@dataclasses.dataclass(kw_only=True, slots=True)
class OneByOne(abc.ABC):
    """A reward that looks at one sample, and at nothing of the run. Each has its own time."""

    name: str
    weight: float = 1.0

    def open(self, surroundings: Any) -> Scores:
        del surroundings
        return lambda samples: [self.judge(sample) for sample in samples]

    @abc.abstractmethod
    def judge(self, sample: Sample) -> float: ...


@dataclasses.dataclass(kw_only=True, slots=True)
class Function(OneByOne):
    """Any function of a sample, imported by name: `call(sample) -> float`."""

    call: Callable[[Sample], float]
    name: str = 'function'

    def judge(self, sample: Sample) -> float:
        return self.call(sample)


@dataclasses.dataclass(frozen=True, slots=True)
class Judged:
    """Of B samples: the weighted sum, and each reward alone; NaN in `total` where one failed."""

    total: np.ndarray  # float64[B]
    each: dict[str, np.ndarray]

    @property
    def failed(self) -> np.ndarray:
        return np.isnan(self.total)


def check(rewards: Sequence[Reward], documents: Sequence[Documents], on_error: OnError = 'stop') -> None:
    """Raises ConfigError where a reward could not judge the answers to the first prompt of a source."""
    for docs in documents:
        first = docs[0]
        for reward in rewards:
            look = getattr(reward, 'check', None)
            try:
                if look and first is not None:
                    look(first.record or {})
            except ConfigError as error:
                raise ConfigError(f'reward {reward.name!r}: {error}') from None
            except ValueError as error:
                if on_error == 'stop':
                    raise ConfigError(f'{docs.name(0)}: reward {reward.name!r}: {error}; mend the records') from None


class Panel:
    """The rewards of a run, open.

    With several hosts, `first` gives every one what the first said (`checkpoint.agree.first`), and each of them calls
    the panel: models on the mesh are asked by all, everything else is asked once. `skips` is what would pass over the
    samples that fail, for those who read of one.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        surroundings: Any,
        *,
        on_error: OnError,
        timeout: float,
        first: Callable[[str], str] | None = None,
        skips: str = '',
    ):
        names = [reward.name for reward in rewards]
        if not names:
            raise ConfigError('rewards is empty; a policy needs at least one')
        if len(set(names)) < len(names):
            raise ConfigError(f'rewards have the names {", ".join(names)}; give each a name of its own')
        self._rewards = [(reward, reward.open(surroundings)) for reward in rewards]
        self._on_error, self._timeout, self._first = on_error, timeout, first
        self._or_skip = f', or set {skips}' if skips and on_error == 'stop' else ''
        self._causes: set[tuple[str, ...]] = set()  # those that were told

    def __call__(self, samples: Sequence[Sample]) -> Judged:
        each = {reward.name: self._told(reward, judge, samples) for reward, judge in self._rewards}
        total = sum(reward.weight * each[reward.name] for reward, _ in self._rewards)
        return Judged(np.asarray(total, np.float64), each)

    def _told(self, reward: Reward, judge: Scores, samples: Sequence[Sample]) -> np.ndarray:
        if self._first is None or getattr(reward, 'on_mesh', False):
            return self._ask(reward, judge, samples)
        said: dict[str, Any] = {}
        if jax.process_index() == 0:
            try:
                said = {'values': self._ask(reward, judge, samples).tolist()}
            except RewardError as error:
                said = {'error': str(error)}
        said = json.loads(self._first(json.dumps(said)))
        if 'error' in said:
            raise RewardError(said['error'])
        return np.asarray(said['values'], np.float64)

    def _ask(self, reward: Reward, judge: Scores, samples: Sequence[Sample]) -> np.ndarray:
        """All at once, or where that fails one by one, so that those at fault are named, or they alone left out."""
        if len(samples) > 1 and isinstance(reward, OneByOne):
            return self._each(reward, judge, samples)
        try:
            return self._checked(reward.name, judge, samples)
        except RewardError as error:
            if len(samples) > 1:
                values = self._each(reward, judge, samples)
                if self._on_error == 'skip':
                    return values
            if self._on_error == 'stop':
                raise
            cause = (reward.name, *_cause(error))
            if cause not in self._causes:
                self._causes.add(cause)
                logger.warning('left out (of each cause the first is named, and all are counted): %s', error)
            return np.array([math.nan])

    def _each(self, reward: Reward, judge: Scores, samples: Sequence[Sample]) -> np.ndarray:
        return np.concatenate([self._ask(reward, judge, [sample]) for sample in samples])

    def _checked(self, name: str, judge: Scores, samples: Sequence[Sample]) -> np.ndarray:
        where = _where(name, samples[0]) + (f' and {len(samples) - 1} more' if len(samples) > 1 else '')
        try:
            told = _within(lambda: judge(samples), self._timeout * len(samples))
            values = np.asarray(told, np.float64)
        except _TooLong:
            mend = f'mend it, raise its timeout{self._or_skip}'
            raise RewardError(f'{where}: no answer within {self._timeout:g} s a sample; {mend}') from None
        except ConfigError:
            raise
        except Exception as error:  # It is the user's function: whatever it raises is named, with its sample.
            said = ' '.join(f'{type(error).__name__}: {error}'.split()) + _at(error)
            raise RewardError(f'{where}: {said}; mend it{self._or_skip}') from error
        if told is None:
            raise RewardError(f'{where}: {_NONE}')
        if values.shape != (len(samples),):
            raise RewardError(f'{where}: {list(values.shape)} numbers for {len(samples)} samples; give one a sample')
        if not np.isfinite(values).all():
            at = int(np.flatnonzero(~np.isfinite(values))[0])
            if list(told)[at] is None:
                raise RewardError(f'{_where(name, samples[at])}: {_NONE}')
            raise RewardError(f'{_where(name, samples[at])}: {values[at]}; give a finite number{self._or_skip}')
        return values


def _where(name: str, sample: Sample) -> str:
    place = sample.where()
    return f'{place}: ' * bool(place) + f'reward {name!r}, response {sample.response[:60]!r} to {sample.prompt[:60]!r}'


def _at(error: Exception) -> str:
    """The last line of the user's own code that it passed; '' where there is none."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    theirs = [f' at {Path(file).name}:{line}' for file, line in frames if not file.startswith(_LIBRARIES)]
    return theirs[-1] if theirs else ''


def _cause(error: RewardError) -> tuple[str, ...]:
    """What was raised and on which line; its words may differ with every sample."""
    raised = error.__cause__ or error
    *_, (frame, line) = traceback.walk_tb(raised.__traceback__)
    return type(raised).__name__, frame.f_code.co_filename, str(line)


class _TooLong(Exception):
    pass


def _within(function: Callable[[], Any], seconds: float) -> Any:
    """What the function returns or raises, in a thread that is left behind where it hangs: Python cannot end one, and
    only for daemons does it not wait as it exits itself.
    """
    ended: list[Callable[[], Any]] = []

    def work() -> None:
        try:
            value = function()
            ended.append(lambda: value)
        except BaseException as error:
            failure = error
            ended.append(lambda: _raise(failure))

    thread = threading.Thread(target=work, daemon=True, name='reward')
    thread.start()
    thread.join(seconds)
    if not ended:
        raise _TooLong
    return ended[0]()


def _raise(error: BaseException) -> None:
    raise error

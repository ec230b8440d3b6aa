"""Rewards for how long a response is, in tokens; 0 at best."""

import dataclasses

from tpu_llm.config import ConfigError
from tpu_llm.rl.rewards import OneByOne, Sample


@dataclasses.dataclass(kw_only=True, slots=True)
class SoftOverlong(OneByOne):
    """DAPO's soft overlong punishment (Yu et al., 2025, arXiv 2503.14476, eq. 13): 0 up to `most - cache` tokens, from
    there linearly to -1 at `most`.
    """

    most: int  # theirs is rollout.max_new_tokens
    cache: int
    name: str = 'overlong'

    def validate(self) -> None:
        if not 0 < self.cache <= self.most:
            raise ConfigError(f'cache = {self.cache} is the last part of most = {self.most} tokens; make it 1 to most')

    def judge(self, sample: Sample) -> float:
        return -min(max(sample.tokens - (self.most - self.cache), 0) / self.cache, 1.0)


@dataclasses.dataclass(kw_only=True, slots=True)
class TargetLength(OneByOne):
    """-|tokens - target| / target, not counting the first `slack` tokens of the difference, and at least -1."""

    target: int
    slack: int = 0
    name: str = 'length'

    def validate(self) -> None:
        if self.target < 1 or self.slack < 0:
            raise ConfigError(f'target = {self.target} is at least 1 token, and slack = {self.slack} not negative')

    def judge(self, sample: Sample) -> float:
        return -min(max(abs(sample.tokens - self.target) - self.slack, 0) / self.target, 1.0)

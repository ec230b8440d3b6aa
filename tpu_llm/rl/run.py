"""A run that learns from what its model writes: rollouts, rewards, advantages; the loop is `train.loop`'s."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from etils import epath

from tpu_llm.arrays import Batch, RolloutBatch
from tpu_llm.config import ConfigError, schedule
from tpu_llm.objectives.policy_gradient import PolicyGradient
from tpu_llm.parallel.sharding import Layout
from tpu_llm.rl.rewards import OnError
from tpu_llm.train.run import Run as TrainRun

Advantages = Literal['grpo', 'dr_grpo', 'rloo', 'reinforce++', 'gae']


@dataclasses.dataclass(kw_only=True, slots=True)
class Rollout:
    """How the policy is put to work. A rollout is `prompts` x `group` responses, and serves as many steps as it has
    batches, `epochs` times over.
    """

    prompts: int
    max_new_tokens: int
    group: int = 1  # responses to each prompt
    template: str = ''  # as in `data.conversations`: '' is the tokenizer's own
    system: str = ''  # what prompts without a system message begin with
    epochs: int = 1
    advantages: Advantages = 'grpo'
    kl_penalty: float = 0.0  # of each token's reward, for what is not in the loss: PPO, REINFORCE++
    kl_target: float = 0.0  # above 0, the penalty follows it (Ziegler et al., 2019, arXiv 1909.08593, section 2.2)
    discount: float = 1.0  # of 'gae' and 'reinforce++'
    decay: float = 0.95  # λ of 'gae'
    redraw: int = 0  # how often prompts are replaced whose responses are all worth the same (DAPO's dynamic sampling)
    ahead: bool = False  # write the next rollout with the weights that this one starts from, one step off-policy
    max_gap: float = 0.1  # a warning where sampler and trainer differ by more, in mean |log p| a token
    on_error: OnError = schedule('stop')
    timeout: float = schedule(30.0)  # seconds a sample that a reward may take

    def validate(self) -> None:
        for name in ('prompts', 'max_new_tokens', 'group', 'epochs'):
            if getattr(self, name) < 1:
                raise ConfigError(f'{name} is {getattr(self, name)}; it is at least 1')
        if self.advantages in ('grpo', 'dr_grpo', 'rloo') and self.group < 2:
            raise ConfigError(f'advantages = {self.advantages!r} compares a group; set group to 2 or more')
        if self.kl_target and not self.kl_penalty:
            raise ConfigError(f'kl_target = {self.kl_target} steers kl_penalty, which is 0; set where it starts')
        if self.kl_penalty and self.advantages not in ('gae', 'reinforce++'):
            raise ConfigError(
                f'kl_penalty = {self.kl_penalty} is of single tokens, which advantages = {self.advantages!r} does not '
                "have; set objective.kl, or advantages to 'gae' or 'reinforce++'"
            )
        if min(self.kl_penalty, self.kl_target, self.redraw, self.max_gap) < 0 or self.timeout <= 0:
            raise ConfigError('kl_penalty, kl_target, redraw and max_gap must not be negative, and timeout above 0')
        for name in ('discount', 'decay'):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f'{name} is {getattr(self, name)}; write a share from 0 to 1')


@dataclasses.dataclass(kw_only=True, slots=True)
class Run(TrainRun):
    """`data` gives the prompts; its `seq_len` holds prompt and response, its `global_batch` is of responses."""

    rollout: Rollout
    rewards: tuple[Any, ...]
    objective: Any = dataclasses.field(default_factory=PolicyGradient)

    @property
    def responses(self) -> int:
        """Of a rollout."""
        return self.rollout.prompts * self.rollout.group

    @property
    def prompt_length(self) -> int:
        """The tokens that a prompt may have."""
        return self.data.seq_len - self.rollout.max_new_tokens

    def validate(self) -> None:
        TrainRun.validate(self)
        if not self.steps:
            raise ConfigError('the length of a run of reinforcement learning is given in steps')
        if not self.rewards:
            raise ConfigError('rewards is empty; a policy needs at least one')
        if self.prompt_length < 1:
            raise ConfigError(
                f'rollout.max_new_tokens = {self.rollout.max_new_tokens} leaves data.seq_len = {self.data.seq_len} no '
                'room for a prompt; raise seq_len'
            )
        if self.responses % self.data.global_batch:
            raise ConfigError(
                f'rollout.prompts x group = {self.responses} responses are no multiple of data.global_batch = '
                f'{self.data.global_batch}; make them one'
            )
        if (self.rollout.advantages == 'gae') != (self.objective.value > 0):
            raise ConfigError(
                f'rollout.advantages = {self.rollout.advantages!r} and objective.value = {self.objective.value}: '
                "'gae' takes a critic that learns, and nothing else does"
            )
        self.objective.check_model(self.model)

    @property
    def remembers(self) -> bool:
        """Whether the policy's own log-probs, by the trainer's numerics, are taken before it trains on what it wrote.

        A rollout that serves one step needs none: they are those of that step.
        """
        rollout = self.rollout
        several = rollout.epochs > 1 or self.responses > self.data.global_batch or rollout.ahead
        return several or rollout.kl_penalty > 0 or rollout.advantages == 'gae'

    def needs_frozen(self) -> bool:
        return self.objective.kl > 0 or self.rollout.kl_penalty > 0

    def alarm(self, metrics: Mapping[str, Any]) -> str:
        gap = metrics.get('sampler_gap', 0.0)  # a loss of one's own may not tell it
        if gap <= self.rollout.max_gap:
            return ''
        return (
            f'the sampler and the trainer differ by {gap:.3f} in |log p| a token, more than rollout.max_gap = '
            f'{self.rollout.max_gap}: compute in float32, or set objective.correction=2.0'
        )

    def gives(self) -> type[Batch]:
        return RolloutBatch

    def empty_batch(self) -> Batch:
        whole = (self.data.global_batch, self.data.seq_len)
        response = np.zeros((self.data.global_batch, self.rollout.max_new_tokens), np.float32)
        ids = dict.fromkeys(('tokens', 'targets', 'segments', 'positions'), np.zeros(whole, np.int32))
        critic = response if self.rollout.advantages == 'gae' else None
        return RolloutBatch(
            **ids,
            weights=np.zeros(whole, np.float32),
            advantages=response,
            sampled=response,
            old=response if self.remembers else None,
            reference=response if self.needs_frozen() else None,
            values=critic,
            returns=critic,
        )

    def other_programs(self, graphs: Any, layout: Layout, state: Any, frozen: Any) -> dict[str, tuple[Any, int]]:
        from tpu_llm.rl.sampler import Sampler
        from tpu_llm.rl.scorer import Scorer

        weights = {**frozen.base, **state.params}
        sampler = Sampler(
            graphs.model,
            layout,
            prompt_length=self.prompt_length,
            max_new_tokens=self.rollout.max_new_tokens,
            temperature=self.objective.temperature,
            stops=(0,),  # which ids these are, only the tokenizer knows, and no shape depends on it
            pad=0,
            vocab_size=self.model.vocab_size,
        )
        programs = {'rollout': (sampler.lower(weights, self.responses), self.rollout.max_new_tokens)}
        if (scorer := Scorer(self, graphs, layout)).asked:
            programs['scoring'] = (scorer.lower(weights, frozen, self.data.seq_len), 0)
        return programs

    def open_feed(self, layout: Layout, workdir: epath.Path) -> Any:
        from tpu_llm.rl.feed import RolloutFeed

        return RolloutFeed(self, layout, workdir)

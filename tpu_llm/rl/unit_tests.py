"""A reward for programs: the share of the record's tests that they pass, run in `evals.sandboxed`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tpu_llm.evals import sandboxed
from tpu_llm.evals.sandboxed import Limits
from tpu_llm.rl.rewards import Sample, Scores
from tpu_llm.rl.verify import known


@dataclasses.dataclass(kw_only=True, slots=True)
class UnitTests:
    """The program is the response's last fenced block of Python, or all of it where there is none.

    Tests are what `sandboxed.passed` takes: code, or {'input': …, 'output': …}.
    """

    name: str = 'tests'
    weight: float = 1.0
    field: str = 'tests'
    whole: bool = False  # 1 where all tests pass, else 0
    limits: Limits = dataclasses.field(default_factory=Limits)
    workers: int = 0  # programs at once; 0: as many as processors

    def check(self, record: Mapping[str, Any]) -> None:
        known(record, self.field)

    def open(self, surroundings: Any) -> Scores:
        del surroundings
        sandboxed.run([], self.limits)  # a machine that cannot contain them is told of before the first rollout is

        def judge(samples: Sequence[Sample]) -> list[float]:
            programs = [sandboxed.code_of(sample.response) for sample in samples]
            tests = [known(sample.record, self.field) for sample in samples]
            passed = sandboxed.passed_by_each(programs, tests, self.limits, self.workers)
            return [float(all(each)) if self.whole else sum(each) / len(each) for each in passed]

        return judge

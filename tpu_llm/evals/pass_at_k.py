"""Programs by what they do: pass@k, the chance that one of k programs passes all tests (Chen et al., 2021).

Programs run in `sandboxed`. Of n programs of which c pass, 1 − C(n − c, k) / C(n, k) has no bias, while
1 − (1 − c/n)^k does (arXiv 2107.03374, section 2.1).
"""

import dataclasses
from typing import ClassVar

from tpu_llm.config import ConfigError
from tpu_llm.evals import sandboxed
from tpu_llm.evals.measures import mean
from tpu_llm.evals.sandboxed import Limits
from tpu_llm.evals.subject import Ask, Subject
from tpu_llm.evals.task import Fields, Form, Outcome, Task, fill


def pass_at_k(programs: int, passed: int, k: int) -> float:
    """The chance that of `k` programs, drawn without putting back, one passes. Raises ValueError for k > programs."""
    if not 1 <= k <= programs:
        raise ValueError(f'pass@{k} takes at least {k} programs, and there are {programs}')
    fails = 1.0
    for at in range(k):
        fails *= max(programs - passed - at, 0) / (programs - at)
    return 1.0 - fails


@dataclasses.dataclass(kw_only=True, slots=True)
class Code(Form):
    """Rows have `tests`: a list of what `sandboxed.passed` takes, code or {"input": …, "output": …}.

    The program is `program`, in which `{response}` is the last fenced block of Python of what the model wrote, or all
    of it where there is none.
    """

    kind: ClassVar = 'code'
    writes: ClassVar = True
    needs: ClassVar = ('tests',)
    filled: ClassVar = ('prompt', 'program')
    given: ClassVar = ('response',)

    max_new_tokens: int
    program: str = '{response}'
    stop: tuple[str, ...] = ()
    samples: int = 1  # programs of each row
    temperature: float = 0.0
    k: tuple[int, ...] = (1,)
    seconds: float = 5.0  # that each test may take

    def validate(self) -> None:
        Form.validate(self)
        if self.max_new_tokens < 1 or self.samples < 1:
            raise ConfigError(f'max_new_tokens is {self.max_new_tokens} and samples {self.samples}; both are 1 or more')
        if not self.k or min(self.k) < 1 or max(self.k) > self.samples:
            raise ConfigError(f'k is {self.k}; write numbers from 1 to samples = {self.samples}')
        if self.samples > 1 and not self.temperature:
            raise ConfigError(f'samples is {self.samples} and temperature 0: they would be the same; raise it')
        if self.temperature < 0 or self.seconds <= 0:
            raise ConfigError(f'temperature is {self.temperature} and seconds {self.seconds}; write more')
        if '{response}' not in self.program:
            raise ConfigError(f'program is {self.program!r}, where nothing the model wrote stands; put {{response}} in')

    def names(self) -> tuple[str, ...]:
        return tuple(f'pass@{k}' for k in sorted(self.k))

    def check(self, fields: Fields) -> None:
        Form.check(self, fields)
        tests = fields['tests']
        if not isinstance(tests, list) or not tests:
            raise ValueError(f"field 'tests' is {tests!r}; write a list of at least one")
        for test in tests:
            pair = isinstance(test, dict) and isinstance(test.get('input'), str) and isinstance(test.get('output'), str)
            if not pair and not isinstance(test, str):
                raise ValueError(f'field \'tests\' has {test!r}; write code, or {{"input": …, "output": …}}')

    def answered(self, fields: Fields) -> str:
        return fill(self.continuation, fields)

    def outcome(self, subject: Subject, task: Task, shots: int) -> Outcome:
        limits = Limits(seconds=self.seconds)
        sandboxed.run([], limits)  # a machine that cannot contain programs is told of before the model writes any
        prompts = task.prompts(shots)
        ask = Ask(max_new_tokens=self.max_new_tokens, stop=self.stop, temperature=self.temperature, times=self.samples)
        written = subject.write(prompts, ask)
        programs = [
            fill(self.program, {**row.fields, 'response': sandboxed.code_of(text)})
            for row, texts in zip(task.rows, written, strict=True)
            for text in texts
        ]
        tests = [row.fields['tests'] for row in task.rows for _ in range(self.samples)]
        flat = [all(each) for each in sandboxed.passed_by_each(programs, tests, limits)]
        passed = [flat[at : at + self.samples] for at in range(0, len(flat), self.samples)]
        metrics = {
            f'pass@{k}': mean([pass_at_k(self.samples, sum(each), k) for each in passed]) for k in sorted(self.k)
        }
        samples = [
            {'asked': prompt, 'said': texts, 'passed': each}
            for prompt, texts, each in zip(prompts, written, passed, strict=True)
        ]
        return Outcome(metrics, samples)

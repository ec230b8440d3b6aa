"""Tree of thoughts (Yao et al., 2023, arXiv 2305.10601), breadth first: steps are proposed, the best are kept."""

import dataclasses
import re
from collections.abc import Sequence
from typing import ClassVar

from tpu_llm.config import ConfigError
from tpu_llm.evals.prompting import Answer, Example, Prompted, Steps, read
from tpu_llm.evals.task import fill

Path = tuple[str, ...]  # the steps so far

# What a judgement is worth, as in the paper; one that is none of them is worth nothing, and counted.
WORTH = {'sure': 20.0, 'likely': 1.0, 'impossible': 0.001}
_JUDGED = re.compile(rf'\W*({"|".join(WORTH)})\W*', re.IGNORECASE)


@dataclasses.dataclass(kw_only=True, slots=True)
class TreeOfThoughts(Prompted):
    """`depth` times: `width` next steps of each path are drawn, each is judged `votes` times, and the `keep` paths of
    the highest sum go on. The best path of the last round is asked for the answer.

    A step is one line. Paths with an equal sum stay in the order in which they were proposed.
    """

    examples: ClassVar = 'none'

    depth: int = 3
    width: int = 5
    keep: int = 2
    votes: int = 3
    temperature: float = 0.7  # of steps and judgements; the answer is the likeliest
    propose: str = '{question}\nSteps so far:\n{path}\nThe next step, in one line:\n'
    judge: str = (
        '{question}\nSteps so far:\n{path}\nWill these steps lead to the right answer? Say one word: sure, likely or '
        'impossible.\n'
    )
    conclude: str = '{question}\nSteps:\n{path}\nTherefore, the answer is'

    def validate(self) -> None:
        Prompted.validate(self)
        for name in ('depth', 'width', 'keep', 'votes'):
            if getattr(self, name) < 1:
                raise ConfigError(f'{name} is {getattr(self, name)}; it is at least 1')
        for name in ('propose', 'judge', 'conclude'):
            self.places(name, 'question', 'path')
        if self.width > 1 and not self.temperature:
            raise ConfigError(f'width = {self.width} and temperature = 0: all steps would be the same; raise it')

    def steps(self, question: str, examples: Sequence[Example]) -> Steps:
        paths: list[Path] = [()]
        levels, astray = [], 0
        for _ in range(self.depth):
            prompts = [_filled(self.propose, question, path) for path in paths]
            proposed = yield self.request(*prompts, stop=('\n',), times=self.width)
            longer = [
                (*path, thought.strip())
                for path, thoughts in zip(paths, proposed, strict=True)
                for thought in thoughts
                if thought.strip()
            ]
            if not longer:
                break  # the model has nothing to add
            longer = list(dict.fromkeys(longer))
            prompts = [_filled(self.judge, question, path) for path in longer]
            judged = yield self.request(*prompts, stop=('\n',), times=self.votes)
            words = [[_JUDGED.fullmatch(said) for said in each] for each in judged]
            astray += sum(word is None for each in words for word in each)
            worth = [sum(WORTH[word[1].lower()] for word in each if word) for each in words]
            order = sorted(range(len(longer)), key=lambda at: -worth[at])
            paths = [longer[at] for at in order[: self.keep]]
            levels.append([{'path': list(longer[at]), 'worth': worth[at]} for at in order])
        last = _filled(self.conclude, question, paths[0])
        ((said,),) = yield self.request(last, stop=('\n',), temperature=0.0)
        details = {'path': list(paths[0]), 'levels': levels, 'judgements not in form': astray}
        return Answer(text=read(said, self.reads, whole=True), said=said, details=details)


def _filled(template: str, question: str, path: Path) -> str:
    shown = '\n'.join(f'{number}. {step}' for number, step in enumerate(path, 1)) or '(none yet)'
    return fill(template, {'question': question, 'path': shown})

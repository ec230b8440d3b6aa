"""A needle in a haystack: what a model finds of a long text, by the text's length and by where in it it stands.

A sentence with a secret number is put into filler, which is made here and says nothing of it, and the number is asked
for at the end. In one trial the filler is the same at all depths, and that of a longer text begins as a shorter one's.
"""

import dataclasses
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

from etils import epath
from rich.console import Console

from tpu_llm.config import ConfigError, RunError, digest, machine, schedule, validate
from tpu_llm.data.tokenizer import Tokenizer
from tpu_llm.evals.candidate import Candidate, Saved, Settings, Untrained
from tpu_llm.evals.intervals import share
from tpu_llm.evals.subject import Ask, Subject
from tpu_llm.train.metrics import replace_text

FILE = 'needle.json'
_OTHERS = 9  # numbers that the right one must be likelier than: a tenth is chance
_ROOM = 64  # tokens beside the text: marks of a chat template, the number itself

_NEEDLE = 'The secret number of {place} is {value}.'
_QUESTION = '\n\nQuestion: What is the secret number of {place}?'
_ANSWER = '\nAnswer: The secret number of {place} is'
_PLACES = ('Aldmoor', 'Brenwick', 'Calder Bay', 'Dunholt', 'Eastvale', 'Farrow Hill', 'Greyford', 'Hollin', 'Inverpool')
_WHO = (
    'baker',
    'teacher',
    'sailor',
    'gardener',
    'painter',
    'farmer',
    'clerk',
    'miller',
    'doctor',
    'carpenter',
    'guide',
)
_HOW = ('old', 'young', 'quiet', 'cheerful', 'careful', 'tired', 'patient', 'curious', 'friendly', 'busy')
_DID = ('walked to', 'looked at', 'talked about', 'wrote about', 'came back from', 'dreamt of', 'drew', 'thought of')
_WHAT = (
    'bridge',
    'harbour',
    'garden',
    'market',
    'church',
    'forest',
    'mill',
    'river',
    'school',
    'orchard',
    'tower',
    'road',
)
_WHEN = (
    'in the morning',
    'after lunch',
    'on a rainy day',
    'before sunset',
    'in early spring',
    'once a week',
    'at night',
)


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """One text with its question. `value` is what is to be found."""

    length: int
    depth: float  # 0: the needle is the first sentence, 1: the last
    number: int
    place: str
    value: str
    text: str  # with the needle, without the question
    tokens: int  # of text, question and the beginning of an answer


@dataclasses.dataclass(kw_only=True, slots=True)
class Needle:
    """Writes needle.json in the workdir, length by length; what is there is done."""

    saves: ClassVar[bool] = False

    model: Saved | Untrained
    lengths: tuple[int, ...] = schedule()  # tokens, question included; more may be added to a grid
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    trials: int = 3  # texts in each cell of the grid
    score: Literal['contains', 'likelihood'] = 'contains'  # the answer has the number, or it is likelier than 9 others
    chat: bool = False  # the text and the question are what a user says, in the model's own template
    max_new_tokens: int = 24  # of an answer
    seed: int = 0
    tokens: int = machine(4096)  # that are read at once: so many rows, at least one

    def validate(self) -> None:
        if not self.lengths or not self.depths:
            raise ConfigError('lengths or depths is empty; give at least one of each')
        for name, least in (('trials', 1), ('max_new_tokens', 1), ('tokens', 1)):
            if getattr(self, name) < least:
                raise ConfigError(f'{name} is {getattr(self, name)}; it is at least {least}')
        if self.trials > len(_PLACES):
            raise ConfigError(f'trials is {self.trials}; there are needles for at most {len(_PLACES)}')
        for name in ('lengths', 'depths'):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ConfigError(f'{name} is {getattr(self, name)}; give each once')
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise ConfigError(f'depths is {self.depths}; each is from 0, the beginning, to 1, the end')
        if self.score == 'likelihood' and self.chat:
            raise ConfigError("score = 'likelihood' weighs plain texts; leave chat out, or take score = 'contains'")

    def main(self, workdir: str) -> None:
        validate(self)
        file = epath.Path(workdir) / FILE
        candidate = self.model.open()
        file.parent.mkdir(parents=True, exist_ok=True)
        about = {'model': candidate.name, 'grid': digest(self)}
        cells = _done(file, about)
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        for length in self.lengths:
            if any(cell['length'] == length for cell in cells):
                continue
            begun = time.monotonic()
            cells += self.cells(candidate, length)
            replace_text(file, json.dumps({**about, 'score': self.score, 'cells': cells}, indent=1))
            console.print(
                f'{length:,} tokens: {len(self.depths) * self.trials} texts in {time.monotonic() - begun:.0f} s'
            )
        print('\n'.join([*drawn(candidate.name, cells), str(file)]))

    def cells(self, candidate: Candidate, length: int) -> list[dict[str, Any]]:
        """The row of the grid for one length."""
        trials = list(self.made(candidate.tokenizer, length))
        settings = Settings(
            rows=max(1, self.tokens // length), chat=self.chat, seed=self.seed, max_length=length + _ROOM
        )
        subject = candidate.ask(settings)
        found = (self._written if self.score == 'contains' else self._weighed)(subject, trials)
        cells = []
        for depth in self.depths:
            own = [(each, *told) for each, told in zip(trials, found, strict=True) if each.depth == depth]
            hits = sum(hit for _, hit, _ in own)
            samples = [
                {'tokens': each.tokens, 'place': each.place, 'value': each.value, 'hit': hit, 'told': told}
                for each, hit, told in own
            ]
            estimate = share(hits, len(own))
            cells.append(
                {
                    'length': length,
                    'depth': depth,
                    'hits': hits,
                    'trials': len(own),
                    'low': estimate.low,
                    'high': estimate.high,
                    'samples': samples,
                }
            )
        return cells

    def made(self, tokenizer: Tokenizer, length: int) -> Iterator[Trial]:
        """The texts of one length. Raises ConfigError where a needle and its question alone are longer."""

        def count(text: str) -> int:
            return len(tokenizer.encode(text))

        for number in range(self.trials):
            random_ = random.Random(f'{self.seed}/{number}')
            place, value = _PLACES[number], str(random_.randrange(10_000, 100_000))
            needle = _NEEDLE.format(place=place, value=value)
            ending = (_QUESTION + _ANSWER).format(place=place)
            room = length - count(f' {needle}{ending}')
            sentences = _filling(random_, room, count)
            if not sentences:
                raise ConfigError(
                    f'lengths has {length}: a sentence, the needle and its question need {length - room} tokens and '
                    'some; give more'
                )
            for depth in self.depths:
                at = round(depth * len(sentences))
                text = ' '.join([*sentences[:at], needle, *sentences[at:]])
                yield Trial(length, depth, number, place, value, text, count(text + ending))

    def _written(self, subject: Subject, trials: Sequence[Trial]) -> list[tuple[bool, Any]]:
        endings = _QUESTION if self.chat else _QUESTION + _ANSWER
        prompts = [each.text + endings.format(place=each.place) for each in trials]
        said = [text for (text,) in subject.write(prompts, Ask(max_new_tokens=self.max_new_tokens))]
        return [(contains(text, each.value), text) for each, text in zip(trials, said, strict=True)]

    def _weighed(self, subject: Subject, trials: Sequence[Trial]) -> list[tuple[bool, Any]]:
        """Whether the value is the likeliest; and by how many nats it is likelier than the best of the others."""
        requests = []
        for each in trials:
            random_ = random.Random(f'{self.seed}/{each.number}/others')
            others: list[str] = []
            while len(others) < _OTHERS:
                other = str(random_.randrange(10_000, 100_000))
                others += [other] if other not in (each.value, *others) else []
            context = each.text + (_QUESTION + _ANSWER).format(place=each.place)
            requests += [(context, f' {value}') for value in (each.value, *others)]
        log_probs = [each.log_prob for each in subject.likelihoods(requests)]
        step = 1 + _OTHERS
        rows = [log_probs[at : at + step] for at in range(0, len(log_probs), step)]
        return [(right > max(others), right - max(others)) for right, *others in rows]


def contains(text: str, value: str) -> bool:
    """Whether the number stands there, with or without commas, and not as a part of another."""
    return re.search(rf'(?<![\d.]){value}(?!\d|\.\d)', re.sub(r'(?<=\d),(?=\d{3})', '', text)) is not None


def _filling(random_: random.Random, room: int, count: Callable[[str], int]) -> list[str]:
    """Sentences of so many tokens together, or a few less."""
    sentences: list[str] = []
    used = 0
    while True:
        sentence = _sentence(random_)
        used += count(f' {sentence}')
        if used > room:
            return sentences
        sentences.append(sentence)


def _sentence(random_: random.Random) -> str:
    how, who, did, what, other, whom, when = map(random_.choice, (_HOW, _WHO, _DID, _WHAT, _HOW, _WHO, _WHEN))
    return f'The {how} {who} {did} the {what} of the {other} {whom} {when}.'


# --------------------------------------------------------------------------------------------------- file and picture


def _done(file: epath.Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells that are there. Raises RunError where they are of another grid."""
    if not file.exists():
        return []
    found = json.loads(file.read_text())
    for name, value in about.items():
        if found[name] != value:
            raise RunError(f'{file} is of another {name} ({found[name]}, and this is {value}); give another workdir')
    return found['cells']


_SHADES = ' ░▒▓█'


def drawn(title: str, cells: Sequence[dict[str, Any]]) -> list[str]:
    """A line a length, a column a depth; the last columns are of the whole line, with its interval."""
    depths = sorted({cell['depth'] for cell in cells})
    lengths = sorted({cell['length'] for cell in cells})
    by_place = {(cell['length'], cell['depth']): cell for cell in cells}
    lines = [title, f'{"tokens":>9}   ' + '  '.join(f'{depth:>6.0%}' for depth in depths) + '      all  95 % interval']
    for length in lengths:
        row = [by_place[length, depth] for depth in depths]
        hits, trials = (sum(cell[name] for cell in row) for name in ('hits', 'trials'))
        line = share(hits, trials)
        shown = '  '.join(_cell(cell['hits'] / cell['trials']) for cell in row)
        lines.append(f'{length:>9,}   {shown}   {line.value:>6.2f}  {line.low:.2f} – {line.high:.2f}')
    return lines


def _cell(value: float) -> str:
    return f'{_SHADES[round(value * (len(_SHADES) - 1))]} {value:.2f}'

"""Makes the tasks of the package that no hand wrote: `python -m tpu_llm.evals.made_tasks` writes them anew."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).with_name('tasks')
_EXAMPLES = 5

Record = dict[str, Any]

_ARITHMETIC = """kind: choice
about: Sums, differences and products of numbers below 100, made by made_tasks.py; four choices each, all near.
prompt: '{question} ='
continuation: ' {choice}'
separator: "\\n"
shots: 5
"""

_SUMS = """kind: generative
about: Sums of two numbers below 100, made by made_tasks.py, asked as the source `Sums` of tpu_llm/data asks them.
prompt: "{question} = ?\\n"
continuation: '{question} = {answer}.'
separator: "\\n"
metrics: [numeric]
max_new_tokens: 16
stop: ["\\n"]
"""

_PAST = """kind: generative
about: Sentences put into the past, made by made_tasks.py of the words in it.
prompt: "Now: {now}\\nThen:"
continuation: ' {answer}'
metrics: [exact, f1, bleu, chrf, rouge1, rouge2, rougeL]
max_new_tokens: 32
ignore: [case, space, punctuation]
shots: 5
"""

_PROBLEMS = """kind: reasoned
about: Word problems of two steps, made by made_tasks.py, answered behind a chain of thought.
prompt: '{question}'
strategy: chain-of-thought
reads: number
max_new_tokens: 64
shots: 5
"""

_NAMES = ('Ann', 'Ben', 'Clara', 'Omar', 'Lena', 'Ravi', 'Sofia', 'Tom')
_THINGS = ('apples', 'marbles', 'stamps', 'books', 'shells', 'coins', 'cards', 'pencils')

_WHO = ('she', 'he', 'the teacher', 'my sister', 'the old man', 'our neighbour', 'the doctor', 'a child')
_DOES = (
    ('walks', 'walked', 'to the station', 'along the river'),
    ('writes', 'wrote', 'a long letter', 'the list of names'),
    ('buys', 'bought', 'bread and milk', 'a new bicycle'),
    ('sings', 'sang', 'an old song', 'in the kitchen'),
    ('opens', 'opened', 'the window', 'a small shop'),
    ('brings', 'brought', 'three chairs', 'the map'),
    ('drinks', 'drank', 'a cup of tea', 'cold water'),
    ('paints', 'painted', 'the garden fence', 'a picture of a boat'),
    ('takes', 'took', 'the early train', 'the wrong road'),
    ('finds', 'found', 'a lost key', 'two coins'),
    ('teaches', 'taught', 'children to swim', 'history'),
    ('sells', 'sold', 'apples', 'the house'),
)
_WHEN = ('every day', 'on Monday', 'in the morning', 'after lunch')


def make() -> dict[str, str]:
    """The text of each file, by its name."""
    return {
        'arithmetic.task': _file(_ARITHMETIC, _arithmetic(100)),
        'sums.task': _file(_SUMS, _sums(100)),
        'past_tense.task': _file(_PAST, _past(60)),
        'word_problems.task': _file(_PROBLEMS, _problems(60)),
    }


def _file(head: str, rows: Iterator[Record]) -> str:
    marked = ({'example': True, **row} if number < _EXAMPLES else row for number, row in enumerate(rows))
    return head + '---\n' + ''.join(json.dumps(row) + '\n' for row in marked)


def _arithmetic(count: int) -> Iterator[Record]:
    draw, seen = random.Random('arithmetic'), set()
    while len(seen) < count + _EXAMPLES:
        sign, a, b = draw.choice('+-*'), draw.randrange(2, 100), draw.randrange(2, 100)
        if sign == '-' and a < b:
            a, b = b, a
        if sign == '*':
            a, b = a % 11 + 2, b % 11 + 2
        if (sign, a, b) in seen:
            continue
        seen.add((sign, a, b))
        right = {'+': a + b, '-': a - b, '*': a * b}[sign]
        near = [right + off for off in (-10, -2, -1, 1, 2, 10) if right + off >= 0]
        yield {'question': f'{a} {sign} {b}', **_mixed(draw, str(right), map(str, draw.sample(near, 3)))}


def _mixed(draw: random.Random, right: str, wrong: Iterator[str] | Sequence[str]) -> Record:
    choices = [right, *wrong]
    draw.shuffle(choices)
    return {'choices': choices, 'answer': choices.index(right)}


def _sums(count: int) -> Iterator[Record]:
    draw = random.Random('sums')
    for number in draw.sample(range(100 * 100), count + _EXAMPLES):
        a, b = divmod(number, 100)
        yield {'question': f'{a} + {b}', 'answer': a + b}


def _past(count: int) -> Iterator[Record]:
    draw = random.Random('past tense')
    every = [(who, *does[:2], what, when) for who in _WHO for does in _DOES for what in does[2:] for when in _WHEN]
    for who, now, then, what, when in draw.sample(every, count + _EXAMPLES):
        yield {
            'now': f'{who} {now} {what} {when}.'.capitalize().replace('monday', 'Monday'),
            'answer': f'{who} {then} {what} {when}.'.capitalize().replace('monday', 'Monday'),
        }


def _problems(count: int) -> Iterator[Record]:
    draw, seen = random.Random('word problems'), set()
    while len(seen) < count + _EXAMPLES:
        who, things, first = draw.choice(_NAMES), draw.choice(_THINGS), draw.randrange(3, 30)
        more, times, away = draw.randrange(2, 20), draw.randrange(2, 5), draw.randrange(1, 3)
        if draw.random() < 0.5:
            did, reasoning, now = f'finds {more} more', f'{first} + {more} = {first + more}.', first + more
        else:
            did, reasoning, now = (
                f'soon has {times} times as many',
                f'{first} * {times} = {first * times}.',
                first * times,
            )
        question = f'{who} has {first} {things}, {did} and gives {away} away. How many {things} does {who} have now?'
        if question not in seen:
            seen.add(question)
            yield {
                'question': question,
                'reasoning': f'{reasoning} {now} - {away} = {now - away}.',
                'answer': now - away,
            }


if __name__ == '__main__':
    for name, text in make().items():
        (_FOLDER / name).write_text(text)

"""The answer that a response comes to: what it marks as its answer, and the last quantity that it names.

Numbers are exact fractions, so 0.1 is 1/10 and 1/3 is no decimal; units are factors over seven base units.
"""

import dataclasses
import re
from collections.abc import Iterator
from fractions import Fraction

from tpu_llm.evals import units
from tpu_llm.evals.units import Dimension

_MOST_DIGITS = 300  # of a number, its exponent's zeros included; what is longer is no answer


@dataclasses.dataclass(frozen=True, slots=True)
class Quantity:
    written: Fraction  # the number, as it stands there
    unit: str = ''  # as it stands there; '' where there is none that is known

    @property
    def value(self) -> Fraction:
        """In base units; of temperatures in kelvin."""
        unit = units.read(self.unit)
        return self.written * unit.factor + unit.offset

    @property
    def dimension(self) -> Dimension:
        return units.read(self.unit).dimension


def marked(text: str) -> str | None:
    """What stands in the last `\\boxed{…}`, or else behind the last `####` of its line; None without either."""
    start = max(text.rfind('\\boxed{'), text.rfind('\\fbox{'))
    if start >= 0:
        return _braced(text, text.index('{', start))
    found = re.findall(r'####[ \t]*(\S[^\n]*)', text)
    return found[-1].strip() if found else None


def _braced(text: str, start: int) -> str | None:
    depth = 0
    for at in range(start, len(text)):
        depth += {'{': 1, '}': -1}.get(text[at], 0)
        if depth == 0:
            return text[start + 1 : at].strip()
    return None  # cut before it was closed


def last_quantity(text: str) -> Quantity | None:
    """The last number of a text and its unit; None where there is none.

    Read are 1,234.5 and 1 234.5, 3/4 and 1 3/4, 5e-3 and 5 × 10^-3, and what LaTeX makes of them; in front of a number
    $, € and £. Behind it stands a unit of `units`: a product or a quotient such as km/h, m/s^2 or N·m.
    """
    return next(iter(reversed(list(_quantities(_plain(text))))), None)


def equal(a: Quantity, b: Quantity, *, relative: float = 0.0, absolute: float = 0.0, bare: bool = True) -> bool:
    """Whether `a` is within max(absolute, relative * |b|) of `b`, once both are in the same unit.

    `absolute` is in b's unit. With `bare` a number without a unit is taken to be in the other's.
    """

    def near(x: Fraction, y: Fraction, scale: Fraction) -> bool:
        return abs(x - y) <= max(Fraction(absolute) * scale, Fraction(relative) * abs(y))

    if bare and (not a.unit or not b.unit) and near(a.written, b.written, Fraction(1)):
        return True
    return a.dimension == b.dimension and near(a.value, b.value, abs(units.read(b.unit).factor))


# ---------------------------------------------------------------------------------------------------------- numbers

_DECIMAL = r'(?:\d{1,3}(?:[, \u00a0\u202f]\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+'
_NUMBER = re.compile(
    rf'(?P<sign>[-+](?=\s?[$€£\d.]))?\s?(?P<money>[$€£])?\s?(?:(?P<whole>\d+)\s+(?=\d+/\d))?(?P<number>{_DECIMAL})'
    r'(?:\s*/\s*(?P<below>\d+(?:\.\d+)?)(?![\d/])|[eE](?P<exponent>[-+]?\d{1,4})(?![\w.])'
    r'|\s*\*\s*10\s*(?:\^|\*\*)\s*(?P<power>[-+]?\d{1,4}))?'
)
_LATEX = [
    (r'\$\$', ' '),
    (r'(?<!\\)\$([^$\n]*[^\s$\\])\$(?!\s?\d)', r' \1 '),  # $…$, unless the second is of an amount
    (r'\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}', r' \1/\2 '),
    (r'\\[dt]?frac\s*(\d)\s*(\d)', r' \1/\2 '),
    (r'\\(?:text|mathrm|textbf|mbox|mathbf)\s*\{([^{}]*)\}', r' \1'),
    (r'\^\s*\{([^{}]*)\}', r'^\1'),
    (r'\^?\\(?:circ|degree)(?![a-zA-Z])\s*', '°'),
    (r'\\times(?![a-zA-Z])|×', '*'),
    (r'\\cdot(?![a-zA-Z])|⋅', '·'),
    (r'\{,\}', ','),
    (r'\\[!,;: ]', ''),
    (r'\\([%$])', r'\1'),
    ('[\u2212\u2013]', '-'),
    ('½', ' 1/2'),
    ('¼', ' 1/4'),
    ('¾', ' 3/4'),
]


def _plain(text: str) -> str:
    for pattern, replacement in _LATEX:
        text = re.sub(pattern, replacement, text)
    return text


def _quantities(text: str) -> Iterator[Quantity]:
    at = 0
    while match := _NUMBER.search(text, at):
        at = match.end()
        number = _number(match, text)
        if number is None:
            continue
        unit, at = (units.MONEY[match['money']], at) if match['money'] else units.find(text, at)
        yield Quantity(number, unit)


def _number(match: re.Match[str], text: str) -> Fraction | None:
    digits = re.sub('[, \u00a0\u202f]', '', match['number'])
    exponent = int(match['exponent'] or match['power'] or 0)
    if len(digits) + len(match['below'] or '') + len(match['whole'] or '') + abs(exponent) > _MOST_DIGITS:
        return None
    number = Fraction(digits) * Fraction(10) ** exponent
    if match['below']:
        if not Fraction(match['below']):
            return None
        number = number / Fraction(match['below']) + Fraction(match['whole'] or 0)
    # A hyphen joins words and numbers; a sign stands behind neither.
    signed = match['sign'] == '-' and not (match.start() and re.match(r'[\w)\]]', text[match.start() - 1]))
    return -number if signed else number

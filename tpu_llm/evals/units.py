"""Units of measurement: factors over base units, so that quantities can be compared whatever they are written in."""

import dataclasses
import functools
import math
import re
from fractions import Fraction

from tpu_llm.config import ConfigError

Dimension = tuple[tuple[str, int], ...]  # base units and their powers, sorted


@dataclasses.dataclass(frozen=True, slots=True)
class Unit:
    """A quantity of it is `number * factor + offset` in base units."""

    factor: Fraction
    dimension: Dimension = ()
    offset: Fraction = Fraction(0)


_PREFIXES = {
    'T': 12,
    'G': 9,
    'M': 6,
    'k': 3,
    'h': 2,
    'd': -1,
    'c': -2,
    'm': -3,
    'u': -6,
    'µ': -6,
    'μ': -6,
    'n': -9,
    'p': -12,
    'tera': 12,
    'giga': 9,
    'mega': 6,
    'kilo': 3,
    'hecto': 2,
    'deci': -1,
    'centi': -2,
    'milli': -3,
    'micro': -6,
    'nano': -9,
    'pico': -12,
}
MONEY = {'$': 'dollar', '€': 'euro', '£': 'pound_sterling'}

# symbol or word = factor and base units. Names before the bar take prefixes.
_TABLE = """
m metre meter | = 1 m
g gram | = 0.001 kg
s second sec | = 1 s
A ampere amp | = 1 A
K kelvin | = 1 K
mol mole | = 1 mol
cd candela | = 1 cd
Hz hertz | = 1 s-1
N newton | = 1 kg m s-2
Pa pascal | = 1 kg m-1 s-2
J joule | = 1 kg m2 s-2
W watt | = 1 kg m2 s-3
C coulomb | = 1 A s
V volt | = 1 kg m2 s-3 A-1
Ω ohm | = 1 kg m2 s-3 A-2
F farad | = 1 kg-1 m-2 s4 A2
T tesla | = 1 kg s-2 A-1
L l litre liter | = 0.001 m3
Wh | = 3600 kg m2 s-2
eV electronvolt | = 1.602176634e-19 kg m2 s-2
cal calorie | = 4.184 kg m2 s-2
bar | = 100000 kg m-1 s-2
bit | = 1 bit
B byte | = 8 bit
| min minute = 60 s
| h hr hour = 3600 s
| day = 86400 s
| week = 604800 s
| inch inches = 0.0254 m
| ft foot feet = 0.3048 m
| yd yard = 0.9144 m
| mi mile = 1609.344 m
| mph = 0.44704 m s-1
| oz ounce = 0.028349523125 kg
| lb lbs pound = 0.45359237 kg
| t tonne = 1000 kg
| ha hectare = 10000 m2
| acre = 4046.8564224 m2
| gallon gal = 0.003785411784 m3
| atm atmosphere = 101325 kg m-1 s-2
| rpm = 1/60 s-1
| % percent = 0.01
| dollar USD = 1 dollar
| cent = 0.01 dollar
| euro EUR = 1 euro
| pound_sterling GBP = 1 pound_sterling
| rad radian = 1 rad
"""


@functools.cache
def _units() -> tuple[dict[str, Unit], frozenset[str]]:
    """The table by name, and which of its names take prefixes."""
    units, prefixed = {}, set()
    for line in _TABLE.strip().splitlines():
        names, _, meaning = line.partition('=')
        with_prefix, _, without = names.partition('|')
        factor, *bases = meaning.split()
        powers = [re.fullmatch(r'(\D+?)(-?\d+)?', base) for base in bases]
        dimension = tuple(sorted((found[1], int(found[2] or 1)) for found in powers if found))
        for name in (*with_prefix.split(), *without.split()):
            units[name] = Unit(Fraction(factor), dimension)
            if len(name) > 3:
                units[f'{name}s'] = units[name]
        prefixed |= set(with_prefix.split()) | {f'{name}s' for name in with_prefix.split()}
    kelvin = (('K', 1),)
    for name in ('°C', 'degrees Celsius', '°Celsius'):
        units[name] = Unit(Fraction(1), kelvin, Fraction('273.15'))
    for name in ('°F', 'degrees Fahrenheit', '°Fahrenheit'):
        units[name] = Unit(Fraction(5, 9), kelvin, Fraction('459.67') * Fraction(5, 9))
    for name in ('°', 'degree', 'degrees'):
        units[name] = Unit(Fraction(math.pi) / 180, (('rad', 1),))
    return units, frozenset(prefixed)


def _single(name: str) -> Unit | None:
    units, prefixed = _units()
    if name in units:
        return units[name]
    for prefix, power in _PREFIXES.items():
        rest = name.removeprefix(prefix)
        # Symbols go with symbols, words with words.
        if rest != name and rest in prefixed and rest in units and (len(prefix) > 2) == (len(rest) > 3):
            unit = units[rest]
            return Unit(unit.factor * Fraction(10) ** power, unit.dimension)
    return None


_POWERS = str.maketrans('⁻⁰¹²³⁴⁵⁶⁷⁸⁹', '-0123456789')
_DEGREES = r'degrees? (?:Celsius|Fahrenheit)|°\s?(?:C(?:elsius)?|F(?:ahrenheit)?)(?![A-Za-z])|°'
_FACTOR = re.compile(rf'\s*({_DEGREES}|%|[A-Za-zµμΩ]+)(\^?[-⁻]?[\d⁰¹²³⁴⁵⁶⁷⁸⁹]{{1,2}}(?!\d|\.\d))?')
_JOINT = re.compile(r'\s*(/|·|\*| per )\s*')
_SPELLED = {'square': 2, 'cubic': 3}


def find(text: str, at: int) -> tuple[str, int]:
    """The unit that begins there, as it is written, and where it ends; ('', at) for words that are none."""
    end, begin = at, at
    while found := _FACTOR.match(text, begin):
        if found[1] in _SPELLED and end == at:
            begin = found.end()
            continue
        if _single(_canonical(found[1])) is None:
            break
        end = found.end()
        joint = _JOINT.match(text, end)
        if not joint:
            break
        begin = joint.end()
    return text[at:end].strip(), end


def _canonical(name: str) -> str:
    return re.sub(r'°\s', '°', name)


@functools.lru_cache(maxsize=1024)
def read(written: str) -> Unit:
    """What a unit that `find` found, or one of a config, means. Raises ConfigError where it is unknown."""
    if not written:
        return Unit(Fraction(1))
    factor, powers, offset = Fraction(1), dict[str, int](), Fraction(0)
    at, sign, spelled, count = 0, 1, 1, 0
    while at < len(written):
        found = _FACTOR.match(written, at)
        if found and found[1] in _SPELLED:
            spelled, at = _SPELLED[found[1]], found.end()
            continue
        unit = _single(_canonical(found[1])) if found else None
        if found is None or unit is None:
            raise ConfigError(f'unit {written!r} is unknown')
        power = sign * spelled * int((found[2] or '1').translate(_POWERS).lstrip('^'))
        factor *= unit.factor**power
        for base, exponent in unit.dimension:
            powers[base] = powers.get(base, 0) + exponent * power
        offset, count, spelled = unit.offset, count + 1, 1
        at = found.end()
        if joint := _JOINT.match(written, at):
            sign, at = -1 if joint[1] in ('/', ' per ') else 1, joint.end()
    dimension = tuple(sorted((base, power) for base, power in powers.items() if power))
    return Unit(factor, dimension, offset if count == 1 else Fraction(0))

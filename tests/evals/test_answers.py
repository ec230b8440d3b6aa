"""Numbers and units as people and models write them."""

from fractions import Fraction

import pytest

from tpu_llm.config import ConfigError
from tpu_llm.evals import answers, patterns, units


@pytest.mark.parametrize(
    ('text', 'number', 'unit'),
    [
        ('It is 1,234.5 km.', '1234.5', 'km'),
        ('1 000 000', '1000000', ''),
        ('first 1, then 2, then 3', '3', ''),
        ('3/4 of it', '3/4', ''),
        ('1 3/4 cups', '7/4', ''),
        ('½', '1/2', ''),
        ('\\frac{3}{4}', '3/4', ''),
        ('$\\dfrac34$', '3/4', ''),
        ('5 \\times 10^{-3} m', '0.005', 'm'),
        ('5 × 10^3', '5000', ''),
        ('2.5e-3', '0.0025', ''),
        ('-3', '-3', ''),
        ('\u22123', '-3', ''),
        ('10-3', '3', ''),
        ('$1,000', '1000', 'dollar'),
        ('-$5', '-5', 'dollar'),
        ('from $5 to $6', '6', 'dollar'),
        ('so $x = 5$.', '5', ''),
        ('12\\%', '12', '%'),
        ('9.8 m/s²', '9.8', 'm/s²'),
        ('the area is 5 m2.', '5', 'm2'),
        ('20^\\circ C', '20', '°C'),
        ('5 \\text{ cm}', '5', 'cm'),
        ('42 apples', '42', ''),
        ('12 in total', '12', ''),
        ('4 square cows', '4', ''),
        ('.5', '0.5', ''),
    ],
)
def test_a_quantity_is_read(text, number, unit):
    found = answers.last_quantity(text)
    assert found == answers.Quantity(Fraction(number), unit)


@pytest.mark.parametrize('text', ['', 'none', '1/0', '1e9999', '9' * 5000, 'π'])
def test_what_is_no_number(text):
    assert answers.last_quantity(text) is None


@pytest.mark.parametrize(
    ('text', 'mark'),
    [
        ('so \\boxed{1}, or \\boxed{\\frac{1}{2}}.', '\\frac{1}{2}'),
        ('7 + 5 = 12\n#### 12\n', '12'),
        ('#### 3\nno, #### 4', '4'),
        ('\\boxed{12', None),
        ('12', None),
        ('####', None),
    ],
)
def test_what_is_marked_as_the_answer(text, mark):
    assert answers.marked(text) == mark


@pytest.mark.parametrize(
    ('one', 'other'),
    [
        ('36 km/h', '10 m/s'),
        ('1.5 hours', '90 minutes'),
        ('2 kWh', '7.2 MJ'),
        ('1 N·m', '1 J'),
        ('5 km per hour', '5000 m/h'),
        ('4 square meters', '4 m^2'),
        ('1 l', '1 dm³'),
        ('1 cubic meter', '1000 liters'),
        ('68 °F', '20 degrees Celsius'),
        ('50%', '0.5'),
        ('50%', '50'),
        ('1 mile', '1609.344 m'),
        ('3 kilometers', '3 km'),
        ('2 MB', '2 megabytes'),
        ('100 cents', '$1'),
        ('0.1', '1/10'),
    ],
)
def test_equal_in_whatever_unit(one, other):
    a, b = answers.last_quantity(one), answers.last_quantity(other)
    assert a is not None
    assert b is not None
    assert answers.equal(a, b)
    assert answers.equal(b, a)


@pytest.mark.parametrize(
    ('one', 'other'), [('5 km', '5 kg'), ('5 km', '5 m'), ('1/3', '0.3333'), ('5000', '5 km'), ('1 mm', '1 Mm')]
)
def test_not_equal(one, other):
    a, b = answers.last_quantity(one), answers.last_quantity(other)
    assert a is not None
    assert b is not None
    assert not answers.equal(a, b)


def test_tolerance_is_of_the_second_and_in_its_unit():
    about, wanted = answers.Quantity(Fraction('1.004'), 'km'), answers.Quantity(Fraction(1000), 'm')
    assert answers.equal(about, wanted, absolute=4.0)
    assert not answers.equal(about, wanted, absolute=3.9)
    assert answers.equal(about, wanted, relative=0.0041)
    assert not answers.equal(about, wanted, relative=0.0039)


def test_without_bare_a_number_alone_has_no_dimension():
    wanted = answers.Quantity(Fraction(5), 'km')
    assert answers.equal(answers.Quantity(Fraction(5)), wanted)
    assert not answers.equal(answers.Quantity(Fraction(5)), wanted, bare=False)


def test_an_unknown_unit_is_named():
    with pytest.raises(ConfigError, match="unit 'cows' is unknown"):
        units.read('cows')


def test_patterns_match_whole_or_anywhere():
    assert patterns.match('a.b', ['a\nb', 'xa.b', ' acb\n']) == [True, False, True]
    assert patterns.match('a.b', ['xacbx', 'b'], anywhere=True) == [True, False]


def test_a_pattern_that_backtracks_is_ended():
    with pytest.raises(ValueError, match='it backtracks'):
        patterns.match('(a+)+$', ['a' * 60 + 'b'], seconds=0.5)

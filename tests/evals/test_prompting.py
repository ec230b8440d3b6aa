"""Strategies against a scripted writer: what they ask, in which order, and what they make of what they are told."""

import dataclasses

import pytest

from tpu_llm.config import ConfigError, validate
from tpu_llm.evals.least_to_most import LeastToMost, questions_in
from tpu_llm.evals.prompting import (
    ChainOfThought,
    Example,
    FewShot,
    SelfConsistency,
    ZeroShot,
    ZeroShotChainOfThought,
    ask_all,
    key,
    read,
)
from tpu_llm.evals.tree_of_thoughts import TreeOfThoughts

EXAMPLE = Example(
    question='1 + 1?',
    answer='2',
    reasoning='One and one are two.',
    parts=(('What is the first number?', '1'), ('What is the second?', '1')),
)


class Script:
    """Writes what `say` answers to each prompt, a different draw each time, and remembers what it was asked."""

    def __init__(self, say):
        self.say, self.asked, self.calls = say, [], []

    def __call__(self, prompts, ask):
        self.calls.append((tuple(prompts), ask))
        self.asked += prompts
        draws = {}

        def draw(prompt):
            draws[prompt] = draws.get(prompt, -1) + 1
            told = self.say(prompt)
            return told if isinstance(told, str) else told[draws[prompt] % len(told)]

        return [[draw(prompt) for _ in range(ask.times)] for prompt in prompts]


def test_zero_shot_asks_the_question_alone():
    write = Script(lambda prompt: ' Paris.\nThat is in France.')
    answer = ZeroShot(max_new_tokens=8).ask('The capital of France?', [], write)
    assert answer.text == 'Paris'
    ((prompts, ask),) = write.calls
    assert prompts == ('Q: The capital of France?\nA:',)
    assert (ask.max_new_tokens, ask.temperature, ask.times, ask.stop) == (8, 0.0, 1, ('\nQ:',))


@pytest.mark.parametrize('given', [['a', 'b'], [['a']], [['a', 'a'], ['b', 'b']]])
def test_a_writer_of_another_shape_is_told_which(given):
    with pytest.raises(ConfigError, match=r'^write was given 2 prompts; it returns a list for each, of 1 \(ask'):
        ask_all(ZeroShot(), ['a?', 'b?'], [], lambda prompts, ask: given)


def test_few_shots_are_shown_before_it():
    write = Script(lambda prompt: ' 5')
    assert FewShot(reads='number').ask('2 + 3?', [EXAMPLE], write).text == '5'
    assert write.asked == ['Q: 1 + 1?\nA: 2\n\nQ: 2 + 3?\nA:']


def test_a_chain_of_thought_shows_reasoning_and_reads_what_is_concluded():
    write = Script(lambda prompt: ' Two and three are 5, not 6. The answer is 5. Since 4 is wrong.')
    assert ChainOfThought(reads='number').ask('2 + 3?', [EXAMPLE], write).text == '5'
    assert write.asked == ['Q: 1 + 1?\nA: One and one are two. The answer is 2.\n\nQ: 2 + 3?\nA:']
    silent = Script(lambda prompt: ' Two and three make something.')
    assert ChainOfThought().ask('2 + 3?', [EXAMPLE], silent).text is None


def test_zero_shot_chain_of_thought_asks_twice():
    write = Script(lambda prompt: ' 5.' if prompt.endswith('the answer is') else ' Two and three. \n')
    answer = ZeroShotChainOfThought(reads='number').ask('2 + 3?', [], write)
    thinking = "Q: 2 + 3?\nA: Let's think step by step."
    assert write.asked == [thinking, f'{thinking} Two and three.\nTherefore, the answer is']
    assert (answer.text, answer.details) == ('5', {'reasoning': ' Two and three. \n'})


def test_self_consistency_counts_votes_of_equal_answers():
    said = ['The answer is 4.', 'The answer is 5.0', 'no idea', 'So 5 it is', 'The answer is 4', 'the answer is: 5 ']
    write = Script(lambda prompt: said)
    strategy = SelfConsistency(base=ChainOfThought(reads='number'), times=6)
    answer = strategy.ask('2 + 3?', [EXAMPLE], write)
    assert answer.text == '5'
    assert answer.details == {'votes': {'4': 2, '5': 3}, 'without': 1, 'said': said}
    ((prompts, ask),) = write.calls
    assert (len(prompts), len(set(prompts)), ask.temperature) == (6, 1, 0.7)
    assert strategy.base.temperature == 0, 'the base is not changed'


def test_of_equally_many_votes_the_first_wins_and_of_none_there_is_no_answer():
    strategy = SelfConsistency(base=ChainOfThought(), times=4)
    said = ['The answer is b', 'The answer is a', 'The answer is A.', 'The answer is "B"']
    assert strategy.ask('?', [EXAMPLE], Script(lambda prompt: said)).text == 'b'
    nothing = strategy.ask('?', [EXAMPLE], Script(lambda prompt: 'hm'))
    assert (nothing.text, nothing.details['without']) == (None, 4)


def test_least_to_most_solves_what_it_names_in_turn():
    def say(prompt):
        if 'What must be answered first?' in prompt.rpartition('\n\n')[2]:
            return '1. How many are there?\nLet me see.\n- How many go?\n2. How many stay?\n'
        return {'How many are there?': ' 7', 'How many go?': ' 3 '}.get(
            prompt[prompt.rfind('Q: ') + 3 : -3], ' It is 4.'
        )

    write = Script(say)
    question = 'Of 7, 3 go. How many stay?'
    answer = LeastToMost(reads='number', most=2).ask(question, [EXAMPLE], write)
    assert answer.text == '4'
    assert answer.details == {'parts': [('How many are there?', '7'), ('How many go?', '3')]}
    split, first, second, last = write.asked
    assert split.startswith('1 + 1?\nWhat must be answered first?')
    assert '1. What is the first number?\n2. What is the second?\n\nOf 7, 3 go.' in split
    shown = '1 + 1?\n\nQ: What is the first number?\nA: 1\n\nQ: What is the second?\nA: 1\n\nQ: 1 + 1?\nA: 2\n\n'
    assert first == f'{shown}{question}\n\nQ: How many are there?\nA:'
    assert second == f'{shown}{question}\n\nQ: How many are there?\nA: 7\n\nQ: How many go?\nA:'
    assert last == f'{second} 3\n\nQ: {question}\nA:'


def test_without_simpler_questions_the_question_is_asked_at_once():
    write = Script(lambda prompt: ' I cannot.')
    assert LeastToMost().ask('Why?', [], write).details == {'parts': []}
    assert write.asked[1] == 'Why?\n\nQ: Why?\nA:'
    assert questions_in('1) A?\n* A?\nB\n?\n 12. C is what?') == ['A?', 'C is what?']


def test_a_tree_of_thoughts_keeps_the_best_paths():
    """Steps a, b, c on each level; b is judged sure, c likely, a impossible."""
    judged = {'a': 'Impossible.', 'b': ' sure', 'c': 'likely\n'}

    def say(prompt):
        if prompt.endswith('in one line:\n'):
            return [' a', 'b', 'c ', '', 'b']
        if 'Say one word' in prompt:
            return judged[prompt[prompt.rfind('. ', 0, prompt.rfind('Will these')) + 2]]
        return ' 7.'

    write = Script(say)
    tree = TreeOfThoughts(depth=2, width=5, keep=2, votes=3, reads='number')
    answer = tree.ask('How?', [], write)
    assert answer.text == '7'
    assert answer.details['path'] == ['b', 'b']
    first, second = answer.details['levels']
    assert [(each['path'], each['worth']) for each in first] == [(['b'], 60), (['c'], 3), (['a'], pytest.approx(0.003))]
    assert [each['path'] for each in second] == [['b', 'b'], ['c', 'b'], ['b', 'c'], ['c', 'c'], ['b', 'a'], ['c', 'a']]
    assert answer.details['judgements not in form'] == 0
    assert [ask.times for _, ask in write.calls] == [5, 3, 5, 3, 1]
    assert [ask.temperature for _, ask in write.calls] == [0.7] * 4 + [0.0]
    assert write.calls[2][0][1] == 'How?\nSteps so far:\n1. c\nThe next step, in one line:\n'
    assert write.asked[-1] == 'How?\nSteps:\n1. b\n2. b\nTherefore, the answer is'


def test_a_judgement_that_is_none_of_the_words_is_worth_nothing_and_counted():
    said = {'line:\n': ['x', 'y'], 'ble.\n': ['not sure', 'It is likely, I think'], 'is': '1'}
    write = Script(lambda prompt: next(text for end, text in said.items() if prompt.endswith(end)))
    answer = TreeOfThoughts(depth=1, width=2, votes=2).ask('?', [], write)
    assert [each['worth'] for each in answer.details['levels'][0]] == [0, 0]
    assert answer.details['judgements not in form'] == 4
    assert answer.details['path'] == ['x']
    assert TreeOfThoughts().ask('?', [], Script(lambda prompt: '')).details['path'] == []


def test_many_questions_go_side_by_side():
    """What is wanted at the same time is one call, though one of the questions needs fewer of them."""

    def say(prompt):
        if 'What must be answered first?' in prompt:
            return 'Is it?' if prompt.startswith('b') else ''
        return f' said of {prompt[0]}'

    write = Script(say)
    found = ask_all(LeastToMost(), ['a', 'b', 'c'], [], write)
    assert [each.text for each in found] == ['said of a', 'said of b', 'said of c']
    assert [len(prompts) for prompts, _ in write.calls] == [3, 3, 1]
    assert found[1] == LeastToMost().ask('b', [], Script(say))


@pytest.mark.parametrize(
    ('said', 'reads', 'whole', 'text'),
    [
        ('We get \\boxed{1/3}. The answer is 4', 'number', False, '1/3'),
        ('It costs $1,234.50 in all', 'number', False, '1234.5 dollar'),
        ('The answer is 5 km. Or 7', 'number', False, '5 km'),
        ('nothing', 'number', True, None),
        ('I take (B) because', 'letter', True, 'B'),
        ('A or B? The answer is (C).', 'letter', False, 'C'),
        ('A or B?', 'letter', False, None),
        ('\n  "Paris."\nor so', 'text', True, 'Paris'),
        ('Paris', 'text', False, None),
        ('', 'text', True, None),
    ],
)
def test_answers_are_read(said, reads, whole, text):
    assert read(said, reads, whole=whole) == text


def test_numbers_are_equal_in_any_unit_and_texts_but_for_their_looks():
    assert key('5 km', 'number') == key('5000 m', 'number') != key('5', 'number')
    assert key('1234.5 dollar', 'number') == key('$1,234.50', 'number')
    assert key('"The Hague"', 'text') == key('the  hague!', 'text')


@pytest.mark.parametrize(
    ('strategy', 'examples', 'told'),
    [
        (ZeroShot(), [EXAMPLE], 'ZeroShot shows no example, and there are 1; give none'),
        (FewShot(), [], 'FewShot shows examples, and there are none; give at least one'),
        (ChainOfThought(), [dataclasses.replace(EXAMPLE, reasoning='')], "'1 \\+ 1\\?' has no reasoning"),
        (SelfConsistency(base=FewShot()), [], 'FewShot shows examples'),
        (LeastToMost(), [dataclasses.replace(EXAMPLE, parts=())], "'1 \\+ 1\\?' has no parts"),
    ],
)
def test_examples_that_do_not_fit_are_refused(strategy, examples, told):
    with pytest.raises(ConfigError, match=told):
        strategy.ask('?', examples, Script(lambda prompt: ''))


@pytest.mark.parametrize(
    ('strategy', 'told'),
    [
        (ZeroShot(max_new_tokens=0), 'max_new_tokens = 0 must be at least 1'),
        (ZeroShot(question='Q'), r"question is 'Q'; its places must be \{question\}"),
        (SelfConsistency(base=ChainOfThought(), temperature=0.0), 'a vote takes 2 or more, and above 0'),
        (SelfConsistency(base=ChainOfThought(temperature=-1.0)), 'config.base: max_new_tokens .* not negative'),
        (LeastToMost(split='{question} {x}'), r'its places must be \{question\}'),
        (LeastToMost(most=0), 'most is 0'),
        (TreeOfThoughts(temperature=0.0), 'all steps would be the same'),
        (TreeOfThoughts(keep=0), 'keep is 0'),
        (TreeOfThoughts(judge='{question}'), r'places must be \{question\} and \{path\}'),
    ],
)
def test_settings_that_cannot_be_say_why(strategy, told):
    with pytest.raises(ConfigError, match=told):
        validate(strategy)

"""Judges that follow a script: what they are asked, and what is made of verdicts, of their lack and of their bias."""

import dataclasses
import json

import numpy as np
import pytest
import toy

from configs import judge as page
from tpu_llm.config import ConfigError, RunError, validate
from tpu_llm.evals import __main__ as command
from tpu_llm.evals.candidate import Untrained
from tpu_llm.evals.judge import Judge, Pair, Rubric, mean_score, read, said, summary
from tpu_llm.evals.judging import Judging

RUBRIC = Rubric(
    text='How good is it?', criteria=('It is right.', 'It is {short}.'), highest=3, scale=('bad', 'so-so', 'good')
)
FORMED = 'Reason: it is {}.\nVerdict: {}'


class Script:
    """Judges as `say(question, tries)` has it and remembers what it was asked."""

    def __init__(self, say):
        self.say, self.calls, self.tries = say, [], {}

    def __call__(self, prompts, ask):
        self.calls.append((list(prompts), ask))
        return [[self._one(prompt)] for prompt in prompts]

    def _one(self, prompt):
        question = prompt.partition('\n\nMind the form')[0]
        self.tries[question] = self.tries.get(question, 0) + 1
        return self.say(question, self.tries[question])


def test_a_score_is_asked_for_by_the_rubric_and_comes_with_its_reason():
    write = Script(lambda question, tries: FORMED.format('right', 3))
    (verdict,) = Judge(rubric=RUBRIC).scores([('2 + 2?', 'It is {4}.')], write)
    assert (verdict.value, verdict.reason, verdict.tries) == ('3', 'it is right.', 1)
    (((question,), ask),) = write.calls
    assert question == (
        'How good is it?\n\nCriteria:\n- It is right.\n- It is {short}.\n\nScores:\n1: bad\n2: so-so\n3: good\n\n'
        '[The prompt]\n2 + 2?\n\n[The response]\nIt is {4}.\n\n'
        'Answer in this form, and say nothing else:\nReason: why, in one or two sentences\n'
        'Verdict: one whole number from 1 to 3\n'
    )
    assert (ask.temperature, ask.times) == (0.0, 1)


@pytest.mark.parametrize(
    ('text', 'verdict'),
    [
        ('Reason: fine\nVerdict: 2', ('2', 'fine')),
        ('**Reason:** fine,\nand more.\n\n**Verdict: 2.**', ('2', 'fine,\nand more.')),
        ('It is fine.\nverdict: "3"\n', ('3', 'It is fine.')),
        ('Reason: a\nVerdict: 2\nVerdict: 2', ('2', 'a')),
        ('Reason: a\nVerdict: 2\nVerdict: 3', None),
        ('Reason: a\nVerdict: 4', None),
        ('Reason: a\nVerdict: 2 or 3', None),
        ('Reason: a\nVerdict: 2/3', None),
        ('Verdict: 2', None),
        ('Verdict: 2\nReason: said too late', None),
        ('Reason: I give it a 2', None),
        ('', None),
    ],
)
def test_what_is_not_in_form_is_no_verdict(text, verdict):
    assert read(text, ['1', '2', '3']) == verdict


def test_who_was_not_in_form_is_asked_again_and_then_counted():
    """The first judges at once, the second in its second try, the third never."""
    needs = {'[The response]\na': 1, '[The response]\nb': 2, '[The response]\nc': 9}

    def say(question, tries):
        least = next(tries for part, tries in needs.items() if part in question)
        return FORMED.format('so', 1 + tries) if tries >= least else 'I would say 2.'

    write = Script(say)
    judge = Judge(rubric=RUBRIC, retries=2)
    verdicts = judge.scores([('?', 'a'), ('?', 'b'), ('?', 'c')], write)
    assert [(each.value, each.tries) for each in verdicts] == [('2', 1), ('3', 2), (None, 3)]
    assert verdicts[2].said == 'I would say 2.'
    assert [len(prompts) for prompts, _ in write.calls] == [3, 2, 1]
    assert [ask.temperature for _, ask in write.calls] == [0.0, 0.7, 0.7]
    assert write.calls[1][0][0].endswith('a line that is "Verdict:" and one whole number from 1 to 3.')
    assert mean_score(verdicts).value == 2.5
    stop = dataclasses.replace(judge, no_verdict='stop')
    with pytest.raises(RunError, match=r"the third: the judge did not answer in form in 3 tries; .* 'I would say 2\.'"):
        stop.scores(
            [('?', 'a'), ('?', 'b'), ('?', 'c')], Script(say), ['the first', 'the second', 'the third'].__getitem__
        )


def better(question):
    """A or B, by which of two responses is the longer one."""
    first, second = (question.split(f'[Response {name}]\n')[1].split('\n\n')[0] for name in 'AB')
    return 'tie' if len(first) == len(second) else 'A' if len(first) > len(second) else 'B'


PAIRS = [Pair(prompt='?', a='long one', b='short'), Pair(prompt='?', a='x', b='yy'), Pair(prompt='?', a='o', b='p')]


def test_a_fair_judge_says_the_same_in_both_orders():
    write = Script(lambda question, tries: FORMED.format('longer', better(question)))
    compared = Judge(rubric=RUBRIC).compare(PAIRS, write)
    assert [(each.winner, each.consistent) for each in compared] == [('a', True), ('b', True), ('tie', True)]
    ((questions, _),) = write.calls
    assert '[Response A]\nlong one\n\n[Response B]\nshort\n' in questions[0]
    assert '[Response A]\nshort\n\n[Response B]\nlong one\n' in questions[3]
    assert 'Verdict: A, B or tie\n' in questions[0]
    assert 'Scores:' not in questions[0]
    found = summary(compared)
    assert (found.a, found.b, found.ties, found.inconsistent, found.without) == (1, 1, 1, 0, 0)
    assert (found.points.value, found.first.value) == (0.5, 0.5)


def test_who_favours_a_place_comes_to_ties_that_are_counted():
    first = Script(lambda question, tries: FORMED.format('first', 'A'))
    compared = Judge(rubric=RUBRIC, ties=False).compare(PAIRS, first)
    assert [(each.winner, each.consistent) for each in compared] == [('tie', False)] * 3
    assert summary(compared).first.value == 1.0
    assert summary(compared).inconsistent == 3
    assert 'Verdict: A or B\n' in first.calls[0][0][0]


def test_a_tie_in_one_order_alone_is_a_tie_and_one_verdict_alone_is_none():
    given = '[Response A]\nlong one'
    half = Script(lambda question, tries: FORMED.format('', 'tie' if given in question else better(question)))
    (compared,) = Judge(rubric=RUBRIC).compare(PAIRS[:1], half)
    assert (compared.winner, compared.consistent) == ('tie', False)
    one = Script(lambda question, tries: FORMED.format('', 'A') if given in question else 'B is better')
    (compared,) = Judge(rubric=RUBRIC, retries=0).compare(PAIRS[:1], one)
    assert (compared.winner, compared.consistent) == (None, None)
    assert summary([compared]).without == 1
    assert np.isnan(summary([compared]).points.value)
    with pytest.raises(RunError, match='pair 0: the judge did not answer in form in 1 tries'):
        Judge(rubric=RUBRIC, retries=0, no_verdict='stop').compare(PAIRS[:1], one, 'pair {}'.format)


def test_prompts_are_texts_or_conversations():
    assert said('Hi') == said([{'role': 'user', 'content': 'Hi'}]) == 'Hi'
    talk = [{'role': 'system', 'content': 'Be kind.'}, {'role': 'user', 'content': 'Hi'}]
    assert said(talk) == 'system: Be kind.\n\nuser: Hi'


# -------------------------------------------------------------------------------------------------- files of verdicts


@dataclasses.dataclass
class Asked:
    write: Script
    name: str = 'script'

    def ask(self, settings):
        return self


@pytest.fixture
def judging(tmp_path, monkeypatch):
    """Makes a run over records, judged by a script."""

    def make(records, say, **changes):
        data = tmp_path / 'data.jsonl'
        data.write_text('\n'.join(map(json.dumps, records)) + '\n')
        script = Script(say)
        monkeypatch.setattr(Untrained, 'open', lambda self: Asked(script))
        model = Untrained(model=toy.config(), tokenizer=None)
        return Judging(model=model, judge=Judge(rubric=RUBRIC, retries=0), data=str(data), **changes), script

    return make


def lines(folder):
    return [json.loads(line) for line in (folder / 'verdicts.jsonl').read_text().splitlines()]


def pair(n):
    """The longer response is the better one for people, too."""
    a, b = ('much longer', f'{n}') if n % 3 else (f'{n}', 'much longer')
    names = ('big', 'small') if n % 3 else ('small', 'big')
    return {
        'prompt': f'{n}?',
        'response_a': a,
        'response_b': b,
        'a': names[0],
        'b': names[1],
        'label': 'a' if n % 3 else 'b',
    }


def fair(question, tries):
    return FORMED.format('longer', better(question))


def test_verdicts_on_pairs_are_battles_and_are_weighed_against_people(judging, tmp_path, capsys):
    run, _ = judging([pair(n) for n in range(9)], lambda q, t: 'hm' if '[The prompt]\n4?' in q else fair(q, t))
    run.main(str(tmp_path / 'run'))
    written = lines(tmp_path / 'run')
    assert [each['winner'] for each in written] == ['b', 'a', 'a', 'b', None, 'a', 'b', 'a', 'a']
    assert written[0]['given'] == {
        'value': 'B',
        'reason': 'it is longer.',
        'tries': 1,
        'said': 'Reason: it is longer.\nVerdict: B',
    }
    assert written[0]['judge'].startswith('script (')
    told = capsys.readouterr().out
    assert 'a, b, tie          5, 3, 0' in told
    assert 'against label of 8 records\n  agreement                1.000 [1.000, 1.000]' in told
    file = tmp_path / 'run/verdicts.jsonl'
    assert command.main(['agreement', str(file), '--verdict=winner', '--draws=20']) == 0
    assert capsys.readouterr().out.startswith('9 items, 1 without a verdict'.replace('9', '8'))
    assert command.main(['agreement', str(file)]) == 2
    assert "line 1 has no 'verdict' but a winner, as pairs have; add --verdict=winner" in capsys.readouterr().err
    assert command.main(['arena', str(file), '--draws=20', '--json']) == 0
    (island,) = json.loads(capsys.readouterr().out)['islands']
    assert {row['model']: row['points'] for row in island} == {'big': 8, 'small': 0}


def test_scores_are_written_beside_what_was_judged(judging, tmp_path, capsys):
    records = [{'prompt': 'Hi', 'response': f'{n}', 'label': n % 3 + 1, 'id': n} for n in range(6)]
    run, _ = judging(
        records, lambda question, tries: FORMED.format('so', int(question.split('[The response]\n')[1][0]) % 3 + 1)
    )
    run.main(str(tmp_path / 'run'))
    assert [(each['id'], each['verdict'], each['reason']) for each in lines(tmp_path / 'run')] == [
        (n, n % 3 + 1, 'it is so.') for n in range(6)
    ]
    assert 'Spearman                 1.000' in capsys.readouterr().out


def test_a_run_goes_on_in_whole_blocks_and_is_not_mixed_with_another(judging, tmp_path):
    records = [pair(n) for n in range(130)]
    run, script = judging(records, fair)
    run.main(str(tmp_path / 'run'))
    whole = (tmp_path / 'run/verdicts.jsonl').read_text()
    assert [len(prompts) for prompts, _ in script.calls] == [128, 128, 4]
    (tmp_path / 'run/verdicts.jsonl').write_text(whole[: len(whole) * 3 // 4])
    run, script = judging(records, fair)
    run.main(str(tmp_path / 'run'))
    assert [len(prompts) for prompts, _ in script.calls] == [128, 4]
    assert (tmp_path / 'run/verdicts.jsonl').read_text() == whole
    run, script = judging(records, fair)
    run.main(str(tmp_path / 'run'))
    assert script.calls == []
    run.judge.retries = 1
    with pytest.raises(
        ConfigError, match=r'verdicts of script \(\w+\), and this is script \(\w+\); give another workdir'
    ):
        run.main(str(tmp_path / 'run'))


@pytest.mark.parametrize(
    ('record', 'told'),
    [
        (
            {'prompt': '?', 'response_a': 'x'},
            "line 2 has prompt, response_a; wanted is 'response', or",
        ),
        ({'response': 'x'}, "line 2 has no 'prompt'"),
        ({'prompt': '?', 'response': 3}, 'line 2: response is 3; write a text'),
        ({'prompt': [], 'response': 'x'}, 'line 2: prompt must be a list of'),
        ({'prompt': '?', 'response': 'x'}, 'line 2 is of one response or two, and .*line 1 is not'),
    ],
)
def test_a_record_that_cannot_be_judged_is_named_before_any_is(judging, tmp_path, record, told):
    run, script = judging([pair(0), record], fair)
    with pytest.raises(ConfigError, match=told):
        run.main(str(tmp_path / 'run'))
    assert script.calls == []


@pytest.mark.parametrize(
    ('config', 'told'),
    [
        (Rubric(text=' '), 'text is empty'),
        (Rubric(text='x', lowest=5), 'lowest is 5 and highest 5'),
        (Rubric(text='x', scale=('a', 'b')), 'scale says what 2 scores mean, and there are 5'),
        (Judge(rubric=RUBRIC, retries=-1), 'retries = -1'),
    ],
)
def test_settings_that_cannot_be_say_why(config, told):
    with pytest.raises(ConfigError, match=told):
        validate(config)


def test_the_page_judges_pairs_that_come_with_the_package(tmp_path, capsys, quick_compile):
    """By a tiny model that nobody trained: nothing is in form, and nothing is guessed."""
    run = page.get_config('smoke')
    run.model.model = toy.config(vocab_size=259, layers=1)
    run.judge.max_new_tokens = 2
    run.main(str(tmp_path))
    assert [(each['winner'], each['given']['tries']) for each in lines(tmp_path)] == [(None, 2)] * 2
    told = capsys.readouterr().out
    assert 'without a verdict         2' in told
    assert told.splitlines()[-1] == f'{tmp_path}/verdicts.jsonl'
    with pytest.raises(ConfigError):
        page.get_config(f'path={tmp_path}/none').main(str(tmp_path / 'new'))
    assert not (tmp_path / 'new').exists()
    pairs = [record for _, record in page.get_config().records()]
    assert len(pairs) == 36
    order = ['right', 'evasive', 'wrong']
    for each in pairs:
        better = min(each['a'], each['b'], key=order.index)
        assert each[each['label']] == better

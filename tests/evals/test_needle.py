"""Needles in haystacks: the grid that is asked, what counts as found, and what a killed run leaves."""

import json

import pytest
from subjects import Table

from configs import needle as page
from tpu_llm.config import ConfigError, RunError, validate
from tpu_llm.data.tokenizer import Bytes
from tpu_llm.evals.candidate import Untrained
from tpu_llm.evals.needle import Needle, contains, drawn
from tpu_llm.models.decoder_config import DecoderConfig

pytestmark = pytest.mark.usefixtures('quick_compile')

TOKENIZER = Bytes().make(iter(()), '')
MODEL = DecoderConfig(vocab_size=259, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp_width=16)


def grid(**changes):
    return Needle(model=Untrained(model=MODEL, tokenizer=Bytes()), **({'lengths': (400, 800), 'trials': 2} | changes))


class Candidate:
    name, tokenizer = 'script', TOKENIZER

    def __init__(self, subject):
        self.subject, self.settings = subject, []

    def ask(self, settings):
        self.settings.append(settings)
        return self.subject


def test_texts_are_as_long_as_they_should_be_and_the_needle_is_where_it_should_be():
    needle = grid(depths=(0.0, 0.5, 1.0))
    long, short = (list(needle.made(TOKENIZER, length)) for length in (800, 400))
    assert [(each.number, each.depth) for each in long] == [(n, d) for n in (0, 1) for d in (0.0, 0.5, 1.0)]
    for each in [*long, *short]:
        hidden = f'The secret number of {each.place} is {each.value}.'
        assert each.length - 90 < each.tokens <= each.length
        assert each.text.count(hidden) == 1
        assert each.text.count(each.value) == 1
        at = each.text.index(hidden) / (len(each.text) - len(hidden))
        assert at == pytest.approx(each.depth, abs=70 / each.length)
    sentences = long[0].text.replace('. ', '.\n').split('\n')
    assert len(set(sentences)) == len(sentences) > 5
    # The filler is the same at all depths, and the shorter one's is the beginning of the longer one's.
    without = [
        [line for line in each.text.replace('. ', '.\n').split('\n') if 'secret' not in line]
        for each in (*long, *short)
    ]
    assert without[0] == without[1] == without[2] != without[3]
    assert without[6] == without[0][: len(without[6])]
    assert list(needle.made(TOKENIZER, 400)) == short


def test_what_is_found_by_place():
    """A model that reads only the last 400 bytes of its prompt."""

    def says(prompt, number):
        place = prompt.rpartition(' of ')[2].removesuffix(' is')
        seen = prompt[-400:]
        hidden = f'number of {place} is '
        return f' {seen[seen.index(hidden) + len(hidden) :][:5]}.' if seen.count(hidden) else ' 12345.'

    candidate = Candidate(Table(says=says))
    needle = grid(depths=(0.0, 1.0), tokens=1600)
    cells = [*needle.cells(candidate, 400), *needle.cells(candidate, 800)]
    found = {(cell['length'], cell['depth']): (cell['hits'], cell['trials']) for cell in cells}
    assert found == {(400, 0.0): (2, 2), (400, 1.0): (2, 2), (800, 0.0): (0, 2), (800, 1.0): (2, 2)}
    assert [(each.rows, each.max_length) for each in candidate.settings] == [(4, 464), (2, 864)]
    told = drawn('script', cells)
    assert told[1].split()[:3] == ['tokens', '0%', '100%']
    assert told[2].startswith('      400   █ 1.00  █ 1.00     1.00  0.51 – 1.00')
    assert told[3].startswith('      800     0.00  █ 1.00     0.50  0.15 – 0.85')


def test_by_likelihood_the_value_must_beat_nine_others():
    subject = Table(log_prob=lambda context, value: -1.0 if f'is{value}.' in context[:200] else -2.0)
    cells = grid(depths=(0.0, 1.0), score='likelihood').cells(Candidate(subject), 800)
    assert [(cell['depth'], cell['hits']) for cell in cells] == [(0.0, 2), (1.0, 0)]
    assert [sample['told'] for sample in cells[0]['samples']] == [1.0, 1.0]
    asked = [value for context, value in subject.asked[:10]]
    assert len(set(asked)) == 10
    assert all(len(value) == 6 and value.startswith(' ') for value in asked)


@pytest.mark.parametrize(
    ('text', 'there'),
    [
        ('is 12345.', True),
        ('12,345', True),
        ('112345', False),
        ('12345.6', False),
        ('0.12345', False),
        ('1234 5', False),
    ],
)
def test_a_number_is_there_or_not(text, there):
    assert contains(text, '12345') == there


@pytest.mark.parametrize('score', ['contains', 'likelihood'])
def test_a_whole_run_with_a_tiny_model(score, tmp_path, capsys):
    needle = page.get_config('smoke,likelihood' if score == 'likelihood' else 'smoke')
    needle.model.model = MODEL
    needle.max_new_tokens = 3
    needle.main(str(tmp_path))
    made = json.loads((tmp_path / 'needle.json').read_text())
    assert (made['model'], made['score']) == ('untrained', score)
    assert [(cell['length'], cell['depth'], cell['trials']) for cell in made['cells']] == [(256, 0.0, 1), (256, 1.0, 1)]
    told = capsys.readouterr().out
    assert 'untrained\n   tokens' in told
    assert told.splitlines()[-1] == f'{tmp_path}/needle.json'


def test_a_grid_goes_on_and_is_not_mixed_with_another(tmp_path, monkeypatch):
    candidate = Candidate(Table(says=lambda prompt, number: ''))
    monkeypatch.setattr(Untrained, 'open', lambda self: candidate)
    grid(lengths=(400,)).main(str(tmp_path))
    grid().main(str(tmp_path))
    assert [each.max_length for each in candidate.settings] == [464, 864]
    with pytest.raises(RunError, match=r'is of another grid .*; give another workdir'):
        grid(trials=3).main(str(tmp_path))


def test_a_model_that_is_not_there_leaves_no_workdir(tmp_path):
    with pytest.raises(ConfigError):
        page.get_config(f'path={tmp_path}/none').main(str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('changes', 'told'),
    [
        ({'lengths': ()}, 'lengths or depths is empty'),
        ({'depths': (0.0, 1.5)}, r'depths is \(0\.0, 1\.5\); each is from 0'),
        ({'lengths': (400, 400)}, 'give each once'),
        ({'trials': 0}, 'trials is 0'),
        ({'trials': 99}, 'there are needles for at most 9'),
        ({'score': 'likelihood', 'chat': True}, 'weighs plain texts'),
    ],
)
def test_settings_that_cannot_be_say_why(changes, told):
    with pytest.raises(ConfigError, match=told):
        validate(grid(**changes))


def test_a_length_without_room_for_filler_says_so():
    with pytest.raises(ConfigError, match=r'lengths has 150: .* need 1\d{2} tokens and some'):
        list(grid().made(TOKENIZER, 150))


def test_the_page_halves_the_longest():
    assert page.get_config().lengths == (256, 512, 1024, 2048)
    assert page.get_config('longest=3000').lengths == (375, 750, 1500, 3000)
    with pytest.raises(ConfigError, match='a grid begins at 256'):
        page.get_config('longest=100')
    validate(page.get_config('likelihood,longest=131072'))

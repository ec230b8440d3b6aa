"""Rows of a task that are in training data: found wherever they are, and nothing else."""

import json
import random

import numpy as np
import pytest
from etils import epath

from tpu_llm.config import ConfigError
from tpu_llm.data.sources import Jsonl, Text
from tpu_llm.data.tokenizer import Bytes
from tpu_llm.evals import __main__ as command
from tpu_llm.evals import catalogue, contamination, measures, task
from tpu_llm.evals.contamination import check, run_length
from tpu_llm.evals.kept import score, write_results
from tpu_llm.evals.overlap import Windows, characters, words
from tpu_llm.evals.task import Outcome

WORDS = [f'{a}{b}' for a in ('ba', 'ke', 'li', 'mo', 'nu', 'ra') for b in ('d', 'f', 'g', 'n', 's', 't')]


def text(seed, count):
    return ' '.join(random.Random(seed).choices(WORDS, k=count))


def naive(texts, other, unit, size):
    """The windows that two texts share, by comparing all with all."""
    split = words if unit == 'words' else characters

    def windows(each):
        units = split(each)
        return {tuple(units[at : at + size]) for at in range(len(units) - size + 1)}

    return {window for each in texts for window in windows(each)} & windows(other)


@pytest.mark.parametrize(('unit', 'size'), [('words', 3), ('characters', 9)])
def test_windows_are_those_of_comparing_all_with_all(unit, size, monkeypatch):
    """In blocks shorter than the text, and with many words that no text has."""
    monkeypatch.setattr('tpu_llm.evals.overlap._BLOCK', 64)
    texts = [text(seed, 40) for seed in range(5)] + ['too short']
    other = text(99, 2000) + ' Ünïcode—and 🦙, and a_b\n' + texts[3].upper().replace(' ', ', ')
    found = {hit.text.replace(' ', '') for hit in Windows(texts, unit, size).find(other)}
    expected = {''.join(window) for window in naive(texts, other, unit, size)}
    assert len(expected) > 30
    assert found == expected


def test_equal_windows_are_one_that_both_texts_own():
    windows = Windows(['a b c d', 'x b c d'], 'words', 3)
    assert sorted(windows.owners) == [[0], [0, 1], [1]]
    assert len(Windows([], 'words', 3)) == len(Windows(['a b'], 'words', 3)) == 0
    assert list(Windows(['a b'], 'words', 3).find('a b c d')) == []


def test_equal_hashes_of_different_texts_are_no_hit(monkeypatch):
    monkeypatch.setattr(Windows, '_hashes', lambda self, units: np.zeros(max(0, len(units) - self.size + 1), np.uint64))
    windows = Windows(['a b c'], 'words', 3)
    assert [hit.text for hit in windows.find('x y z a b c')] == ['a b c']


def test_a_run_has_8_to_13_words_by_the_shortest_rows():
    assert run_length([5] * 100) == 8
    assert run_length([40] * 100) == 13
    assert run_length(list(range(100))) == 8
    assert run_length([10] * 6 + [50] * 94) == 10


@pytest.fixture
def files(tmp_path):
    """Training data in two files; of the rows 1 is in it by words, 2 by letters and 3 too often to mean anything."""
    rows = [text(seed, 30) for seed in range(4)]
    (tmp_path / 'a.jsonl').write_text(
        '\n'.join(json.dumps({'text': part}) for part in (text(50, 200), f'{text(51, 60)} {rows[1]} {text(52, 9)}'))
    )
    glued = characters(rows[2])[:60]
    common = ' '.join(words(rows[3])[:20])
    lines = [text(60, 50), f'{glued}.', *[f'{text(70 + n, 5)} W {common} W {text(90 + n, 5)}' for n in range(12)]]
    (tmp_path / 'b.txt').write_text('\n'.join(lines))
    return tmp_path, rows


def test_rows_are_found_where_they_are(files):
    folder, rows = files
    sources = {
        'a': Jsonl(paths=(f'{folder}/a.jsonl',)).open(),
        'b': Text(paths=(f'{folder}/b.txt',), per='line').open(),
    }
    given = [(10 + at, [each, 'yes']) for at, each in enumerate(rows)] + [(20, ['too short'])]
    heard = []
    found = check(given, sources, run=13, heard=lambda *each: heard.append(each))
    assert [(row.line, row.checked, row.clean) for row in found] == [
        (10, True, True),
        (11, True, False),
        (12, True, False),
        (13, True, True),
        (20, False, None),
    ]
    both, (letters,) = found[1].found, found[2].found
    assert [(each.by, each.runs, each.of) for each in both] == [
        ('words', 18, 18),
        ('characters', len(characters(rows[1])) - 49, len(characters(rows[1])) - 49),
    ]
    assert both[0].text == ' '.join(words(rows[1])[:13])
    assert both[0].document == f'{folder}/a.jsonl, line 2'
    assert (letters.by, letters.runs, letters.document) == ('characters', 11, f'{folder}/b.txt, line 2')
    assert heard[-1][:2] == (16, 16)
    often = check(given, sources, run=13, letters=0, common=12)
    assert [row.clean for row in often] == [True, False, True, False, None]
    assert often[3].found[0].documents == 12


def test_documents_of_ids_are_read_by_their_tokenizer(files):
    folder, rows = files
    tokenizer = Bytes().make(iter(()), epath.Path('.'))
    (folder / 'ids.jsonl').write_text(json.dumps({'text': tokenizer.encode(rows[0]).tolist()}))
    sources = {'ids': Jsonl(paths=(f'{folder}/ids.jsonl',)).open()}
    given = [(1, [rows[0]]), (2, [rows[1]])]
    assert [row.clean for row in check(given, sources, run=13, tokenizer=lambda: tokenizer)] == [False, True]
    with pytest.raises(ConfigError, match="source 'ids' holds ids; give the tokenizer that made them"):
        check(given, sources, run=13)


TASK = 'kind: generative\nabout: test\nprompt: "{question}"\nmetrics: [exact]\nmax_new_tokens: 4\n---\n'


def test_from_the_command_line_to_the_score_of_the_clean_rows(files, capsys):
    folder, rows = files
    file = folder / 'mine.task'
    lines = [json.dumps({'question': each, 'answer': 'yes'}) for each in rows]
    file.write_text(TASK + json.dumps({'question': rows[0], 'answer': 'no', 'example': True}) + '\n' + '\n'.join(lines))
    read = task.read(file, catalogue.KINDS)
    outcome = Outcome({'exact': measures.mean([0.0, 1.0, 1.0, 1.0])}, [{}] * 4)
    write_results(folder / 'run', {'model': 'm', 'identity': 'i'}, [score(read, outcome, 0, 1.0)])
    data = [f'--data={folder}/a.jsonl', f'--out={folder}/out.jsonl', f'--results={folder}/run']
    assert command.main(['contamination', f'--task={file}', *data]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith(f'{file}: 4 rows against 2 documents, ')
    assert told[1] == 'contaminated             1 of 4 checked   0.250 [0.046, 0.699]'
    assert told[3].startswith('line 9: 18 of 18 runs of words: ')
    assert told[3].endswith(f'in {folder}/a.jsonl, line 2')
    assert [line.split()[:4] for line in told[-3:]] == [
        ['exact', 'all', '4', 'rows'],
        ['exact', 'clean', '3', 'rows'],
        ['exact', 'contaminated', '1', 'rows'],
    ]
    assert [line.split()[4] for line in told[-3:]] == ['0.750', '0.667', '1.000']
    out = [json.loads(line) for line in (folder / 'out.jsonl').read_text().splitlines()]
    assert [(row['line'], row['clean']) for row in out] == [(8, True), (9, False), (10, True), (11, True)]


def test_rows_too_short_to_be_checked_are_in_no_share(files, capsys):
    folder, rows = files
    file = folder / 'mine.task'
    lines = [json.dumps({'question': each, 'answer': 'yes'}) for each in (*rows, 'short', 'brief')]
    file.write_text(TASK + '\n'.join(lines))
    outcome = Outcome({'exact': measures.mean([0.0, 1.0, 1.0, 1.0, 0.0, 1.0])}, [{}] * 6)
    made = score(task.read(file, catalogue.KINDS), outcome, 0, 1.0)
    write_results(folder / 'run', {'model': 'm', 'identity': 'i'}, [made])
    asked = ['contamination', f'--data={folder}/a.jsonl', '--words=13']
    assert command.main([*asked, f'--task={file}', f'--results={folder}/run']) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[1:3] == [
        'contaminated             1 of 4 checked   0.250 [0.046, 0.699]',
        'too short to be checked  2',
    ]
    assert told[-1].split()[:6] == ['exact', 'not', 'checked', '2', 'rows', '0.500']
    assert command.main([*asked, '--task=arithmetic']) == 0
    assert capsys.readouterr().out.splitlines()[1] == 'contaminated             0 of 0 checked'


def test_the_sources_of_a_training_run(files, capsys):
    folder, rows = files
    (folder / 'rows.jsonl').write_text(json.dumps({'q': rows[1], 'other': rows[0]}))
    asked = ['contamination', f'--task={folder}/rows.jsonl', '--fields=q']
    assert command.main([*asked, f'--config=configs/pretrain.py:smoke,data={folder}/a.jsonl']) == 0
    assert 'contaminated             1 of 1 checked' in capsys.readouterr().out
    assert command.main([*asked, '--fields=other', f'--config=configs/pretrain.py:smoke,data={folder}/a.jsonl']) == 0
    assert 'contaminated             0 of 1 checked' in capsys.readouterr().out


def test_what_cannot_be_looked_for_is_said(files, capsys):
    folder, rows = files
    data = f'--data={folder}/a.jsonl'
    rows_file = folder / 'rows.jsonl'
    rows_file.write_text(json.dumps({'q': rows[1], 'n': 3}))
    for options, told in (
        ([f'--task={rows_file}'], 'give the training data: either --config=FILE.py of the run, or --data=FILES'),
        ([f'--task={rows_file}', data, '--fields=x'], "line 1 has no 'x'"),
        ([f'--task={rows_file}', data, '--fields=n'], 'line 1 has no text to look for; its fields are q, n'),
        ([f'--task={rows_file}', data, '--common=0'], '--common is 0; it is at least 1'),
        ([f'--task={rows_file}', '--config=configs/chat.py'], 'describes a Chat, which reads no training data'),
        ([f'--task={folder}/none.jsonl', data], 'there is no file'),
        ([f'--task={rows_file}', f'--data={folder}/none.txt'], 'no file matches'),
        ([f'--task={rows_file}', data, f'--results={folder}/no'], f'there is no file {folder}/no/results.json; give'),
    ):
        assert command.main(['contamination', *options]) == 2
        assert told in capsys.readouterr().err


def test_rows_of_another_file_than_was_evaluated_are_not_mixed(files):
    folder, rows = files
    file = folder / 'mine.task'
    file.write_text(TASK + json.dumps({'question': rows[0], 'answer': 'yes'}))
    read = task.read(file, catalogue.KINDS)
    outcome = Outcome({'exact': measures.mean([1.0])}, [{}])
    write_results(folder / 'run', {'model': 'm', 'identity': 'i'}, [score(read, outcome, 0, 1.0)])
    with pytest.raises(ConfigError, match='was asked rows of mine that are not in the file now'):
        contamination.without(f'{folder}/run', 'mine', [])
    with pytest.raises(ConfigError, match='has no scores of other; it has mine'):
        contamination.without(f'{folder}/run', 'other', [])

"""The viewer: what is trained on is coloured, or in brackets; special tokens are named; padding is counted."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tpu_llm.data.__main__ import main
from tpu_llm.data.corrupted import Masks, Prefix, Spans
from tpu_llm.data.forms import Texts
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.show import show
from tpu_llm.data.sources import Conversations, Preferences, Text
from tpu_llm.data.tokenizer import Bytes


def make_data(source, **changes) -> Data:
    fields = {'global_batch': 2, 'seq_len': 24, 'whole': True, 'overlong': 'drop', 'interleave': 1}
    return Data(mixture=Mixture(sources={'a': source}), tokenizer=Bytes(), **(fields | changes))


def shown(data: Data, rows: int = 1, step: int = 1, **terminal) -> str:
    out = io.StringIO()
    show(data, Console(file=out, width=200, highlight=False, **terminal), seed=0, step=step, rows=rows, workdir='')
    return out.getvalue()


@pytest.fixture
def talks(tmp_path: Path) -> Conversations:
    (tmp_path / 'a.jsonl').write_text(json.dumps({'prompt': 'Two and\ntwo?', 'completion': 'Four é.'}))
    return Conversations(paths=(f'{tmp_path}/a.jsonl',), template='plain')


def test_brackets_where_there_are_no_colours(talks: Conversations, tmp_path: Path) -> None:
    assert shown(make_data(talks)).splitlines() == [
        '⟦trained on⟧  read only  <special token>  ⏎ line feed',
        '',
        f'row 0 · segment 1 · a: {tmp_path}/a.jsonl, line 1 · 9 of 21 targets trained on',
        '<bos>Two and⏎',
        'two?⟦Four é.<eos>⟧',
        '',
        '24 positions: trained on 9 (37.5%), read only 12 (50.0%), padding 3 (12.5%)',
    ]


def test_colours_on_a_terminal(talks: Conversations) -> None:
    out = shown(make_data(talks), rows=2, force_terminal=True, color_system='standard')
    assert '\x1b[32m' in out
    assert '\x1b[7;32m<eos>' in out
    assert '\x1b[2;7m<bos>' in out
    assert '⟦' not in out
    assert 'row 1' in out


def test_examples_with_their_values(tmp_path: Path) -> None:
    (tmp_path / 'a.jsonl').write_text(json.dumps({'prompt': 'x', 'chosen': 'y', 'rejected': 'z', 'margin': 0.5}))
    source = Preferences(paths=(f'{tmp_path}/a.jsonl',), template='plain')
    out = shown(make_data(source, form=Texts(most=4)), step=3)
    assert 'segment 4 · a: ' in out
    assert 'example 2 · value 0.5 · 2 of 3 targets trained on\n<bos>x⟦z<eos>⟧\n' in out
    assert 'segment 5' not in out


@pytest.mark.parametrize(
    ('form', 'said'),
    [
        (None, '<bos>⟦The quick brown fox jumps⟧'),
        (Prefix(), '<bos>'),
        (Masks(), '<bos>'),
        (Spans(target_len=24), ' ⟶ <pad>⟦<259>'),
    ],
)
def test_every_form(tmp_path: Path, form, said: str) -> None:
    (tmp_path / 'a.txt').write_text('The quick brown fox jumps over the lazy dog')
    source = Text(paths=(f'{tmp_path}/a.txt',))
    data = make_data(source, form=form, whole=False, overlong='split', seq_len=25)
    out = shown(data)
    assert said in out
    assert ('a: ' in out) == (not isinstance(form, (Masks, Spans)))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(['show', '--config=configs/sft.py:smoke', '--rows=1', '--step=2']) == 0
    out = capsys.readouterr().out
    assert '<eos>⟧' in out
    assert '128 positions: trained on' in out
    assert main(['show', '--config=configs/sft.py:smoke', '--rows=0']) == 2
    assert capsys.readouterr().err == 'error: rows is 0; it is at least 1\n'
    assert main(['show', '--config=configs/grpo.py:smoke']) == 2
    assert 'its rows are the answers that are written while the run goes on; show is for' in capsys.readouterr().err

"""Which rows of a task are in training data, and what a model scores on the others.

A row is contaminated where one of its fields shares a run of words with a training document: 13, or the fifth
percentile of the rows' lengths where that is less, but at least 8 (Brown et al., 2020, arXiv 2005.14165, appendix C);
or 50 letters and digits (OpenAI, 2023, arXiv 2303.08774, appendix C; all runs are tried here, not three). What stands
in more than 10 documents is a phrase, and counts for nothing.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from tpu_llm import command_line
from tpu_llm.checkpoint.pretrained import TokenizerOf
from tpu_llm.config import ConfigError
from tpu_llm.data.documents import Documents
from tpu_llm.data.sources import Jsonl, Text
from tpu_llm.data.tokenizer import Tokenizer, TrainedBPE
from tpu_llm.evals import catalogue, measures, records
from tpu_llm.evals.intervals import share
from tpu_llm.evals.kept import read_results
from tpu_llm.evals.measures import Measured
from tpu_llm.evals.overlap import Unit, Windows, words

_MOST, _LEAST, _PERCENTILE = 13, 8, 5  # of words in a run
_EVERY = 10.0  # seconds between two lines of progress

Heard = Callable[[int, int, int], None]  # documents done, of so many, bytes read


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a row shares with training documents, by one rule."""

    by: Unit
    text: str  # the first run that both have
    document: str  # where that is
    documents: int  # that have it
    runs: int  # of the row that are in documents
    of: int


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    line: int
    checked: bool  # False: every field is too short for a run
    found: tuple[Found, ...]

    @property
    def clean(self) -> bool | None:
        """None where that is not known."""
        return (not self.found) if self.checked else None


def run_length(lengths: Sequence[int]) -> int:
    """Words in a run, from the words of each row's longest field."""
    return int(np.clip(np.percentile(lengths, _PERCENTILE), _LEAST, _MOST))


def check(
    rows: Sequence[tuple[int, Sequence[str]]],
    sources: Mapping[str, Documents],
    *,
    run: int,
    letters: int = 50,
    common: int = 10,
    tokenizer: Callable[[], Tokenizer] | None = None,
    heard: Heard = lambda done, of, size: None,
) -> list[Row]:
    """`rows` are (line, texts), of which each is looked for by itself. 0 letters leave that rule out.

    A document at a time is in memory. `tokenizer` makes texts of documents that are ids. Raises ConfigError where one
    is wanted, and for a bad record.
    """
    texts = [text for _, fields in rows for text in fields]
    row_of = [at for at, (_, fields) in enumerate(rows) for _ in fields]
    rules = [_Rule(Windows(texts, 'words', run), common)]
    rules += [_Rule(Windows(texts, 'characters', letters), common)] if letters else []
    done = size = 0
    of = sum(map(len, sources.values()))
    for name, documents in sources.items():
        for number, text in _texts(name, documents, tokenizer):
            for rule in rules:
                rule.read(text, (name, number))
            done, size = done + 1, size + len(text)
            heard(done, of, size)
    found: list[list[Found]] = [[] for _ in rows]
    checked = np.zeros(len(rows), bool)
    for rule in rules:
        for at, each in rule.found(row_of, len(rows), sources).items():
            checked[at] = True
            found[at] += [each] if each else []
    return [Row(line, bool(known), tuple(own)) for (line, _), known, own in zip(rows, checked, found, strict=True)]


class _Rule:
    """Windows that are looked for, in how many documents each was, and which one was the first."""

    def __init__(self, windows: Windows, common: int):
        self._windows, self._common = windows, common
        self._documents = np.zeros(len(windows), np.int64)
        self._first: dict[int, tuple[tuple[str, int], str]] = {}  # in the order in which they were met

    def read(self, text: str, document: tuple[str, int]) -> None:
        hits = {hit.window: hit.text for hit in self._windows.find(text)}
        for window, shared in hits.items():
            self._documents[window] += 1
            self._first.setdefault(window, (document, shared))

    def found(self, row_of: Sequence[int], rows: int, sources: Mapping[str, Documents]) -> dict[int, Found | None]:
        """Of each row that has a window."""
        own: dict[int, list[int]] = {}
        for window, texts in enumerate(self._windows.owners):
            for row in {row_of[text] for text in texts}:
                own.setdefault(row, []).append(window)
        counts, met = self._documents, {window: at for at, window in enumerate(self._first)}
        made: dict[int, Found | None] = {}
        for row in range(rows):
            if row not in own:
                continue
            hit = [window for window in own[row] if 0 < counts[window] <= self._common]
            made[row] = None
            if hit:
                first = min(hit, key=lambda window: met[window])
                (name, number), text = self._first[first]
                made[row] = Found(
                    by=self._windows.unit,
                    text=text,
                    document=sources[name].name(number),
                    documents=int(counts[first]),
                    runs=len(hit),
                    of=len(own[row]),
                )
        return made


def _texts(name: str, documents: Documents, tokenizer: Callable[[], Tokenizer] | None) -> Iterator[tuple[int, str]]:
    decoder = None
    for number in range(len(documents)):
        document = documents[number]
        if document is None:
            continue
        if document.text is not None:
            yield number, document.text
            continue
        if tokenizer is None:
            raise ConfigError(f'source {name!r} holds ids; give the tokenizer that made them: --tokenizer=FOLDER')
        decoder = decoder or tokenizer()
        assert document.tokens is not None
        yield number, decoder.decode(document.tokens.tolist())


# ------------------------------------------------------------------------------------------------------ command line


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--task', required=True, help="one of the package's tasks, a .task file, or JSONL")
    parser.add_argument('--fields', default='', help='fields of a row that are looked for, with commas; default: all')
    parser.add_argument('--config', help='FILE.py[:arg] of a training run, whose sources are read')
    parser.add_argument('--data', nargs='+', help='files or globs: .jsonl with a field text, and plain text')
    parser.add_argument('--tokenizer', help='a run or model folder, for sources that are ids')
    parser.add_argument('--words', type=int, default=0, help='in a run; default: 8 to 13, by the rows')
    parser.add_argument('--letters', type=int, default=50, help='and digits in a run; 0 leaves that out (%(default)s)')
    parser.add_argument('--common', type=int, default=10, help='documents that make a run mean nothing (%(default)s)')
    parser.add_argument('--results', help='the workdir of an evaluation of the task: its scores without such rows')
    parser.add_argument('--out', help='JSONL to write, a row of the task a line')


def run(options: argparse.Namespace) -> None:
    for name, least in (('words', 0), ('letters', 0), ('common', 1)):
        if getattr(options, name) < least:
            raise ConfigError(f'--{name} is {getattr(options, name)}; it is at least {least}')
    rows = _rows(options.task, [field for field in options.fields.split(',') if field])
    sources, tokenizer = _sources(options)
    length = options.words or run_length([max(len(words(text)) for text in fields) for _, fields in rows])
    began = said = time.monotonic()
    size = 0

    def heard(done: int, of: int, read: int) -> None:
        nonlocal said, size
        size = read
        if time.monotonic() - said > _EVERY:
            said = time.monotonic()
            speed = read / (said - began) / 1e6
            print(f'read {done:,} of {of:,} documents, {speed:.1f} million characters/s', file=sys.stderr, flush=True)

    found = check(
        rows, sources, run=length, letters=options.letters, common=options.common, tokenizer=tokenizer, heard=heard
    )
    documents = sum(map(len, sources.values()))
    print(
        f'{options.task}: {len(rows):,} rows against {documents:,} documents, {size:,} characters, in '
        f'{time.monotonic() - began:.0f} s; runs of {length} words'
        + (f' or {options.letters} letters' if options.letters else '')
    )
    print('\n'.join(told(found)))
    if options.out:
        lines = [json.dumps({'clean': row.clean, **dataclasses.asdict(row)}, ensure_ascii=False) for row in found]
        epath.Path(options.out).expanduser().write_text('\n'.join(lines) + '\n')
    if options.results:
        print('\n'.join(without(options.results, epath.Path(options.task).stem, found)))


def told(found: Sequence[Row]) -> list[str]:
    """How many rows, and which."""
    dirty = [row for row in found if row.found]
    checked = sum(row.checked for row in found)
    of_these = f'   {share(len(dirty), checked)}' if checked else ''
    lines = [f'contaminated             {len(dirty):,} of {checked:,} checked{of_these}']
    lines += [f'too short to be checked  {len(found) - checked:,}']
    for row in dirty:
        each = row.found[0]
        more = f' and {each.documents - 1:,} more' if each.documents > 1 else ''
        text = each.text if len(each.text) <= 60 else f'{each.text[:59]}…'
        lines.append(f'line {row.line}: {each.runs} of {each.of} runs of {each.by}: {text!r} in {each.document}{more}')
    return lines


def without(workdir: str, name: str, found: Sequence[Row]) -> list[str]:
    """An evaluation's metrics over all rows, those that are clean, that are not, and that were not checked."""
    about, scores = read_results(epath.Path(workdir).expanduser())
    score = next((each for each in scores if each.task == name), None)
    if score is None:
        raise ConfigError(f'{workdir} has no scores of {name}; it has {", ".join(each.task for each in scores)}')
    clean = {row.line: row.clean for row in found}
    lines_of = [sample['line'] for sample in score.samples]
    if not set(lines_of) <= set(clean):
        raise ConfigError(f'{workdir} was asked rows of {name} that are not in the file now; evaluate it again')
    groups = {
        'all': list(range(len(lines_of))),
        'clean': [at for at, line in enumerate(lines_of) if clean[line]],
        'contaminated': [at for at, line in enumerate(lines_of) if clean[line] is False],
        'not checked': [at for at, line in enumerate(lines_of) if clean[line] is None],
    }
    lines = ['', f'{about["model"]} on {name}']
    for metric in score.metrics:
        measured = score.measured(metric)
        for group, rows in groups.items():
            if rows:
                estimate = measures.estimate(Measured(measured.added[rows], measured.form))
                lines.append(f'  {metric:20} {group:13} {len(rows):>7,} rows  {estimate}')
    return lines


def _rows(path: str, fields: Sequence[str]) -> list[tuple[int, list[str]]]:
    """(line, texts) of the rows that are scored. Raises ConfigError where one has no text to look for."""
    if path.endswith('.task') or path in catalogue.shipped():
        (asked,) = catalogue.find([path])
        given = [(row.line, f'{path} line {row.line}', row.fields) for row in asked.rows]
    else:
        given = [(int(where.rpartition(' ')[2]), where, record) for where, record in records.read(path)]
        given = [each for each in given if not each[2].get('example')]
    rows = []
    for line, where, record in given:
        values = [records.value_of(record, field, where) for field in fields] or list(record.values())
        texts = list(_strings(values))
        if not texts:
            raise ConfigError(f'{where} has no text to look for; its fields are {", ".join(record)}')
        rows.append((line, texts))
    return rows


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))


def _sources(options: argparse.Namespace) -> tuple[dict[str, Documents], Callable[[], Tokenizer] | None]:
    if bool(options.config) == bool(options.data):
        raise ConfigError('give the training data: either --config=FILE.py of the run, or --data=FILES')
    if options.data:
        tokenizer = _tokenizer(options.tokenizer, None)
        return {path: _of_path(path) for path in options.data}, tokenizer
    trained = command_line.load(options.config, [])
    if not hasattr(trained, 'data') or not hasattr(trained.data, 'mixture'):
        raise ConfigError(f'{options.config} describes a {type(trained).__name__}, which reads no training data')
    opened = {name: source.open() for name, source in trained.data.mixture.sources.items()}
    return opened, _tokenizer(options.tokenizer, trained.data.tokenizer)


def _of_path(path: str) -> Documents:
    jsonl = path.endswith(('.jsonl', '.json'))
    return Jsonl(paths=(path,)).open() if jsonl else Text(paths=(path,)).open()


def _tokenizer(path: str | None, config: Any) -> Callable[[], Tokenizer] | None:
    if path:
        config = TokenizerOf(path=path)
    if config is None or isinstance(config, TrainedBPE):  # that one is made from the text, of which there is none
        return None

    def make() -> Tokenizer:
        nothing: Iterable[str] = iter(())
        return config.make(nothing, '.')

    return make

"""Whole examples in rows: what is in a batch, that nothing but the step decides, and what becomes of long ones."""

import contextlib
import dataclasses
import json
import logging
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conversations import tokenizer as home

from tpu_llm.arrays import Batch, ScoredBatch
from tpu_llm.config import ConfigError, validate
from tpu_llm.data import examples
from tpu_llm.data.corrupted import Prefix
from tpu_llm.data.evaluation import held_out, held_out_rows
from tpu_llm.data.forms import Texts
from tpu_llm.data.length import epoch_positions, run_steps
from tpu_llm.data.loader import Data, Loader, open_documents, open_tokenizer
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.packing import WAITING, Piece, fill, whole_rows
from tpu_llm.data.sources import Conversations, Jsonl, Labelled, Preferences, Ranked, Rated, Steps
from tpu_llm.data.streams import Stream
from tpu_llm.data.templates import TEMPLATES
from tpu_llm.data.tokenizer import Bytes, ByteTokenizer, Pretrained, SentencePiece, TrainedBPE, load, train_bpe

TOKENIZER = ByteTokenizer()


def lines(path: Path, records: list[dict]) -> tuple[str]:
    path.write_text('\n'.join(map(json.dumps, records)))
    return (str(path),)


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Examples of every kind, of 4 to 40 bytes a text."""
    folder = tmp_path_factory.mktemp('examples')
    rng = np.random.default_rng(0)

    def text(low: int = 2, high: int = 20) -> str:
        return ''.join(chr(97 + letter) for letter in rng.integers(0, 26, int(rng.integers(low, high))))

    talks = [
        [{'role': role, 'content': text()} for _ in range(int(rng.integers(1, 3))) for role in ('user', 'assistant')]
        for _ in range(23)
    ]
    lines(folder / 'talks.jsonl', [{'messages': talk} for talk in talks])
    lines(folder / 'preferences.jsonl', [{'prompt': text(), 'chosen': text(), 'rejected': text()} for _ in range(17)])
    lines(folder / 'labelled.jsonl', [{'prompt': text(), 'completion': text(), 'label': i % 2 == 0} for i in range(13)])
    lines(folder / 'rated.jsonl', [{'prompt': text(), 'completion': text(), 'score': i / 4} for i in range(13)])
    lines(folder / 'ranked.jsonl', [{'prompt': text(), 'completions': [text(), text(), text()]} for _ in range(11)])
    steps = [{'prompt': text(), 'completions': [text(), text()], 'labels': [True, i % 2 == 0]} for i in range(11)]
    lines(folder / 'steps.jsonl', steps)
    lines(folder / 'text.jsonl', [{'text': text(1, 60)} for _ in range(19)])
    return folder


KINDS = {
    'talks': Conversations,
    'preferences': Preferences,
    'labelled': Labelled,
    'rated': Rated,
    'ranked': Ranked,
    'steps': Steps,
}


def source(folder: Path, kind: str):
    return KINDS[kind](paths=(f'{folder}/{kind}.jsonl',), template='plain')


def make_data(folder: Path, *kinds: str, **changes) -> Data:
    sources = {kind: source(folder, kind) for kind in kinds}
    form = None if kinds == ('talks',) else Texts(most=5)
    fields = {'global_batch': 4, 'seq_len': 160, 'interleave': 2, 'whole': True, 'overlong': 'drop', 'form': form}
    weights = {0: dict.fromkeys(sources, 1.0)}
    return Data(mixture=Mixture(sources=sources, weights=weights), tokenizer=Bytes(), **(fields | changes))


def read(data: Data, count: int, owned=None, table=None):
    validate(data)
    loader = Loader(data, open_documents(data, TOKENIZER, ''), TOKENIZER, seed=3, owned=owned)
    with contextlib.closing(loader):
        if table is not None:
            loader.restore(table)
        return [next(loader) for _ in range(count)], loader


def same(one: Batch, other: Batch, rows=slice(None)) -> None:
    for field in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(one, field.name)[rows], getattr(other, field.name), err_msg=field.name)


# ------------------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize('kinds', [('talks',), *((kind,) for kind in KINDS if kind != 'talks'), tuple(KINDS)])
def test_a_batch_depends_on_seed_and_step_alone(folder: Path, kinds: tuple[str, ...]) -> None:
    """From any index on, and on any hosts."""
    data = make_data(folder, *kinds)
    whole, _ = read(data, 6)
    assert {type(batch) for batch, _ in whole} == {Batch if kinds == ('talks',) else ScoredBatch}
    for k in range(5):
        same(whole[k + 1][0], read(data, 1, table=whole[k][1])[0][0][0])
    for owned in ([0, 2], [1, 3]):
        for (batch, _), (part, _) in zip(whole, read(data, 6, owned)[0], strict=True):
            same(batch, part, owned)
    assert len({np.asarray(batch.tokens).tobytes() for batch, _ in whole}) == 6


@pytest.mark.full
def test_workers_give_the_same_batches(folder: Path) -> None:
    data = make_data(folder, 'talks', 'preferences')
    for (one, _), (other, _) in zip(read(data, 2)[0], read(dataclasses.replace(data, workers=2), 2)[0], strict=True):
        same(one, other)


@pytest.mark.parametrize('kind', KINDS)
def test_rows_hold_whole_texts(folder: Path, kind: str) -> None:
    """Every segment is a text of its document, from its begin mark to its end; the rest of a row is padding."""
    data = make_data(folder, kind)
    docs = open_documents(data, TOKENIZER, '')[0]
    every = [docs[i].pairs for i in range(len(docs))]
    texts = {pairs[pairs['text'] == t].tobytes() for pairs in every for t in range(examples.count_texts(pairs))}
    found = 0
    for batch, _ in read(data, 3)[0]:
        for row in range(4):
            count = int(batch.segments[row].max())
            assert count <= 5 or kind == 'talks'
            used = batch.segments[row] > 0
            assert used.sum() == np.flatnonzero(used).max() + 1
            for name in ('targets', 'weights', 'positions', 'segments'):
                assert not getattr(batch, name)[row][~used].any()
            for segment in range(1, count + 1):
                here = batch.segments[row] == segment
                pairs = np.zeros(here.sum(), examples.PAIR)
                pairs['token'], pairs['target'] = batch.tokens[row][here], batch.targets[row][here]
                pairs['weight'], pairs['position'] = batch.weights[row][here], batch.positions[row][here]
                if isinstance(batch, ScoredBatch):
                    pairs['value'], pairs['mark'] = batch.values[row][here], batch.marks[row][here]
                    pairs['text'] = (
                        segment - batch.segments[row][batch.examples[row] == batch.examples[row][here][0]][0]
                    )
                else:
                    pairs['mark'][-1] = 1.0
                assert pairs.tobytes() in texts
                found += 1
    assert found > 20


def test_an_epoch_holds_every_example_once(folder: Path) -> None:
    data = make_data(folder, 'talks', global_batch=1, interleave=1)
    docs = open_documents(data, TOKENIZER, '')
    steps = epoch_positions(data, docs) // data.seq_len
    batches, _ = read(data, 3 * steps)
    _, loader = read(data, 0)
    stream = Stream('talks', docs[0], TOKENIZER, 3)
    seen = []
    for step, (_, table) in enumerate(batches, 1):
        seen += [piece.document for piece in loader.describe(step)[0]]
        # What was drawn is in the rows, or waits: nothing twice, nothing lost.
        waits = set(table['waiting'][0, :, 1].tolist())
        drawn = [index for index in range(1, int(table['drawn'][0, 0]) + 1) if index not in waits]
        assert sorted(seen) == sorted(stream.number(index - 1) for index in drawn)
        assert len(waits) == WAITING
    assert 0 <= len(seen) - 3 * 23 <= 2 * WAITING, 'rows of documents in another order are about as many'
    assert Counter(seen).most_common()[0][1] <= 4
    assert run_steps(data, docs, epochs=2) == 2 * steps


def test_text_is_packed_whole_beside_examples(folder: Path, tmp_path: Path) -> None:
    data = make_data(folder, 'talks', form=None, cache=str(tmp_path))
    data.mixture.sources['text'] = Jsonl(paths=(f'{folder}/text.jsonl',))
    data.mixture.weights[0]['text'] = 1.0
    _, loader = read(data, 4)
    pieces = [piece for step in (1, 2, 3) for row in loader.describe(4 + step) for piece in row]
    assert {piece.source for piece in pieces} == {0, 1}
    assert all((piece.start, piece.stop) == (0, examples.count_pairs(piece.ids)) for piece in pieces)
    assert len(list(tmp_path.iterdir())) == 1, 'the cache is of the text'
    docs = open_documents(data, TOKENIZER, '')
    parts = [epoch_positions(make_data(folder, 'talks'), docs[:1]), sum(docs[1].lengths() + 1)]
    assert parts[0] + parts[1] <= epoch_positions(data, docs) < parts[0] + 1.5 * parts[1] + 160


def test_scores_of_text_are_none(folder: Path) -> None:
    ids = np.array([1, 5, 6, 2], np.int32)
    config = Texts()
    batch = config.empty(1, 8)
    config.make(TOKENIZER, 8)(batch, 0, [Piece(ids, 0, 3)], np.random.default_rng(0), lambda *_: ids)
    assert batch.marks.tolist() == [[0, 0, 1, 0, 0, 0, 0, 0]]
    assert batch.weights.tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]]
    assert not batch.values.any()
    assert not batch.reference.any()


def test_a_tokenizer_is_trained_on_what_is_said(folder: Path, tmp_path: Path) -> None:
    data = make_data(folder, 'talks')
    data.tokenizer = TrainedBPE(vocab_size=300)
    tokenizer = open_tokenizer(data, tmp_path)
    said = data.mixture.sources['talks'].open()[0].text
    assert tokenizer.decode(tokenizer.encode(said)) == said
    assert len(tokenizer.encode(said)) < len(TOKENIZER.encode(said))


# ------------------------------------------------------------------------------------------------------ long examples


def conversation(*sizes: int) -> dict:
    roles = ('user', 'assistant') * len(sizes)
    return {'messages': [{'role': role, 'content': 'x' * size} for role, size in zip(roles, sizes, strict=False)]}


def first_row(tmp_path: Path, record: dict, kind=Conversations, **changes):
    paths = lines(tmp_path / 'long.jsonl', [record])
    fields = {'global_batch': 1, 'seq_len': 32, 'whole': True, 'overlong': 'truncate', 'interleave': 1}
    data = Data(
        mixture=Mixture(sources={'long': kind(paths=paths, template='plain')}), tokenizer=Bytes(), **(fields | changes)
    )
    return read(data, 1)[0][0][0]


def test_truncation_ends_behind_a_response(tmp_path: Path) -> None:
    # bos, 5 and 6 bytes, eos: 12 pairs with the end mark as the last target; the second response ends after 26 more.
    batch = first_row(tmp_path, conversation(5, 6, 10, 20))
    assert batch.weights[0, :12].tolist() == [0] * 5 + [1] * 7
    assert batch.targets[0, 11] == TOKENIZER.eos
    assert batch.segments[0, :24].tolist() == [1] * 12 + [2] * 12, 'the one example again'


@pytest.mark.parametrize(
    ('record', 'kind', 'changes'),
    [
        (conversation(5, 40), Conversations, {}),
        (conversation(5, 6, 10, 20), Conversations, {'overlong': 'drop'}),
        ({'prompt': 'x', 'chosen': 'y' * 20, 'rejected': 'z' * 20}, Preferences, {'form': Texts()}),
        ({'prompt': 'x', 'completion': 'y' * 40, 'score': 0}, Rated, {'form': Texts()}),
    ],
)
def test_what_does_not_fit_is_left_out_and_named(
    tmp_path: Path, record: dict, kind, changes: dict, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ConfigError, match="from source 'long' gave no document that fits seq_len = 32: it has 1, "),
    ):
        first_row(tmp_path, record, kind, **changes)
    assert caplog.text.count('long.jsonl, line 1 is ') == 1
    assert 'positions long, more than the context of 32 (' in caplog.text


def test_long_examples_may_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"long.jsonl, line 1 is 45 positions .* use overlong='truncate' or 'drop', or"
    ):
        first_row(tmp_path, conversation(4, 40), overlong='stop')
    record = {'prompt': 'x', 'completions': list('abc')}
    with pytest.raises(ConfigError, match=r'long.jsonl, line 1 has 3 texts, and a row takes 2; raise data\.form\.most'):
        first_row(tmp_path, record, Ranked, form=Texts(most=2))


def test_a_cut_is_behind_the_last_response_that_fits() -> None:
    trained = np.array([0, 0, 1, 1, 0, 0, 1, 1, 0], bool)
    pairs = examples.text_pairs(np.arange(9), trained)
    for length, kept in ((2, None), (3, 3), (6, 3), (7, 7), (8, 7)):
        found = examples.cut(pairs, length)
        assert (found if found is None else len(found)) == kept
        assert found is None or found['mark'].tolist() == [0.0] * (kept - 1) + [1.0]


def test_rows_are_filled_with_what_waits_and_fits() -> None:
    def text(size: int) -> np.ndarray:
        return examples.text_pairs(np.arange(size + 1), np.ones(size + 1, bool))

    def rows(*given: int, most: int = 0) -> list[list[int]]:
        return [[piece.stop for piece in row] for row in whole_rows(map(text, given), 8, most)]

    # The first that waits, then always the longest that fits.
    assert rows(5, 2, 8, 3, 3, 1, 1) == [[5, 3], [2, 3, 1, 1], [8]]
    assert rows(5, 2, 8, 3, 3, 1, 1, most=3) == [[5, 3], [2, 3, 1], [8], [1]]
    # Not beyond those that wait.
    assert rows(5, *[4] * WAITING, 3) == [[5], [4, 4], [4, 4], [4, 4], [4, 4], [3]]
    batch = fill([[Piece(text(3), 0, 3), Piece(np.array([7, 8, 9], np.int32), 0, 2)]], 1, 8, 99)
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2, 0, 0, 0]]
    assert batch.tokens.tolist() == [[0, 1, 2, 7, 8, 99, 99, 99]]


# --------------------------------------------------------------------------------------------------------- held out


@pytest.mark.parametrize('kind', KINDS)
def test_held_out_examples_are_there_once(folder: Path, kind: str) -> None:
    data = make_data(folder, kind)
    docs = source(folder, kind).open()
    one, other = (list(held_out_rows(data, docs, TOKENIZER, 8)) for _ in range(2))
    for batch, again in zip(one, other, strict=True):
        same(batch, again)
    every = docs.encoded(TOKENIZER)
    expected = sum(every[i].pairs['weight'].sum() for i in range(len(docs)))
    assert sum(batch.weights.sum() for batch in one) == expected
    with pytest.raises(ConfigError, match=r'the held-out source is of .* examples, not of text; use HeldOutObjective'):
        held_out(docs, TOKENIZER, 8, 160)


# ----------------------------------------------------------------------------------------------------------- settings

WRONG = [
    ({'overlong': 'split'}, "whole = True divides no document; set overlong to 'drop', 'truncate' or 'stop'"),
    ({'form': Texts(), 'whole': False}, 'form = Texts is of whole texts; set whole = True'),
    ({'form': Texts(most=0)}, 'most is 0; a row holds at least 1 text, of preferences 2'),
]


@pytest.mark.parametrize(('changes', 'message'), WRONG)
def test_settings_that_cannot_be_say_why(folder: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(make_data(folder, 'talks', **changes))


def test_sources_that_do_not_go_with_the_rows_say_so(folder: Path) -> None:
    for kind, changes, message in (
        (
            'talks',
            {'whole': False},
            "source 'talks' is of conversation examples, which are not divided; set data.whole",
        ),
        (
            'labelled',
            {'form': None},
            r"'labelled' is of labelled examples, whose texts are not all to be imitated; set",
        ),
        (
            'talks',
            {'form': Prefix()},
            "'talks' is of conversation examples, and data.form = Prefix is for text; take one",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            open_documents(make_data(folder, kind, **changes), TOKENIZER, '')


# ---------------------------------------------------------------------------------------------------------- template


def test_the_runs_tokenizer_takes_the_template_over(tmp_path: Path) -> None:
    """And the mark behind a response ends generation; both are in the files that go with a checkpoint."""
    made = home().to_str().encode()
    config = json.dumps({'bos_token': '<s>', 'eos_token': '</s>'}).encode()
    (tmp_path / 'tokenizer.json').write_bytes(made)
    (tmp_path / 'tokenizer_config.json').write_bytes(config)
    paths = lines(tmp_path / 'a.jsonl', [conversation(3, 3)])
    sources = {
        'chat': Conversations(paths=paths, template='chatml'),
        'plain': Conversations(paths=paths, template='plain'),
        'text': Jsonl(paths=paths),
    }
    fields = {'global_batch': 1, 'seq_len': 64, 'whole': True, 'overlong': 'drop'}
    weights = {0: dict.fromkeys(sources, 1.0)}
    data = Data(mixture=Mixture(sources=sources, weights=weights), tokenizer=Pretrained(path=str(tmp_path)), **fields)
    bare, taught = data.tokenizer.make((), ''), open_tokenizer(data, '')
    (tmp_path / 'again').mkdir()
    for name, content in taught.files().items():
        (tmp_path / 'again' / Path(name).name).write_bytes(content)
    again = load(tmp_path / 'again')
    end = bare.special_tokens['<|im_end|>']
    for tokenizer in (taught, again):
        assert tokenizer.chat_template == TEMPLATES['chatml']
        assert tokenizer.stops == {bare.eos, end}
        assert tokenizer.fingerprint == bare.fingerprint
    data.mixture.sources['other'] = Conversations(paths=paths, template='gemma')
    with pytest.raises(ConfigError, match="sources 'chat' and 'other' have different templates; a model has one"):
        open_tokenizer(data, '')
    data.mixture.sources = {'plain': sources['plain']}
    assert open_tokenizer(data, '').chat_template is None
    pieces = SentencePiece(train_bpe(['user: assistant: two and two are four; ' * 40], 300))
    chatting = pickle.loads(pickle.dumps(pieces.with_chat('{{ messages }}', 7)))
    assert (chatting.chat_template, chatting.stops) == ('{{ messages }}', {pieces.eos, 7})
    assert chatting.fingerprint == pieces.fingerprint
    with pytest.raises(ConfigError, match='a ByteTokenizer takes no chat template; use one with special tokens'):
        TOKENIZER.with_chat('x', 1)

"""Log-probs beside examples: every pair gets its own, whatever row it was scored in, and a start finds them again."""

import pickle
import shutil

import numpy as np
import pytest

from tpu_llm.data import referenced
from tpu_llm.data.forms import Texts, fill, generator
from tpu_llm.data.judged_sums import JudgedSums
from tpu_llm.data.packing import Piece
from tpu_llm.data.referenced import Referenced
from tpu_llm.data.tokenizer import Bytes

TOKENIZER = Bytes().make((), '')
LENGTH = 52  # half of the examples are longer


def score(batch):
    """Of a target its number, and where it stands in its text."""
    return np.where(batch.segments > 0, batch.targets + batch.positions / 1000, np.nan).astype(np.float32)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    docs = JudgedSums(split='heldout').open().encoded(TOKENIZER)
    folder = tmp_path_factory.mktemp('referenced') / 'made'
    referenced.write(docs, TOKENIZER, folder, 4, LENGTH, score)
    return docs, folder


def test_every_pair_has_its_own(made):
    docs, folder = made
    found = Referenced(docs, folder)
    assert len(found) == len(docs)
    assert (found.kind, found.name(3), found.fingerprint) == ('preference', docs.name(3), docs.fingerprint)
    kept = dropped = 0
    for number in range(len(docs)):
        before, after = docs[number].pairs, found[number].pairs
        if len(before) > LENGTH:
            assert not after['reference'].any()
            dropped += 1
            continue
        expected = (before['target'] + before['position'] / 1000).astype(np.float32)
        np.testing.assert_array_equal(after['reference'], expected)
        np.testing.assert_array_equal(after['target'], before['target'])
        assert not before['reference'].any()
        kept += 1
    assert kept > 100
    assert dropped > 100


def test_it_goes_to_a_worker_and_into_the_batch(made):
    docs, folder = made
    found = pickle.loads(pickle.dumps(Referenced(docs, folder)))
    assert found.encoded(TOKENIZER) is found
    numbers = [n for n in range(len(docs)) if len(docs[n].pairs) <= LENGTH][:2]
    pairs = [found.read(number).pairs for number in numbers]
    form = Texts()
    rows = [[Piece(p, 0, len(p)) for p in pairs]]
    batch = fill(form, form.make(TOKENIZER, 150), rows, 150, [generator(0, 0, 0)], lambda *_: pairs[0])
    expected = np.concatenate([p['reference'] for p in pairs])
    np.testing.assert_array_equal(batch.reference[0, : len(expected)], expected)
    assert not batch.reference[0, len(expected) :].any()


def test_what_is_deleted_is_made_again_bitwise(made, tmp_path):
    docs, folder = made
    shutil.copytree(folder, tmp_path / 'before')
    shutil.rmtree(folder)
    referenced.write(docs, TOKENIZER, folder, 4, LENGTH, score)
    for name in ('reference.bin', 'spans.npy'):
        assert (folder / name).read_bytes() == (tmp_path / 'before' / name).read_bytes()
    assert {path.name for path in folder.parent.iterdir()} == {'made'}


def test_a_scorer_that_fails_leaves_nothing(made, tmp_path):
    def broken(batch):
        raise RuntimeError('no device')

    with pytest.raises(RuntimeError, match='no device'):
        referenced.write(made[0], TOKENIZER, tmp_path / 'made', 4, LENGTH, broken)
    assert not list(tmp_path.iterdir())

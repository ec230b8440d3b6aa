"""Whatever becomes of a checkpoint's files: named in one line, passed over for the newest whole one."""

import json
import pathlib
import shutil

import pytest
from etils import epath

from tpu_llm.checkpoint import checksums, commit, files
from tpu_llm.checkpoint.files import CheckpointError


def flip(path: pathlib.Path) -> None:
    """Changes one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {'flip': flip, 'truncate': truncate, 'remove': pathlib.Path.unlink}
SAYS = {'flip': ['is not what was written'], 'truncate': ['bytes', 'not what was'], 'remove': ['is missing']}


@pytest.mark.parametrize('kind', DAMAGE)
def test_damage_to_each_file_is_noticed(tmp_path, start, caplog, kind):
    run = start(tmp_path).save(1, 2)
    newest = run.folder(2)
    names = files.walk(epath.Path(newest))
    assert len(names) >= 12
    for name in names:
        kept = (newest / name).read_bytes()
        DAMAGE[kind](newest / name)
        caplog.clear()
        restored = run.store.restore(run.like())
        assert restored.step == 1, name
        assert run.bits(restored.arrays) == run.bits(run.state(1))
        (line,) = [record.getMessage() for record in caplog.records]
        assert str(newest) in line
        assert name in line
        assert any(words in line for words in SAYS[kind]), line
        (newest / name).write_bytes(kept)
    assert run.store.restore(run.like()).step == 2


def test_every_byte_of_the_commit_mark_counts(tmp_path, start):
    folder = epath.Path(start(tmp_path).save(7, metrics={'loss': 2.5}).folder(7))
    whole = (folder / commit.MARK).read_bytes()
    for i in range(len(whole)):
        (folder / commit.MARK).write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises(checksums.Damaged, match=commit.MARK):
            commit.read_mark(folder)
    (folder / commit.MARK).write_bytes(whole)
    assert commit.read_mark(folder).metrics == {'loss': 2.5}


def test_without_commit_mark_it_is_no_checkpoint(tmp_path, start, caplog):
    run = start(tmp_path).save(1, 2)
    (run.folder(2) / commit.MARK).unlink()
    assert run.store.restore(run.like()).step == 1
    assert 'COMMIT.json is missing, so it was never finished' in caplog.text
    (run.folder(1) / commit.MARK).unlink()
    assert run.store.restore(run.like()) is None, 'killed during its first save, a run starts again'


def test_no_whole_checkpoint_is_an_error_not_a_start_from_scratch(tmp_path, start):
    run = start(tmp_path).save(1, 2)
    flip(run.folder(1) / 'manifest.json')
    flip(run.folder(2) / 'data' / 'lanes-0.npz')
    with pytest.raises(CheckpointError) as error:
        run.store.restore(run.like())
    message = str(error.value)
    assert message.startswith(f'no checkpoint in {tmp_path}/checkpoints is whole')
    assert 'manifest.json is not what was written' in message
    assert 'data/lanes-0.npz is not what was written' in message
    assert '\n' not in message


def test_what_cannot_be_read_is_an_error_not_passed_over(tmp_path, start):
    run = start(tmp_path).save(1, 2)
    (run.folder(2) / 'manifest.json').unlink()
    (run.folder(2) / 'manifest.json').mkdir()
    with pytest.raises(CheckpointError, match='could not be read: Is a directory'):
        run.store.restore(run.like())


def test_after_a_fallback_the_later_start_counts_as_newer(tmp_path, start):
    """A damaged checkpoint of a later step neither comes back nor costs a whole one its place."""
    first = start(tmp_path).save(10, 20)
    flip(first.folder(20) / 'manifest.json')
    second = start(tmp_path, keep=1)
    assert second.store.restore(second.like()).step == 10
    second.save(15)
    assert second.store.steps() == [15]
    assert second.store.restore(second.like()).step == 15


def test_a_copied_or_renamed_checkpoint_is_whole(tmp_path, start):
    run = start(tmp_path / 'run').save(4)
    shutil.copytree(run.folder(4), tmp_path / 'best')
    from tpu_llm.checkpoint import reader

    assert reader.load(reader.find(tmp_path / 'best'), run.like()).step == 4


def test_sums_that_another_process_is_writing_are_not_summed(tmp_path):
    (tmp_path / 'manifest.json').write_text('{}')
    (tmp_path / '.checksums-2.json.b768600a').write_text('{')
    checksums.write(tmp_path, 0)
    assert list(json.loads((tmp_path / 'checksums-0.json').read_text())) == ['manifest.json']

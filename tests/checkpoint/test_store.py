"""Saving and restoring: bit for bit, in the background, with errors that come up once and in one line."""

import asyncio
import errno
import json
import pathlib
import re
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_llm.checkpoint import files, reader
from tpu_llm.checkpoint.files import CheckpointError
from tpu_llm.config import ConfigError


def test_restores_what_was_saved_bit_for_bit(tmp_path, start):
    run = start(tmp_path).save(1, 2, metrics={'bits_per_byte': 1.5})
    restored = start(tmp_path).store.restore(run.like())
    assert restored.step == 2
    assert run.bits(restored.arrays) == run.bits(run.state(2))
    assert jax.tree.structure(restored.arrays) == jax.tree.structure(run.state(2))
    assert restored.checkpoint.metrics == {'bits_per_byte': 1.5}


def test_restores_a_given_step(tmp_path, start):
    run = start(tmp_path).save(1, 2)
    assert run.store.steps() == [1, 2]
    assert run.bits(run.store.restore(run.like(), step=1).arrays) == run.bits(run.state(1))
    with pytest.raises(CheckpointError, match=r'no checkpoint of step 3; there are: 1, 2'):
        run.store.restore(run.like(), step=3)


def test_nothing_saved_restores_nothing(tmp_path, start):
    assert start(tmp_path).store.restore({}) is None


def test_layout_on_disk(tmp_path, start):
    run = start(tmp_path).save(12)
    names = {re.sub('[0-9a-f]{32}', 'HASH', name) for name in files.walk(run.fence.workdir / 'checkpoints')}
    token = run.fence.token
    assert {name.removeprefix(f'00000012.{token}/') for name in names} == {
        'COMMIT.json',
        'checksums-0.json',
        'manifest.json',
        'data/lanes-0.npz',
        'tokenizer/pieces.model',
        'arrays/_METADATA',
        'arrays/_sharding',
        'arrays/array_metadatas/process_0',
        'arrays/d/HASH',
        'arrays/manifest.ocdbt',
        'arrays/ocdbt.process_0/d/HASH',
        'arrays/ocdbt.process_0/manifest.ocdbt',
    }
    mark = json.loads((run.folder(12) / 'COMMIT.json').read_text())
    assert (mark['step'], mark['token'], mark['processes']) == (12, token, 1)
    manifest = json.loads((run.folder(12) / 'manifest.json').read_text())
    assert manifest['tensors']['params.decoder.embed'] == {'shape': [3, 4], 'dtype': 'float32'}
    assert manifest['tensors']['optimizer.1.0'] == {'shape': [4], 'dtype': 'float32'}
    assert (manifest['step'], manifest['processes'], manifest['tokenizer']) == (12, 1, 'abc')


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path, start):
    run = start(tmp_path)
    advance = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros((256, 1024))
    for step in range(5):
        run.store.save(step, {'x': x}, lanes=run.lanes(step), manifest=run.MANIFEST)
        x = advance(advance(x))
    run.store.wait()
    like = {'x': jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)}
    for step in run.store.steps():
        np.testing.assert_array_equal(run.store.restore(like, step).arrays['x'], 2.0 * step)


def test_a_relative_workdir(tmp_path, start, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = start('runs/here').save(1)
    assert run.store.restore(run.like()).step == 1
    assert (tmp_path / 'runs' / 'here' / 'checkpoints').is_dir()


def test_restores_onto_another_mesh(tmp_path, start):
    whole = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)

    def mesh_sharding(shape, *spec):
        mesh = jax.make_mesh(shape, ('fsdp', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    run = start(tmp_path)
    saved = {'w': jax.device_put(whole, mesh_sharding((4, 2), 'fsdp', 'tensor'))}
    run.store.save(1, saved, lanes=run.lanes(1), manifest=run.MANIFEST, wait=True)
    for sharding in (mesh_sharding((2, 4), 'tensor', 'fsdp'), mesh_sharding((8, 1), 'fsdp'), mesh_sharding((1, 8))):
        restored = run.store.restore({'w': jax.ShapeDtypeStruct((8, 16), np.float32, sharding=sharding)})
        assert restored.arrays['w'].sharding == sharding
        np.testing.assert_array_equal(restored.arrays['w'], whole)


def test_saves_where_an_event_loop_runs(tmp_path, start):
    """As in a notebook."""
    run = start(tmp_path)

    async def cell() -> None:
        run.save(1)
        assert run.store.restore(run.like()).step == 1

    asyncio.run(cell())


def test_lane_table_comes_back_in_lane_order(tmp_path, start):
    run = start(tmp_path).save(5)
    table = run.store.restore(run.like()).lanes
    np.testing.assert_array_equal(table['lane'], [0, 1, 2])
    np.testing.assert_array_equal(table['document'], [5, 15, 25])
    np.testing.assert_array_equal(table['done'], np.eye(3)[[1, 2, 0]])


def test_a_step_is_saved_once(tmp_path, start):
    run = start(tmp_path).save(3)
    before = (run.folder(3) / 'COMMIT.json').stat().st_mtime_ns
    run.save(3, wait=True)
    assert (run.folder(3) / 'COMMIT.json').stat().st_mtime_ns == before


def test_misfits_name_the_tensors(tmp_path, start):
    run = start(tmp_path).save(1)
    like = run.like()
    like['params']['head'] = jax.ShapeDtypeStruct((5, 3), jnp.float32, sharding=like['odd'].sharding)
    like['extra'] = like.pop('mask')
    with pytest.raises(ConfigError) as error:
        run.store.restore(like)
    message = str(error.value)
    assert 'params.head is float32[5,2] there and float32[5,3] here' in message
    assert 'extra is only here' in message
    assert 'mask is only there' in message
    assert '\n' not in message


def test_an_error_of_the_background_comes_up_once_and_the_next_save_works(tmp_path, start, caplog):
    run = start(tmp_path).save(1)
    blocked = pathlib.Path(run.folder(1).parent, run.folder(1).name.replace('00000001', '00000002'))
    (blocked / 'manifest.json').mkdir(parents=True)  # a folder where a file must go
    run.store.save(2, run.state(2), lanes=run.lanes(2), manifest=run.MANIFEST)
    with pytest.raises(CheckpointError) as error:
        run.store.save(3, run.state(3), lanes=run.lanes(3), manifest=run.MANIFEST)
    assert re.fullmatch(
        r'.*: the checkpoint of step 2 was not saved: Is a directory.*; mend that and start again: '
        'those before it are untouched',
        str(error.value),
    )
    assert not blocked.exists()
    run.save(3)
    assert run.store.steps() == [1, 3]
    assert not [record for record in caplog.records if record.exc_info], 'a traceback was logged'


def test_close_raises_what_went_wrong(tmp_path, start):
    run = start(tmp_path)
    run.store.save(1, {'none': jnp.zeros((0, 3))}, lanes=run.lanes(1), manifest=run.MANIFEST)
    with pytest.raises(CheckpointError, match='step 1 was not saved: Cannot save arrays with zero size'):
        run.store.close()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1M', 'none', disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f'mounting is refused here: {mounted.stderr.decode().strip()}')
    yield disk
    subprocess.run(['umount', disk], check=True)


def test_full_disk(small_disk, start, caplog):
    run = start(small_disk / 'run').save(1)
    noise = {'x': jax.random.normal(jax.random.key(0), (1024, 1024))}
    with pytest.raises(CheckpointError) as error:
        run.store.save(2, noise, lanes=run.lanes(2), manifest=run.MANIFEST, wait=True)
    assert str(error.value) == (
        f'{small_disk}/run: the checkpoint of step 2 was not saved: No space left on device; '
        'mend that and start again: those before it are untouched'
    )
    assert not [record for record in caplog.records if record.exc_info], 'a traceback was logged'
    assert run.store.restore(run.like()).step == 1
    assert run.save(3).store.restore(run.like()).step == 3, 'what was half-written makes room again'


def test_what_cannot_be_removed_is_a_warning(tmp_path, start, caplog):
    run = start(tmp_path, keep=1).save(1)
    busy = run.folder(1) / 'busy'
    busy.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', 'none', busy], capture_output=True)
    if mounted.returncode:
        pytest.skip(f'mounting is refused here: {mounted.stderr.decode().strip()}')
    try:
        run.save(2)
    finally:
        subprocess.run(['umount', busy], check=True)
    assert 'an old checkpoint could not be removed: Device or resource busy' in caplog.text
    assert run.store.steps() == [2]
    run.save(3)
    assert not busy.exists()


def test_what_the_store_no_longer_gives_is_one_line(tmp_path, start):
    """Gone between the verification and the read."""
    run = start(tmp_path).save(1)
    found = reader.find(tmp_path)
    for data in run.folder(1).glob('arrays/d/*'):
        data.unlink()
    with pytest.raises(CheckpointError, match=r'could not be read: .*') as error:
        reader.load(found, run.like())
    assert '\n' not in str(error.value)


def test_read_only_workdir(small_disk, start):
    run = start(small_disk / 'run').save(1)
    subprocess.run(['mount', '-o', 'remount,ro', small_disk], check=True)
    with pytest.raises(CheckpointError) as error:
        start(small_disk / 'run')
    assert str(error.value) == (f'{small_disk}/run cannot be written (Read-only file system); give another --workdir')
    with pytest.raises(CheckpointError, match='step 2 was not saved: Read-only file system'):
        run.save(2)
    assert run.store.restore(run.like()).step == 1


def test_a_write_is_whole_or_absent(tmp_path):
    path = files.epath.Path(tmp_path) / 'folder' / 'file'
    files.write(path, b'first')
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match=r'.') as error:
        files.write(path, b'second')
    assert error.value.errno == errno.EISDIR
    assert files.listing(path.parent) == ['file'], 'nothing half-written stays behind'


@pytest.mark.parametrize('between', ['', ' [domain=\\"{}\\"] [spec=\'{\\"store_data_equal_to_fill_value\\":true}\']'])
def test_what_tensorstore_says_of_the_disk_is_the_systems_word(between):
    """Whatever it puts between its own words and the number."""
    error = ValueError(f"RESOURCE_EXHAUSTED: Error writing \"a:b\": no room{between} [os_error_code='28'] [x='1']")
    assert files.one_line(error) == 'No space left on device'

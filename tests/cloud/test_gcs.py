"""The same promises on gs://, against a real GCS API server."""

import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from tpu_llm.checkpoint import fence, files, reader
from tpu_llm.checkpoint.__main__ import main
from tpu_llm.checkpoint.files import CheckpointError
from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.checkpoint.store import Store

SAVER = pathlib.Path(__file__).parents[1] / 'checkpoint' / 'saver.py'


def like():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {'params': jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=sharding)}


def save(store: Store, *steps: int) -> None:
    for step in steps:
        store.save(step, state(step), lanes={'lane': np.arange(2)}, manifest={'config': {}}, metrics={'loss': 1.0})
    store.wait()


def state(step: int):
    return {'params': jax.random.normal(jax.random.key(step), (64, 64))}


def assert_restores(store: Store, step: int) -> None:
    restored = store.restore(like())
    assert restored.step == step
    np.testing.assert_array_equal(restored.arrays['params'], state(step)['params'])


def test_save_retire_restore_list(bucket, capsys):
    store = Store(Checkpoints(keep=2), fence.start(bucket), {'tokenizer/pieces.model': b'pieces'})
    save(store, 1, 2, 3)
    assert store.steps() == [2, 3]
    assert_restores(store, 3)
    (folder, _) = reader.folders(bucket)
    assert (folder / 'tokenizer' / 'pieces.model').read_bytes() == b'pieces'
    assert not [name for name in files.walk(epath.Path(bucket)) if '/00000001.' in name]
    store.close()

    assert main(['list', bucket]) == 0
    assert capsys.readouterr().out.count('committed') == 3, 'the head of the column and two checkpoints'
    assert main(['verify', bucket]) == 0
    assert main(['diff', str(folder), str(folder)]) == 0
    assert main(['list', f'{bucket}/nowhere']) == 2


def test_files(bucket):
    folder = epath.Path(bucket) / 'folder'
    assert files.listing(folder) == []
    assert not files.exists(folder / 'a')
    files.write(folder / 'a', b'1')
    files.write(folder / 'b' / 'c', b'2')
    files.write(folder / 'a', b'')
    assert files.listing(folder) == ['a', 'b']
    assert files.walk(folder) == ['a', 'b/c']
    assert (files.read(folder / 'a'), files.sha256(folder / 'a')[1]) == (b'', 0)
    assert files.sha256(folder / 'b' / 'c') == (files.hashlib.sha256(b'2').hexdigest(), 1)
    with pytest.raises(FileNotFoundError):
        files.read(folder / 'd')
    with pytest.raises(FileNotFoundError):
        files.sha256(folder / 'd')
    files.remove(folder)
    files.remove(folder)
    assert files.listing(folder) == []


def test_damage_is_noticed(gcs, bucket, caplog):
    store = Store(Checkpoints(), fence.start(bucket))
    save(store, 1, 2)
    (newest, _) = reader.folders(bucket)
    for name in ('manifest.json', 'checksums-0.json', 'COMMIT.json'):
        content = files.read(newest / name)
        files.write(newest / name, content[:-1] + bytes([content[-1] ^ 1]))
        assert_restores(store, 1)
        assert f'{name} is not what was written' in caplog.text
        files.write(newest / name, content)
    files.remove(newest / 'data/lanes-0.npz')
    assert_restores(store, 1)
    assert 'data/lanes-0.npz is missing' in caplog.text
    store.close()


def test_another_process_takes_over(bucket):
    """The older run has looked before; a cached listing would hide the newer start from it."""
    store = Store(Checkpoints(), fence.start(bucket))
    save(store, 1)
    code = 'import sys; from tpu_llm.checkpoint import fence; print(fence.start(sys.argv[1]).token)'
    newer = subprocess.run([sys.executable, '-c', code, bucket], capture_output=True, text=True, check=True)
    with pytest.raises(fence.Superseded, match=f'a newer run took over .start {newer.stdout.strip()} '):
        save(store, 2)
    assert store.steps() == [1]
    store.close()


def test_killed_while_saving(bucket):
    whole = 0
    rng = random.Random(1)
    for _ in range(2):
        with subprocess.Popen([sys.executable, SAVER, bucket], stdout=subprocess.PIPE, text=True) as run:
            assert int(run.stdout.readline()) == whole, 'each start goes on from the newest whole checkpoint'
            first = int(run.stdout.readline())
            time.sleep(rng.uniform(0.0, 0.3))
            run.send_signal(signal.SIGKILL)
            committed = run.stdout.read().split('\n')[:-1]
        last = int(committed[-1]) if committed else first
        whole = reader.find(bucket).step
        assert whole in (last, last + 1), 'nothing that was committed is lost'


def test_unavailable_for_a_while(gcs, bucket):
    store = Store(Checkpoints(), fence.start(bucket))
    gcs.fail_for(1)
    save(store, 1)
    assert gcs.refused > 0
    gcs.fail_for(1)
    assert_restores(store, 1)
    assert gcs.refused > 0
    store.close()


@pytest.mark.parametrize(('status', 'says'), [(403, 'Forbidden'), (401, 'Unauthorized')])
def test_a_store_that_refuses_is_an_error_not_an_empty_workdir(gcs, bucket, status, says):
    store = Store(Checkpoints(), fence.start(bucket))
    save(store, 1)
    store.close()
    gcs.fail_for(1000, status)
    try:
        with pytest.raises(CheckpointError, match=f'the store refused: {says}'):
            reader.find(bucket)
        with pytest.raises(CheckpointError, match=f'the store refused: {says}'):
            files.listing(epath.Path(bucket))
        with pytest.raises(CheckpointError, match=f'{bucket} cannot be written .*{says}'):
            fence.start(bucket)
    finally:
        gcs.fail_for(0)


@pytest.mark.full
def test_longer_than_gcsfs_waits(gcs, bucket, caplog):
    store = Store(Checkpoints(), fence.start(bucket))
    gcs.fail_for(40)
    save(store, 1)
    assert 'no answer from the store (Service Unavailable, 503); asking again' in caplog.text
    assert_restores(store, 1)
    store.close()


@pytest.mark.full
def test_unavailable_for_too_long_is_one_line(gcs, bucket, monkeypatch):
    monkeypatch.setattr('tpu_llm.checkpoint.cloud.PATIENCE_SECONDS', 1.0)
    gcs.fail_for(1000)
    try:
        with pytest.raises(CheckpointError) as error:
            reader.find(bucket)
    finally:
        gcs.fail_for(0)
    assert str(error.value).startswith(f'{bucket}/COMMIT.json: no answer from the store for ')
    assert str(error.value).endswith('(Service Unavailable, 503); start again when it is back')


def test_a_bucket_that_is_not_there(gcs):
    with pytest.raises(CheckpointError, match=r'gs://nowhere/run cannot be written \(.*\); give another --workdir'):
        fence.start('gs://nowhere/run')

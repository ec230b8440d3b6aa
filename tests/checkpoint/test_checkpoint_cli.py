"""`python -m tpu_llm.checkpoint list|verify|diff`."""

import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import pytest

from tpu_llm.checkpoint.__main__ import main


@pytest.fixture
def call(capsys):
    """Runs a command; gives its exit code and what it printed."""

    def called(*argv):
        code = main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        return code, out, err

    return called


def test_without_a_command_it_says_which_there_are(call):
    code, _, err = call()
    assert code == 2
    for command in ('list', 'verify', 'diff', 'inspect', 'convert', 'merge'):
        assert re.search(rf'^    python -m tpu_llm.checkpoint {command} (PATH|ADAPTER).*  \w', err, re.MULTILINE)


def test_list(tmp_path, start, call):
    run = start(tmp_path).save(1, metrics={'bits_per_byte': 1.84321})
    run.save(2, 3)
    (run.folder(2) / 'COMMIT.json').unlink()
    (run.folder(3) / 'COMMIT.json').write_text('{}')
    code, out, _ = call('list', tmp_path)
    assert code == 0
    newest, middle, oldest = (line for line in out.splitlines() if run.fence.token in line)
    assert 'damaged: COMMIT.json' in newest
    assert 'not finished' in middle
    assert 'committed' in oldest
    assert 'bits_per_byte 1.843' in oldest
    assert ' kB' in oldest


def test_list_of_a_copy_under_another_name(tmp_path, start, call):
    run = start(tmp_path / 'run').save(7)
    shutil.copytree(run.folder(7), tmp_path / 'best')
    code, out, _ = call('list', tmp_path / 'best')
    assert code == 0
    assert re.search(rf'7 +{run.fence.token} .* committed', out)


def test_verify(tmp_path, start, call):
    run = start(tmp_path).save(1, 2, 3)
    (run.folder(3) / 'COMMIT.json').unlink()
    assert call('verify', tmp_path) == (
        0,
        f'{run.folder(3).name}: not finished, will be passed over\n'
        f'{run.folder(2).name}: whole\n{run.folder(1).name}: whole\n',
        '',
    )
    (run.folder(1) / 'data' / 'lanes-0.npz').write_text('')
    (run.folder(1) / 'manifest.json').unlink()
    code, out, _ = call('verify', tmp_path)
    assert code == 1
    assert f'{run.folder(1).name}: DAMAGED: manifest.json is missing\n' in out
    assert f'{run.folder(1).name}: DAMAGED: data/lanes-0.npz has 0 of ' in out
    assert call('verify', run.folder(2))[:2] == (0, f'{run.folder(2).name}: whole\n')


def test_diff_of_equals(tmp_path, start, call):
    for name in 'ab':
        start(tmp_path / name).save(7)
    code, out, _ = call('diff', tmp_path / 'a', tmp_path / 'b')
    assert (code, out) == (0, 'identical: 9 tensors and the lane table, bit for bit\n')


def test_diff_names_what_differs(tmp_path, start, call):
    a, b = start(tmp_path / 'a'), start(tmp_path / 'b')
    a.store.save(
        1,
        {
            'same': jnp.ones(2),
            'x': jnp.zeros((2, 2)),
            'sign': jnp.zeros(3),
            'shape': jnp.ones(2),
            'old': jnp.ones(1),
            'scalar': jnp.asarray(1.0),
        },
        lanes=a.lanes(1),
        manifest={'config': {'width': 8, 'steps': 5}},
    )
    b.store.save(
        1,
        {
            'same': jnp.ones(2),
            'x': jnp.array([[0, 0.5], [-0.25, 0]]),
            'sign': -jnp.zeros(3),
            'shape': jnp.ones(3),
            'new': jnp.ones(1),
            'scalar': jnp.asarray(jnp.nan),
        },
        lanes=b.lanes(2),
        manifest={'config': {'width': 16, 'steps': 5}},
    )
    a.store.wait()
    b.store.wait()
    code, out, _ = call('diff', tmp_path / 'a', tmp_path / 'b')
    assert code == 1
    assert sorted(out.splitlines()) == [
        'config.width: 8 → 16',
        'lane table, document: differs',
        'new: only in the second',
        'old: only in the first',
        'scalar: 1 of 1 values differ, by at most nan',
        'shape: float32[2] → float32[3]',
        'sign: 3 of 3 values differ, by at most 0',
        'x: 2 of 4 values differ, by at most 0.5',
    ]


def test_diff_of_whole_runs_takes_the_newest_whole_ones(tmp_path, start, call):
    run = start(tmp_path / 'a').save(1, 2)
    (run.folder(2) / 'manifest.json').unlink()
    assert call('diff', tmp_path / 'a', run.folder(1))[0] == 0


@pytest.mark.parametrize('command', ['list', 'verify'])
def test_no_checkpoints_is_one_line(tmp_path, command):
    """Also that the command runs as users type it."""
    done = subprocess.run(
        [sys.executable, '-m', 'tpu_llm.checkpoint', command, tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ''
    assert done.stderr == f'error: {tmp_path} holds no checkpoint; give a workdir, or one folder in its checkpoints/\n'


def test_diff_with_nothing_finished(tmp_path, start, call):
    run = start(tmp_path).save(1)
    (run.folder(1) / 'COMMIT.json').unlink()
    assert call('diff', tmp_path, tmp_path) == (2, '', f'error: {tmp_path} holds no finished checkpoint\n')


def test_diff_with_one_damaged_folder_speaks_of_it_alone(tmp_path, start, call):
    run = start(tmp_path).save(1, 2)
    (run.folder(2) / 'manifest.json').unlink()
    code, _, err = call('diff', run.folder(1), run.folder(2))
    assert code == 2
    assert f'error: {run.folder(2)} is not whole (manifest.json is missing); bring it back, or give another' in err

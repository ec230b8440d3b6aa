"""Of all runs started in one workdir exactly one writes."""

import json
import os
import re
import socket
import subprocess
import sys

import pytest
from etils import epath

from tpu_llm.checkpoint import fence
from tpu_llm.checkpoint.fence import Superseded
from tpu_llm.config import ConfigError


def test_each_start_has_a_higher_number(tmp_path):
    tokens = [fence.start(tmp_path).token for _ in range(3)]
    assert [fence.order(token)[0] for token in tokens] == [1, 2, 3]
    assert sorted(fence.tokens(epath.Path(tmp_path))) == tokens
    assert all(re.fullmatch(r'\d{4}-[0-9a-f]{6}', token) for token in tokens)


def test_numbers_are_compared_as_numbers(tmp_path):
    (tmp_path / 'fence').mkdir()
    (tmp_path / 'fence' / '9999-ffffff.json').write_text('{}')
    newer = fence.start(tmp_path)
    assert newer.token.startswith('10000-')
    newer.check()


def test_the_older_run_is_told_who_took_over(tmp_path):
    older = fence.start(tmp_path)
    older.check()
    newer = fence.start(tmp_path)
    newer.check()
    with pytest.raises(Superseded) as error:
        older.check()
    started = json.loads((tmp_path / 'fence' / f'{newer.token}.json').read_text())['started']
    assert str(error.value) == (
        f'{tmp_path}: a newer run took over (start {newer.token} on host {socket.gethostname()}, '
        f'pid {os.getpid()}, at {started}); this one (start {older.token}) stops, '
        'and every committed checkpoint stays'
    )


def test_a_tie_has_one_winner(tmp_path):
    holder = json.dumps({'host': 'h', 'pid': 1, 'started': 'now'})
    (tmp_path / 'fence').mkdir()
    runs = [fence.Fence(epath.Path(tmp_path), token) for token in ('0001-aaa', '0001-bbb')]
    for run in runs:
        (tmp_path / 'fence' / f'{run.token}.json').write_text(holder)
    runs[1].check()
    with pytest.raises(Superseded):
        runs[0].check()


def test_a_start_that_is_refused_leaves_nothing(tmp_path):
    with pytest.raises(ConfigError), fence.withdrawn_on_error(fence.start(tmp_path / 'run')):
        raise ConfigError('no such data')
    assert not (tmp_path / 'run').exists()


def test_a_start_that_is_refused_leaves_what_others_made(tmp_path):
    older = fence.start(tmp_path)
    with pytest.raises(ConfigError), fence.withdrawn_on_error(fence.start(tmp_path)):
        raise ConfigError('no such data')
    older.check()
    newer = fence.start(tmp_path)
    with fence.withdrawn_on_error(newer):
        pass
    newer.check()
    with pytest.raises(Superseded, match='a newer run took over'):
        older.check()


def test_the_users_folder_stays(tmp_path):
    with pytest.raises(ConfigError), fence.withdrawn_on_error(fence.start(tmp_path)):
        raise ConfigError('no such data')
    assert tmp_path.exists()
    assert not list(tmp_path.iterdir())


def test_a_superseded_run_commits_and_removes_nothing(tmp_path, start):
    older = start(tmp_path, keep=1).save(1)
    newer = start(tmp_path).save(2)
    before = sorted(path.name for path in newer.folder(2).parent.iterdir())
    with pytest.raises(Superseded, match='a newer run took over'):
        older.save(3)
    assert newer.store.steps() == [1, 2]
    assert [name for name in before if not (tmp_path / 'checkpoints' / name).exists()] == []
    newer.save(4)
    assert not list((tmp_path / 'checkpoints').glob('00000003.*')), 'the newer run clears what the older left'


def test_two_runs_that_save_one_step_do_not_mix(tmp_path, start):
    older, newer = start(tmp_path), start(tmp_path)
    newer.save(1)
    with pytest.raises(Superseded):
        older.save(1)
    restored = newer.store.restore(newer.like())
    assert newer.bits(restored.arrays) == newer.bits(newer.state(1))


RACE = """
import sys, time
from tpu_llm.checkpoint import fence
print('ready', flush=True)
sys.stdin.readline()
held = fence.start(sys.argv[1])
for _ in range(50):
    time.sleep(0.01)
    held.check()
print('survived', held.token)
"""


def test_of_two_processes_started_at_once_one_survives(tmp_path):
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    runs = [subprocess.Popen([sys.executable, '-c', RACE, tmp_path], **pipes) for _ in range(2)]
    for run in runs:
        assert run.stdout.readline() == 'ready\n'
    for run in runs:
        run.stdin.write('go\n')
        run.stdin.flush()
    outcomes = [run.communicate(timeout=60) for run in runs]
    survivors = [out.split()[1] for out, _ in outcomes if out.startswith('survived')]
    assert survivors == [max(fence.tokens(epath.Path(tmp_path)), key=fence.order)]
    (loser,) = [err for out, err in outcomes if not out]
    assert f'a newer run took over (start {survivors[0]}' in loser


@pytest.mark.parametrize('name', ['run[1]', 'run*', 'run?'])
def test_a_path_that_orbax_cannot_glob_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match='in its path, which Orbax cannot find again; rename it'):
        fence.start(tmp_path / name)

"""Hosts that would not run the same program refuse to join, all with the same line."""

import shutil
import sys

from several import ROOT, ends, launch

from tpu_llm.parallel.deaths import LOST, named
from tpu_llm.parallel.handshake import difference, identity, refusal

PAGE = f'--config={ROOT / "tests/multihost/meeting.py"}'
COMMAND = [sys.executable, ROOT / 'launch/run.py', PAGE]
# What hosts.join waits for is a parameter, so that this test need not wait five minutes.
JOIN = f'import sys; sys.path.insert(0, "{ROOT}"); from tpu_llm.parallel import hosts; hosts._QUIET = 2; '
JOIN += 'hosts.join(None, seconds=4)'


def errors(stderr):
    return [line for line in stderr.splitlines() if line.startswith('error:')]


def test_hosts_that_are_alike_share_the_name_of_the_start(tmp_path):
    processes = launch([COMMAND] * 2)
    said = [out for out, _ in ends(processes)]
    names = {line for out in said for line in out.splitlines() if line.startswith('met at')}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(names) == 1


def test_every_host_says_which_differ_and_in_what(tmp_path):
    """Host 1 has an older jax by what its packages say of themselves, 2 another flag, 3 other code."""
    (tmp_path / '1/jax-0.9.9.dist-info').mkdir(parents=True)
    (tmp_path / '1/jax-0.9.9.dist-info/METADATA').write_text('Metadata-Version: 2.1\nName: jax\nVersion: 0.9.9\n')
    for folder in filter(lambda name: (ROOT / name).exists(), ('tpu_llm', 'configs', 'experiments', 'launch')):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns('__pycache__'))
    with open(tmp_path / 'tpu_llm/nn/norm.py', 'a') as file:
        file.write('# mine\n')
    other = [sys.executable, tmp_path / 'launch/run.py', PAGE]
    processes = launch([COMMAND, COMMAND, [*COMMAND, '--config.steps=20'], other], PYTHONPATH=f'{tmp_path}/{{}}')
    said = [errors(err) for _, err in ends(processes)]
    assert [process.returncode for process in processes] == [2] * 4
    assert said == [said[0]] * 4
    (line,) = said[0]
    assert line == (
        f'error: host 1 has jax 0.9.9 where host 0 has {identity(None)["jax"]}; install the same on all, and '
        'host 2 has config.steps = 20 where host 0 has 12; start the same command on all, and '
        'host 3 has another version of tpu_llm/nn/norm.py than host 0; bring the same code to all, as '
        '`launch/pod.py push` does'
    )


def test_a_host_that_does_not_come_is_told_from_one_that_cannot_be_reached():
    processes = launch([[sys.executable, '-c', JOIN]] * 2 + [['true']])
    stderrs = [err for _, err in ends(processes)]
    first, second, _ = map(errors, stderrs)
    assert [process.returncode for process in processes[:2]] == [LOST, LOST]
    assert first[0].startswith('error: 2 of 3 hosts came within 4 s; start the same command on all of them')
    assert second[0].startswith('error: not all of 3 hosts came within 4 s; host 0 says how many did')
    assert [line for line in stderrs[0].splitlines() if line.startswith('waiting')] == [
        'waiting for the others: 2 of 3 hosts so far'
    ]
    assert 'waiting for the others: host 0 says who is there\n' in stderrs[1]
    alone = launch([['true'], [sys.executable, '-c', JOIN]])
    said = ends(alone)[1][1]
    assert 'waiting for the others: no host 0 yet at 127.0.0.1:' in said
    assert 'host 0 did not answer at 127.0.0.1:' in errors(said)[0]


def test_the_identity_holds_versions_sources_and_the_config():
    mine = identity(None)
    assert {'Python', 'jax', 'flax', 'tpu_llm/parallel/handshake.py', 'launch/run.py', 'config'} <= set(mine)
    assert mine == identity(None)
    assert not any('__pycache__' in name for name in mine)


def test_versions_come_before_sources_and_sources_before_the_config():
    mine = {'jax': '1', 'a.py': 'x', 'b.py': 'x', 'config.steps': '1'}
    assert difference(mine, mine) == ''
    assert difference({**mine, 'config.steps': '2', 'jax': '0'}, mine).startswith('jax 0 where host 0 has 1')
    text = difference({**mine, 'config.steps': '2', 'a.py': 'y', 'b.py': 'y'}, mine)
    assert text.startswith('another version of a.py (and of 1 more files) than host 0')
    without = {name: value for name, value in mine.items() if name != 'jax'}
    assert difference(without, mine).startswith('jax none where host 0 has 1')
    assert 'c.py' in difference({**mine, 'c.py': 'x'}, mine)


def test_another_workdir_is_a_difference():
    assert difference(identity(None, 'a'), identity(None, 'b')).startswith(
        '--workdir = a where host 0 has b; start the same'
    )


def test_hosts_that_differ_alike_are_named_together():
    assert refusal({}) == ''
    text = refusal({1: 'jax 1', 2: 'jax 1', 3: 'jax 1', 5: 'another'})
    assert text == 'hosts 1-3 have jax 1, and host 5 has another'
    assert named([0, 1, 3]) == 'hosts 0, 1, 3'
    assert named([2]) == 'host 2'


def test_the_private_import_is_in_one_place():
    users = [path.name for path in (ROOT / 'tpu_llm').rglob('*.py') if 'jax._src.distributed' in path.read_text()]
    assert users == ['board.py']

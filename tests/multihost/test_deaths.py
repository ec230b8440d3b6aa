"""A host dies: the others stop soon, and what ended it is written down and quoted."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import jax
import pytest
from several import ROOT, assert_close, ends, finish, launch, run, start, wait_for_step

from launch import worker
from tpu_llm.checkpoint import reader
from tpu_llm.parallel import deaths, hosts
from tpu_llm.parallel.deaths import LOST, End, culprit, verdict

SOON = 20 + 2  # seconds in which the others stop; two for a busy machine
ABORTED = b'F0101 client.h:80] Terminating process because the JAX distributed service detected fatal errors. This'


def parent(folder, command):
    """launch/worker.py over one host's command, as launch/pod.py starts it; the kernel's counts are a file of ours."""
    (folder / 'pod/job').mkdir(parents=True)
    (folder / 'events').write_text('oom 0\noom_kill 0\n')
    code = (
        f'import pathlib, sys; sys.path.insert(0, "{ROOT / "launch"}"); import worker; '
        f'worker.supervise(sys.argv[1:], pathlib.Path("{folder}/events"))'
    )
    words = [sys.executable, '-c', code, *map(str, command)]
    return ['sh', '-c', f'exec {shlex.join(words)} > {folder}/pod/job/log 2>&1']


def parents(tmp_path, count, **arg):
    said = ','.join(f'{name}={value}' for name, value in arg.items())
    page = f'--config={ROOT / "tests/multihost/meeting.py"}:{said}'
    command = ['python', ROOT / 'launch/run.py', page, f'--workdir={tmp_path / "run"}']
    more = {'HOME': f'{tmp_path}/{{}}', 'EVENTS': f'{tmp_path}/{{}}/events', 'PYTHONPATH': str(ROOT)}
    more['PATH'] = f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}'
    return launch([parent(tmp_path / str(host), command) for host in range(count)], **more)


def died(out):
    return float(re.search(r'died at ([\d.]+)', out)[1])


def test_the_others_stop_and_quote_how_it_died(tmp_path):
    processes = parents(tmp_path, 4, seconds=1, dies=2)
    ends(processes)
    said = [(tmp_path / str(host) / 'pod/job/log').read_text() for host in range(4)]
    assert time.time() - died(said[2]) < SOON
    (folder,) = (tmp_path / 'run/hosts').iterdir()
    records = {int(file.stem): json.loads(file.read_text()) for file in folder.glob('*.json')}
    assert {host: record['lost_contact'] for host, record in records.items()} == {0: True, 1: True, 2: False, 3: True}
    assert (records[2]['signal'], records[2]['exit'], records[2]['oom_kills']) == ('SIGKILL', None, 1)
    quote = rf'^host 2 \({re.escape(os.uname().nodename)}\) was ended by SIGKILL; '
    quote += r'the kernel counted 1 out-of-memory kill$'
    for host, text in enumerate(said):
        assert len(re.findall(quote, text, re.MULTILINE)) == 1, text
        assert 'preempted' not in re.sub('.*(Task|task).*', '', text), 'nobody knows that'
        assert (tmp_path / str(host) / 'pod/job/status').read_text().startswith('137' if host == 2 else ('75', '134'))


@pytest.mark.full
def test_a_host_that_fails_alone_does_not_wait_for_those_that_wait_for_it(tmp_path):
    begun = time.monotonic()
    processes = parents(tmp_path, 2, seconds=1, fails=1)
    ends(processes)
    first, second = [(tmp_path / str(host) / 'pod/job/log').read_text() for host in range(2)]
    assert time.monotonic() - begun < 5 + SOON
    assert 'error: no such disk' in second
    assert re.search(r'^host 1 \(.*\) ended with exit status 2; the kernel counted no', first, re.MULTILINE)


@pytest.mark.parametrize(
    'collective',
    ['AllGather', 'ReduceScatter', 'all-reduce', 'all-to-all', 'collective permute', 'context initialization'],
)
def test_contact_is_lost_in_whatever_collective(collective, monkeypatch):
    """The six messages of jaxlib's Gloo, as `strings` shows them."""
    said = f'Gloo {collective} failed: [external/gloo+/gloo/transport/tcp/pair.cc:547] Connection closed by peer'
    mine = RuntimeError('one of ours')
    mine.__cause__ = jax.errors.JaxRuntimeError(f'UNKNOWN: {said}')
    monkeypatch.setattr(hosts.board, 'count', lambda: 2)
    monkeypatch.setattr(hosts, '_end_soon', lambda code: None)
    with pytest.raises(deaths.LostHost) as lost, hosts.contact(lambda error: LOST):
        raise mine
    assert f'(UNKNOWN: Gloo {collective} failed: Connection closed by peer); the same' in str(lost.value)


def record(host, code, at=0.0, oom_kills=None, log=b''):
    end = deaths.end(host, code, oom_kills, log)
    return End(**{name: getattr(end, name) for name in End.__slots__} | {'at': f'{at:09.3f}', 'machine': 'm'})


def test_who_only_lost_contact_is_never_the_cause():
    lost = {0: record(0, LOST), 1: record(1, -6, log=ABORTED), 3: record(3, 134, log=ABORTED)}
    assert culprit(lost) is None
    assert verdict(lost, 4) == 'host 2 vanished, cause unknown'
    assert verdict(lost, 6) == 'hosts 2, 4, 5 vanished, cause unknown'
    assert verdict({0: lost[0], 1: lost[1]}, 2).startswith(
        'no host died, each lost contact with another: look at the net'
    )
    assert verdict(lost | {2: record(2, 1)}, 4) == 'host 2 (m) ended with exit status 1'
    assert verdict(lost | {2: record(2, -6)}, 4) == 'host 2 (m) was ended by SIGABRT'  # an abort of its own
    assert verdict(lost | {2: record(2, 0)}, 4).startswith('no host died')


@pytest.mark.parametrize(
    ('code', 'kills', 'said'),
    [
        (-9, 2, 'host 5 (m) was ended by SIGKILL; the kernel counted 2 out-of-memory kills'),
        (137, 1, 'host 5 (m) was ended by SIGKILL; the kernel counted 1 out-of-memory kill'),
        (-9, 0, 'host 5 (m) was ended by SIGKILL; the kernel counted no out-of-memory kills'),
        (-15, None, 'host 5 (m) was ended by SIGTERM'),
        (1, 1, 'host 5 (m) ended with exit status 1; the kernel counted 1 out-of-memory kill'),
        (255, None, 'host 5 (m) ended with exit status 255'),
    ],
)
def test_an_end_in_words(code, kills, said):
    assert str(record(5, code, oom_kills=kills)) == said


def test_the_first_to_die_is_the_cause():
    both = {0: record(0, 1, at=12.0), 1: record(1, -9, at=11.0)}
    assert culprit(both) is both[1]


def tell(tmp_path, host, *flags):
    """What launch/worker.py runs after its child."""
    joined = deaths.Joined(workdir=str(tmp_path), start='20260101T000000-abcdef', host=host, hosts=2)
    deaths.announce(joined, tmp_path / f'joined{host}')
    return deaths.main([str(tmp_path / f'joined{host}'), *flags])


def test_a_host_without_a_record_vanished(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(deaths, 'PATIENCE', 1)
    assert tell(tmp_path, 0, f'--code={LOST}') == 0
    assert capsys.readouterr().out == 'host 1 vanished, cause unknown\n'
    assert tell(tmp_path, 1, '--code=-9', '--oom-kills=0') == 0
    assert capsys.readouterr().out.endswith('was ended by SIGKILL; the kernel counted no out-of-memory kills\n')
    (tmp_path / 'log').write_bytes(b'x' * 100_000 + ABORTED)
    assert tell(tmp_path, 0, '--code=-6', f'--log={tmp_path / "log"}') == 0
    assert capsys.readouterr().out.startswith('host 1 (')


def test_a_good_end_and_a_mistake_are_recorded_without_a_word(tmp_path, capsys):
    for code in (0, 2):
        assert tell(tmp_path, 0, f'--code={code}') == 0
        (file,) = (tmp_path / 'hosts').glob('*/0.json')
        assert json.loads(file.read_text())['exit'] == code
    assert capsys.readouterr().out == ''


def test_the_kernel_counts_in_either_version_of_cgroups(tmp_path):
    for text, count in (('low 0\noom 3\noom_kill 2\n', 2), ('oom_kill_disable 0\nunder_oom 0\noom_kill 1\n', 1)):
        (tmp_path / 'events').write_text(text)
        assert worker.oom_kills(tmp_path / 'events') == count
    (tmp_path / 'events').write_text('oom 1\n')  # of an old kernel
    assert worker.oom_kills(tmp_path / 'events') is None
    assert worker.oom_kills(None) is None
    if found := worker.memory_events():  # this machine's own
        assert isinstance(worker.oom_kills(found), int)


def test_the_parent_needs_nothing_but_an_old_python():
    import ast

    tree = ast.parse((ROOT / 'launch/worker.py').read_text(), feature_version=(3, 8))
    imports = {name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in [a.name for a in node.names]}
    froms = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imports | froms <= sys.stdlib_module_names | {'__future__'}


def test_what_tells_the_others_starts_without_jax():
    code = 'import sys, tpu_llm.parallel.deaths; print("jax" in sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == 'False\n', done.stderr


@pytest.mark.full
def test_killing_one_of_four_then_going_on_with_two(text, tmp_path):
    finish(start(1, tmp_path / 'one', text))
    workdir = tmp_path / 'several'
    processes = start(4, workdir, text, pause=0.5)
    wait_for_step(workdir, 5, processes)
    processes[2].send_signal(signal.SIGKILL)
    begun = time.monotonic()
    said = [err for _, err in ends(processes)]
    assert time.monotonic() - begun < SOON
    for host in (0, 1, 3):
        assert processes[host].returncode in (LOST, -signal.SIGABRT)
        assert 'error: lost contact with another host' in said[host] or 'another task died' in said[host]
        assert 'Traceback' not in said[host]
    assert reader.find(workdir).step >= 3
    finish(launch([run(workdir, text)] * 2))
    assert_close(workdir, tmp_path / 'one')

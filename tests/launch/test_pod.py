"""Pods: the exact calls of gcloud, and what happens when Cloud refuses, forgets, or takes the machines away.

No Cloud can be reached from a test, so `gcloud`, `kubectl` and `xpk` here are MOCKS: a script, first on PATH, that
writes down how it was called and plays a small Cloud. What is real: the processes, the tar, the unpacking, the files'
modes, and launch/worker.py, which the mock runs once for every worker in a home of its own, as ssh would. So these
tests prove what is called and what is survived, not that Google's side takes it; the mock's words and exit codes were
taken from the source of gcloud and from reports of its users.
"""

import ast
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from launch import cloud, pod, queued
from launch.cloud import Pod, PodError
from tpu_llm.parallel.chips import CHIPS, find

ROOT = Path(__file__).parents[2]
WHERE = ['--zone=us-west4-a', '--quiet']
QR = ['gcloud', 'compute', 'tpus', 'queued-resources']

MOCK = r'''
"""The stand-in for gcloud. `replies.json` holds answers that come before its own, each for one call of a verb."""
import json, os, pathlib, re, shutil, signal, subprocess, sys, threading
here = pathlib.Path(os.environ['MOCK'])
tool, *argv = sys.argv[1:]
with open(here / 'calls', 'a') as calls:
    calls.write(json.dumps([tool, *argv]) + '\n')
verb = argv[3] if tool == 'gcloud' else argv[0]
flag = lambda name: next((word.partition('=')[2] for word in argv if word.startswith(f'--{name}=')), None)
state, homes = here / 'state.json', sorted(here.glob('worker-*'))

def answer(code=0, out='', err=''):
    sys.stdout.write(out)
    sys.stderr.write(err)
    sys.exit(code)

def resource(value, kind, count):
    data = {'state': {'state': value}, 'tpu': {'nodeSpec': [{'node': {'acceleratorType': kind}}]}}
    if count > 1:
        data['tpu']['nodeSpec'][0]['multisliceParams'] = {'nodeCount': count}
    state.write_text(json.dumps(data))

def lose():
    for home in homes:
        if (home / 'pod/job/pid').exists():
            try:
                os.killpg(int((home / 'pod/job/pid').read_text()), signal.SIGKILL)
            except ProcessLookupError:
                pass
        shutil.rmtree(home)
        home.mkdir()

replies = json.loads((here / 'replies.json').read_text())
reply = next((reply for reply in replies if reply['verb'] == verb), {})
if reply:
    replies.remove(reply)
    (here / 'replies.json').write_text(json.dumps(replies))
if 'state' in reply:
    resource(reply['state'], reply.get('kind', 'v5litepod-16'), reply.get('count', 1))
    if 'why' in reply:
        data = json.loads(state.read_text())
        data['state']['failedData'] = {'error': {'message': reply['why']}}
        state.write_text(json.dumps(data))
if 'sleep' in reply:
    import time
    time.sleep(reply['sleep'])
if 'code' in reply:
    answer(reply['code'], reply.get('out', ''), reply.get('err', ''))
if tool == 'kubectl':
    (here / 'applied').write_text(sys.stdin.read())
    answer(0, 'jobset created\n')
if verb == 'create':
    resource('ACTIVE', flag('accelerator-type'), int(flag('node-count') or 1))
elif verb == 'describe':
    if not state.exists():
        answer(1, err='ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource not found\n')
    answer(0, state.read_text())
elif verb == 'list':
    answer(0, 'NAME  STATE\nforgotten  ACTIVE\n')
elif verb == 'delete':
    state.unlink()
    lose()
elif verb == 'scp':
    for home in homes:
        for file in argv[4:]:
            if not file.startswith('-') and ':' not in file:
                shutil.copy(file, home / 'pod')
elif verb == 'ssh':
    if not state.exists() or json.loads(state.read_text())['state']['state'] != 'ACTIVE':
        answer(1, err='ERROR: (gcloud) TPU is in state "PREEMPTED", therefore cannot be reached\n')
    codes, clients = {}, []
    def one(home):
        env = {**os.environ, 'HOME': str(home), 'HOST': home.name}
        env['PATH'] = f"{here / 'remote'}:{os.environ['PATH']}"
        client = subprocess.Popen(['bash', '-c', flag('command')], cwd=home, env=env, stdout=-1, stderr=-2, text=True)
        clients.append(client)
        for line in client.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            if 'until' in reply and reply['until'] in line:
                for other in clients:
                    other.kill()
                if reply.get('then'):
                    resource(reply['then'], 'v5litepod-16', 1)
                    lose()
                os._exit(255)
        codes[home.name] = client.wait()
    print('SSH: Attempting to connect to workers...', flush=True)
    threads = [threading.Thread(target=one, args=(home,)) for home in homes]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    sys.exit(next((code for code in codes.values() if code), 0))
'''
# On a worker: a Python that installs nothing, and knows the worker's name. Both start quickly, without site-packages.
PYTHON = f'{os.path.realpath(sys.executable)} -S -E'
NAMED = 'import os, runpy, socket, sys; socket.gethostname = lambda: os.environ["HOST"]; del sys.argv[0]; '
NAMED += 'runpy.run_path(sys.argv[0], run_name="__main__")'
REMOTE_PYTHON = f"""#!/bin/sh
if [ "$1" = -m ]; then
    echo "$@" >> ~/installed
    if [ "$3" = venv ]; then mkdir -p venv/bin && ln -s {sys.executable} venv/bin/python; fi
    exit 0
fi
[ -f "$1" ] || exit 2
exec {PYTHON} -c '{NAMED}' "$@"
"""


class Mock:
    """The folder of the stand-in: what it was asked, and what it shall answer first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pauses: list[float] = []

    def reply(self, *replies: dict) -> None:
        (self.folder / 'replies.json').write_text(json.dumps(replies))

    def calls(self, verb: str | None = None) -> list[list[str]]:
        file = self.folder / 'calls'
        calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [call for call in calls if verb is None or verb in call[:5]]

    def verbs(self) -> list[str]:
        return [call[4] if call[4] != 'ssh' else self._remote(call) for call in self.calls()]

    def _remote(self, call: list[str]) -> str:
        command = next(word for word in call if word.startswith('--command=')).partition('=')[2]
        words = shlex.split(command)
        return words[2] if words[0] == 'python3' else words[0]

    def home(self, worker: int = 0) -> Path:
        return self.folder / f'worker-{worker}'

    def has(self, state: str, kind: str = 'v5litepod-16') -> None:
        node = {'node': {'acceleratorType': kind}}
        (self.folder / 'state.json').write_text(json.dumps({'state': {'state': state}, 'tpu': {'nodeSpec': [node]}}))


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A small checkout with something that git ignores, and something that was deleted."""
    folder = tmp_path / 'checkout'
    (folder / 'launch').mkdir(parents=True)
    shutil.copy(ROOT / 'launch/worker.py', folder / 'launch')
    (folder / '.gitignore').write_text('runs/\n')
    (folder / 'runs').mkdir()
    (folder / 'runs/checkpoint').write_text('large')
    (folder / 'deleted.py').write_text('')
    subprocess.run(['git', 'init', '-q'], cwd=folder, check=True)
    subprocess.run(['git', 'add', '.'], cwd=folder, check=True)
    (folder / 'deleted.py').unlink()
    (folder / 'new file.py').write_text('print("new")')
    monkeypatch.setattr(queued, 'ROOT', folder)
    return folder


@pytest.fixture
def mock(tmp_path, monkeypatch, checkout):
    (tmp_path / 'mock.py').write_text(MOCK)
    for name in ('bin', 'remote', 'worker-0', 'worker-1'):
        (tmp_path / name).mkdir()
    for tool in ('gcloud', 'kubectl', 'xpk'):
        (tmp_path / 'bin' / tool).write_text(f'#!/bin/sh\nexec {PYTHON} {tmp_path / "mock.py"} {tool} "$@"\n')
        (tmp_path / 'bin' / tool).chmod(0o755)
    (tmp_path / 'remote/python3').write_text(REMOTE_PYTHON)
    (tmp_path / 'remote/python3').chmod(0o755)
    monkeypatch.setenv('MOCK', str(tmp_path))
    monkeypatch.setenv('PATH', f'{tmp_path / "bin"}:{os.environ["PATH"]}')
    mock = Mock(tmp_path)
    mock.reply()
    monkeypatch.setattr(pod, 'sleep', mock.pauses.append)
    monkeypatch.setattr(queued, 'sleep', mock.pauses.append)
    yield mock
    for home in tmp_path.glob('worker-*'):
        if (file := home / 'pod/job/pid').exists() and not (home / 'pod/job/status').exists():
            os.killpg(int(file.read_text()), signal.SIGKILL)


@pytest.fixture
def ready(mock):
    """A pod that is there and was pushed to."""
    mock.has('ACTIVE')
    for worker in (0, 1):
        code = mock.home(worker) / 'pod/code/launch'
        code.mkdir(parents=True)
        shutil.copy(ROOT / 'launch/worker.py', code)
    return mock


def on(verb: str, *words: str) -> int:
    return pod.main([verb, 'my-pod', '--zone=us-west4-a', *words])


def wait_for(condition) -> None:
    pause = threading.Event()
    for _ in range(400):
        if condition():
            return
        pause.wait(0.05)
    raise AssertionError('it did not come to pass in 20 seconds')


def error(capsys) -> str:
    lines = capsys.readouterr().err.splitlines()
    found = [line for line in lines if line.startswith('error:')]
    assert len(found) == 1, lines
    return found[0]


# ------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ('name', 'kind', 'runtime'),
    [
        ('v4-32', ['--accelerator-type=v4-64'], 'tpu-ubuntu2204-base'),
        ('v5e-16', ['--accelerator-type=v5litepod-16'], 'v2-alpha-tpuv5-lite'),
        ('v5p-512', ['--accelerator-type=v5p-1024'], 'v2-alpha-tpuv5'),
        ('v5p:4x8x16', ['--type=v5p', '--topology=4x8x16'], 'v2-alpha-tpuv5'),
        ('v6e-256', ['--accelerator-type=v6e-256'], 'v2-alpha-tpuv6e'),
    ],
)
def test_our_names_count_chips(name, kind, runtime):
    words = Pod('a').create(find(name), slices=1, capacity='on-demand', wait='1h')
    assert words[7:-2] == [*kind, f'--runtime-version={runtime}']


def test_counts_are_checked(capsys):
    assert on('create', '--type=v5e-16', '--slices=0') == 2
    assert "slices '0' cannot be: 1 or more" in error(capsys)
    assert on('run', '--retries=-1', '--', 'true') == 2
    assert "retries '-1' cannot be: 0 or more" in error(capsys)


def test_unknown_slices_are_refused_with_those_there_are(mock, capsys):
    assert on('create', '--type=v5e-512') == 2
    assert 'no v5e slice of 512 chips (v5e-512); the nearest: v5e-256' in error(capsys)
    assert mock.calls() == []


@pytest.mark.parametrize('verb', ['create', 'run', 'manifest', 'xpk'])
def test_several_slices_are_a_number_of_their_own(verb, mock, capsys):
    more = {'manifest': ['--image=i'], 'xpk': ['--image=i', '--cluster=c']}.get(verb, [])
    assert on(verb, '--type=2xv4:4x4x16', *more, *(['--', 'true'] if verb != 'create' else [])) == 2
    assert 'error: 2xv4:4x4x16 is 2 slices: --type=v4:4x4x16 --slices=2' in error(capsys)
    assert mock.calls() == []


def test_tpu7x_is_for_kubernetes_alone(mock, capsys):
    assert on('create', '--type=tpu7x-64') == 2
    assert 'tpu7x:4x4x4 is offered by GKE alone: use `pod.py manifest` or `pod.py xpk`' in error(capsys)
    assert set(cloud.GKE) == set(CHIPS)


@pytest.mark.parametrize('name', ['My-pod', '-pod', 'pod-', 'a' * 40, 'a;rm -rf', '$(id)', '--flag', 'a b', ''])
def test_names_that_cloud_would_refuse_are_refused_here(name):
    with pytest.raises(PodError, match='cannot be: lower-case letters'):
        Pod(name)


def test_zones_and_projects_are_checked():
    Pod('a', 'us-central1-ai1a', 'example.com:my-project')
    with pytest.raises(PodError, match="zone 'us-west4' cannot be: such as us-west4-a"):
        Pod('a', 'us-west4')
    with pytest.raises(PodError, match='gcloud projects list'):
        Pod('a', project='My Project')


# ------------------------------------------------------------------------------------------------------ calls


def test_create_calls():
    def made(**changes):
        asked = {'slices': 1, 'capacity': 'spot', 'wait': '6h'} | changes
        return Pod('a', 'us-west4-a', 'my-project').create(find('v5e-16'), **asked)

    where = ['--zone=us-west4-a', '--project=my-project', '--quiet']
    kind = ['--accelerator-type=v5litepod-16', '--runtime-version=v2-alpha-tpuv5-lite']
    until = '--valid-until-duration=6h'
    assert made() == [*QR, 'create', 'a', '--node-id=a', *kind, '--spot', until, *where]
    assert made(capacity='on-demand') == [*QR, 'create', 'a', '--node-id=a', *kind, until, *where]
    several = [*QR, 'create', 'a', '--node-count=2', '--node-prefix=a', *kind, '--reserved', until, *where]
    assert made(capacity='reserved', slices=2) == several
    more = made(account='me@my-project.iam.gserviceaccount.com', also="--network=n --labels='team=a b'")
    assert '--service-account=me@my-project.iam.gserviceaccount.com' in more
    assert more[-5:-3] == ['--network=n', '--labels=team=a b']
    with pytest.raises(PodError, match=r"duration '6 hours' cannot be: such as 24h"):
        made(wait='6 hours')


def test_a_dry_run_prints_the_calls_and_makes_none(mock, capsys):
    command = ['python', 'launch/run.py', '--workdir=gs://b/a b']
    assert on('run', '--type=v5e-16', '--capacity=spot', '--dry-run', '--', *command) == 0
    printed = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[4] for line in printed] == ['create', 'ssh', 'scp', 'ssh', 'ssh']
    assert mock.calls() == []
    sent = next(word for word in printed[-1] if word.startswith('--command=')).partition('=')[2]
    assert shlex.split(sent)[:3] == ['python3', 'pod/code/launch/worker.py', 'run']
    assert shlex.split(sent)[4:] == ['--', *command]
    assert {'--worker=all', '--node=all', '--batch-size=all'} <= set(printed[-1])


def test_a_dry_run_claims_nothing(mock, capsys):
    assert on('delete', '--dry-run') == 0
    assert on('status', '--dry-run') == 0
    said = capsys.readouterr()
    assert [shlex.split(line)[:5] for line in said.out.splitlines() if line] == [
        [*QR, verb] for verb in ('delete', 'describe', 'ssh')
    ]
    assert said.err == ''
    assert mock.calls() == []


def test_a_dry_run_of_the_remote_command_is_refused(mock, capsys):
    assert on('run', '--', 'python', 'launch/run.py', '--dry-run') == 2
    assert error(capsys) == 'error: --dry-run after the -- would go to the command: put it before the --'
    assert mock.calls() == []


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['create', 'my-pod'], 'the following arguments are required: --type; '),
        (['xpk', 'my-pod', '--type=v5e-1', '--image=i'], 'the following arguments are required: --cluster; '),
        (['create', 'my-pod', '--type=v5e-1', '--capacity=free'], "argument --capacity: invalid choice: 'free'"),
        (['run', 'my-pod', '--retries=x', '--', 'true'], "argument --retries: invalid int value: 'x'"),
        (['delete'], 'the following arguments are required: name'),
        (['begin'], "argument VERB: invalid choice: 'begin'"),
        ([], 'the following arguments are required: VERB'),
    ],
)
def test_wrong_options_are_one_line(words, message, capsys):
    assert pod.main(words) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f'error: {message}')
    assert said[0].endswith(f'{words[0] if words and "VERB" not in message else ""} --help lists the options')


def test_a_missing_tool_is_named(mock, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))
    assert on('delete') == 2
    assert error(capsys) == 'error: gcloud is not installed: cloud.google.com/sdk/docs/install'


# ----------------------------------------------------------------------------------------------------- create


def test_create_waits_until_the_pod_is_active(mock, capsys):
    waits = [{'verb': 'describe', 'state': state} for state in ('WAITING_FOR_RESOURCES', 'PROVISIONING')]
    mock.reply({'verb': 'describe', 'code': 1, 'err': 'ERROR: (x) NOT_FOUND: y'}, *waits, waits[-1], waits[-1],
               {'verb': 'describe', 'state': 'ACTIVE'})  # fmt: skip
    assert on('create', '--type=v5e-16') == 0
    assert mock.verbs() == ['describe', 'create', *['describe'] * 5]
    assert mock.pauses == [10, 10, 20, 40]
    assert 'my-pod: PROVISIONING' in capsys.readouterr().err


@pytest.mark.parametrize('half', ['WAITING_FOR_RESOURCES', 'CREATING', 'ACTIVE'])
def test_create_again_adopts_what_is_half_there(mock, half):
    mock.has(half)
    mock.reply({'verb': 'describe', 'state': half}, {'verb': 'describe', 'state': 'ACTIVE'})
    assert on('create', '--type=v5e-16') == 0
    assert mock.calls('create') == []


@pytest.mark.parametrize('dead', ['FAILED', 'SUSPENDED'])
def test_create_again_deletes_what_is_dead(mock, dead):
    mock.has(dead)
    assert on('create', '--type=v5e-16') == 0
    assert mock.verbs() == ['describe', 'delete', 'describe', 'create', 'describe']
    assert mock.calls('delete') == [[*QR, 'delete', 'my-pod', '--force', *WHERE]]


def test_another_pod_of_that_name_is_not_adopted(mock, capsys):
    mock.has('ACTIVE', kind='v6e-8')
    assert on('create', '--type=v5e-16') == 2
    assert '1 x v6e-8, not 1 x v5litepod-16: delete it first, or take another name' in error(capsys)
    mock.has('ACTIVE')
    assert on('create', '--type=v5e-16', '--slices=2') == 2
    assert 'not 2 x v5litepod-16' in error(capsys)


QUOTA = """ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota limit
'TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone us-west4-a.
"""


def test_no_quota_is_told_in_one_line_with_the_mend(mock, capsys):
    mock.reply({'verb': 'create', 'code': 1, 'err': QUOTA})
    assert on('create', '--type=v5e-16', '--capacity=spot') == 2
    said = error(capsys)
    assert 'Limit: 0 in zone us-west4-a; ask for more at console.cloud.google.com/iam-admin/quotas' in said
    assert 'pod.py status' in said


def test_a_request_that_failed_says_why(mock, capsys):
    mock.reply({'verb': 'create', 'state': 'FAILED', 'why': 'There is no more capacity in the zone', 'code': 0})
    assert on('create', '--type=v5e-16') == 2
    said = error(capsys)
    assert 'my-pod could not be had: There is no more capacity in the zone; wait longer (--wait=48h)' in said
    assert len(mock.calls('create')) == 1


def test_a_pod_that_is_taken_away_again_and_again_is_given_up(mock, capsys):
    mock.reply(*[{'verb': 'create', 'state': 'SUSPENDED', 'code': 0}] * 9)
    assert on('create', '--type=v5e-16', '--capacity=spot', '--retries=2') == 2
    assert 'taken away 3 times before it was used; try another zone' in error(capsys)


def test_a_call_without_an_answer_ends(mock, monkeypatch, capsys):
    monkeypatch.setattr(queued, 'LIMIT', 0.3)
    mock.reply({'verb': 'describe', 'sleep': 30})
    assert on('create', '--type=v5e-16') == 2
    assert 'queued-resources describe: no answer in 0.3 s; the same command goes on from what there is' in error(capsys)


@pytest.mark.parametrize(
    ('said', 'mend'),
    [
        ('ERROR: (gcloud.x) PERMISSION_DENIED: no', 'roles/tpu.admin'),
        ('ERROR: (g) Cloud TPU API has not been used in project 1 before', 'gcloud services enable tpu.googleapis.com'),
        ('ERROR: (g) There was a problem refreshing auth tokens: Reauthentication failed.', 'gcloud auth login'),
        ('ERROR: (g) The required property [compute/zone] is not currently set.', 'gcloud config set compute/zone'),
        ('WARNING: x\nERROR: (g) Key not in agent: use ssh-add', 'ssh-add ~/.ssh/google_compute_engine'),
    ],
)
def test_known_complaints_have_a_mend(said, mend):
    line = cloud.explain(said)
    assert mend in line
    assert '\n' not in line
    assert 'WARNING' not in line


def test_unknown_complaints_are_passed_on():
    assert cloud.explain('one\ntwo\nERROR: (gcloud.x) Something\nnew') == 'Something new'
    assert cloud.explain('') == 'it failed without a word'


# ------------------------------------------------------------------------------------------------------- push


def test_push_brings_what_git_would_and_nothing_else(mock, checkout):
    mock.has('ACTIVE')
    (mock.home(1) / 'pod/code/runs').mkdir(parents=True)
    assert on('push') == 0
    for worker in (0, 1):
        code = mock.home(worker) / 'pod/code'
        there = {str(path.relative_to(code)) for path in code.rglob('*') if path.is_file()}
        assert there == {'launch/worker.py', '.gitignore', 'new file.py'}
        assert stat.S_IMODE((mock.home(worker) / 'pod').stat().st_mode) == 0o700
    (checkout / 'new file.py').unlink()
    assert on('push') == 0
    assert not (mock.home() / 'pod/code/new file.py').exists()
    assert (mock.home(1) / 'pod/code/runs').exists()  # a run's own files outlive a push
    installed = (mock.home() / 'installed').read_text().splitlines()
    assert installed[-1].endswith('pip install --quiet --python venv/bin/python -e code[tpu,gcs]')
    assert sum('uv venv' in line for line in installed) == 1
    assert [call[4] for call in mock.calls()] == ['ssh', 'scp', 'ssh'] * 2


def test_secrets_travel_in_a_file_only(mock, tmp_path, capfd):
    mock.has('ACTIVE')
    secret = tmp_path / 'my.env'
    secret.write_text('# mine\nWANDB_API_KEY=xyzzy=1\n')
    secret.chmod(0o600)
    assert on('push', f'--env-file={secret}') == 0
    for worker in (0, 1):
        assert stat.S_IMODE((mock.home(worker) / 'pod/env').stat().st_mode) == 0o600
    capfd.readouterr()
    assert on('run', '--', 'sh', '-c', 'echo $WANDB_API_KEY | rev') == 0
    assert '1=yzzyx' in capfd.readouterr().out
    assert 'xyzzy' not in (mock.folder / 'calls').read_text()


def test_an_open_or_broken_file_of_secrets_is_refused(mock, tmp_path, capsys):
    secret = tmp_path / 'my.env'
    assert on('push', f'--env-file={secret}') == 2
    assert f'no file {secret}' in error(capsys)
    secret.write_text('WANDB_API_KEY=xyzzy\nexport A=b\n')
    secret.chmod(0o644)
    assert on('push', f'--env-file={secret}') == 2
    assert f'can be read by others: chmod 600 {secret}' in error(capsys)
    secret.chmod(0o600)
    assert on('push', f'--env-file={secret}') == 2
    said = error(capsys)
    assert 'line 2: not NAME=value' in said
    assert 'xyzzy' not in said


def test_secrets_on_the_command_line_are_refused(mock, capsys):
    assert on('run', '--', 'env', 'WANDB_API_KEY=xyzzy', 'python') == 2
    said = error(capsys)
    assert 'WANDB_API_KEY on a command line is seen by everyone' in said
    assert 'xyzzy' not in said
    assert mock.calls() == []


def test_what_is_no_checkout_cannot_be_pushed(mock, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(queued, 'ROOT', tmp_path / 'bin')
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path))
    assert on('push') == 2
    assert 'cannot be pushed: fatal: not a git repository' in error(capsys)


# -------------------------------------------------------------------------------------------------------- run


def test_run_gathers_the_logs_of_all_workers(ready, capfd):
    assert on('run', '--', 'sh', '-c', 'echo "hello  from $HOST"; echo oops >&2') == 0
    lines = capfd.readouterr().out.splitlines()
    for worker in ('worker-0', 'worker-1'):
        assert f'[{worker}] hello  from {worker}' in lines
        assert f'[{worker}] oops' in lines
    assert ready.pauses == []


def test_a_command_that_fails_is_not_tried_again(ready, capfd):
    assert on('run', '--type=v5e-16', '--', 'sh', '-c', 'echo broken; [ $HOST = worker-0 ] || exit 7') == 7
    said = capfd.readouterr()
    assert '[worker-1] broken' in said.out
    assert 'worker-1 ended with exit 7, and the pod is well' in said.err
    assert ready.verbs().count('run') == 1
    assert (
        pod.SETTLE in ready.pauses
    )  # Cloud was asked again, in case this was a preemption that it did not know of yet


def test_a_users_mistake_ends_at_once(ready):
    assert on('run', '--', 'sh', '-c', 'exit 2') == 2
    assert ready.pauses == []


def test_a_command_that_is_not_there_says_so(ready, capfd):
    assert on('run', '--', 'no-such-program') == 127
    assert 'no-such-program: No such file or directory' in capfd.readouterr().out


def test_nothing_was_pushed(mock, capsys):
    mock.has('ACTIVE')
    assert on('run', '--', 'true') == 2
    assert 'no worker answered: pod.py push my-pod first' in error(capsys)


def test_run_needs_a_command(mock, capsys):
    assert on('run') == 2
    assert 'no command to run: put it last, after --' in error(capsys)


SLOW = 'for i in 1 2 3 4 5; do echo line $i; sleep 0.1; done; echo $$ >> ~/started'


def test_a_dropped_ssh_attaches_to_the_same_run(ready, capfd):
    ready.reply({'verb': 'ssh', 'until': 'line 3'})
    assert on('run', '--', 'sh', '-c', SLOW) == 0
    out = capfd.readouterr().out
    for worker in (0, 1):
        assert f'[worker-{worker}] line 5' in out
        assert len((ready.home(worker) / 'started').read_text().splitlines()) == 1
    assert ready.verbs().count('run') == 2


def test_the_same_command_from_elsewhere_attaches(ready, capfd):
    codes, heard = [], []
    waits = 'echo begun; echo x >> ~/started; until [ -e ~/go ]; do sleep 0.05; done'

    def begun(times: int) -> bool:
        heard.append(capfd.readouterr().out)
        return ''.join(heard).count('] begun') == times

    threads = [threading.Thread(target=lambda: codes.append(on('run', '--', 'sh', '-c', waits))) for _ in range(2)]
    threads[0].start()
    wait_for(lambda: begun(2))
    threads[1].start()
    wait_for(lambda: begun(4))
    for worker in (0, 1):
        (ready.home(worker) / 'go').touch()
    for thread in threads:
        thread.join(20)
    assert codes == [0, 0]
    assert (ready.home() / 'started').read_text() == 'x\n'


def test_control_c_leaves_the_run_alone(ready, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(queued.Queued, 'attend', interrupted)
    assert on('run', '--', 'true') == 130
    assert 'the same command attaches, `stop` ends it' in capsys.readouterr().err


def test_a_run_that_ended_while_nobody_listened_is_not_run_again(ready):
    ready.reply({'verb': 'ssh', 'until': 'line 5'})
    assert on('run', '--', 'sh', '-c', SLOW) == 0
    assert len((ready.home() / 'started').read_text().splitlines()) == 1


def test_a_dropped_ssh_is_tried_a_bounded_number_of_times(ready, capsys):
    ready.reply(*[{'verb': 'ssh', 'code': 255, 'err': 'ssh: connection refused\n'}] * 9)
    assert on('run', '--retries=3', '--', 'true') == 2
    assert 'gave up after 4 tries, my-pod being ACTIVE; the same command continues' in error(capsys)
    assert [pause for pause in ready.pauses if pause != pod.SETTLE] == [10, 20, 40]


def test_cloud_out_of_reach_is_not_a_lost_pod(ready, capfd):
    down = {'code': 1, 'err': 'ERROR: (gcloud) Unable to find the server at tpu.googleapis.com'}
    ready.reply({'verb': 'ssh', 'until': 'line 2'}, {'verb': 'describe', **down})
    assert on('run', '--', 'sh', '-c', SLOW) == 0
    assert len((ready.home() / 'started').read_text().splitlines()) == 1
    assert 'Unable to find the server' in capfd.readouterr().err


@pytest.mark.parametrize(
    'said',
    [
        'ERROR: (gcloud.x) The required property [project] is not currently set.',
        'ERROR: (gcloud.x) Failed to find attribute [zone].\n- set the property `compute/zone`',
        'ERROR: (gcloud.x) PERMISSION_DENIED: no',
        'ERROR: (gcloud.x) You do not currently have an active account selected. no active account',
    ],
)
def test_what_no_try_mends_is_not_tried_again(ready, capsys, said):
    ready.reply(*[{'verb': verb, 'code': 1, 'err': said} for verb in ('ssh', 'describe')])
    assert on('run', '--', 'true') == 2
    mend = next(mend for pattern, mend in cloud.SETUP.items() if re.search(pattern, said, re.IGNORECASE))
    assert error(capsys).endswith(f'; {mend}')
    assert ready.pauses == []


def test_a_preempted_pod_is_made_again_and_the_run_goes_on(mock, capfd):
    assert on('create', '--type=v5e-16', '--capacity=spot') == 0
    assert on('push') == 0
    mock.reply({'verb': 'ssh', 'until': 'line 3', 'then': 'SUSPENDED'})
    (mock.folder / 'calls').unlink()
    assert on('run', '--type=v5e-16', '--capacity=spot', '--', 'sh', '-c', SLOW) == 0
    made_again = ['delete', 'describe', 'create', 'describe', 'install', 'scp', 'cd', 'run']
    assert mock.verbs() == ['describe', 'run', 'describe', 'describe', *made_again]
    assert '[worker-1] line 5' in capfd.readouterr().out
    tokens = {shlex.split(word)[3] for call in mock.calls('ssh') for word in call if 'worker.py run' in word}
    assert len(tokens) == 2


def test_preemptions_are_survived_a_bounded_number_of_times(ready, capsys):
    ready.reply(*[{'verb': 'ssh', 'until': 'begun', 'then': 'SUSPENDED'}] * 2)
    assert on('run', '--type=v5e-16', '--retries=0', '--', 'sh', '-c', 'echo begun; sleep 30') == 2
    assert 'gave up after 1 tries, my-pod being SUSPENDED' in error(capsys)
    assert ready.calls('create') == []


def test_without_a_type_a_preempted_pod_is_not_replaced(ready, capsys):
    ready.reply({'verb': 'ssh', 'until': 'begun', 'then': 'SUSPENDED'})
    assert on('run', '--', 'sh', '-c', 'echo begun; sleep 30') == 2
    assert 'my-pod is SUSPENDED: with --type=… and --capacity=… this command creates it again' in error(capsys)


def test_a_run_that_was_told_to_save_and_stop_is_started_again(ready):
    saves = 'echo x >> ~/started; [ -s ~/second ] || { echo y > ~/second; echo "preempted: saved at step 4/9"; }'
    assert on('run', '--', 'sh', '-c', saves) == 0
    assert len((ready.home() / 'started').read_text().splitlines()) == 2


def test_the_loop_says_what_is_listened_for():
    texts = [node.value for node in ast.walk(ast.parse((ROOT / 'tpu_llm/train/loop.py').read_text()))
             if isinstance(node, ast.Constant) and isinstance(node.value, str)]  # fmt: skip
    assert any(text.startswith(queued.PREEMPTED) for text in texts)


# ------------------------------------------------------------------------------------- stop, status, delete


SAVING = 'trap "echo saved; exit 0" TERM; echo begun; while :; do sleep 0.05; done'


def test_stop_lets_the_run_save_and_the_one_who_listens_knows(ready, capfd):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(on('run', '--', 'sh', '-c', SAVING)))
    thread.start()
    logs = [ready.home(worker) / 'pod/job/log' for worker in (0, 1)]
    wait_for(lambda: all(log.exists() and 'begun' in log.read_text() for log in logs))
    assert on('status') == 0
    assert on('push') == 2  # not under a run's feet
    assert on('run', '--', 'other') == 3
    assert on('stop') == 0
    thread.join(20)
    assert codes == [0]
    said = capfd.readouterr()
    assert '[worker-1] saved' in said.out
    assert "[worker-1] running: sh -c 'trap" in said.out
    assert '[worker-0] busy with another command, which `pod.py stop` ends' in said.out
    assert 'a command runs here: pod.py stop ends it' in said.err
    assert on('status') == 0
    assert '[worker-0] exit 0: sh -c' in capfd.readouterr().out


def test_a_killed_command_is_told_by_its_signal(ready, capfd):
    assert on('run', '--', 'sh', '-c', 'kill -9 $$') == 137
    assert 'ended: exit 137 (SIGKILL)' in capfd.readouterr().out


def test_a_command_never_ends_as_ssh_would(ready):
    assert on('run', '--', 'sh', '-c', 'exit 255') == 255
    assert ready.verbs().count('run') == 1  # not taken for a dropped connection


def test_status_says_what_there_is(mock, capfd):
    assert on('status') == 0
    assert 'my-pod: gone' in capfd.readouterr().out
    assert pod.main(['status', '--zone=us-west4-a']) == 0
    assert 'forgotten  ACTIVE' in capfd.readouterr().out
    assert mock.calls('list') == [[*QR, 'list', *WHERE]]


def test_delete(mock, capfd):
    mock.has('ACTIVE')
    assert on('delete') == 0
    assert mock.calls() == [[*QR, 'delete', 'my-pod', '--force', *WHERE]]
    assert 'my-pod is deleted' in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------- Kubernetes


def test_a_jobset(mock, capsys):
    words = ['--type=tpu7x-64', '--slices=2', '--image=i', '--capacity=spot', '--secret=s', '--service-account=k']
    command = ['python', 'launch/run.py', '--workdir=gs://b/a b']
    assert on('manifest', *words, '--', *command) == 0
    made = yaml.safe_load(capsys.readouterr().out)
    assert (made['apiVersion'], made['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
    assert made['spec']['failurePolicy']['maxRestarts'] == 5
    (replicated,) = made['spec']['replicatedJobs']
    job = replicated['template']['spec']
    assert (replicated['replicas'], job['parallelism'], job['completions'], job['backoffLimit']) == (2, 16, 16, 0)
    inner = job['template']['spec']
    assert inner['nodeSelector'] == {
        'cloud.google.com/gke-tpu-accelerator': 'tpu7x',
        'cloud.google.com/gke-tpu-topology': '4x4x4',
        'cloud.google.com/gke-spot': 'true',
    }
    (container,) = inner['containers']
    assert container['command'] == command
    assert container['resources']['limits'] == {'google.com/tpu': 4}
    assert container['envFrom'] == [{'secretRef': {'name': 's'}}]
    assert inner['serviceAccountName'] == 'k'
    assert mock.calls() == []


def test_a_jobset_is_handed_to_kubectl(mock):
    assert on('manifest', '--type=v5e-1', '--image=i', '--apply', '--', 'true') == 0
    assert mock.calls() == [['kubectl', 'apply', '-f', '-']]
    applied = yaml.safe_load((mock.folder / 'applied').read_text())
    job = applied['spec']['replicatedJobs'][0]['template']['spec']
    assert job['parallelism'] == 1
    assert job['template']['spec']['containers'][0]['resources']['limits'] == {'google.com/tpu': 1}


def test_kubectl_failing_is_told(mock, capsys):
    mock.reply({'verb': 'apply', 'code': 1, 'err': 'error: no matches for kind "JobSet" in version "x"'})
    assert on('manifest', '--type=v5e-1', '--image=i', '--apply', '--', 'true') == 2
    assert 'no matches for kind "JobSet"' in error(capsys)


def test_the_call_of_xpk(mock):
    more = ['--cluster=c', '--image=i', '--env-file=my.env', '--retries=3']
    assert on('xpk', '--type=v5p-512', '--slices=2', *more, '--', 'python', 'a b') == 0
    assert mock.calls() == [
        ['xpk', 'workload', 'create', '--workload=my-pod', '--cluster=c', '--tpu-type=v5p-1024', '--num-slices=2',
         '--docker-image=i', "--command=python 'a b'", '--max-restarts=3', '--env-file=my.env', '--zone=us-west4-a']
    ]  # fmt: skip


def test_a_worker_that_only_lost_contact_is_not_named_as_the_one_that_failed():
    assert [*queued.Ended(exits={'a': 75, 'b': 134, 'c': 0, 'd': 137}).failed] == ['d', 'a', 'b']

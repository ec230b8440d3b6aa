"""Runs elsewhere: the exact calls of launch/pod.py and kubectl, and what is made of what they say.

No cluster can be reached from a test: `kubectl` is a script, first on PATH, that writes down how it was called and
plays a cluster of one file a JobSet. launch/pod.py is the real one but where a run on a pod is played.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from etils import epath
from toy_sweep import Toy

from launch.cloud import RULES
from tpu_llm.config import RunError
from tpu_llm.scaling import drive, jobs, sweep
from tpu_llm.scaling.jobs import JobSets, Pod, jobset_name
from tpu_llm.scaling.sweep import Job, Try

POD = [sys.executable, str(Path(__file__).parents[2] / 'launch/pod.py')]

KUBECTL = """
import json, os, pathlib, sys
here = pathlib.Path(os.environ['CLUSTER'])
verb, *rest = sys.argv[1:]
with open(here / 'calls', 'a') as file:
    file.write(' '.join([verb, *rest]) + chr(10))
if verb == 'apply':
    text = sys.stdin.read()
    name = next(line.split()[-1] for line in text.splitlines() if line.startswith('  name: '))
    (here / f'{name}.yaml').write_text(text)
    (here / f'{name}.json').write_text(json.dumps({'status': {}}))
elif verb == 'delete':
    (here / f'{rest[1]}.json').unlink(missing_ok=True)
elif verb == 'get':
    if (here / 'down').exists():
        sys.exit('Unable to connect to the server')
    file = here / f'{rest[1]}.json'
    print(file.read_text() if file.exists() else '')
"""

# Plays `pod.py run`: takes down its words, and how the run ends is what the run's name begins with.
RUN = """
import json, pathlib, signal, sys, time
here, words = pathlib.Path(sys.argv[1]), sys.argv[2:]
with open(here / 'calls', 'a') as file:
    file.write(json.dumps(words) + chr(10))
name = words[words.index('one') + 1]
if name.startswith('slow'):
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    print('listening', flush=True)
    (here / 'slow').touch()
    time.sleep(30)
if name.startswith('lost'):
    sys.exit(1)
folder = here / 'runs' / name
folder.mkdir(parents=True)
tries = [{'status': 'finished', 'reason': '', 'seconds': 0.0, 'at': ''}]
(folder / 'tries.json').write_text(json.dumps({'tries': tries, 'config': CONFIG}))
"""


def one(job):
    return ['python', 'launch/sweep.py', 'one', job.name, '--config=page.py']


@pytest.fixture
def job(tmp_path):
    return lambda name: Job(name, Toy(), {}, epath.Path(tmp_path / 'runs' / name))


class View:
    def changed(self, job, status, reason=''):
        pass

    def tick(self):
        pass


# -------------------------------------------------------------------------------------------------------- on a pod


def test_a_pod_is_asked_through_pod_py(job):
    """What launch/pod.py makes of the words, in its own dry run."""
    engine = Pod(POD, ['mine', '--zone=us-west4-a', '--dry-run'], one)
    said = subprocess.run([*engine.words, *one(job('rate=0.1'))], capture_output=True, text=True, check=True).stdout
    assert said.startswith('gcloud compute tpus queued-resources ssh mine --worker=all --node=all')
    assert 'python launch/sweep.py one rate=0.1 --config=page.py' in said


@pytest.fixture
def pod(tmp_path):
    toy = {'type': 'toy_sweep.Toy', 'ends': 'well', 'seconds': 0.0, 'rate': 0.1, 'steps': 1}
    (tmp_path / 'pod.py').write_text(f'CONFIG = {json.dumps(toy)}\n{RUN}')
    return Pod([sys.executable, str(tmp_path / 'pod.py'), str(tmp_path)], ['mine', '--type=v5e-16'], one)


def test_a_pod_runs_one_after_another(pod, job, tmp_path):
    made = drive.Drive([job('a'), job('lost'), job('b')], pod, View(), retries=1)
    made.run()
    assert made.status == {'a': 'finished', 'lost': 'failed', 'b': 'finished'}
    assert sweep.tries(job('lost').folder)[-1].reason == 'pod.py ended with exit 1, and the run said nothing'
    calls = [json.loads(line) for line in (tmp_path / 'calls').read_text().splitlines()]
    assert [call[call.index('one') + 1] for call in calls] == ['a', 'lost', 'b', 'lost']
    assert calls[0] == ['run', 'mine', '--type=v5e-16', '--', *one(job('a'))]


def test_a_stopped_sweep_leaves_the_pod_at_work(pod, job, tmp_path):
    pod.start(job('slow'))
    assert not pod.room(job('b'))
    while not (tmp_path / 'slow').exists():
        time.sleep(0.01)
    process = pod._process
    pod.stop()
    assert process.returncode == 130  # as after Ctrl-C, on which pod.py leaves the run alone


# ---------------------------------------------------------------------------------------------------- on a cluster


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    (tmp_path / 'bin').mkdir()
    tool = tmp_path / 'bin/kubectl'
    tool.write_text(f'#!{sys.executable} -S\n{KUBECTL}')
    tool.chmod(0o755)
    monkeypatch.setenv('CLUSTER', str(tmp_path))
    monkeypatch.setenv('PATH', str(tmp_path / 'bin'), prepend=':')
    monkeypatch.setattr(jobs, 'LOOK', 0.0)
    return tmp_path


def verbs(cluster):
    return [line.split()[0] for line in (cluster / 'calls').read_text().splitlines()]


def test_names_are_what_kubernetes_and_pod_py_allow(job):
    names = [jobset_name(job(name)) for name in ('Rate=0.1,Width=64', 'Rate=0.1,Width=65', '=', 'x' * 150)]
    assert all(re.fullmatch(RULES['name'][0], name) for name in names)
    assert len(set(names)) == 4
    assert names[0].startswith('r-rate-0-1-width-64-')


def test_a_jobset_is_submitted_awaited_and_tried_again(cluster, job):
    engine = JobSets(POD, ['--type=v5e-16', '--image=me/it', '--capacity=spot'], one)
    run, lost = job('rate=0.1'), job('lost')
    engine.start(run)
    name = jobset_name(run)
    made = yaml.safe_load((cluster / f'{name}.yaml').read_text())
    container = made['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']['containers'][0]
    assert (container['command'], container['image']) == (one(run), 'me/it')
    assert engine.ended() == []

    sweep.record(run, Try(status='finished'))
    assert engine.ended() == [('rate=0.1', '')]

    engine.start(lost)
    (cluster / f'{jobset_name(lost)}.json').write_text('{"status": {"terminalState": "Failed"}}')
    ((_, why),) = engine.ended()
    assert why == f'its JobSet is failed, and it said nothing: kubectl describe jobset {jobset_name(lost)}'
    engine.start(lost)  # again: what is over goes first
    assert verbs(cluster)[-3:] == ['get', 'delete', 'apply']


def test_a_sweep_that_comes_back_adopts_what_it_submitted(cluster, job):
    run = job('rate=0.1')
    for _ in range(2):
        engine = JobSets(POD, ['--type=v5e-16', '--image=me/it'], one)
        engine.start(run)
        engine.stop()
    assert verbs(cluster) == ['get', 'delete', 'apply', 'get']


def test_what_kubectl_refuses_is_one_line(cluster, job):
    (cluster / 'down').touch()
    engine = JobSets(POD, ['--type=v5e-16', '--image=me/it'], one)
    with pytest.raises(RunError, match=r'kubectl get jobset r-a-.*: Unable to connect to the server'):
        engine.start(job('a'))


def test_a_mistake_in_the_words_is_pod_pys(cluster, job):
    engine = JobSets(POD, ['--type=v5e-17', '--image=me/it'], one)
    with pytest.raises(RunError, match='there is no v5e slice of 17 chips'):
        engine.start(job('a'))

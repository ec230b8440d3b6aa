"""Several hosts train as one does, stop together, and go on with fewer."""

import signal

import pytest
from several import GLOO, STEPS, assert_close, ends, finish, start, wait_for_step

from tpu_llm.checkpoint import reader
from tpu_llm.parallel.deaths import LOST

EXPERT = ('--config.mesh.expert=4',)
STAGE = ('--config.mesh.stage=2', '--config.model.layers=4', '--config.pipeline.circles=2')


@pytest.fixture(scope='module')
def one_host(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('one')
    finish(start(1, workdir, text))
    return workdir


def test_two_hosts_train_like_one(one_host, text, tmp_path):
    said = finish(start(2, tmp_path, text))
    assert_close(tmp_path, one_host)
    printed = [line for line in said[1][0].splitlines() if not GLOO.search(line)]
    assert printed == [], 'only the first host prints'


@pytest.mark.full
def test_experts_on_several_hosts(text, tmp_path):
    """Each of the four devices holds one of four experts: every token crosses the hosts."""
    for count in (1, 2, 4):
        finish(start(count, tmp_path / str(count), text, *EXPERT, experts=4))
        assert_close(tmp_path / str(count), tmp_path / '1')


@pytest.mark.full
def test_a_pipeline_through_several_hosts(text, tmp_path):
    """The first stage is on the first half of the hosts, the second on the other."""
    for count in (1, 2, 4):
        finish(start(count, tmp_path / str(count), text, *STAGE))
        assert_close(tmp_path / str(count), tmp_path / '1')


def test_preempting_one_host_stops_both_at_one_step(one_host, text, tmp_path):
    processes = start(2, tmp_path, text, pause=0.5)
    wait_for_step(tmp_path, 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    said = finish(processes)
    assert 'preempted' in said[0][0]
    assert 3 <= reader.find(tmp_path).step < STEPS
    finish(start(2, tmp_path, text))
    assert_close(tmp_path, one_host)


@pytest.mark.full
def test_a_host_that_fails_after_a_save_does_not_wait_to_agree_on_it(text, tmp_path):
    """The others are in a step by then, and wait for it there."""
    processes = start(2, tmp_path, text, stuck='1/5/0')
    (_, first), (_, second) = ends(processes, seconds=60)
    assert processes[1].returncode == 2
    assert 'error: no such disk' in second
    assert processes[0].returncode in (LOST, -6), first

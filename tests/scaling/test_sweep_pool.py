"""The pool of this machine: who gets which cores, what fits its memory, what a dying worker costs, how it stops.

Workers here are small scripts that speak the protocol; tests/launch/test_sweep_command.py has the real ones.
"""

import json
import os
import sys
import time

import pytest
from etils import epath
from toy_sweep import Toy

from tests.train import tiny
from tpu_llm.data.tokenizer import TrainedBPE
from tpu_llm.scaling import drive, local, memory, shared, sweep
from tpu_llm.scaling.local import Budget, Pool
from tpu_llm.scaling.sweep import Job

# Says how a run ended as a worker does. Of the name, `die` kills it, `slow` takes a while and saves when it is to stop.
WORKER = """
import json, os, pathlib, signal, sys, threading, time
runs, cores = pathlib.Path(sys.argv[1]), sys.argv[2]
print('ready', flush=True)
stopping = threading.Event()
names = []
def listen():
    for line in sys.stdin:
        names.append(line.strip())
    stopping.set()
threading.Thread(target=listen, daemon=True).start()
while not (stopping.is_set() and not names):
    if not names:
        time.sleep(0.005)
        continue
    name = names.pop(0)
    folder = runs / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'starts', 'a') as file:
        file.write(f'{os.getpid()} {cores}\\n')
    if name.startswith('die') and len((folder / 'starts').read_text().splitlines()) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    stopped = name.startswith('slow') and stopping.wait(20)
    if name.startswith('exit'):
        sys.exit(7)
    tries = [{'status': 'stopped' if stopped else 'finished', 'reason': '', 'seconds': 0.0, 'at': ''}]
    (folder / 'tries.json').write_text(json.dumps({'tries': tries, 'config': CONFIG}))
    print(name, flush=True)
    time.sleep(0.05)
"""


class View:
    def changed(self, job, status, reason=''):
        pass

    def tick(self):
        pass


@pytest.fixture
def pool(tmp_path):
    """A pool of stand-ins for workers, and the jobs of these names."""
    script = tmp_path / 'worker.py'
    config = {'type': 'toy_sweep.Toy', 'ends': 'well', 'seconds': 0.0, 'rate': 0.1, 'steps': 1}
    script.write_text(f'CONFIG = {json.dumps(config)}\n' + WORKER)

    def made(*names, processes=2, cores=(0, 1), gib=100.0):
        there = Budget(processes=processes, cores=cores, memory=gib)
        jobs = [Job(name, Toy(), {}, epath.Path(tmp_path / 'runs' / name)) for name in names]
        return Pool([sys.executable, str(script), str(tmp_path / 'runs')], there, tmp_path), jobs

    return made


def starts(job):
    """(process, cores) of each start."""
    return [tuple(line.split(' --cores=')) for line in (job.folder / 'starts').read_text().splitlines()]


def test_workers_do_one_run_after_another_on_cores_of_their_own(pool):
    engine, jobs = pool(*'abcdef')
    made = drive.Drive(jobs, engine, View(), retries=0)
    made.run()
    assert set(made.status.values()) == {'finished'}
    seen = {start for job in jobs for start in starts(job)}
    assert len(seen) == 2
    assert {cores for _, cores in seen} == {'0', '1'}
    assert engine.workers == []


def test_a_dying_worker_costs_its_run_only(pool):
    engine, jobs = pool('die', 'exit', 'a', 'b')
    made = drive.Drive(jobs, engine, View(), retries=1)
    made.run()
    assert made.status == {'die': 'finished', 'exit': 'failed', 'a': 'finished', 'b': 'finished'}
    assert len(starts(jobs[0])) == 2
    assert [each.reason for each in sweep.tries(jobs[1].folder)] == ['its process ended with exit 7'] * 2


def test_the_reason_names_the_signal(pool):
    engine, jobs = pool('die')
    drive.Drive(jobs, engine, View(), retries=0).run()
    (only,) = sweep.tries(jobs[0].folder)
    assert only.status == 'lost'
    assert 'was ended by SIGKILL; the kernel does so where memory is short' in only.reason


def test_stopping_lets_runs_save_and_leaves_no_process(pool):
    engine, jobs = pool('slow', 'slower')
    for job in jobs:
        assert engine.room(job)
        engine.start(job)
    assert not engine.room(jobs[0])
    while not all((job.folder / 'starts').exists() for job in jobs):
        time.sleep(0.01)
    processes = [worker.process for worker in engine.workers]
    engine.stop()
    assert [process.returncode for process in processes] == [0, 0]
    assert [sweep.tries(job.folder)[-1].status for job in jobs] == ['stopped', 'stopped']


def test_what_does_not_stop_is_killed(pool, monkeypatch):
    monkeypatch.setattr(local, 'PATIENCE', 0.2)
    engine, jobs = pool('a')
    engine.command = [sys.executable, '-c', 'import time; time.sleep(60)']
    engine.start(jobs[0])
    process = engine.workers[0].process
    engine.stop()
    assert process.returncode == -9


def test_memory_says_how_many_run_at_once(pool, monkeypatch):
    needs = {'a': 3.0, 'b': 3.0, 'c': 5.0, 'huge': 99.0}
    engine, jobs = pool(*needs, processes=3, cores=(0, 1, 2), gib=7.0)
    monkeypatch.setattr(engine, '_need', lambda job: needs[job.name])
    a, b, c, huge = jobs
    engine.start(a)
    assert engine.room(b)
    engine.start(b)
    assert not engine.room(c)
    while engine.workers[0].job or engine.workers[1].job:
        engine.ended()
    # Two idle workers hold 6 GiB of the 7: one ends, and the other takes the run of 5.
    assert engine.room(c)
    assert len(engine.workers) == 1
    engine.start(c)
    assert not engine.room(huge)
    while engine.workers and engine.workers[0].job:
        engine.ended()
    assert engine.room(huge)  # alone, whatever it takes
    engine.stop()


def test_cores_are_shared_out():
    assert [Budget(processes=2, cores=(0, 1, 2, 3, 4), memory=1.0).of(slot) for slot in (0, 1)] == [[0, 1], [2, 3]]
    assert [Budget(processes=3, cores=(4, 5), memory=1.0).of(slot) for slot in (0, 1, 2)] == [[4], [5], [4]]


def test_the_budget_is_of_this_machine(monkeypatch):
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    cores = len(os.sched_getaffinity(0))
    there = local.budget(runs=10**6)
    assert (there.processes, len(there.cores)) == (cores, cores)
    assert 0 < there.memory < os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / memory.GIB
    assert local.budget(runs=1).processes == 1
    assert local.budget(runs=2, processes=7, memory=3.0) == Budget(processes=7, cores=there.cores, memory=3.0)
    monkeypatch.setattr(local, '_accelerated', lambda: True)
    assert local.budget(runs=10).processes == 1


def test_larger_runs_are_taken_to_need_more(text):
    small, large = (tiny.get_config(f'text={text}') for _ in range(2))
    large.model.width, large.model.layers = 1024, 24
    assert memory.PROCESS < memory.need(small) < memory.PROCESS + 0.1
    weights = 24 * (4 * 1024 * 32 + 3 * 1024 * 64) * 16 / memory.GIB  # with gradients and two moments
    assert memory.need(large) > memory.need(small) + weights
    assert memory.need(Toy()) == memory.PROCESS


# ------------------------------------------------------------------------------------------------ what runs share


def test_tokens_and_tokenizer_are_made_once(text, tmp_path, monkeypatch):
    made = []
    original = shared.open_tokenizer
    monkeypatch.setattr(shared, 'open_tokenizer', lambda *args: made.append(args) or original(*args))
    common = tmp_path / 'shared'
    for i in range(3):
        run = tiny.get_config(f'text={text}')
        run.data.cache, run.seed = 'cache', i
        run.data.tokenizer = TrainedBPE(vocab_size=320)
        shared.share(run, common)
        shared.prepare(run, tmp_path / str(i), common)
        assert run.data.cache == str(common / 'cache')
    assert len(made) == 1
    models = [(tmp_path / str(i) / 'tokenizer/tokenizer.model').read_bytes() for i in range(3)]
    assert models[0] == models[1] == models[2]
    assert len(list((common / 'cache').iterdir())) == 2  # the two sources
    run.data.tokenizer = TrainedBPE(vocab_size=330)
    shared.prepare(run, tmp_path / 'other', common)
    assert (tmp_path / 'other/tokenizer/tokenizer.model').read_bytes() != models[0]


def test_what_has_a_place_of_its_own_keeps_it(text, tmp_path):
    run = tiny.get_config(f'text={text}')
    for own in ('', '/elsewhere', 'gs://bucket/cache'):
        run.data.cache = own
        shared.share(run, tmp_path)
        assert run.data.cache == own

"""From a file's `sweep` to jobs, and what a later start makes of the runs that are there."""

import json

import pytest
import toy_sweep
from etils import epath
from toy_sweep import Toy

from tpu_llm.config import ConfigError
from tpu_llm.scaling import drive, sweep
from tpu_llm.scaling.sweep import Job, Try

HEAD = 'from toy_sweep import Toy\n\ndef sweep(arg=None):\n'


@pytest.fixture
def load(tmp_path):
    """The jobs of a sweep with this body."""

    def made(body, *overrides):
        (tmp_path / 'page.py').write_text(HEAD + ''.join(f'    {line}\n' for line in body.splitlines()))
        return sweep.load(f'{tmp_path}/page.py', overrides, tmp_path / 'w', ['--config'])

    return made


def test_jobs_are_in_order_with_overrides_and_labels(load, tmp_path):
    body = "for i in (3, 1):\n    yield f'r{i}', Toy(rate=float(i)), {'budget': i}\nyield 'plain', Toy(rate=7.0)"
    jobs = load(body, '--config.steps=5')
    assert [job.name for job in jobs] == ['r3', 'r1', 'plain']
    assert [(job.config.rate, job.config.steps, job.labels) for job in jobs] == [
        (3.0, 5, {'budget': 3}),
        (1.0, 5, {'budget': 1}),
        (7.0, 5, {}),
    ]
    assert jobs[0].folder == epath.Path(tmp_path / 'w/runs/r3')


@pytest.mark.parametrize(
    ('body', 'said'),
    [
        (
            "yield 'a', Toy()\nyield 'A', Toy(rate=0.5, steps=3)",
            'named A: they differ in config.rate: 0.1 → 0.5; config.steps: 1 → 3; say so',
        ),
        ("yield 'a', Toy()\nyield 'a', Toy()", 'named a: and are one config; yield it once'),
        ("yield 'a', Toy()\nyield 'b', Toy()", 'runs a and b have one and the same config'),
        ("yield 'a/b', Toy()", "run 'a/b' is to be a folder"),
        ("yield '..', Toy()", "run '..' is to be a folder"),
        ("yield 'a*', Toy()", "run 'a.*' is to be a folder"),
        ("yield 'a', Toy(rate=-1.0)", 'run a: config: rate = -1.0 is negative'),
        ("yield 'a'", r'yields \(name, config\)'),
        ("yield 'a', Toy(), 3", 'run a: labels are to be a dict, not 3'),
        ("toy = Toy()\nfor name in 'ab':\n    yield name, toy", 'one object was yielded twice; make a fresh config'),
        ("yield 'a', 3", r"not \('a', 3\)"),
        ('return 3', r'gave 3; it yields \(name, config\)'),
        ('return []', 'yields no run'),
        ("yield 'a', Toy(rat=1)", r"page.py:4: TypeError: .*'rat' \(did you mean 'rate'\?\)"),
    ],
)
def test_what_cannot_be_a_sweep(load, body, said):
    with pytest.raises(ConfigError, match=said):
        load(body)


def test_a_flag_that_no_run_has(load):
    with pytest.raises(ConfigError, match=r"run a: config has no field 'rat' \(did you mean 'rate'\?\)"):
        load("yield 'a', Toy()", '--config.rat=1')


def test_a_file_without_a_sweep(tmp_path):
    (tmp_path / 'page.py').write_text('def get_config(arg=None):\n    pass\n')
    with pytest.raises(ConfigError, match=r'page.py has no function sweep\(arg=None\) that yields \(name, config\)'):
        sweep.load(f'{tmp_path}/page.py', [], tmp_path, [])


# ------------------------------------------------------------------------------------------------------- resuming


def job(folder, **fields):
    return Job('run', Toy(**fields), {}, epath.Path(folder))


def test_tries_are_kept_in_order(tmp_path):
    sweep.record(job(tmp_path), Try(status='lost', reason='SIGKILL', seconds=1.5))
    sweep.record(job(tmp_path), Try(status='finished'))
    tries = sweep.tries(tmp_path)
    assert [(each.status, each.reason, each.seconds) for each in tries] == [
        ('lost', 'SIGKILL', 1.5),
        ('finished', '', 0.0),
    ]
    assert all(each.at for each in tries)


@pytest.mark.parametrize(
    ('last', 'changes', 'status'),
    [
        ('finished', {}, 'finished'),
        ('diverged', {}, 'diverged'),
        ('finished', {'seconds': 3.0}, 'finished'),  # of the machine
        ('finished', {'steps': 2}, 'waiting'),  # it is to go on
        ('failed', {}, 'waiting'),
        ('refused', {}, 'waiting'),
        ('lost', {}, 'waiting'),
        ('stopped', {}, 'waiting'),
    ],
)
def test_what_a_later_start_does(tmp_path, last, changes, status):
    sweep.record(job(tmp_path), Try(status=last))
    assert drive.status_of(job(tmp_path, **changes)) == status


def test_a_run_that_never_began_waits(tmp_path):
    assert drive.status_of(job(tmp_path / 'absent')) == 'waiting'


def test_another_config_under_the_same_name_is_refused_or_cleared(tmp_path):
    folder = tmp_path / 'run'
    sweep.record(job(folder), Try(status='finished'))
    other = job(folder, rate=0.2)
    with pytest.raises(
        ConfigError, match=r'run run was made with another config: config.rate: 0.1 → 0.2; .*--changed='
    ):
        sweep.is_done(other)
    assert sweep.is_changed(other)
    sweep.clear(other)
    assert drive.status_of(other) == 'waiting'


def test_a_run_that_was_killed_in_its_first_try_has_a_config_too(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps({'type': 'toy_sweep.Toy', 'rate': 9.0}))
    with pytest.raises(ConfigError, match=r'config.rate: 9.0 → 0.1'):
        sweep.is_done(job(tmp_path))


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / 'tries.json').write_text('{"tries": [')
    with pytest.raises(ConfigError, match=r'tries.json is damaged; bring it back, or delete'):
        sweep.is_done(job(tmp_path))


# ---------------------------------------------------------------------------------------------------------- driving


class Engine:
    """Plays an engine of so many places: `ends` says how the tries of each run end, `None` that its process dies."""

    left = ''

    def __init__(self, places, **ends):
        self.places, self.ends = places, {name: iter(each) for name, each in ends.items()}
        self.running, self.started, self.most, self.stopped = [], [], 0, False

    def room(self, job):
        return len(self.running) < self.places

    def start(self, job):
        self.running.append(job)
        self.started.append(job.name)
        self.most = max(self.most, len(self.running))

    def ended(self):
        job = self.running.pop(0)
        status = next(self.ends[job.name])
        if isinstance(status, BaseException):
            raise status
        if status:
            sweep.record(job, Try(status=status, reason=f'it {status}'))
        return [(job.name, '' if status else 'it was killed')]

    def stop(self):
        self.stopped = True


class View:
    def __init__(self):
        self.said = []

    def changed(self, job, status, reason=''):
        self.said.append((job.name, status, reason))

    def tick(self):
        pass


@pytest.fixture
def driven(tmp_path, monkeypatch):
    """A sweep of runs whose tries end so: (what became of them, what was said, the engine)."""
    monkeypatch.setattr(drive, 'PAUSE', 0.0)

    def run(retries=1, places=2, **ends):
        jobs = [Job(name, Toy(), {}, epath.Path(tmp_path / name)) for name in ends]
        engine, view = Engine(places, **ends), View()
        made = drive.Drive(jobs, engine, view, retries)
        try:
            made.run()
        finally:
            run.last = made.status, view.said, engine
        return run.last

    return run


def test_every_run_comes_to_an_end(driven):
    status, said, engine = driven(
        a=['finished'],
        b=['diverged'],
        c=['failed', 'finished'],
        d=[None, None],
        e=['refused'],
        f=['stopped', 'finished'],
    )
    ends = {'a': 'finished', 'b': 'diverged', 'c': 'finished', 'd': 'failed', 'e': 'failed', 'f': 'finished'}
    assert status == ends
    assert [engine.started.count(name) for name in 'abcdef'] == [1, 1, 2, 2, 1, 2]
    assert (engine.most, engine.stopped) == (2, True)
    assert ('d', 'waiting', 'it was killed; tried again, 0 more after that') in said
    assert said[-1][:2] in list(ends.items())


def test_retries_are_bounded_and_reasons_kept(driven, tmp_path):
    status, _, engine = driven(retries=3, a=[None, 'failed', None, 'failed'])
    assert status == {'a': 'failed'}
    assert [each.reason for each in sweep.tries(tmp_path / 'a')] == ['it was killed', 'it failed'] * 2
    again, _, engine = driven(retries=0, a=['finished'], b=['failed'])
    assert again == {'a': 'finished', 'b': 'failed'}
    assert engine.started == ['a', 'b']


def test_what_is_done_is_not_started(driven, tmp_path):
    sweep.record(job(tmp_path / 'a'), Try(status='finished'))
    sweep.record(job(tmp_path / 'b'), Try(status='diverged'))
    status, _, engine = driven(a=[], b=[], c=['finished'])
    assert (status, engine.started) == ({'a': 'finished', 'b': 'diverged', 'c': 'finished'}, ['c'])


def test_ctrl_c_stops_the_engine_and_leaves_runs_waiting(driven):
    with pytest.raises(KeyboardInterrupt):
        driven(places=1, a=['finished'], b=[KeyboardInterrupt()], c=[])
    status, said, engine = driven.last
    assert status == {'a': 'finished', 'b': 'waiting', 'c': 'waiting'}
    assert engine.stopped
    assert said[-1] == ('b', 'waiting', '')


def test_the_toy_is_a_sweep():
    assert [name for name, _ in toy_sweep.sweep('rates=2')] == ['ends=well,rate=1.0', 'ends=well,rate=2.0']

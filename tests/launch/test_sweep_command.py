"""launch/sweep.py as one types it: real workers, real runs, and what is left when it is stopped or killed."""

import csv
import fcntl
import json
import os
import runpy
import signal
import subprocess
import sys
import time

import pytest
from entry import ROOT, one_line

from tpu_llm.scaling import points, sweep

PAGE = '''"""Two runs that train, and one that diverges."""

from tests.scaling.toy_sweep import Toy
from tests.train import tiny
from tpu_llm.config import parse_arg
from tpu_llm.scaling.combinators import name, product


def sweep(arg=None):
    args = parse_arg(arg, text={text!r}, steps=4, pause=0.0, seed=0, toys=True)
    for point in product(rate=[1e-2, 2e-2]):
        run = tiny.get_config(f'text={{args.text}},steps={{args.steps}},pause={{args.pause}}')
        run.data.cache, run.ema, run.model.dropout, run.seed = 'cache', 0.0, None, args.seed
        run.optimizer.schedule.peak = point['rate']
        yield name(point), run
    if args.toys:
        yield 'diverges', Toy(ends='diverged')
'''
PARAMETERS = 2 * 259 * 32 + 4 * 32 * 32 + 3 * 32 * 64 + 3 * 32
TOKENS = 4 * 8 * 32
FLOPS = 3 * (2 * (4 * 32 * 32 + 3 * 32 * 64) + 2 * 32 * 259 + 4 * 32 * 33 / 2) * TOKENS


@pytest.fixture(scope='module')
def page(tmp_path_factory, text):
    file = tmp_path_factory.mktemp('pages') / 'two.py'
    file.write_text(PAGE.format(text=str(text)))
    return file


def command(*args):
    return [sys.executable, str(ROOT / 'launch/sweep.py'), *map(str, args)]


def environment():
    """As a user's, but with the tests' compilation cache."""
    return os.environ | {'JAX_PLATFORMS': 'cpu'}


@pytest.fixture(scope='module')
def main():
    path = sys.path.copy()
    made = runpy.run_path(str(ROOT / 'launch/sweep.py'))['main']
    yield lambda *args: made(['sweep.py', *map(str, args)])
    sys.path[:] = path


@pytest.fixture(scope='module')
def swept(page, tmp_path_factory):
    """The folder of a sweep that ran to its end, and what was said."""
    workdir = tmp_path_factory.mktemp('sweep') / 'w'
    words = command(f'--config={page}', f'--workdir={workdir}')
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return workdir, done.stdout


def rows(workdir):
    return {row['name']: row for row in csv.DictReader((workdir / 'table.csv').open())}


def test_every_run_is_in_the_table(swept):
    found = rows(swept[0])
    assert {name: (row['status'], row['tries']) for name, row in found.items()} == {
        'rate=0.01': ('finished', '1'),
        'rate=0.02': ('finished', '1'),
        'diverges': ('diverged', '1'),
    }
    row = found['rate=0.01']
    assert (int(row['parameters']), int(row['tokens']), int(row['flops'])) == (PARAMETERS, TOKENS, FLOPS)
    summary = json.loads((swept[0] / 'runs/rate=0.01/summary.json').read_text())
    assert (float(row['loss']), row['loss_of']) == (summary['heldout_loss'], 'heldout_loss')
    assert (row['config.optimizer.schedule.peak'], row['steps']) == ('0.01', '4')
    assert float(row['ledger.step']) > 0
    assert found['rate=0.02']['loss'] != row['loss']


def test_the_table_is_what_a_law_is_fitted_to(swept):
    found = points.read(swept[0] / 'table.csv', columns=None)
    assert set(found.points.names) == {'rate=0.01', 'rate=0.02'}
    assert found.left_out['diverged'] == 1


def test_a_run_has_a_workdir_of_its_own_and_a_log(swept):
    folder = swept[0] / 'runs/rate=0.02'
    assert {'config.json', 'metrics.jsonl', 'checkpoints', 'summary.json', 'ledger.jsonl', 'log.txt'} <= {
        file.name for file in folder.iterdir()
    }
    assert 'step 4/4' in (folder / 'log.txt').read_text()


def test_runs_share_tokens(swept):
    assert len(list((swept[0] / 'shared/cache').iterdir())) == 2  # the two sources of the mixture, once
    assert not (swept[0] / 'runs/rate=0.02/cache').exists()


def test_it_says_what_happens(swept):
    said = [line.split('  ', 1)[-1] for line in swept[1].splitlines()]
    assert said[0] == f'{swept[0]}: 3 runs: 3 waiting'
    assert 'diverges diverged: stopped at step 4: the loss is nan' in said
    assert any(line.startswith('rate=0.01 finished, heldout_loss ') for line in said)
    assert said[-2:] == [f'2 finished, 1 diverged; {swept[0]}/table.csv', f'{swept[0]}/report.html']


def test_the_same_command_passes_over_what_is_done(swept, page, main, capsys):
    before = (swept[0] / 'runs/rate=0.01/metrics.jsonl').read_bytes()
    assert main(f'--config={page}', f'--workdir={swept[0]}') == 0
    assert capsys.readouterr().out.splitlines() == [
        f'{swept[0]}: 3 runs: 2 finished, 1 diverged',
        f'2 finished, 1 diverged; {swept[0]}/table.csv',
        f'{swept[0]}/report.html',
    ]
    assert (swept[0] / 'runs/rate=0.01/metrics.jsonl').read_bytes() == before


def test_without_plotly_a_sweep_says_what_to_install(swept, page, main, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'plotly', None)
    assert main(f'--config={page}', f'--workdir={swept[0]}') == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "report.html is not written: a page of many runs is drawn by plotly: pip install -e '.[report]'"


def test_another_config_under_the_same_name_is_refused(swept, page, main, capsys):
    assert main(f'--config={page}:seed=3', f'--workdir={swept[0]}') == 2
    said = one_line(capsys.readouterr().err)
    assert said.startswith('run rate=0.01 was made with another config: config.seed: 0 → 3; ')
    assert '--workdir=another' in said
    assert '--changed=rerun' in said


def test_one_run_can_be_run_alone(page, main, tmp_path):
    args = (f'--config={page}', f'--workdir={tmp_path}')
    assert main('one', 'diverges', *args) == 0
    assert [each.status for each in sweep.tries(tmp_path / 'runs/diverges')] == ['diverged']


def test_compare_reads_runs_of_a_sweep(swept, main, capsys):
    assert main('compare', 'rate=0.01', 'rate=0.02', f'--workdir={swept[0]}') == 0
    said = [' '.join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert 'config.optimizer.schedule.peak 0.01 0.02' in said
    assert 'step A B B − A' in said
    assert any(line.startswith('heldout_loss ') for line in said)


def test_list_runs_nothing(page, main, capsys, tmp_path):
    assert main(f'--config={page}', '--list', f'--workdir={tmp_path}/w') == 0
    said = ' '.join(capsys.readouterr().out.split())
    assert f'rate=0.01 {PARAMETERS / 1e3:.1f}k 4 {TOKENS / 1e3:.2f}k {FLOPS:.3g}' in said
    assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ([], 'no config given: --config=FILE.py[:arg]'),
        (['frob'], "unexpected argument 'frob'"),
        (['--config=PAGE', '--proceses=2'], "unknown flag --proceses (did you mean '--processes'?)"),
        (['--config=PAGE', '--config.optimizer.schedule.peak=1.0'], 'run diverges: config has no field'),
        (['--config=PAGE:toys=false', '--config.optimizer.schedule.peak=1.0'], 'have one and the same config'),
        (['--config=PAGE:seeds=1'], "config arg 'seeds' is unknown (did you mean 'seed'?)"),
        (['--config=PAGE', '--workdir=PAGE'], 'is a file; give a folder'),
        (['--config=PAGE', '--pod=mine', '--workdir=FOLDER'], '--pod needs a --workdir that its machines and this one'),
        (['--config=PAGE', '--pod=mine', '--ray=auto', '--workdir=FOLDER'], '--pod does not go with --ray'),
        (
            ['--config=PAGE', '--ray=local', '--each=CPU=two', '--workdir=FOLDER'],
            '--each=CPU=two: write what',
        ),
        (['--config=PAGE', '--workdir=gs://bucket/w'], 'runs on this machine need a folder on it, not gs://bucket/w'),
        (['--config=PAGE', '--processes=-1'], 'processes'),
        (['one', 'other', '--config=PAGE'], "the sweep has no run 'other'"),
        (['compare', 'a'], 'compare takes two runs, and 1 were given'),
    ],
)
def test_a_mistake_is_one_line(args, message, page, main, capsys, tmp_path):
    words = [word.replace('PAGE', str(page)).replace('FOLDER', str(tmp_path / 'w')) for word in args]
    assert main(*words) == 2
    assert message in one_line(capsys.readouterr().err)


def test_two_sweeps_do_not_work_in_one_folder(page, main, capsys, tmp_path):
    with open(tmp_path / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(f'--config={page}', f'--workdir={tmp_path}') == 2
    assert 'another sweep works in' in one_line(capsys.readouterr().err)


# ------------------------------------------------------------------------------------------- stopped, and killed


@pytest.fixture
def slow(page, tmp_path):
    """Starts a sweep whose steps are slow, and waits until both of its runs have trained some."""

    def start():
        args = (f'--config={page}:steps=30,pause=0.2,toys=false', f'--workdir={tmp_path}/w', '--processes=2')
        process = subprocess.Popen(
            command(*args),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # where tests run in the background
        )
        files = [tmp_path / f'w/runs/rate={rate}/metrics.jsonl' for rate in (0.01, 0.02)]
        while process.poll() is None and not all(file.exists() and file.stat().st_size > 600 for file in files):
            time.sleep(0.05)
        return process, tmp_path / 'w', workers(process)

    return start


def workers(process):
    found = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True, check=False).stdout
    return [int(pid) for pid in found.split()]


def are_gone(pids, seconds=60.0):
    limit = time.monotonic() + seconds
    while any(os.path.exists(f'/proc/{pid}') for pid in pids) and time.monotonic() < limit:
        time.sleep(0.1)
    return not any(os.path.exists(f'/proc/{pid}') for pid in pids)


@pytest.mark.full
def test_ctrl_c_saves_and_the_same_command_goes_on(slow, swept, page, tmp_path):
    process, workdir, children = slow()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert said.strip() == 'interrupted: 2 waiting; the runs at work have saved, and the same command goes on'
    assert len(children) == 2
    assert are_gone(children, 0)
    for rate in (0.01, 0.02):
        (only,) = sweep.tries(workdir / f'runs/rate={rate}')
        assert only.status == 'stopped'
        assert list((workdir / f'runs/rate={rate}/checkpoints').glob('*/COMMIT.json'))
    process, _, _ = slow()
    assert process.wait() == 0
    found = rows(workdir)
    assert {row['status'] for row in found.values()} == {'finished'}
    assert {row['steps'] for row in found.values()} == {'30'}


@pytest.mark.full
def test_a_killed_sweep_leaves_no_process_and_continues(slow):
    process, workdir, children = slow()
    os.kill(children[0], signal.SIGKILL)
    time.sleep(1.0)
    children = workers(process) or children
    process.kill()
    process.communicate()
    assert are_gone(children)
    process, _, _ = slow()
    assert process.wait() == 0
    found = rows(workdir)
    assert {row['status'] for row in found.values()} == {'finished'}
    tries = [each.status for rate in (0.01, 0.02) for each in sweep.tries(workdir / f'runs/rate={rate}')]
    assert tries.count('finished') == 2
    assert tries.count('lost') == 1

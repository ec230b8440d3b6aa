"""Runs every config that a sweep yields, keeps what finished, and writes one table of all.

    python launch/sweep.py --config=experiments/NAME/config.py
    python launch/sweep.py --config=experiments/NAME/config.py:smoke --workdir=runs/try --config.steps=100
    python launch/sweep.py --config=experiments/NAME/config.py --list          the runs, without running them
    python launch/sweep.py compare RUN RUN [--workdir=SWEEP]                   two runs: configs, curves, last values
    python launch/sweep.py one NAME --config=… --workdir=…                     one of its runs, in this process

The config file defines `def sweep(arg=None)` that yields (name, config); docs/sweeps.md is the tour. The same command
goes on where a sweep was stopped or killed: what finished or diverged is passed over.

--config     FILE.py or FILE.py:arg
--config.…   sets one field in every run, as in launch/run.py
--workdir    the sweep's folder; default runs/<config>. In it: runs/NAME, table.csv, table.parquet, sweep.json,
             report.html
--retries    how often a run that failed or was lost is tried again; default 1
--changed    stop (default), or rerun: what to do with a run whose config is not that of the run in its folder
--list       lists the runs and ends
--debug      shows the traceback of a mistake, too

Where runs run: in processes of this machine, unless one of the last three says otherwise.

--processes  at once on this machine; default: one a core, or one alone where there is an accelerator
--memory     GiB that they may take together; default 0.8 of what is free
--pod        one after another on a pod: the words after `pod.py run`, as in --pod='NAME --type=v5e-16'
--gke        as JobSets: the words after the name in `pod.py manifest`, as in --gke='--type=v5e-16 --image=…'
--ray        on a Ray cluster: auto, an address, or local; --each=CPU=4,TPU=8 is what a run takes of it (default CPU=1)
"""

import contextlib
import fcntl
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tpu_llm.command_line import unknown  # noqa: E402
from tpu_llm.config import ConfigError, RunError  # noqa: E402

UNFINISHED = 3  # the exit status where a run failed for good
ELSEWHERE = ('pod', 'gke', 'ray')


def main(argv: list[str]) -> int:
    verb = VERBS.get(argv[1] if len(argv) > 1 else '')
    try:
        return verb([argv[0], *argv[2:]]) if verb else sweep(argv)
    except (ConfigError, RunError, flags.Error, OSError) as error:
        if '--debug' in argv:
            raise
        print('error:', ' '.join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f'interrupted{stop}', file=sys.stderr)
        return 130


def sweep(argv: list[str]) -> int:
    options, overrides = _options(argv)
    if options['help'].value:
        print(__doc__)
        return 0
    _check(options, overrides)
    workdir, jobs = _load(options, overrides)

    from rich.console import Console

    from tpu_llm.scaling.listing import listing
    from tpu_llm.scaling.sweep import clear, is_changed

    console = Console() if sys.stdout.isatty() else Console(width=160)
    if options['list'].value:
        console.print(listing(jobs))
        return 0
    with _alone(workdir):
        for job in filter(is_changed, jobs) if options['changed'].value == 'rerun' else ():
            clear(job)
        return _drive(jobs, workdir, options, overrides, console)


def _drive(jobs: list[Any], workdir: str, options: Any, overrides: list[str], console: Any) -> int:
    from tpu_llm.scaling import drive, record, show
    from tpu_llm.scaling.points import counted

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    kept = record.Record(jobs, workdir, options['config'].value, overrides)
    status = {job.name: drive.status_of(job) for job in jobs}
    board = show.Board(jobs, status)
    kept.begin(status)
    say(f'{workdir}: {counted(len(jobs))}: {board.counts()}')
    if 'waiting' in status.values():
        engine = _engine(len(jobs), workdir, options, overrides, say)
        shown = show.Shown if console.is_terminal and not console.is_dumb_terminal else show.Lines
        try:
            with shown(board, console) as view:
                drive.Drive(jobs, engine, show.Views(kept, view), options['retries'].value).run()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f': {board.counts()}; {engine.left}') from None
    say(f'{board.counts()}; {workdir}/table.csv')
    if kept.missing:
        say(kept.missing)
    if 'finished' in board.status.values():
        say(_page(workdir))
    return UNFINISHED if 'failed' in board.status.values() else 0


def _page(workdir: str) -> str:
    """Where the page of all runs is, or why there is none."""
    from tpu_llm.scaling.report import FILE, write_report

    try:
        return str(write_report(workdir))
    except ConfigError as error:
        return f'{FILE} is not written: {error}'


def _engine(runs: int, workdir: str, options: Any, overrides: list[str], say: Any) -> Any:
    """Where runs run."""
    rest = [f'--config={options["config"].value}', f'--workdir={workdir}', *overrides]

    def one(python: str, path: str) -> Any:
        return lambda job: [python, path, 'one', job.name, *rest]

    here = os.path.abspath(__file__)
    if options['ray'].value:
        from tpu_llm.scaling.local import COMPILED
        from tpu_llm.scaling.on_ray import Ray

        env = {'JAX_COMPILATION_CACHE_DIR': os.environ.get('JAX_COMPILATION_CACHE_DIR', _absolute(workdir, COMPILED))}
        return Ray(options['ray'].value, _each(options['each'].value), one(sys.executable, here), env)
    if options['pod'].value or options['gke'].value:
        from tpu_llm.scaling import jobs

        kind, words = (jobs.Pod, options['pod'].value) if options['pod'].value else (jobs.JobSets, options['gke'].value)
        pod = [sys.executable, str(ROOT / 'launch/pod.py')]
        return kind(pod, shlex.split(words), one('python', 'launch/sweep.py'))

    from tpu_llm.scaling import local

    there = local.budget(runs, options['processes'].value, options['memory'].value)
    say(f'up to {there.processes} at a time, {_cores(len(there.of(0)))} each, {there.memory:.1f} GiB for all')
    return local.Pool([sys.executable, here, 'work', *rest], there, Path(workdir))


def work(argv: list[str]) -> int:
    """A worker of the pool (tpu_llm/scaling/work.py), which no person calls."""
    options, overrides = _options(argv)
    cores = options['cores'].value
    if cores and hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, {int(core) for core in cores})

    from tpu_llm.parallel import heap

    heap.keep()
    workdir, jobs = _load(options, overrides)

    from tpu_llm.scaling import shared
    from tpu_llm.scaling.work import serve

    serve({job.name: job for job in jobs}, Path(workdir) / shared.FOLDER)
    return 0


def one(argv: list[str]) -> int:
    """One run of a sweep in this process, or as one of its hosts: what a scheduler starts."""
    from tpu_llm.parallel import heap

    heap.keep()
    options, names = _options(argv)
    name, overrides = names[0] if names else '', names[1:]
    workdir, jobs = _load(options, overrides)
    job = next((job for job in jobs if job.name == name), None)
    if job is None:
        from tpu_llm.config import nearest

        meant = nearest(name, [job.name for job in jobs])
        raise ConfigError(f'the sweep has no run {name!r}{meant}; --list lists them')

    from tpu_llm.parallel import board, hosts
    from tpu_llm.scaling import shared, work
    from tpu_llm.scaling.sweep import record

    start, error = time.monotonic(), None
    try:
        with hosts.contact(work.exit_status):
            hosts.join(job.config, str(job.folder))
            hosts.announce(str(job.folder))
            if '://' not in workdir and board.count() == 1:
                work.prepare(job, Path(workdir) / shared.FOLDER)
            job.config.main(str(job.folder))
    except Exception as raised:
        error = raised
    ended = work.judged(job, error, start)
    if board.index() == 0:
        record(job, ended)
    return work.exit_status(error)


def compare(argv: list[str]) -> int:
    """Two runs: what differs in their configs, their curves and where they ended."""
    options = flags.FlagValues()
    flags.DEFINE_string('workdir', None, '', flag_values=options)
    flags.DEFINE_bool('debug', False, '', flag_values=options)
    names = options(argv)[1:]
    if len(names) != 2:
        raise ConfigError(f'compare takes two runs, and {len(names)} were given: compare RUN RUN [--workdir=SWEEP]')

    from rich.console import Console

    from tpu_llm.scaling.compare import comparison

    console = Console() if sys.stdout.isatty() else Console(width=160)
    a, b = names
    console.print(comparison(a, b, options['workdir'].value))
    return 0


VERBS = {'work': work, 'compare': compare, 'one': one}


def _options(argv: list[str]) -> tuple[Any, list[str]]:
    options = flags.FlagValues()
    for name in ('config', 'workdir', *ELSEWHERE, 'each'):
        flags.DEFINE_string(name, None, '', flag_values=options)
    flags.DEFINE_integer('processes', 0, '', lower_bound=0, flag_values=options)
    flags.DEFINE_float('memory', 0.0, '', lower_bound=0.0, flag_values=options)
    flags.DEFINE_integer('retries', 1, '', lower_bound=0, flag_values=options)
    flags.DEFINE_enum('changed', 'stop', ['stop', 'rerun'], '', flag_values=options)
    flags.DEFINE_list('cores', [], '', flag_values=options)
    for name in ('list', 'debug'):
        flags.DEFINE_bool(name, False, '', flag_values=options)
    flags.DEFINE_bool('help', False, '', short_name='h', flag_values=options)
    rest = options(argv, known_only=True)[1:]
    return options, rest


def _check(options: Any, rest: list[str]) -> None:
    """Raises ConfigError for a word that is neither a flag nor the override of a field, and for flags that do not go
    together.
    """
    for word in rest:
        if not word.lstrip('-').startswith(('config.', 'noconfig.')):
            verb = '' if word.startswith('-') else f' (or is it a verb? {", ".join(VERBS)} come first)'
            raise ConfigError(unknown(word, None, [f'--{name}' for name in options]) + verb)
    said, workdir = [name for name in ELSEWHERE if options[name].value], options['workdir'].value or ''
    if len(said) > 1:
        raise ConfigError(f'--{said[0]} does not go with --{said[1]}; leave one of them out')
    if said and said[0] != 'ray' and '://' not in workdir:
        raise ConfigError(f'--{said[0]} needs a --workdir that its machines and this one see: gs://…')
    if not said and '://' in workdir:
        raise ConfigError(f'runs on this machine need a folder on it, not {workdir}: --workdir=…')
    _each(options['each'].value)


def _load(options: Any, overrides: list[str]) -> tuple[str, list[Any]]:
    """The sweep's folder and its jobs."""
    from tpu_llm.scaling.sweep import load

    spec = options['config'].value
    if spec is None:
        raise ConfigError('no config given: --config=FILE.py[:arg]')
    workdir = options['workdir'].value or _default_workdir(spec)
    if Path(workdir).is_file():
        raise ConfigError(f'the workdir {workdir} is a file; give a folder, there already or not: --workdir=…')
    return workdir, load(spec, overrides, workdir, [f'--{name}' for name in options])


def _default_workdir(spec: str) -> str:
    """`runs/isoflop` of experiments/isoflop/config.py; the bare words of the arg are kept."""
    file, _, arg = spec.partition(':')
    path = Path(file)
    name = path.resolve().parent.name if path.stem == 'config' else path.stem
    return '-'.join([f'runs/{name}', *(word for word in arg.split(',') if word and '=' not in word)])


def _each(text: str | None) -> dict[str, float]:
    """`CPU=4,TPU=8` as numbers."""
    try:
        return {name: float(count) for name, _, count in (item.partition('=') for item in (text or 'CPU=1').split(','))}
    except ValueError:
        raise ConfigError(f'--each={text}: write what a run takes, as in --each=CPU=4,TPU=8') from None


def _absolute(workdir: str, name: str) -> str:
    return os.path.join(workdir if '://' in workdir else os.path.abspath(workdir), name)


def _cores(count: int) -> str:
    return '1 core' if count == 1 else f'{count} cores'


@contextlib.contextmanager
def _alone(workdir: str) -> Iterator[None]:
    """One sweep at a time in a folder of this machine; SIGTERM ends it as Ctrl-C does."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with contextlib.ExitStack() as stack:
        if '://' not in workdir:
            os.makedirs(workdir, exist_ok=True)
            lock = stack.enter_context(open(os.path.join(workdir, 'lock'), 'a'))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f'another sweep works in {workdir}; wait for it, or give another --workdir') from None
        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


if __name__ == '__main__':
    sys.exit(main(sys.argv))

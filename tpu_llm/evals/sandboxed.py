"""Programs that a model wrote, run where they can do no harm, and the share of tests that they pass.

Each runs with a time limit, limits on memory, output, files and processes, an environment of its own and no network;
it writes to a folder that is thrown away, and whatever it started is killed with it. `jail` says how. What is not
contained: it may read every file that others may read, and it takes what processor time it is given.

A test counts as passed only where the interpreter got to its end. That is proof against `os._exit(0)`, not against a
program that was written to deceive: tests run in its own process, and its objects may claim to equal anything.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tpu_llm.config import ConfigError, RunError

Test = str | Mapping[str, Any]  # code to be run behind the program, or {'input': …, 'output': …}
Stopped = Literal['', 'time', 'output']

_JAIL = Path(__file__).with_name('jail.py')
_START = 20.0  # seconds that the jail itself may take on a busy machine


@dataclasses.dataclass(kw_only=True, slots=True)
class Limits:
    """Of one program. Memory is of each of its processes."""

    seconds: float = 5.0
    memory: int = 1 << 29  # bytes of address space; Python needs 30 MB
    output: int = 1 << 16  # bytes, of standard output and error each
    files: int = 1 << 24  # bytes, of all its files together
    processes: int = 16  # and threads
    contained: bool = True  # by the kernel; False: go on without where it refuses, as `jail` says

    def validate(self) -> None:
        for name in ('seconds', 'memory', 'output', 'files', 'processes'):
            if getattr(self, name) <= 0:
                raise ConfigError(f'{name} is {getattr(self, name)}; it must be above 0')


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    program: str
    test: str = ''  # run behind it, in the same names
    stdin: str = ''


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    code: int  # that it ended with; the signal, negative, where it was killed
    stopped: Stopped  # the limit for which it was killed
    finished: bool  # the interpreter got to the end of program and test
    stdout: str
    stderr: str
    seconds: float


def run(tasks: Sequence[Task], limits: Limits | None = None) -> list[Outcome]:
    """One after another, each with nothing left of those before.

    Raises RunError where the machine cannot contain them, or the sandbox itself does not work.
    """
    return _ask(tasks, limits or Limits())


def _ask(tasks: Sequence[Task], limits: Limits, *, namespaces: bool = True) -> list[Outcome]:
    with tempfile.TemporaryDirectory(prefix='tpu_llm-sandbox-') as folder:
        asked = dataclasses.asdict(limits) | {
            'tasks': [dataclasses.asdict(task) for task in tasks],
            'folder': folder,
            'namespaces': namespaces,
            'stranger': random.SystemRandom().randrange(60_000, 65_000),
        }
        command = [os.path.realpath(sys.executable), '-I', '-S', '-B', str(_JAIL)]
        environment = {'PATH': '/usr/bin:/bin', 'LANG': 'C.UTF-8'}
        most = _START + len(tasks) * (limits.seconds + 1)
        try:
            told = subprocess.run(
                command,
                input=json.dumps(asked).encode(),
                capture_output=True,
                env=environment,
                timeout=most,
                start_new_session=True,  # Ctrl-C in a terminal is for the run to hear: it would fail the programs
            )
        except subprocess.TimeoutExpired:
            raise RunError(f'the sandbox did not answer within {most:g} s; is the machine overloaded?') from None
    lines = told.stdout.decode().splitlines()
    if lines == ['null']:
        if not limits.contained:
            return _ask(tasks, limits, namespaces=False)
        raise RunError(
            'the kernel of this machine refuses the namespaces (unshare) that contain programs; run in a container '
            'that may make them, or accept what an audit hook can do: limits.contained = False'
        )
    if told.returncode or len(lines) != len(tasks) + 1:
        said = ' '.join(told.stderr.decode(errors='replace').split())[-300:]
        raise RunError(f'the sandbox ended with {told.returncode} after {max(len(lines) - 1, 0)} programs: {said}')
    return [Outcome(**json.loads(line)) for line in lines[1:]]


def passed(program: str, tests: Sequence[Test], limits: Limits | None = None) -> list[bool]:
    """Which tests the program passes, each in a process of its own.

    Code is run behind the program and passes unless it raises; of an input and output, what is printed must be the
    output, white space at the ends of lines and of the whole aside. Raises ValueError for what is no test.
    """
    outcomes = run([_task(program, test) for test in tests], limits)
    return [_passes(test, outcome) for test, outcome in zip(tests, outcomes, strict=True)]


def passed_by_each(
    programs: Sequence[str], tests: Sequence[Sequence[Test]], limits: Limits | None = None, workers: int = 0
) -> list[list[bool]]:
    """`passed` for many programs, each with its own tests, as many at once as there are `workers` (0: processors)."""
    with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(functools.partial(passed, limits=limits), programs, tests))


def _task(program: str, test: Test) -> Task:
    if isinstance(test, str):
        return Task(program=program, test=test)
    if isinstance(test, Mapping) and isinstance(test.get('input'), str) and isinstance(test.get('output'), str):
        return Task(program=program, stdin=test['input'])
    raise ValueError(f"the test {test!r} is neither code nor {{'input': …, 'output': …}}")


def _passes(test: Test, outcome: Outcome) -> bool:
    if isinstance(test, str):
        return outcome.finished and not outcome.stopped
    return outcome.code == 0 and not outcome.stopped and _lines(outcome.stdout) == _lines(test['output'])


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def code_of(response: str) -> str:
    """The last fenced block of Python, or of no language; the response itself where there is none."""
    blocks = re.findall(r'^```(?:python3?|py)?[ \t]*\n(.*?)^```', response, re.DOTALL | re.MULTILINE | re.IGNORECASE)
    return blocks[-1] if blocks else response

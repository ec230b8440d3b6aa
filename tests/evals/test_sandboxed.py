"""Hostile programs, run for real."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from tpu_llm import config
from tpu_llm.config import ConfigError, RunError
from tpu_llm.evals import sandboxed
from tpu_llm.evals.sandboxed import Limits, Outcome, Task

QUICK = Limits(seconds=1.0)


def _can_contain() -> bool:
    try:
        sandboxed.run([])
    except RunError:
        return False
    return True


contained = pytest.mark.skipif(not _can_contain(), reason='the kernel refuses namespaces here')


def run(program: str, limits: Limits = QUICK, **task: str) -> Outcome:
    return sandboxed.run([Task(program=program, **task)], limits)[0]


def uncontained(program: str, limits: Limits | None = None) -> Outcome:
    limits = limits or Limits(seconds=1.0, contained=False)
    return sandboxed._ask([Task(program=program)], limits, namespaces=False)[0]


# ------------------------------------------------------------------------------------------------------ what works

CODE = 'def double(x):\n    return 2 * x\n'


@contained
def test_the_tests_that_pass_are_told_apart():
    tests = ['assert double(2) == 4', 'assert double(2) == 5', 'double(', 'assert double("a") == "aa"']
    assert sandboxed.passed(CODE, tests, QUICK) == [True, False, False, True]


@contained
def test_a_program_that_reads_and_prints():
    program = 'n = int(input())\nprint(2 * n)\nprint()'
    tests = [{'input': '4', 'output': '8\n'}, {'input': '4', 'output': '9'}, {'input': 'x', 'output': '8'}]
    assert sandboxed.passed(program, tests, QUICK) == [True, False, False]


@contained
def test_many_programs_at_once():
    tests = [['assert double(1) == 2'], ['assert double(1) == 2'], []]
    assert sandboxed.passed_by_each([CODE, 'double = int', CODE], tests, QUICK, workers=2) == [[True], [False], []]


@contained
def test_the_environment_is_closed():
    os.environ['TPU_LLM_SECRET'] = 'x'
    try:
        told = run('import os\nprint(sorted(os.environ), os.getcwd(), os.listdir("/proc"))').stdout
    finally:
        del os.environ['TPU_LLM_SECRET']
    assert 'SECRET' not in told
    assert told.endswith('/tmp []\n')


@contained
def test_there_are_no_devices_but_null():
    told = run('import os\nprint(os.listdir("/dev"))\nopen("/dev/null", "w").write("x")\nopen("/dev/null").read()')
    assert told.stdout == "['null']\n"
    assert told.finished


@contained
def test_nothing_is_left_for_the_next_program():
    write = Task(
        program='import os\nos.mkdir("a")\nopen("a/b", "w").write("x")\nopen("c", "w")\nprint(sorted(os.listdir(".")))'
    )
    look = Task(program='import os\nprint(os.listdir("."))')
    first, second = sandboxed.run([write, look], QUICK)
    assert (first.stdout, second.stdout) == ("['a', 'c']\n", '[]\n')


@pytest.mark.parametrize(
    ('response', 'code'),
    [
        ('x = 1', 'x = 1'),
        ('No:\n```python\nx = 1\n```\nYes:\n```python\nx = 2\n```\n', 'x = 2\n'),
        ('```\nx = 1\n```', 'x = 1\n'),
        ('```python\nx = 1\n```\nprints\n```text\n1\n```', 'x = 1\n'),
    ],
)
def test_the_code_of_a_response(response, code):
    assert sandboxed.code_of(response) == code


def test_bad_limits_and_bad_tests_are_named():
    with pytest.raises(ConfigError, match='memory is 0'):
        config.validate(Limits(memory=0))
    with pytest.raises(ValueError, match='is neither code nor'):
        sandboxed.passed('', [{'in': '1'}])


# ------------------------------------------------------------------------------------------------- what is hostile


@contained
@pytest.mark.parametrize('end', ['import os; os._exit(0)', 'exit()', 'raise SystemExit(0)', 'import atexit; 1/0'])
def test_ending_early_passes_no_test(end):
    assert sandboxed.passed(f'def f(): return 1\n{end}', ['assert f() == 1'], QUICK) == [False]
    assert sandboxed.passed(f'def f():\n    {end}', ['assert f() == 1'], QUICK) == [False]


@contained
def test_an_endless_loop_is_ended():
    began = time.monotonic()
    outcome = run('while True: pass')
    assert outcome.stopped == 'time'
    assert time.monotonic() - began < 10


@contained
def test_signals_and_sleep_do_not_help():
    outcome = run('import signal, time\nfor s in (1, 2, 15, 24): signal.signal(s, signal.SIG_IGN)\ntime.sleep(60)')
    assert (outcome.stopped, outcome.code) == ('time', -9)


@contained
def test_memory_is_limited():
    outcome = run('x = bytearray(1 << 31)')
    assert 'MemoryError' in outcome.stderr
    assert not outcome.finished
    assert 'MemoryError' in run('x = []\nwhile True: x.append(bytearray(1 << 24))', Limits(seconds=5.0)).stderr


@contained
def test_output_is_limited():
    outcome = run('while True: print("x" * 10_000)', Limits(seconds=5.0, output=1000))
    assert (outcome.stopped, len(outcome.stdout)) == ('output', 1000)


@contained
def test_files_are_limited():
    outcome = run('for i in range(99): open(str(i), "wb").write(b"x" * (1 << 20))', Limits(files=1 << 22))
    assert 'No space left' in outcome.stderr


@contained
@pytest.mark.parametrize('place', ['/', '/var/tmp', '/dev', '/proc', '/run', '/run/python', os.path.dirname(__file__)])
def test_nothing_is_written_elsewhere(place):
    path = os.path.join(place, 'written-by-a-sandboxed-program')
    outcome = run(f'open({path!r}, "w").write("x")')
    assert not outcome.finished
    assert 'Error' in outcome.stderr
    assert not os.path.exists(path)


@contained
def test_there_is_no_network():
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
        program = f'import socket\nsocket.create_connection(("127.0.0.1", {port}), 1)'
        assert 'Error' in run(program).stderr
    assert 'Error' in run('import socket\nsocket.create_connection(("8.8.8.8", 53), 1)').stderr


@contained
def test_standard_input_is_empty():
    assert 'EOFError' in run('input()').stderr


FORKS = """
import os, time
made = 0
try:
    while made < 500:
        if os.fork() == 0:
            time.sleep(60)
        made += 1
except OSError:
    pass
print(made, flush=True)
"""


@contained
def test_a_fork_bomb_is_small_and_leaves_nobody():
    before = _processes()
    outcome = run(FORKS, Limits(seconds=3.0, processes=8))
    assert int(outcome.stdout) < 8
    outcome = run(
        'import os\nwhile True:\n    try: os.fork()\n    except OSError: pass', Limits(seconds=1.0, processes=8)
    )
    assert outcome.stopped == 'time'
    assert _processes() <= before


def _processes() -> int:
    """Programs of the sandbox that are alive."""
    found = 0
    for entry in os.scandir('/proc'):
        if entry.name.isdigit():
            try:
                with open(f'/proc/{entry.name}/cmdline') as file:
                    found += "told['word']" in file.read()
            except OSError:
                pass
    return found


@contained
def test_a_process_that_hides_is_killed_too():
    outcome = run('import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True: pass')
    assert outcome.finished
    assert _processes() == 0


@contained
@pytest.mark.parametrize(
    'attack',
    [
        'os.kill(os.getppid(), 9)',
        'os.kill(1, 9)',
        'os.kill(-1, 9)',
        'os.killpg(0, 9)',
        'ctypes.CDLL(None).ptrace(16, 1, 0, 0)',
        'ctypes.CDLL(None).umount2(b"/proc", 2)',
        'ctypes.CDLL(None).unshare(0x10020000), ctypes.CDLL(None).umount2(b"/proc", 2), os.stat("/proc/1")',
    ],
)
def test_those_above_cannot_be_harmed(attack):
    hostile = Task(program=f'import os, ctypes\n{attack}\nprint(os.path.exists("/proc/1"))')
    outcome, after = sandboxed.run([hostile, Task(program='print(1)')], QUICK)
    assert 'True' not in outcome.stdout
    assert after.stdout == '1\n'


@contained
def test_it_has_no_privileges():
    told = run('import os\nprint(os.getuid() if os.getuid() != 0 else "root", os.getgroups())').stdout
    assert 'root' not in told


@contained
def test_the_word_cannot_be_guessed_by_writing_more():
    assert sandboxed.passed('import os\nos.write(4, b"0" * 32)', ['assert False', '1'], QUICK) == [False, False]


# ------------------------------------------------------------------------------------------- without the namespaces


@pytest.mark.parametrize(
    'attack',
    [
        'import socket; socket.socket()',
        'import ctypes',
        'import os; os.fork()',
        'import os; os.system("true")',
        'import subprocess; subprocess.run(["true"])',
        'import os; os.kill(os.getppid(), 9)',
        'open("/var/tmp/written-by-a-sandboxed-program", "w")',
        'import os; os.open("/var/tmp/written-by-a-sandboxed-program", os.O_CREAT)',
        'import os; os.mkdir("/var/tmp/written-by-a-sandboxed-program")',
    ],
)
def test_an_audit_hook_refuses(attack):
    outcome = uncontained(attack)
    assert 'not allowed in the sandbox' in outcome.stderr
    assert not outcome.finished


def test_limits_hold_without_namespaces():
    assert uncontained('while True: pass').stopped == 'time'
    assert 'MemoryError' in uncontained('x = bytearray(1 << 31)').stderr
    assert uncontained('while True: print("x" * 10_000)').stopped == 'output'
    assert uncontained('open("x", "w").write("y")\nprint(open("x").read())').stdout == 'y\n'
    assert uncontained('import os; os._exit(0)').finished is False


REFUSING = """
from tpu_llm.evals.sandboxed import Limits, Task, run
print(run([Task(program='import socket; socket.socket()')], Limits(contained=False))[0].stderr)
run([Task(program='open("PATH", "w")')])
"""


@contained
@pytest.mark.parametrize('what', ['max_mnt_namespaces', 'max_net_namespaces'])
def test_where_namespaces_are_refused_it_stops_unless_told_otherwise(tmp_path, what):
    code = REFUSING.replace('PATH', str(tmp_path / 'x'))
    script = f'echo 0 > /proc/sys/user/{what} && exec "$0" -c "$1"'
    command = ['unshare', '--user', '--map-root-user', 'sh', '-c', script, sys.executable, code]
    told = subprocess.run(command, capture_output=True, text=True)
    assert 'socket.__new__ is not allowed in the sandbox' in told.stdout
    assert 'RunError: the kernel of this machine refuses the namespaces' in told.stderr
    assert not (tmp_path / 'x').exists()


SYSTEM_PYTHON = '/usr/bin/python3'
as_root = pytest.mark.skipif(
    not os.path.exists(SYSTEM_PYTHON) or os.getuid() != 0, reason='another user and an interpreter that all may read'
)


def jail(programs: list[str], *, user: int, folder: str = '', namespaces: bool = True) -> tuple[str, list[dict]]:
    asked = dataclasses.asdict(Limits(processes=8, contained=namespaces))
    asked |= {'namespaces': namespaces, 'folder': folder, 'stranger': 60_001}
    asked['tasks'] = [dataclasses.asdict(Task(program=program)) for program in programs]
    command = [SYSTEM_PYTHON, '-I', '-S', '-c', sandboxed._JAIL.read_text()]
    told = subprocess.run(command, input=json.dumps(asked).encode(), capture_output=True, user=user, group=user)
    kind, *outcomes = map(json.loads, told.stdout.splitlines())
    return kind, outcomes


@contained
@as_root
def test_someone_else_than_root_is_contained_as_well():
    programs = [
        'import os\nprint(os.getuid(), os.listdir("/proc"))',
        FORKS,
        'open("/var/tmp/written-by-a-sandboxed-program", "w")',
        'import ctypes\nprint(ctypes.CDLL(None).umount2(b"/proc", 2))',
    ]
    kind, outcomes = jail(programs, user=1234)
    assert kind == 'user'
    assert outcomes[0]['stdout'] == '1234 []\n'
    assert int(outcomes[1]['stdout']) < 8
    assert 'Read-only file system' in outcomes[2]['stderr']
    assert outcomes[3]['stdout'] == '-1\n'


@as_root
def test_root_becomes_a_stranger_without_namespaces_too():
    with tempfile.TemporaryDirectory() as folder:
        program = 'import os\nopen("x", "w").write("y")\nprint(os.getuid(), os.listdir("."))'
        kind, outcomes = jail([program], user=0, folder=folder, namespaces=False)
    assert kind == ''
    assert outcomes[0]['stdout'] == "60001 ['x']\n"

"""One worker's side of launch/pod.py: keeps a command alive when ssh is not, and shows its log to whoever asks.

    python3 worker.py run TOKEN -- python launch/run.py …     starts it, or attaches to it; ends as it ends
    python3 worker.py stop                                    SIGTERM, so that the run saves; SIGKILL five minutes later
    python3 worker.py status                                  what runs here, or how it ended

It runs under the machine's own Python (3.8 or newer) with nothing installed. It writes into ~/pod/job: `lock`, which is
held for as long as the command runs (and no longer, whatever ends it), `command`, `token`, `pid`, `log`, `status` and
`stopped`; launch/run.py adds `joined`. The token tells one start from another: gcloud repeats a dropped connection by
itself, and the repetition must attach to what the first one started, or say how that ended.
"""

from __future__ import annotations  # for the Python of older images

import fcntl
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

POD = Path.home() / 'pod'
JOB = POD / 'job'
GRACE = 300  # seconds that a run has to save before it is killed
TAIL = 4096  # bytes of the log that are shown again to who attaches
BUSY = 3
TELL = 120  # seconds that the record of how it ended, and the wait for the others', may take
LARGEST = 254  # 255 would be taken for a failure of ssh itself


def main(argv: list[str]) -> int:
    JOB.mkdir(parents=True, exist_ok=True)
    verb, *rest = argv
    if verb == 'run':
        return run(rest[0], rest[2:])
    if verb == 'supervise':
        return supervise(rest)
    return stop() if verb == 'stop' else status()


def run(token: str, command: list[str]) -> int:
    lock = acquire()
    shown = max(0, size('log') - TAIL)
    if lock is None and read('command') != shlex.join(command):
        say(f'busy with another command, which `pod.py stop` ends: {read("command")}')
        say(f'{token} ended: exit {BUSY}')
        return BUSY
    if lock is not None and read('token') != token:
        begin(token, command, lock)
        shown = 0
    if lock is not None:
        os.close(lock)
    return follow(shown)


def begin(token: str, command: list[str], lock: int) -> None:
    for name in ('status', 'stopped', 'joined'):
        (JOB / name).unlink(missing_ok=True)
    (JOB / 'command').write_text(shlex.join(command))
    (JOB / 'token').write_text(token)
    with open(JOB / 'log', 'wb') as log:
        supervisor = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), 'supervise', *command],
            cwd=POD / 'code',
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # no hang-up reaches it
            pass_fds=[lock],  # the lock is held until the last process that has it open is gone
        )
    (JOB / 'pid').write_text(str(supervisor.pid))


def supervise(command: list[str], events: Path | None = None) -> int:
    """Runs the command, hands SIGTERM on to it (and to no helper process of it), and records how it ended.

    `events` is the file in which the kernel counts what it killed for lack of memory, here by default.
    """
    events = events or memory_events()
    before = oom_kills(events)
    terminate = {signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, terminate)  # until there is a process to hand it to
    try:
        child = subprocess.Popen(
            command,
            env=dict(os.environ, TPU_LLM_JOINED=str(JOB / 'joined')),
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, terminate),
        )
    except OSError as error:
        print(f'{command[0]}: {error.strerror}', flush=True)
        (JOB / 'status').write_text('127')
        return 127
    signal.signal(signal.SIGTERM, lambda *_: child.send_signal(signal.SIGTERM))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, terminate)
    code = child.wait()
    (JOB / 'status').write_text(str(code) if code >= 0 else f'{128 - code} ({signal.Signals(-code).name})')
    if (JOB / 'joined').exists():
        after = oom_kills(events)
        tell(code, None if before is None or after is None else after - before)
    return 0


def tell(code: int, kills: int | None) -> None:
    """Lets the other hosts know how this one's child ended, and says what ended theirs."""
    words = ['python', '-m', 'tpu_llm.parallel.deaths', str(JOB / 'joined'), f'--code={code}', f'--log={JOB / "log"}']
    words += [] if kills is None else [f'--oom-kills={kills}']
    try:
        subprocess.run(words, timeout=TELL)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f'how this host ended could not be recorded: {error}', flush=True)


def memory_events() -> Path | None:
    """Where the kernel counts for the cgroup of this process, which is its child's: version 2 or 1; None if nowhere."""
    own, root = Path('/proc/self/cgroup'), Path('/sys/fs/cgroup')
    kinds = {'': (root, 'memory.events'), 'memory': (root / 'memory', 'memory.oom_control')}
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, group = line.split(':', 2)
        folder, name = kinds.get(controllers, (root, ''))
        file = folder / group.lstrip('/') / name
        if file.is_file():
            return file
    return None


def oom_kills(events: Path | None) -> int | None:
    lines = events.read_text().splitlines() if events and events.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith('oom_kill ')), None)


def follow(shown: int) -> int:
    """Prints the log from byte `shown` on until the command has ended; returns its exit status."""
    with open(JOB / 'log', 'rb') as log:
        log.seek(shown)
        rest = b''
        while True:
            over = not running()  # asked before reading, so that nothing written before the end is missed
            *lines, rest = (rest + log.read()).split(b'\n')
            for line in lines + ([rest] if over and rest else []):
                say(line.decode(errors='replace'))
            if over:
                break
            time.sleep(0.2)
    ended = read('status') or '137 (killed, or the machine was restarted)'
    stopped = ', stopped' if (JOB / 'stopped').exists() else ''
    say(f'{read("token")} ended: exit {ended}{stopped}')
    return min(int(ended.split()[0]), LARGEST)


def stop() -> int:
    if running():
        (JOB / 'stopped').touch()
        supervisor = int(read('pid'))
        os.kill(supervisor, signal.SIGTERM)
        limit = time.monotonic() + GRACE
        while running() and time.monotonic() < limit:
            time.sleep(0.2)
        if running():
            os.killpg(supervisor, signal.SIGKILL)
            say(f'killed: it did not end within {GRACE} s of SIGTERM')
    return status()


def status() -> int:
    if running():
        say(f'running: {read("command")}')
    else:
        say(f'exit {read("status") or "unknown"}: {read("command")}' if size('command') else 'nothing has run here')
    return 0


def environment() -> dict[str, str]:
    """The machine's own, the virtual environment, and what `push --env-file` brought."""
    path = f'{POD / "venv" / "bin"}:{os.environ.get("PATH", "")}'
    own = dict(os.environ, PATH=path, VIRTUAL_ENV=str(POD / 'venv'), PYTHONUNBUFFERED='1')
    file = POD / 'env'
    lines = file.read_text().splitlines() if file.exists() else []
    pairs = (line.partition('=') for line in lines if '=' in line and not line.startswith('#'))
    return {**own, **{name: value for name, _, value in pairs}}


def acquire() -> int | None:
    """The lock, open; None if a command runs. Tries for a second, since who asks whether one runs holds it briefly."""
    lock = os.open(JOB / 'lock', os.O_RDWR | os.O_CREAT)
    for _ in range(10):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            time.sleep(0.1)
    os.close(lock)
    return None


def running() -> bool:
    lock = os.open(JOB / 'lock', os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def read(name: str) -> str:
    return (JOB / name).read_text() if (JOB / name).exists() else ''


def size(name: str) -> int:
    return (JOB / name).stat().st_size if (JOB / name).exists() else 0


def say(line: str) -> None:
    print(f'[{socket.gethostname()}] {line}', flush=True)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

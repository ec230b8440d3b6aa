"""Runs a stranger's programs where they can do no harm. `sandboxed` starts it as a process of its own, JSON in and out.

Three processes. The first makes namespaces (of processes, network, mounts and System V) and waits. The second is
process 1 in there: it furnishes a file system that can only be read, without /proc, /run and devices and with a small
/tmp, and runs the programs one after another, each in a third process that has given up every privilege. A program can
neither signal process 1 nor look into it; when that ends, the kernel kills whatever is left inside.

Where the kernel refuses namespaces, an audit hook in the program's own interpreter refuses sockets, processes and
writing outside of its folder: that stops accidents, not an attack.

This file imports nothing but the standard library: it runs without site-packages.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import shutil
import signal
import sys
import time

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_NOSUID, _NODEV, _READ_ONLY, _BIND, _REC, _PRIVATE = 2, 4, 1, 4096, 16384, 1 << 18
_PDEATHSIG, _DUMPABLE, _CAPBSET_DROP, _SUBREAPER, _NO_NEW_PRIVS = 1, 4, 24, 36, 38
_MOUNT_SETATTR = 442  # the number is the same on every architecture
# What the third process has as its descriptors 0, 1, …; the last is there until the program starts.
_PIPES = ('stdin', 'stdout', 'stderr', 'told', 'word', 'broken')
_FED = ('stdin', 'told')
_REFUSED = 3  # a code to exit with
_PYTHON = '/run/python'  # where the interpreter is inside, since its own folder may be closed to strangers

# What the third process runs. `told` is read whole before the program: it holds the word that says it came to its end.
_RUNNER = """
import json, os, sys
def run():
    told, first = json.load(os.fdopen(3)), os.getpid()
    guard(told['guard'], told['folder'])
    space = {'__name__': '__main__', '__builtins__': __builtins__}
    exec(compile(told['program'], '<program>', 'exec'), space)
    if told['test']:
        exec(compile(told['test'], '<test>', 'exec'), space)
    sys.stdout.flush()
    if os.getpid() == first:
        os.write(4, told['word'].encode())
def guard(refused, folder):
    if not refused:
        return
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    changing = ('os.mkdir', 'os.remove', 'os.rename', 'os.rmdir', 'os.chmod', 'os.chown', 'os.link', 'os.symlink')
    changing += ('os.truncate', 'os.utime', 'os.setxattr', 'os.removexattr', 'shutil.')
    starting = ('os.fork', 'os.forkpty', 'os.exec', 'os.spawn', 'os.posix_spawn', 'os.system', 'os.kill', 'pty.')
    starting += ('subprocess.', 'ctypes.', 'signal.pthread_kill', 'sys.addaudithook')
    real, inside = os.path.realpath, os.path.realpath(folder) + '/'
    def outside(path):
        path = os.fsdecode(path) if isinstance(path, (str, bytes)) else None
        return path is not None and path != os.devnull and not (real(path) + '/').startswith(inside)
    def hook(event, args):
        if event.startswith('socket.') or event.startswith(starting):
            raise PermissionError(event + ' is not allowed in the sandbox')
        if event == 'import' and args[0] in ('ctypes', '_ctypes', '_posixsubprocess'):
            raise ImportError('import of ' + args[0] + ' is not allowed in the sandbox')
        wrote = event == 'open' and isinstance(args[2], int) and args[2] & writing
        if (wrote and outside(args[0])) or (event.startswith(changing) and any(map(outside, args))):
            raise PermissionError('writing outside of the working folder is not allowed in the sandbox')
    sys.addaudithook(hook)
run()
"""


def main() -> None:
    """Writes 'null' where namespaces are refused; else what contains the programs, and a line for each of them."""
    asked = json.load(sys.stdin)
    _prctl(_PDEATHSIG, signal.SIGKILL)
    inside = _enter() if asked['namespaces'] else ''
    code = _REFUSED
    if inside or not asked['namespaces']:
        child = os.fork()
        if child == 0:
            _serve(asked, inside)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == _REFUSED:
        print('null')
    sys.exit(code not in (0, _REFUSED))


# ------------------------------------------------------------------------------------------------------- namespaces


def _enter() -> str:
    """Makes namespaces, whose first process is the next child: as 'root', as 'user', or '' where that is refused."""
    spaces = _NEWNS | _NEWIPC | _NEWPID | _NEWNET
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0 and _LIBC.unshare(spaces) == 0:
        return 'root'
    if _LIBC.unshare(_NEWUSER | spaces):
        return ''
    try:
        for name, text in (('setgroups', 'deny'), ('uid_map', f'{uid} {uid} 1'), ('gid_map', f'{gid} {gid} 1')):
            with open(f'/proc/self/{name}', 'w') as file:
                file.write(text)
    except PermissionError:  # some let anyone make a namespace, and nobody be anyone in it
        return ''
    return 'user'


def _furnish(asked: dict) -> str:
    """The file system inside; returns the folder that can be written to."""
    _check(_LIBC.mount(b'none', b'/', None, _REC | _PRIVATE, None), 'mount /')
    read_only = (ctypes.c_uint64 * 4)(_READ_ONLY | _NOSUID, 0, 0, 0)
    _check(_LIBC.syscall(_MOUNT_SETATTR, -100, b'/', 0x8000, read_only, ctypes.sizeof(read_only)), 'mount_setattr')
    # By their descriptors, because their paths may lead through what is covered.
    python = os.open(sys.base_prefix, os.O_PATH | os.O_DIRECTORY)
    null = os.open('/dev/null', os.O_PATH)
    for place in ('/run', '/dev'):
        _tmpfs(place, 1 << 16)
    os.mkdir(_PYTHON)
    os.close(os.open('/dev/null', os.O_CREAT))
    _bind(python, _PYTHON)
    _bind(null, '/dev/null')
    _tmpfs('/tmp', asked['files'])
    os.chmod('/tmp', 0o1777)
    _tmpfs('/proc', 4096)
    for place in ('/run', '/dev', '/proc'):
        _check(_LIBC.mount(None, place.encode(), None, 32 | _READ_ONLY | _NOSUID | _NODEV, None), f'remount {place}')
    return '/tmp'


def _tmpfs(place: str, size: int) -> None:
    _check(_LIBC.mount(b'tmpfs', place.encode(), b'tmpfs', _NOSUID | _NODEV, f'size={size}'.encode()), place)


def _bind(descriptor: int, place: str) -> None:
    _check(_LIBC.mount(f'/proc/self/fd/{descriptor}'.encode(), place.encode(), None, _BIND | _REC, None), place)
    os.close(descriptor)


def _check(result: int, what: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), f'{what}: {os.strerror(ctypes.get_errno())}')


def _prctl(option: int, value: int) -> None:
    _LIBC.prctl(option, value, 0, 0, 0)


# --------------------------------------------------------------------------------------------- the second process


def _serve(asked: dict, inside: str) -> None:
    """Runs each program, and writes what came of it, a line each; does not return."""
    try:
        _prctl(_PDEATHSIG, signal.SIGKILL)
        _prctl(_SUBREAPER, 1)
        folder, stranger = asked['folder'], _stranger(asked, inside)
        if inside:
            try:
                folder = _furnish(asked)
            except OSError:  # … or mount in it
                os._exit(_REFUSED)
        if stranger and not inside:
            os.chown(folder, stranger, stranger)
        _prctl(_DUMPABLE, 0)  # it cannot be traced
        out = os.fdopen(os.dup(1), 'w')
        print(json.dumps(inside), file=out, flush=True)
        for task in asked['tasks']:
            print(json.dumps(_run(asked, task, inside, folder, stranger)), file=out, flush=True)
            _clear(folder)
    except BaseException as error:
        os.write(2, f'{type(error).__name__}: {error}'.encode())
        os._exit(1)
    os._exit(0)


def _stranger(asked: dict, inside: str) -> int:
    """The user to become; 0 is to stay: for who is not root, and where others cannot read the interpreter."""
    with open('/proc/self/uid_map') as ranges:
        known = [(int(first), int(count)) for first, _, count in map(str.split, ranges)]
    if os.geteuid() or inside == 'user' or not any(0 <= asked['stranger'] - first < count for first, count in known):
        return 0
    if inside:
        return asked['stranger']
    above = sys.base_prefix.split('/')
    folders = ['/'.join(above[: depth + 1]) or '/' for depth in range(len(above))]
    return asked['stranger'] if all(os.stat(folder).st_mode & 1 for folder in folders) else 0


def _run(asked: dict, task: dict, inside: str, folder: str, stranger: int) -> dict:
    word = os.urandom(16).hex()
    told = json.dumps({**task, 'word': word, 'guard': not inside, 'folder': folder})
    ends = {name: os.pipe() for name in _PIPES}
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(asked, [pair[name not in _FED] for name, pair in ends.items()], inside, folder, stranger)
    for name, pair in ends.items():
        os.close(pair[name not in _FED])
    feed = {ends['stdin'][1]: task['stdin'].encode(errors='replace'), ends['told'][1]: told.encode()}
    read = {ends[name][0]: name for name in _PIPES if name not in _FED}
    got, stopped, status = _watch(child, feed, read, began + asked['seconds'], asked['output'])
    _kill(child, inside)
    if status is None:
        _, status = os.waitpid(child, 0)
    _reap()
    got = _drained(got, read, asked['output'])
    if got['broken']:
        raise OSError(got['broken'].decode())
    return {
        'code': os.waitstatus_to_exitcode(status),
        'stopped': stopped,
        'finished': got['word'] == word.encode(),
        'stdout': got['stdout'].decode(errors='replace'),
        'stderr': got['stderr'].decode(errors='replace'),
        'seconds': time.monotonic() - began,
    }


def _watch(child: int, feed: dict, read: dict, until: float, most: int) -> tuple[dict, str, int | None]:
    """Feeds and listens until the program ends, has had its time, or says more than `most` bytes."""
    poll = select.poll()
    for end in (*feed, *read):
        os.set_blocking(end, False)
        poll.register(end, select.POLLOUT if end in feed else select.POLLIN)
    ended = os.pidfd_open(child)
    poll.register(ended, select.POLLIN)
    got, stopped = dict.fromkeys(read.values(), b''), ''
    try:
        while True:
            left = until - time.monotonic()
            if left <= 0:
                return got, 'time', None
            for end, _ in poll.poll(left * 1000):
                if end == ended:
                    return got, stopped, os.waitpid(child, 0)[1]
                if end in feed:
                    feed[end] = _fed(end, feed[end])
                    if not feed[end]:
                        poll.unregister(end)
                        os.close(end)
                        del feed[end]
                    continue
                some = os.read(end, 1 << 16)
                if not some:
                    poll.unregister(end)
                got[read[end]] += some[: most + 1 - len(got[read[end]])]
                if len(got[read[end]]) > most:
                    got[read[end]] = got[read[end]][:most]
                    return got, 'output', None
    finally:
        os.close(ended)
        for end in feed:
            os.close(end)


def _fed(end: int, data: bytes) -> bytes:
    """What is left to write; nothing, where nobody reads."""
    try:
        return data[os.write(end, data) :] if data else b''
    except BrokenPipeError:
        return b''


def _drained(got: dict, read: dict, most: int) -> dict:
    """With what was in the pipes when everything had ended."""
    for end, name in read.items():
        with contextlib.suppress(BlockingIOError):  # outside of a namespace somebody may have got away with it
            while len(got[name]) < most and (some := os.read(end, 1 << 16)):
                got[name] = (got[name] + some)[:most]
        os.close(end)
    return got


def _kill(child: int, inside: str) -> None:
    """Everybody that the program has started. Process 1 of a namespace asks the kernel, which forgets nobody."""
    if inside:
        assert os.getpid() == 1, 'this would kill every process of the user'
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    with open(f'/proc/self/task/{os.getpid()}/children') as orphans:
        for orphan in set(orphans.read().split()) - {str(child)}:
            os.kill(int(orphan), signal.SIGKILL)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def _clear(folder: str) -> None:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            os.unlink(entry.path)


# ---------------------------------------------------------------------------------------------- the third process


def _become(asked: dict, ends: list, inside: str, folder: str, stranger: int) -> None:
    """The program; does not return."""
    broken = 1
    try:
        os.setsid()
        os.chdir(folder)
        moved = [os.dup2(end, 100 + at, inheritable=False) for at, end in enumerate(ends)]
        broken = moved[_PIPES.index('broken')]  # closes as the program starts
        for at in range(_PIPES.index('broken')):
            os.dup2(moved[at], at)
        os.closerange(_PIPES.index('broken'), 100)
        _limit(asked, counted=bool(inside or stranger))
        if stranger:
            os.setgroups([])
            os.setresgid(stranger, stranger, stranger)
            os.setresuid(stranger, stranger, stranger)
        elif inside:
            for capability in range(64):
                _prctl(_CAPBSET_DROP, capability)
            header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
            _check(_LIBC.capset(header, none), 'capset')
        _prctl(_NO_NEW_PRIVS, 1)
        _prctl(_PDEATHSIG, signal.SIGKILL)
        python = os.path.realpath(sys.executable)
        if inside:
            python = os.path.join(_PYTHON, os.path.relpath(python, os.path.realpath(sys.base_prefix)))
        environment = {'PATH': '/usr/bin:/bin', 'HOME': folder, 'TMPDIR': folder, 'LANG': 'C.UTF-8'}
        environment |= (
            {'LD_LIBRARY_PATH': f'{_PYTHON}/lib', 'PYTHONHASHSEED': '0'} if inside else {'PYTHONHASHSEED': '0'}
        )
        os.execve(python, [python, '-I', '-S', '-B', '-X', 'utf8', '-c', _RUNNER], environment)
    except BaseException as error:
        os.write(broken, f'the program was not started: {type(error).__name__}: {error}'.encode())
    os._exit(127)


def _limit(asked: dict, counted: bool) -> None:
    """`counted`: whether its processes are apart from others of the same user."""
    seconds = int(asked['seconds']) + 2  # the wall's clock comes first, unless it is the clock that is attacked
    limits = {
        resource.RLIMIT_AS: asked['memory'],
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: asked['files'],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    } | ({resource.RLIMIT_NPROC: asked['processes']} if counted else {})
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


if __name__ == '__main__':
    main()

"""The hosts of a run: joining them, agreeing among them, and which rows of the batch each one feeds."""

import contextlib
import glob
import importlib.util
import os
import pathlib
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from tpu_llm.arrays import Array
from tpu_llm.config import ConfigError
from tpu_llm.parallel import board, deaths, handshake
from tpu_llm.parallel.deaths import LostHost

_HEARTBEAT = 10  # seconds without one, after which a process is taken for dead and jax ends all others
_LAST_SECONDS = 5.0  # for a process that failed, to end by itself
_QUIET = 10  # seconds of waiting for the others without a word
_START = 'start the same command on all of them; the log of one that does not come says why'
_LOST = re.compile(r'Gloo [\w -]+ failed|heartbeat|oordination (service|agent)')
_AGAIN = 'the same command on all hosts goes on from the last checkpoint'
_COORDINATES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')


def join(config: Any, workdir: str = '', seconds: int = 300) -> None:
    """Connects this process to the others of the run, and makes sure that they are to run the same `config` in the same
    `workdir` with the same code and versions. Does nothing on a single host.

    Cloud TPU VMs, GKE, Slurm and Open MPI are recognised, and jax asks them for the others. Anywhere else, set
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID for every process.
    Raises ConfigError where these cannot be or a host differs, LostHost where one is gone; where not all come within
    `seconds`, the process ends with one line.
    """
    coordinates = _coordinates()
    if coordinates is None and not _has_others():
        return
    if os.environ.get('JAX_PLATFORMS', '') == 'cpu':
        jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    with _patience(seconds):
        jax.distributed.initialize(
            *(coordinates or (None, None, None)),
            initialization_timeout=10 * seconds,
            heartbeat_timeout_seconds=_HEARTBEAT,
        )
    if board.count() > 1:
        handshake.check(config, workdir)


def _coordinates() -> tuple[str, int, int] | None:
    """Process 0's address, how many processes there are and which this is, where the environment says so."""
    given = [name for name in _COORDINATES if name in os.environ]
    if not given:
        return None
    if len(given) < len(_COORDINATES):
        missing = ', '.join(name for name in _COORDINATES if name not in os.environ)
        raise ConfigError(f'{", ".join(given)} is set but not {missing}; set all three, or none for one host')
    address, *numbers = (os.environ[name] for name in _COORDINATES)
    host, _, port = address.rpartition(':')
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f'JAX_COORDINATOR_ADDRESS = {address!r}; write host:port of process 0, such as 10.0.0.2:8476')
    for name, text in zip(_COORDINATES[1:], numbers, strict=True):
        if not text.isdecimal():
            raise ConfigError(f'{name} = {text!r} is not a whole number')
    count, index = map(int, numbers)
    if index >= count:
        raise ConfigError(f'JAX_PROCESS_ID = {index} of JAX_NUM_PROCESSES = {count}; they are counted from 0')
    if index == 0:
        _check_port(int(port))
    return address, count, index


def _check_port(port: int) -> None:
    """Of a port in use jax may die without a word, or share it with the run that has it."""
    try:
        socket.create_server(('', port)).close()
    except OSError as error:
        raise ConfigError(
            f'port {port} is taken on this host ({error.strerror}); choose another in JAX_COORDINATOR_ADDRESS'
        ) from None


@contextlib.contextmanager
def _patience(seconds: int) -> Iterator[None]:
    """Ends the process with one line if the block takes longer: jax itself would abort it with a stack of C++."""
    ended = threading.Event()

    def watch() -> None:
        came = 0
        for second in range(seconds):
            if ended.wait(1):
                return
            came = max(came, _connections())  # those that came first are the first to leave
            if second + 1 == _QUIET:
                print(_expected(came), file=sys.stderr, flush=True)
        print('error:', _absent(came, seconds), file=sys.stderr, flush=True)
        os._exit(deaths.LOST)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _expected(came: int) -> str:
    """Whom this host waits for, as far as it can tell."""
    if not board.address():
        return 'waiting for the scheduler, or the metadata of the machine, to name the other hosts'
    if board.index() == 0:
        return 'waiting for the others' + (f': {came} of {board.count()} hosts so far' if came else '')
    return f'waiting for the others: {"host 0 says who is there" if came else f"no host 0 yet at {board.address()}"}'


def _absent(came: int, seconds: int) -> str:
    """Who has not come, as far as this host can tell."""
    count, address = board.count(), board.address()
    if not address:
        return f'the scheduler, or the metadata of the machine, did not name the other hosts within {seconds} s'
    if board.index() == 0:
        return f'{came or "not all"} of {count} hosts came within {seconds} s; {_START}'
    if not came:
        return f'host 0 did not answer at {address} for {seconds} s; is it started, and its port open to other hosts?'
    return f'not all of {count} hosts came within {seconds} s; host 0 says how many did; {_START}'


def _connections() -> int:
    """How many connections with process 0 the kernel knows: there one a host, elsewhere this host's own."""
    tables = [pathlib.Path(name).read_text() for name in glob.glob('/proc/net/tcp*')]
    rows = [row.split() for table in tables for row in table.splitlines()]
    port, side = f':{int(board.address().rpartition(":")[2] or 0):04X}', 1 if board.index() == 0 else 2
    return sum(row[side].endswith(port) and row[3] == '01' for row in rows)  # 01: established


def _has_others() -> bool:
    """Whether a scheduler or a TPU's surroundings may know of other processes of this run."""
    if os.environ.get('JAX_PLATFORMS', '') != 'cpu':
        workers = os.environ.get('TPU_PROCESS_ADDRESSES') or os.environ.get('TPU_WORKER_HOSTNAMES')
        if workers:  # GKE; Colab and Kaggle name one worker
            return len(workers.split(',')) > 1 or 'MEGASCALE_NUM_SLICES' in os.environ
        # A Cloud TPU VM has its hosts in its metadata only. Of a single host, jax makes a run of one process.
        if 'TPU_SKIP_MDS_QUERY' not in os.environ and importlib.util.find_spec('libtpu') and _tpu_chips():
            return True
    return any(int(os.environ.get(name, '1')) > 1 for name in ('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE'))


def _tpu_chips() -> list[str]:
    return glob.glob('/dev/accel*') + glob.glob('/dev/vfio/[0-9]*')


def announce(workdir: str) -> None:
    """Tells launch/worker.py, where it is the parent of this process, what the process has joined."""
    if path := os.environ.get(deaths.FILE):
        place = workdir if '://' in workdir else os.path.abspath(workdir)
        here = deaths.Joined(workdir=place, start=handshake.start(), host=board.index(), hosts=board.count())
        deaths.announce(here, pathlib.Path(path))


@contextlib.contextmanager
def contact(status: Callable[[BaseException], int]) -> Iterator[None]:
    """Around all that a run does with others: raises LostHost for what jax raises where the other side is gone.

    A process in which anything is raised ends within seconds, by itself or with the exit status of what was raised.
    Else jax would wait for all processes at its end, and they for this one in a collective: only its death tells them.
    """
    try:
        yield
    except BaseException as error:  # Ctrl-C on one host included
        if board.count() == 1:
            raise
        if said := _broken(error):
            lost = LostHost(f'lost contact with another host ({said}); {_AGAIN}')
            _end_soon(status(lost))
            raise lost from error
        _end_soon(status(error))
        raise


def _end_soon(code: int) -> None:
    timer = threading.Timer(_LAST_SECONDS, os._exit, [code])
    timer.daemon = True
    timer.start()


def _broken(error: BaseException) -> str:
    """jax's words for a lost connection, from the error or those before it; empty where there are none."""
    said, before = str(error), error.__cause__ or error.__context__
    if isinstance(error, (jax.errors.JaxRuntimeError, ValueError)) and _LOST.search(said):
        return re.sub(r'\[external\S+\] ', '', ' '.join(said.split()))[:200]
    return _broken(before) if before else ''


def local_rows(sharding: NamedSharding, rows: int) -> np.ndarray:
    """The sorted rows of a global batch that this host's devices hold: int64[rows / hosts] unless hosts share rows."""
    first = NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[:1]))
    slices = first.addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in slices]))


def assemble(local: np.ndarray, rows: np.ndarray, total: int, sharding: NamedSharding) -> Array:
    """The global array of `total` rows of which this host holds `local` (its sorted `rows`)."""

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        first, *rest = index
        start, stop, _ = first.indices(total)
        at = int(np.searchsorted(rows, start))
        return local[(slice(at, at + stop - start), *rest)]

    return jax.make_array_from_callback((total, *local.shape[1:]), sharding, shard)

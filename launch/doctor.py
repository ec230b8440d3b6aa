"""Says whether this machine can run tpu_llm, and what to do where it cannot.

    python launch/doctor.py                          Python, packages, devices, disk
    python launch/doctor.py --workdir=gs://bucket/x  and whether a run could live there

Each line is ✓ (fine), ! (works, but look) or ✗ (mend this first); the exit code is 1 if there is a ✗. Devices and
buckets are tried in processes of their own with a time limit, since a TPU that is held, or a bucket that cannot be
reached, may never answer. On a TPU pod run it on every host at once.
"""

from __future__ import annotations  # an old Python must live long enough to be told that it is old

import argparse
import dataclasses
import importlib.metadata as metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain')
PLUGINS = ('libtpu', 'jax-cuda12-plugin', 'jax-cuda13-plugin')  # each fits one version of jax
DEVICE_LIMIT = 90  # seconds; a TPU takes up to 30 to start
WORKDIR_LIMIT = 30
LITTLE_DISK = 5  # GiB
LOCK = '/tmp/libtpu_lockfile'


@dataclasses.dataclass(frozen=True)
class Finding:
    mark: str  # ✓ ! ✗
    text: str
    mend: str = ''

    def __str__(self) -> str:
        return f'{self.mark} {self.text}' + (f'\n    → {self.mend}' if self.mend else '')


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', default='runs', help='where runs shall live (local or gs://)')
    workdir = parser.parse_args(argv).workdir
    failed = False
    for finding in (*python(), *packages(), *devices(), *storage(workdir), *compilation_cache()):
        print(finding, flush=True)
        failed |= finding.mark == '✗'
    return int(failed)


# ----------------------------------------------------------------------------------------- Python and packages


def python() -> Iterator[Finding]:
    text = f'Python {platform.python_version()} ({sys.executable})'
    if sys.version_info >= (3, 11):  # noqa: UP036 (pip would refuse, but nobody has to have used pip)
        yield Finding('✓', text)
    else:
        yield Finding('✗', text, 'tpu_llm needs Python 3.11 or newer: make a virtual environment with one')


def packages() -> Iterator[Finding]:
    """The versions that are installed, and every demand they make on each other that is not met."""
    try:
        from packaging.requirements import Requirement

        own = [Requirement(text) for text in metadata.requires('tpu_llm') or ()]
    except (ImportError, metadata.PackageNotFoundError) as error:
        yield Finding('✗', f'tpu_llm is not installed ({error})', 'in its folder: pip install -e .')
        return
    demands = [('tpu_llm', demand) for demand in own]
    for name in PACKAGES:
        if version(name):
            demands += [(name, Requirement(text)) for text in metadata.requires(name) or ()]
    broken = False
    for owner, demand in demands:
        fault = unmet(owner, demand)
        if fault is not None:
            broken = True
            yield fault
    if not broken:
        found = [f'{name} {version(name)}' for name in (*PACKAGES, *PLUGINS) if version(name)]
        yield Finding('✓', ', '.join(found))


def unmet(owner: str, demand) -> Finding | None:
    """What is wrong with one requirement of a package; demands of an extra count only for a plugin that is there."""
    optional = demand.marker is not None and not demand.marker.evaluate({'extra': ''})
    have = version(demand.name)
    if optional and not (owner == 'jax' and demand.name in PLUGINS and have):
        return None
    if have is None:
        return Finding('✗', f'{owner} needs {demand.name}, which is not installed', f"pip install '{demand}'")
    if demand.specifier.contains(have, prereleases=True):
        return None
    wanted = f'{demand.name}{demand.specifier}'
    text = f'{owner} {version(owner)} needs {wanted}, but {have} is installed'
    return Finding('✗', text, f"pip install '{wanted}'")


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# ----------------------------------------------------------------------------------------------------- devices

_DEVICES = """
import json, jax, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
devices = jax.local_devices()
count = len(devices)
square = jax.jit(lambda x: x @ x)(np.ones((256, 256), np.float32))
assert (np.asarray(square) == 256).all(), 'a 256 x 256 matrix product came out wrong'
total = jax.shard_map(
    lambda x: jax.lax.psum(x, 'all'), mesh=Mesh(np.array(devices), 'all'), in_specs=P('all'), out_specs=P()
)
assert jax.jit(total)(np.arange(count, dtype=np.float32))[0] == count * (count - 1) / 2, 'a sum over devices is wrong'
stats = devices[0].memory_stats() or {}
print(json.dumps({
    'platform': devices[0].platform, 'kind': devices[0].device_kind, 'devices': count,
    'chips': len({getattr(device, 'coords', device.id) for device in devices}),
    'processes': jax.process_count(), 'memory': stats.get('bytes_limit'),
    'cache': jax.config.jax_compilation_cache_dir,
}))
"""


def devices() -> Iterator[Finding]:
    """What jax finds, whether it computes and sums over all devices, and who holds the TPU if it cannot be opened."""
    chips = tpu_files()
    begun = time.monotonic()
    output, error = probe(_DEVICES, [], DEVICE_LIMIT)
    held = [*holders([*chips, LOCK])]
    if output is None:
        yield Finding('✗', f'jax cannot use its devices: {error}', '' if held else _mend(bool(chips)))
        for pid, command, path in held:
            yield Finding('✗', f'process {pid} holds {path}: {command}', f'wait for it, or stop it: kill {pid}')
        return
    found = json.loads(output.splitlines()[-1])
    took = f'a matrix product and a sum over all of them work ({time.monotonic() - begun:.0f} s)'
    yield Finding('✓', f'{words(found)}; {took}')
    yield from unused(found['platform'], chips)


def words(found: dict) -> str:
    memory = f', {found["memory"] / 2**30:.0f} GiB each' if found['memory'] else ''
    hosts = f' on this host, of {found["processes"]} hosts' if found['processes'] > 1 else ''
    if found['platform'] == 'tpu':
        return f'{found["chips"]} TPU chip(s), {found["kind"]}, {found["devices"]} jax device(s){memory}{hosts}'
    if found['platform'] == 'gpu':
        return f'{found["devices"]} GPU(s), {found["kind"]}{memory}{hosts}'
    return f'no accelerator: CPU with {os.cpu_count()} cores as {found["devices"]} jax device(s){hosts}'


def unused(used: str, chips: Sequence[str]) -> Iterator[Finding]:
    """Accelerators that are here while jax computes on the CPU."""
    if used != 'cpu':
        return
    setting = os.environ.get('JAX_PLATFORMS')
    for device, extra in ((chips[:1], 'tpu'), (['/dev/nvidia0'], 'cuda')):
        if device and os.path.exists(device[0]):
            forced = f'unset JAX_PLATFORMS (it is {setting!r})' if setting else f"pip install -e '.[{extra}]'"
            yield Finding('!', f'{device[0]} is here, but jax computes on the CPU', forced)


def _mend(tpu: bool) -> str:
    if tpu:
        return "on a pod, run this on all hosts at once; else pip install -U -e '.[tpu]'"
    return 'JAX_PLATFORMS=cpu runs without an accelerator'


def tpu_files() -> list[str]:
    """The device files of TPU chips: /dev/accel0 … (up to v4), /dev/vfio/0 … (later)."""
    return sorted(str(path) for pattern in ('accel*', 'vfio/[0-9]*') for path in Path('/dev').glob(pattern))


def holders(paths: Iterable[str]) -> Iterator[tuple[int, str, str]]:
    """(pid, command, path) of each process that has one of the files open, as far as this user may look."""
    wanted = set(paths)
    for process in Path('/proc').glob('[0-9]*'):
        try:
            links = [*(process / 'fd').iterdir()]
            command = (process / 'cmdline').read_text().replace('\0', ' ').strip()
        except OSError:  # it has ended, or belongs to another user
            continue
        for path in sorted(wanted & {target(link) for link in links}):
            yield int(process.name), command, path


def target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # closed in the meantime
        return ''


def probe(code: str, args: list[str], limit: float) -> tuple[str | None, str]:
    """The output of a Python program, or None and the last line of what it said instead."""
    try:
        done = subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return None, f'no answer within {limit:g} seconds'
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return None, lines[-1] if lines else f'the process died with code {done.returncode}'
    return done.stdout, ''


# ----------------------------------------------------------------------------------------------------- storage

_WRITE = """
import os, sys
from etils import epath
path = epath.Path(sys.argv[1]) / f'.doctor-{os.getpid()}'
path.write_text('written')
assert path.read_text() == 'written', 'what was read is not what was written'
path.unlink()
"""


def storage(workdir: str) -> Iterator[Finding]:
    """Whether a run could write, read and delete there, and how much room there is."""
    remote = '://' in workdir
    place = workdir if remote else str(existing(Path(workdir)))
    begun = time.monotonic()
    output, error = probe(_WRITE, [place], WORKDIR_LIMIT)
    if output is None:
        mend = f'see that this account may write to {place}'
        if remote:
            mend = "pip install -e '.[gcs]', then gcloud auth application-default login, and check the bucket"
        yield Finding('✗', f'workdir {workdir} cannot be written: {error}', mend)
    else:
        seconds = time.monotonic() - begun
        yield Finding('✓', f'workdir {workdir}: a file was written, read and deleted ({seconds:.1f} s)')
    if not remote:
        free = shutil.disk_usage(place).free / 2**30
        mend = '' if free >= LITTLE_DISK else 'checkpoints may not fit: free some, or use another --workdir'
        yield Finding('!' if mend else '✓', f'{free:.1f} GiB free at {place}', mend)


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    return path if path.exists() else existing(path.parent)


def compilation_cache() -> Iterator[Finding]:
    folder = os.environ.get('JAX_COMPILATION_CACHE_DIR')
    if not folder:
        mend = 'export JAX_COMPILATION_CACHE_DIR=~/.cache/jax starts a second run without compiling again'
        yield Finding('!', 'no persistent compilation cache', mend)
        return
    output, error = probe(_WRITE, [folder if '://' in folder else str(existing(Path(folder)))], WORKDIR_LIMIT)
    if output is None:
        yield Finding('✗', f'compilation cache {folder} cannot be written: {error}', 'choose another folder')
    else:
        yield Finding('✓', f'compilation cache {folder}')


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

"""The doctor tells a sound machine from a broken one, says what to do, and never hangs."""

import importlib.util
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

DOCTOR = Path(__file__).parents[2] / 'launch/doctor.py'


@pytest.fixture(scope='module')
def doctor():
    spec = importlib.util.spec_from_file_location('doctor', DOCTOR)
    module = importlib.util.module_from_spec(spec)
    sys.modules['doctor'] = module
    spec.loader.exec_module(module)
    return module


def run(*args, **env):
    env = {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', **env}
    command = [sys.executable, DOCTOR, *args]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True)


@pytest.fixture(scope='module')
def sound(tmp_path_factory):
    folder, cache = (tmp_path_factory.mktemp(name) for name in ('doctor', 'cache'))
    done = run(
        f'--workdir={folder / "runs" / "new"}',
        XLA_FLAGS='--xla_force_host_platform_device_count=3',
        JAX_COMPILATION_CACHE_DIR=str(cache),
    )
    assert list(folder.iterdir()) == []  # it leaves nothing behind, and makes no folder
    return done


def test_a_sound_machine_passes(sound):
    assert sound.returncode == 0, sound.stdout
    assert '✗' not in sound.stdout
    assert f'jax {metadata.version("jax")}, jaxlib' in sound.stdout
    assert 'a file was written, read and deleted' in sound.stdout
    assert 'GiB free at' in sound.stdout
    assert '✓ compilation cache' in sound.stdout


def test_devices_are_told_in_words(sound):
    assert 'no accelerator: CPU with' in sound.stdout
    assert 'as 3 jax device(s)' in sound.stdout
    assert 'a matrix product and a sum over all of them work' in sound.stdout


def test_a_broken_machine_fails_with_a_mend_for_each_fault(tmp_path):
    (tmp_path / 'file').write_text('')
    done = run(f'--workdir={tmp_path / "file"}', JAX_PLATFORMS='nonsense', JAX_COMPILATION_CACHE_DIR='')
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    (device,) = (i for i, line in enumerate(lines) if line.startswith('✗ jax cannot use its devices:'))
    assert 'nonsense' in lines[device]
    assert lines[device + 1].startswith('    → ')
    (workdir,) = (i for i, line in enumerate(lines) if line.startswith(f'✗ workdir {tmp_path / "file"} cannot'))
    assert lines[workdir + 1] == f'    → see that this account may write to {tmp_path / "file"}'
    assert '! no persistent compilation cache' in done.stdout
    assert 'Traceback' not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ('demand', 'text', 'mend'),
    [
        ('jaxlib>=999', 'needs jaxlib>=999, but ', "pip install 'jaxlib>=999'"),
        ('no-such-package>=1', 'needs no-such-package, which is not', "pip install 'no-such-package>=1'"),
    ],
)
def test_a_version_that_does_not_fit_is_named(doctor, demand, text, mend):
    finding = doctor.unmet('jax', Requirement(demand))
    assert finding.mark == '✗'
    assert text in finding.text
    assert finding.mend == mend


@pytest.mark.parametrize(
    'demand', ['jaxlib>=0.1', 'no-such-package; python_version < "3"', 'libtpu==0.0.0.*; extra == "tpu"']
)
def test_a_demand_that_does_not_apply_is_no_fault(doctor, demand):
    if doctor.version('libtpu') and 'libtpu' in demand:
        pytest.skip('libtpu is installed')
    assert doctor.unmet('jax', Requirement(demand)) is None


def test_a_plugin_that_is_there_must_fit_jax(doctor, monkeypatch):
    monkeypatch.setattr(doctor, 'PLUGINS', ('numpy',))
    finding = doctor.unmet('jax', Requirement('numpy==0.0.42.*; extra == "tpu"'))
    assert 'needs numpy==0.0.42.*, but' in finding.text


def test_the_process_that_holds_a_device_is_named(doctor, tmp_path):
    device = tmp_path / 'accel0'
    device.write_text('')
    program = 'import sys, time; file = open(sys.argv[1]); print(1, flush=True); time.sleep(60)'
    with subprocess.Popen([sys.executable, '-c', program, device], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            ((pid, command, path),) = doctor.holders([str(device), '/dev/no-such-chip'])
        finally:
            process.kill()
    assert (pid, path) == (process.pid, str(device))
    assert command.endswith(str(device))
    assert list(doctor.holders([str(device)])) == []


def test_the_holder_is_told_when_jax_cannot_start(doctor, monkeypatch, tmp_path):
    lock = tmp_path / 'lock'
    monkeypatch.setattr(doctor, 'LOCK', str(lock))
    monkeypatch.setattr(doctor, '_DEVICES', 'raise RuntimeError("the TPU is already in use")')
    with lock.open('w'):
        lines = [str(finding) for finding in doctor.devices()]
    assert lines[0] == '✗ jax cannot use its devices: RuntimeError: the TPU is already in use'
    assert lines[1].startswith(f'✗ process {os.getpid()} holds {lock}: ')
    assert lines[1].endswith(f'stop it: kill {os.getpid()}')


def test_a_device_that_never_answers_is_given_up(doctor, monkeypatch):
    monkeypatch.setattr(doctor, 'DEVICE_LIMIT', 0.5)
    monkeypatch.setattr(doctor, '_DEVICES', 'import time; time.sleep(60)')
    begun = time.monotonic()
    finding = next(doctor.devices())
    assert time.monotonic() - begun < 10
    assert finding.text == 'jax cannot use its devices: no answer within 0.5 seconds'


def test_an_accelerator_that_jax_does_not_use_is_told(doctor, monkeypatch, tmp_path):
    chip = tmp_path / 'accel0'
    chip.write_text('')
    monkeypatch.delenv('JAX_PLATFORMS', raising=False)
    (finding,) = doctor.unused('cpu', [str(chip)])
    assert finding.mark == '!'
    assert finding.mend == "pip install -e '.[tpu]'"
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    (finding,) = doctor.unused('cpu', [str(chip)])
    assert finding.mend == "unset JAX_PLATFORMS (it is 'cpu')"
    assert list(doctor.unused('tpu', [str(chip)])) == []


@pytest.mark.parametrize(
    ('found', 'text'),
    [
        (
            {'platform': 'tpu', 'kind': 'TPU v5 lite', 'devices': 4, 'chips': 4, 'memory': 2**34, 'processes': 8},
            '4 TPU chip(s), TPU v5 lite, 4 jax device(s), 16 GiB each on this host, of 8 hosts',
        ),
        (
            {'platform': 'gpu', 'kind': 'NVIDIA H100', 'devices': 1, 'memory': None, 'processes': 1},
            '1 GPU(s), NVIDIA H100',
        ),
    ],
)
def test_accelerators_in_words(doctor, found, text):
    assert doctor.words(found) == text


def test_a_full_disk_is_noticed(doctor, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, 'LITTLE_DISK', 10**9)
    disk = list(doctor.storage(str(tmp_path)))[-1]
    assert disk.mark == '!'
    assert 'another --workdir' in disk.mend


def test_help_says_what_the_marks_mean():
    done = run('--help')
    assert done.returncode == 0
    assert '✓ (fine)' in done.stdout

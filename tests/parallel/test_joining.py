"""Which surroundings make a process join others. The joining itself is tested by real processes (tests/multihost);
what only exists on a Cloud TPU VM (libtpu, its device files) is stood in for.
"""

import importlib.util
import socket

import jax
import pytest

from tpu_llm.config import ConfigError
from tpu_llm.parallel import hosts

# name: (environment, chips of a TPU in this machine, whether jax is asked for the others)
SURROUNDINGS = {
    'a laptop': ({}, [], False),
    'a Cloud TPU VM': ({}, ['/dev/accel0'], True),
    'a Cloud TPU VM, but a run on its CPU': ({'JAX_PLATFORMS': 'cpu'}, ['/dev/accel0'], False),
    'Colab': ({'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_SKIP_MDS_QUERY': '1'}, ['/dev/vfio/0'], False),
    'GKE, one host': ({'TPU_WORKER_HOSTNAMES': 'a'}, ['/dev/vfio/0'], False),
    'GKE, two hosts': ({'TPU_WORKER_HOSTNAMES': 'a,b'}, ['/dev/vfio/0'], True),
    'GKE, one host in each of two slices': (
        {'TPU_WORKER_HOSTNAMES': 'a', 'MEGASCALE_NUM_SLICES': '2'},
        ['/dev/vfio/0'],
        True,
    ),
    'Slurm, two tasks': ({'SLURM_NTASKS': '2'}, [], True),
    'Slurm, one task': ({'SLURM_NTASKS': '1'}, [], False),
    'mpirun -n 4, on CPUs': ({'OMPI_COMM_WORLD_SIZE': '4', 'JAX_PLATFORMS': 'cpu'}, [], True),
}
NAMES = {name for env, _, _ in SURROUNDINGS.values() for name in env}


@pytest.fixture
def joined(monkeypatch):
    """The calls of jax.distributed.initialize, in an environment without anything that counts."""
    calls = []
    monkeypatch.setattr(jax.distributed, 'initialize', lambda *args, **limits: calls.append(args))
    for name in NAMES | set(hosts._COORDINATES):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize('name', SURROUNDINGS)
def test_a_process_joins_where_there_may_be_others(name, joined, monkeypatch):
    env, chips, joins = SURROUNDINGS[name]
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name if chips else None)
    monkeypatch.setattr(hosts, '_tpu_chips', lambda: chips)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    hosts.join(None)
    assert joined == ([(None, None, None)] if joins else [])


def test_coordinates_given_in_part_are_an_error_that_names_the_rest(joined, monkeypatch):
    monkeypatch.setenv('JAX_NUM_PROCESSES', '2')
    message = 'JAX_NUM_PROCESSES is set but not JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID; set all three'
    with pytest.raises(ConfigError, match=message):
        hosts.join(None)
    assert not joined


WRONG = [
    (('127.0.0.1', '2', '0'), "JAX_COORDINATOR_ADDRESS = '127.0.0.1'; write host:port of process 0, such as 10.0.0.2:"),
    ((':8476', '2', '0'), "JAX_COORDINATOR_ADDRESS = ':8476'; write host:port"),
    (('a:84760', '2', '0'), "JAX_COORDINATOR_ADDRESS = 'a:84760'; write host:port"),
    (('a:8476', '2', '2'), 'JAX_PROCESS_ID = 2 of JAX_NUM_PROCESSES = 2; they are counted from 0'),
    (('a:8476', '0', '0'), 'JAX_PROCESS_ID = 0 of JAX_NUM_PROCESSES = 0; they are counted from 0'),
    (('a:8476', '2', '-1'), "JAX_PROCESS_ID = '-1' is not a whole number"),
    (('a:8476', '2', 'one'), "JAX_PROCESS_ID = 'one' is not a whole number"),
    (('a:8476', '', '1'), "JAX_NUM_PROCESSES = '' is not a whole number"),
]


@pytest.mark.parametrize(('given', 'message'), WRONG)
def test_coordinates_that_cannot_be_are_refused_in_one_line(given, message, joined, monkeypatch):
    for name, value in zip(hosts._COORDINATES, given, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as error:
        hosts.join(None)
    assert str(error.value).startswith(message)
    assert not joined


def test_a_port_that_is_taken_is_refused_by_process_0_alone(joined, monkeypatch):
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        for name, value in zip(hosts._COORDINATES, (f'127.0.0.1:{port}', '2', '0'), strict=True):
            monkeypatch.setenv(name, value)
        message = rf'port {port} is taken on this host \(.*\); choose another in JAX_COORDINATOR_ADDRESS'
        with pytest.raises(ConfigError, match=message):
            hosts.join(None)
        monkeypatch.setenv('JAX_PROCESS_ID', '1')
        hosts.join(None)
    monkeypatch.setenv('JAX_PROCESS_ID', '0')
    hosts.join(None)
    assert joined == [(f'127.0.0.1:{port}', 2, 1), (f'127.0.0.1:{port}', 2, 0)]

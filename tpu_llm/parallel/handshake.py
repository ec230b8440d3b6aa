"""Before their first collective the hosts of a run make sure that they are about to run the same program.

Two hosts with different versions, configs or sources would not fail: they would hang in a collective that the other
does not have, or train on and differ. So process 0 puts up what it is (`identity`), every host compares itself with
that, and all of them end with the same line where one differs.
"""

import datetime
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import secrets
from typing import Any

from tpu_llm import config as configs
from tpu_llm.config import ConfigError
from tpu_llm.parallel import board
from tpu_llm.parallel.deaths import LostHost, named

PACKAGES = ('jax', 'jaxlib', 'libtpu', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')
SECONDS = 60  # all processes are connected by then: only one that died meanwhile does not answer
_CHECKOUT = pathlib.Path(__file__).parents[2]
_SOURCES = ('tpu_llm', 'configs', 'experiments', 'launch')


def check(config: Any, workdir: str = '') -> None:
    """Compares this host with process 0.

    Raises ConfigError, on every host alike, where a host differs: which host, in what, and the mend. Raises LostHost
    where one is gone already.
    """
    mine, index = identity(config, workdir), board.index()
    if index == 0:
        board.put('identity', json.dumps(mine))
    board.put(f'differs/{index}', difference(mine, json.loads(_wait_for('identity', 0))))
    if index == 0:
        found = {host: _wait_for(f'differs/{host}', host) for host in range(board.count())}
        board.put('refusal', refusal({host: text for host, text in found.items() if text}))
    if why := _wait_for('refusal', 0):
        raise ConfigError(why)


def start() -> str:
    """The name of this start of the run, the same on all hosts; it sorts by time: `20260131T235959-1a2b3c`."""
    if board.index() == 0 and board.get('start') is None:
        now = datetime.datetime.now(datetime.UTC)
        board.put('start', f'{now:%Y%m%dT%H%M%S}-{secrets.token_hex(3)}')
    return _wait_for('start', 0)


def identity(config: Any, workdir: str = '') -> dict[str, str]:
    """What all hosts must have alike: versions of packages, digests of sources, the config's leaves, the workdir."""
    versions = {'Python': '.'.join(platform.python_version_tuple()[:2])} | {name: _version(name) for name in PACKAGES}
    files = {str(path.relative_to(_CHECKOUT)): path for folder in _SOURCES for path in _modules(_CHECKOUT / folder)}
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest()[:10] for name, path in files.items()}
    leaves = {path: repr(value) for path, value in configs.flatten(configs.dump(config)).items()}
    return versions | digests | leaves | {'--workdir': workdir}  # last: its default is named after the config


def difference(mine: dict[str, str], first: dict[str, str]) -> str:
    """The first thing in which a host differs from process 0, with the mend; empty where there is none.

    In the order of `identity`, since other versions may bring another config, but not the other way round.
    """
    names = [name for name in [*first, *mine] if mine.get(name) != first.get(name)]
    if not names:
        return ''
    name = names[0]
    has, had = mine.get(name, 'none'), first.get(name, 'none')
    if name.startswith(('config.', '--')):
        return f'{name} = {has} where host 0 has {had}; start the same command on all'
    if name.endswith('.py'):
        others = sum(other.endswith('.py') for other in set(names)) - 1
        more = f' (and of {others} more files)' if others else ''
        return f'another version of {name}{more} than host 0; bring the same code to all, as `launch/pod.py push` does'
    return f'{name} {has} where host 0 has {had}; install the same on all'


def refusal(found: dict[int, str]) -> str:
    """One line for all hosts that differ, those that differ alike taken together."""
    alike = {text: [host for host in found if found[host] == text] for text in found.values()}
    return ', and '.join(
        f'{named(hosts)} {"has" if len(hosts) == 1 else "have"} {text}' for text, hosts in alike.items()
    )


def _wait_for(key: str, host: int) -> str:
    value = board.get(key, SECONDS)
    if value is None:
        raise LostHost(f'host {host} joined and was not heard of again for {SECONDS} s; its own log says why')
    return value


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return 'none'


def _modules(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.rglob('*.py'))

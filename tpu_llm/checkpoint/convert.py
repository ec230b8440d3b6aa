"""Weights from one form into another, and what a file says of itself before anyone reads it."""

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import Progress

from tpu_llm import config as config_lib
from tpu_llm.checkpoint import adapters, fence, gguf, lanes, manifest, pretrained, tensors
from tpu_llm.checkpoint.commit import folder_name, root
from tpu_llm.checkpoint.files import CheckpointError
from tpu_llm.checkpoint.pretrained import Adapter, Source
from tpu_llm.checkpoint.saving import Saving
from tpu_llm.config import ConfigError
from tpu_llm.data.tokenizer import Tokenizer
from tpu_llm.models.encoder_decoder import EncoderDecoderConfig
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.param import named_params

FORMS = {  # and the types of weights that each can hold, the usual one first
    'hf': ('float32', 'bfloat16'),
    'gguf': ('F16', 'F32', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1'),
    'tpu_llm': ('float32',),
    'peft': ('float32',),
}


def convert(source: str, target: str, *, to: str = '', dtype: str = '') -> None:
    """Writes the model and tokenizer at `source` as a Hugging Face folder, a GGUF file or a checkpoint of ours; or of a
    run of adapters what it has learned alone, as a folder of PEFT's.

    Raises ConfigError for what cannot be, before anything is written.
    """
    to = to or ('gguf' if target.endswith('.gguf') else 'hf')
    kinds = config_lib.choose('form', to, FORMS)
    same = {kind.lower(): kind for kind in kinds} | {kind: kind.upper() for kind in ('bf16',) if to == 'gguf'}
    same |= (
        {'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16'}
        if to == 'gguf'
        else {'f32': 'float32', 'bf16': 'bfloat16'}
    )
    dtype = same.get(dtype.lower(), dtype) if dtype else kinds[0]
    if dtype not in kinds:
        raise ConfigError(f'--dtype={dtype}: a model as {to} has {", ".join(kinds)}')
    if (to == 'gguf') != target.endswith('.gguf'):
        raise ConfigError(f'{target}: the name of a GGUF file ends in .gguf, and that of nothing else')
    if epath.Path(target).exists():
        raise ConfigError(f'{target} is there already; give another place, or remove it')
    given = pretrained.open_source(source)
    if to == 'peft':
        with _shown('reading') as done:
            model, adapter = pretrained.read_wrapped(given, done)
        adapters.save(model, adapter.kind, target, base=adapter.base)
        return
    tokenizer = given.tokenizer()
    with _shown('reading') as done:
        model = pretrained.read_model(given, 'bfloat16' if dtype == 'bfloat16' else 'float32', done)
    with _shown('writing') as done:
        match to:
            case 'hf':
                pretrained.save_pretrained(model, tokenizer, target, done)
            case 'gguf':
                gguf.save(target, model, tokenizer, dtype, done)
            case 'tpu_llm':
                _save_ours(target, given, model, tokenizer)


@contextlib.contextmanager
def _shown(what: str) -> Iterator[Callable[[str], None]]:
    """A line that names the tensor at hand; in a terminal only."""
    columns = ('{task.description}', '{task.completed} tensors', '{task.fields[name]}')
    with Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task(what, total=None, name='')

        def done(name: str) -> None:
            bar.update(task, advance=1, name=name)

        yield done


def _save_ours(target: str, given: Source, model: object, tokenizer: Tokenizer) -> None:
    """A workdir with one checkpoint, at step 0: what `origin.weights` of a run and `from_pretrained` read."""
    token = fence.start(target)
    weights = {'params': {name: leaf.get_value() for name, leaf in named_params(model)}}  # pyright: ignore
    said = {
        'config': {'model': config_lib.dump(given.config)},
        'tokenizer': tokenizer.fingerprint,
        'versions': manifest.versions(),
        'step': 0,
        'processes': 1,
        'tensors': tensors.describe(weights),
        'source': given.path,
    }
    documents = {
        'manifest.json': json.dumps(said, indent=1).encode(),
        lanes.file_name(0): lanes.encode({'lane': np.zeros(0, np.int64)}),
        **tokenizer.files(),
    }
    folder = root(token.workdir) / folder_name(0, token.token)
    Saving(folder, weights, documents, {}, token).finish()


# ------------------------------------------------------------------------------------------------- inspect


def inspect(path: str) -> bool:
    """Prints what is at a path, reading no weights. Whether every tensor has a place here and there is a tokenizer."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    if adapters.is_folder(path) and not pretrained.is_foreign(path):
        console.print('\n  '.join(_of_peft(path)))
        return True
    source = pretrained.open_source(path)
    graph = ModelGraph(source.config.make(vocab_multiple=1))
    config = source.config
    console.print(f'{source.path}\n  {source.family} ({source.kind}), {graph.count():,} parameters')
    console.print(f'  {_layers(config)}, width {config.width}, {config.vocab_size:,} tokens, {_reach(config)}')
    console.print(f'  {_heads(config)}')
    if source.adapter:
        console.print(f'  {_adapter(source.adapter)}')
    rest = [name for name in source.tensors if source.kind == 'tpu_llm' and not name.startswith('params.')]
    for kind, names in source.types().items():
        if model := [name for name in names if name not in rest]:
            console.print(f'  {kind}: {_sum(source, model)}')
    if rest:
        console.print(f'  for training on, the optimizer among it: {_sum(source, rest)}')
    whole = True
    for check in (lambda: _tokenizer(source), lambda: _tensors(source, graph)):
        try:
            console.print(f'  {check()}')
        except (CheckpointError, ConfigError) as error:
            console.print(f'  {error}')
            whole = False
    return whole


def _of_peft(path: str) -> list[str]:
    """What an adapter's folder says."""
    said, stored = adapters.read(path), adapters.stored(path)
    numbers = sum(math.prod(info.shape) for info in stored.values())
    names = {'r': 'rank', 'num_virtual_tokens': 'length', 'target_modules': 'of'}
    fields = {ours: said[theirs] for theirs, ours in names.items() if said.get(theirs)}
    options = ', '.join(f'{k} {", ".join(v) if isinstance(v, list) else v}' for k, v in fields.items())
    return [
        path,
        adapters.apart(path),
        f'{said.get("peft_type")}: {options}',
        f'{len(stored)} tensors, {numbers:,} parameters',
    ]


def _sum(source: Source, names: Sequence[str]) -> str:
    return f'{len(names)} tensors, {sum(math.prod(source.tensors[name][1]) for name in names):,} numbers'


def _adapter(adapter: Adapter) -> str:
    said = config_lib.dump(adapter.kind)
    options = ', '.join(f'{name}={value}' for name, value in said.items() if name in ('rank', 'base', 'length'))
    kind = type(adapter.kind).__name__ + (f'({options})' if options else '')
    return f'an adapter, {kind}: its tensors alone, beside those of {adapter.base or "weights that the run drew"}'


def _tokenizer(source: Source) -> str:
    tokenizer = source.tokenizer()
    chat = 'a chat template' if tokenizer.chat_template else 'no chat template'
    said = f'{tokenizer.vocab_size:,} ids, bos {tokenizer.bos}, eos {tokenizer.eos}, {chat}'
    return f'{type(tokenizer).__name__}: {said}'


def _tensors(source: Source, graph: ModelGraph) -> str:
    source.check(graph)
    return 'every tensor has its place'


def _layers(config: Any) -> str:
    if isinstance(config, EncoderDecoderConfig):
        return f'{config.encoder_layers} + {config.decoder_layers} layers'
    return f'{config.layers} layers'


def _reach(config: Any) -> str:
    """How long texts may be."""
    length = getattr(config, 'max_length', 0)
    return f'context {length:,}' if length else 'context not said'


def _heads(config: Any) -> str:
    if not config.heads:
        return 'no attention'
    kv_heads = getattr(config, 'kv_heads', config.heads)
    shared = f', {kv_heads} of keys and values' if kv_heads not in (0, config.heads) else ''
    return f'{config.heads} heads of {config.head_dim}{shared}'

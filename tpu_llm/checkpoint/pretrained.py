"""A trained model, ready to use, from wherever it was saved; and saved for others to use.

A source is one of three: a Hugging Face folder, a GGUF file, a checkpoint of ours. Each knows the model's config, and
loads its weights tensor by tensor straight into the shards it is asked for.
"""

import dataclasses
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx

from tpu_llm import config
from tpu_llm.arrays import Array
from tpu_llm.checkpoint import adapters, files, gguf, huggingface, reader
from tpu_llm.checkpoint.commit import Checkpoint
from tpu_llm.checkpoint.named import NAMES
from tpu_llm.config import ConfigError
from tpu_llm.data import tokenizer_gguf, tokenizer_json
from tpu_llm.data.documents import fingerprint, read_range
from tpu_llm.data.tokenizer import Pretrained, Tokenizer
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.param import named_params
from tpu_llm.peft import merging
from tpu_llm.peft.wrapping import Kind, put
from tpu_llm.quant.convert import dequantize

DType = Literal['float32', 'bfloat16']
Like = Mapping[str, jax.ShapeDtypeStruct]
Heard = Callable[[str], None]
Load = Callable[[ModelGraph, Like, Heard], dict[str, Array]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """What a run has learned beside the model that it stands on."""

    kind: Kind
    base: str  # where that model is
    wrapped: Callable[[Like, Heard], Any]  # the model with the adapter beside its maps


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Weights that are not read yet, and all that must be known to read them."""

    path: str
    kind: Literal['hf', 'gguf', 'tpu_llm']
    family: str  # the architecture, by their name
    config: Any
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]  # type and shape of each of theirs
    tokenizer: Callable[[], Tokenizer]
    check: Callable[[ModelGraph], object]  # raises CheckpointError where tensors do not fit
    load: Load
    identity: Callable[[], str]  # of the weights, wherever they lie: what is made of them is made of these
    adapter: Adapter | None = None  # of a run that trained one: what `load` puts into the kernels

    def types(self) -> dict[str, list[str]]:
        """Names of tensors by their type."""
        found: dict[str, list[str]] = {}
        for name, (kind, _) in self.tensors.items():
            found.setdefault(kind, []).append(name)
        return found


@dataclasses.dataclass(kw_only=True, slots=True)
class TokenizerOf(Pretrained):
    """The tokenizer that weights were saved with: `path` is a Hugging Face folder, a GGUF file or a run."""

    def make(self, texts: Iterable[str], workdir: epath.PathLike) -> Tokenizer:
        del texts, workdir
        return open_source(self.path).tokenizer()


_PARTS, _PART_BYTES = 64, 1 << 16


def _identity(paths: Iterable[epath.Path]) -> str:
    """Of the beginning, the end and 62 places between of each file: what is trained changes all over."""
    said = []
    for path in paths:
        size = path.stat().length
        starts = sorted({i * max(size - _PART_BYTES, 0) // (_PARTS - 1) for i in range(_PARTS)})
        parts = (read_range(path, start, min(start + _PART_BYTES, size)) for start in starts)
        said.append((path.name, size, hashlib.sha256(b''.join(parts)).hexdigest()))
    return fingerprint(said)


def is_foreign(path: epath.PathLike) -> bool:
    """Whether it is a Hugging Face folder or a GGUF file, by its look."""
    return epath.Path(path).suffix == '.gguf' or huggingface.is_folder(path)


def open_source(path: epath.PathLike) -> Source:
    """What is at a path: local, gs://, or `org/name` on the hub where huggingface_hub is installed.

    Raises ConfigError or CheckpointError, one line, for what is not there, not known or not whole.
    """
    path = epath.Path(path)
    _check_there(path)
    if path.suffix == '.gguf':
        file = gguf.open_file(path)
        return Source(
            path=str(path),
            kind='gguf',
            family=file.family.architecture,
            config=file.config,
            tensors={name: (info.type, info.shape) for name, info in file.reader.tensors.items()},
            tokenizer=lambda: tokenizer_gguf.from_metadata(file.metadata),
            check=file.bind,
            load=file.load,
            identity=lambda: _identity([path]),
        )
    if huggingface.is_folder(path):
        folder = huggingface.open_folder(path)
        infos = {name: folder.files[name].tensors[name] for name in folder.files}
        return Source(
            path=str(path),
            kind='hf',
            family=folder.family.architecture,
            config=folder.config,
            tensors={name: (str(info.dtype), info.shape) for name, info in infos.items()},
            tokenizer=lambda: tokenizer_json.load(path),
            check=folder.bind,
            load=folder.load,
            identity=lambda: _identity(sorted(path.glob('*.safetensors'))),
        )
    if not files.exists(path):
        return open_source(_from_hub(str(path)))
    return _ours(path)


def _check_there(path: epath.Path) -> None:
    """Raises ConfigError for a path that is plainly a mistake."""
    if str(path).startswith('stage:'):
        raise ConfigError(
            f'{path} becomes a path when Stages starts a stage, and is read before that; make the run without it, and '
            f"set run.origin = Origin(weights='{path}')"
        )
    if not files.exists(path):
        if not _on_the_hub(path):
            meant = config.nearest(str(path), NAMES, cutoff=0.7)
            raise ConfigError(
                f'there is no {path}{meant}; give a Hugging Face folder, a .gguf file, the workdir of a run, or '
                'org/name'
            )
    elif not files.is_cloud(path) and path.is_file() and path.suffix != '.gguf':
        raise ConfigError(f'{path} is a file; give the folder that it is in')


def _on_the_hub(path: epath.Path) -> bool:
    """Whether it looks like org/name, and not like a path that was mistyped."""
    return re.fullmatch(r'[\w.-]+/[\w.-]+', str(path)) is not None and not path.parent.exists()


def _from_hub(name: str) -> str:
    if importlib.util.find_spec('huggingface_hub') is None:
        raise ConfigError(
            f'there is no folder {name}; to fetch {name} from the Hugging Face Hub: pip install huggingface_hub'
        )
    from huggingface_hub import errors, snapshot_download

    try:
        return snapshot_download(name, allow_patterns=['*.json', '*.safetensors', '*.model', '*.jinja', '*.txt'])
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        said = str(error).strip().splitlines()[0]
        raise ConfigError(f'there is no folder {name}, and the Hugging Face Hub did not give it ({said})') from None


def _ours(path: epath.Path) -> Source:
    checkpoint = reader.find(path)
    if checkpoint is None and adapters.is_folder(path):
        raise ConfigError(f'{path} is {adapters.apart(path)}')
    if checkpoint is None:
        raise ConfigError(
            f'{path} holds no finished checkpoint; give the workdir of a run that has saved one, a Hugging Face folder '
            '(config.json and safetensors) or a .gguf file'
        )
    return of_checkpoint(checkpoint)


def of_checkpoint(checkpoint: Checkpoint) -> Source:
    """The parameters in a run's checkpoint."""
    manifest = checkpoint.manifest()
    model = config.load(manifest['config']['model'])

    def load(graph: ModelGraph, like: Like, done: Heard) -> dict[str, Array]:
        del graph
        saved = {name: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding) for name, x in like.items()}
        arrays = reader.load(checkpoint, {'params': saved}, part=True).arrays['params']
        done(str(checkpoint.folder))
        return {name: arrays[name].astype(like[name].dtype) for name in like}

    def tokenizer() -> Tokenizer:
        return _our_tokenizer(checkpoint.folder, manifest)

    adapter = _adapter(model, manifest, load) if manifest['config'].get('peft') else None
    return Source(
        path=str(checkpoint.folder),
        kind='tpu_llm',
        family='tpu_llm',
        config=model,
        tensors={name: (each['dtype'], tuple(each['shape'])) for name, each in manifest['tensors'].items()},
        tokenizer=tokenizer,
        check=lambda graph: None,  # a checkpoint is verified as it is opened
        load=_merged(adapter) if adapter else load,
        identity=lambda: fingerprint(
            checkpoint.checksums, adapter and adapter.base and open_source(adapter.base).identity()
        ),
        adapter=adapter,
    )


def _adapter(model: Any, manifest: Mapping[str, Any], load: Load) -> Adapter:
    kind: Kind = config.load(manifest['config']['peft'])
    base = manifest['config']['origin']['weights']

    def wrapped_model(like: Like, done: Heard) -> Any:
        plain = ModelGraph(dataclasses.replace(model, dtype='float32').make(vocab_multiple=1))
        wrapped = plain.bind(plain.shapes())
        kind.wrap(wrapped)
        graph = ModelGraph(wrapped)
        learned = {name.removeprefix('params.') for name in manifest['tensors'] if name.startswith('params.')}
        here = next(iter(like.values())).sharding
        own = {
            name: like.get(name, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_whole(here)))
            for name, leaf in graph.leaves.items()
            if name in learned
        }
        arrays = load(graph, own, done)
        source = open_source(base)
        below = source.load(plain, {name: x for name, x in like.items() if name not in learned}, done)
        bound = plain.bind({**below, **{name: arrays[name] for name in plain.leaves if name in arrays}})
        kind.wrap(bound)
        put(bound, arrays)
        bound.home = source.family
        return bound

    return Adapter(kind=kind, base=base, wrapped=wrapped_model)


def _merged(adapter: Adapter) -> Load:
    """What loads the model that a run of adapters stands on, with what it has learned in the kernels."""

    def load(graph: ModelGraph, like: Like, done: Heard) -> dict[str, Array]:
        del graph  # which may hold layers and vocabulary in another order; a checkpoint has them as this one does
        bound = adapter.wrapped(like, done)
        merging.merge(bound)
        merging.bare(bound)
        dequantize(bound)  # what the adapters learned beside, and not what it was before
        return {name: leaf.get_value().astype(like[name].dtype) for name, leaf in named_params(bound) if name in like}

    return load


def _whole(like: Any) -> Any:
    """Unsplit, on the devices of another sharding."""
    if isinstance(like, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(like.mesh, jax.sharding.PartitionSpec())
    return like


def _our_tokenizer(folder: epath.Path, manifest: Mapping[str, Any]) -> Tokenizer:
    saved = folder / 'tokenizer'
    if (saved / 'tokenizer.json').exists() or (saved / 'tokenizer.model').exists():
        return tokenizer_json.load(saved)
    # Tokenizers without a file are made from their config alone.
    return config.load(manifest['config']['data']['tokenizer']).make(iter(()), folder)


# ------------------------------------------------------------------------------------------------- the two of us


def from_pretrained(path: epath.PathLike, dtype: DType = 'float32') -> tuple[Any, Tokenizer]:
    """(model, tokenizer) of a Hugging Face folder, a GGUF file or a run's newest whole checkpoint; local or gs://.

    Weights are held and used in `dtype`. A folder's and a GGUF's tensors must fit the config one by one; a checkpoint's
    files are verified first. Raises ConfigError for what is not there or not implemented, CheckpointError for what is
    not whole.
    """
    source = open_source(path)
    model, tokenizer = read_model(source, dtype), source.tokenizer()
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f'{path}: the tokenizer has {tokenizer.vocab_size} ids and the model {model.vocab_size}; give the '
            'folder that they were saved in together'
        )
    return model, tokenizer


def read_model(source: Source, dtype: DType, done: Heard = lambda name: None, *, apart: bool = False) -> Any:
    """The model alone, on this host's first device; its layers one by one, not stacked, where `apart`."""
    _check_dtype(dtype)
    model = dataclasses.replace(source.config, dtype=dtype).make(vocab_multiple=1)
    stacked = source.kind == 'tpu_llm'  # as a checkpoint of ours is
    graph = ModelGraph(model.unstacked() if apart and not stacked else model)
    loaded = graph.bind(source.load(graph, _here(graph, dtype), done))
    loaded.home = source.family  # what it is saved as again, if it still can be
    return loaded.unstacked() if apart and stacked else loaded


def read_wrapped(source: Source, done: Heard = lambda name: None) -> tuple[Any, Adapter]:
    """The model of a run of adapters, float32, with the adapter beside its maps. Raises ConfigError for another run."""
    if source.adapter is None:
        raise ConfigError(f'{source.path} has no adapter; give the workdir of a run with `peft`')
    if not source.adapter.base:
        raise ConfigError(
            f'{source.path} stands on weights that the run drew; an adapter apart from them is of no use: convert it '
            'with --to=hf'
        )
    graph = ModelGraph(source.config.make(vocab_multiple=1))
    return source.adapter.wrapped(_here(graph, 'float32'), done), source.adapter


def _here(graph: ModelGraph, dtype: DType) -> Like:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {name: jax.ShapeDtypeStruct(x.shape, _held(x, dtype), sharding=device) for name, x in graph.leaves.items()}


def _check_dtype(dtype: str) -> None:
    if dtype not in ('float32', 'bfloat16'):
        raise ConfigError(f"dtype = {dtype!r}; write 'float32' or 'bfloat16'")


def _held(leaf: nnx.Param, dtype: DType) -> jnp.dtype:
    """What only moves a choice of experts, by less than bfloat16 can tell, stays exact."""
    return jnp.dtype('float32' if leaf.get_metadata('nudge') else dtype)


def save_pretrained(
    model: Any,
    tokenizer: Tokenizer | None,
    path: epath.PathLike,
    done: Heard = lambda name: None,
    *,
    dtype: DType | None = None,
) -> None:
    """Writes a folder that `transformers` loads: config.json, safetensors, the tokenizer. Weights are written in
    `dtype`, or as they are.

    What is in the folder by these names is replaced. Raises ConfigError for a model that no architecture of
    transformers is, naming what the nearest lacks.
    """
    if dtype is not None:
        _check_dtype(dtype)
    path = epath.Path(path)
    if path.suffix == '.gguf':
        raise ConfigError(f'{path}: a GGUF file is written by python -m tpu_llm.checkpoint convert PATH {path.name}')
    weights = {
        name: leaf.get_value().astype(_held(leaf, dtype)) if dtype else leaf.get_value()
        for name, leaf in named_params(model)
    }
    extra: dict[str, Any] = {'dtype': str(next(iter(weights.values())).dtype)}
    extra |= {'torch_dtype': extra['dtype']}  # as versions of transformers before 5 have it
    if tokenizer is not None:
        extra |= {'bos_token_id': tokenizer.bos, 'eos_token_id': tokenizer.eos, 'pad_token_id': tokenizer.pad}
    said = config.load(json.loads(model.described))
    huggingface.save(path, said, ModelGraph(model), weights, extra, home=getattr(model, 'home', ''), done=done)
    for name, data in (tokenizer_json.dump(tokenizer) if tokenizer is not None else {}).items():
        (path / name).write_bytes(data)

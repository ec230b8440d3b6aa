"""Adapters apart from their model, as the `peft` library has them: adapter_config.json and adapter_model.safetensors.

A wrapped map goes by the name that the model's architecture has for it in transformers, and its matrices are laid out
as that map's weight is (`checkpoint/layout.py`): A is [R, input], B is [output, R].
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from tpu_llm import config as config_lib
from tpu_llm.arrays import Array
from tpu_llm.checkpoint import huggingface, renaming, safetensors_file
from tpu_llm.checkpoint.files import CheckpointError
from tpu_llm.checkpoint.layout import Part
from tpu_llm.checkpoint.renaming import Bound, Place
from tpu_llm.config import ConfigError
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.param import named_params
from tpu_llm.peft import merging
from tpu_llm.peft.ia3 import IA3, ScaledEinsum
from tpu_llm.peft.lora import LoRA, LoraEinsum
from tpu_llm.peft.prefix import Prefix
from tpu_llm.peft.prompts import SoftPrompts
from tpu_llm.peft.wrapping import Kind, each_layer, is_stacked, places, put, unlayered

CONFIG, TENSORS = 'adapter_config.json', 'adapter_model.safetensors'
_GROUP = re.compile(r'\([^)]*\)|.')
Saved = LoRA | IA3 | SoftPrompts | Prefix


# ------------------------------------------------------------------------------------------------- names and layouts


@dataclasses.dataclass(frozen=True, slots=True)
class Linear:
    """A linear map of the architecture: one torch module, one map of ours."""

    theirs: str  # 'model.layers.0.self_attn.q_proj'
    ours: str  # 'attention.query'
    layer: int  # 0 outside a stack
    part: Part  # of its weight

    def group(self, dims: str) -> str:
        """How the dims of ours that are its input, or its output, lie along one of theirs."""
        groups = _GROUP.findall(self.part.theirs)
        return next(g for g in groups if sorted(re.sub(r'[()]', '', g).upper()) == sorted(dims))


def linears(model: Any) -> list[Linear]:
    """The maps of a model, wrapped or not, that are one torch module each."""
    config = config_lib.load(json.loads(model.described))
    family, _ = huggingface.expressible(config, getattr(model, 'home', ''))
    graph = ModelGraph(config.make(vocab_multiple=1))
    found = []
    for bound in (each for group in family.bind(config, graph) for each in group):
        if len(bound.places) != 1 or not bound.name.endswith('.weight'):
            continue
        place = bound.places[0]
        if not place.path.endswith('.kernel') or place.index[1:]:
            continue
        layers = graph.leaves[place.path].get_metadata('layers')
        layer = layers[max(place.index, default=0)] if layers else 0
        ours = unlayered(place.path.removesuffix('.kernel'))
        found.append(Linear(bound.name.removesuffix('.weight'), ours, layer, place.part))
    return found


def _wrapped(model: nnx.Module) -> Iterator[tuple[str, int, tuple[int, ...], str, Any]]:
    """Every wrapped map of every layer: name, layer, index in its parameters, path and module."""
    for place in places(model, merging.Mergeable):
        _, leaf = next(named_params(place.module))
        layers = leaf.get_metadata('layers') or (0,)
        for at, layer in enumerate(layers):
            if layer >= 0:
                yield place.name, layer, (at,) if is_stacked(place.module) else (), place.path, place.module


def _tensors(model: Any, path: str) -> list[Bound]:
    """The tensors of a model's adapters. Raises ConfigError for a map that is a part of one of theirs."""
    known = {(each.ours, each.layer): each for each in linears(model)}
    found = []
    for name, layer, index, at, module in _wrapped(model):
        linear = known.get((name, layer))
        if linear is None:
            raise ConfigError(f'{path}: {name} is no map of its own in transformers; leave it out of the targets')
        for parameter, end, layout in _laid_out(module, linear):
            leaf = getattr(module, parameter)
            dims = leaf.get_metadata('dims')[len(index) :]
            sizes = {**linear.part.sizes, **dict(zip(dims, leaf.shape[len(index) :], strict=True))}
            part = Part(layout, dims, sizes, linear.part.rotary)
            found.append(Bound(f'base_model.model.{linear.theirs}.{end}', (Place(f'{at}.{parameter}', index, part),)))
    return found


def _laid_out(module: Any, linear: Linear) -> Iterator[tuple[str, str, str]]:
    """The parameters of a wrapped map, the ends of their names in peft, and their layouts there."""
    if isinstance(module, ScaledEinsum):
        group = linear.group(module.scaled)
        yield 'ia3_scale', 'ia3_l', f'1{group}' if module.takes else f'{group}1'
        return
    assert isinstance(module, LoraEinsum)
    rank = module.lora_down.get_metadata('dims')[-1]
    summed = module.lora_down.get_metadata('dims').removeprefix('L')[:-1]
    yield 'lora_down', 'lora_A.weight', rank + linear.group(summed)
    yield 'lora_up', 'lora_B.weight', linear.group(module.kept) + rank
    if module.lora_magnitude is not None:
        yield 'lora_magnitude', 'lora_magnitude_vector', linear.group(module.kept)


# ------------------------------------------------------------------------------------------------- save


def save(model: Any, kind: Kind, path: epath.PathLike, *, base: str = '') -> None:
    """Writes what `kind` has added to a model as a folder that `peft` loads; `base` is the model's own folder or name.

    Raises ConfigError for what peft has no form for.
    """
    if not isinstance(kind, Saved):
        raise ConfigError(f'PEFT has no form for {type(kind).__name__}')
    if any(each.merged for each in merging.adapted(model)):
        raise ConfigError('the adapter is merged; unmerge the model to save it apart')
    if not isinstance(kind, (SoftPrompts, Prefix)) and not list(_wrapped(model)):
        raise ConfigError(
            'the model has no adapter beside its maps (one that was loaded from a run has it in its kernels); give the '
            'model that kind.wrap(model) was called on'
        )
    path, weights = epath.Path(path), {name: leaf.get_value() for name, leaf in named_params(model)}
    if isinstance(kind, (SoftPrompts, Prefix)):
        said, tensors = _prompts(model, kind, weights)
    else:
        bound = _tensors(model, str(path))
        if isinstance(kind, LoRA) and kind.dora:
            weights |= {f'{p.path}.lora_magnitude': _magnitude(p.module, 1) for p in places(model, LoraEinsum)}
        tensors = {each.name: renaming.theirs(each, weights) for each in bound}
        said = _said(model, kind)
    common = {'base_model_name_or_path': base, 'task_type': 'CAUSAL_LM', 'inference_mode': True}
    path.mkdir(parents=True, exist_ok=True)
    listed = [(name, array.dtype, array.shape) for name, array in tensors.items()]
    safetensors_file.write(path / TENSORS, listed, lambda name: tensors[name], {'format': 'pt'})
    (path / CONFIG).write_text(json.dumps({**common, **said}, indent=2) + '\n')


def _said(model: Any, kind: LoRA | IA3) -> dict[str, Any]:
    known = {(each.ours, each.layer): each.theirs for each in linears(model)}
    wrapped = [(known[name, layer], module) for name, layer, _, _, module in _wrapped(model)]
    names = _short([theirs for theirs, _ in wrapped], list(known.values()))
    if isinstance(kind, IA3):
        fed = {names[theirs] for theirs, module in wrapped if module.takes}
        return {'peft_type': 'IA3', 'target_modules': sorted(set(names.values())), 'feedforward_modules': sorted(fed)}
    ranks = {names[theirs]: module.lora_up.shape[-1 - len(module.kept)] for theirs, module in wrapped}
    return {
        'peft_type': 'LORA',
        'r': kind.rank,
        'lora_alpha': kind.alpha,
        'lora_dropout': kind.dropout,
        'use_rslora': kind.rslora,
        'use_dora': kind.dora,
        'target_modules': sorted(set(names.values())),
        'rank_pattern': {name: rank for name, rank in ranks.items() if rank != kind.rank},
        'bias': 'none',
    }


def _short(names: Sequence[str], others: Sequence[str]) -> dict[str, str]:
    """The last part of each name, where that names no map that is not meant; else all of it."""
    lasts = {name.rpartition('.')[2] for name in others if name not in names}
    return {name: name if name.rpartition('.')[2] in lasts else name.rpartition('.')[2] for name in names}


def _magnitude(module: LoraEinsum, sign: int) -> Array:
    """Theirs is the whole magnitude, ours what it is more than that of the kernel: one from the other."""
    assert module.lora_magnitude is not None
    return module.lora_magnitude[...] + sign * each_layer(module, LoraEinsum.kernel_norm)


def _prompts(model: Any, kind: SoftPrompts | Prefix, weights: Mapping[str, Array]) -> tuple[dict, dict]:
    config = config_lib.load(json.loads(model.described))
    said = {'num_virtual_tokens': kind.length, 'num_layers': config.layers, 'num_attention_heads': config.heads}
    said |= {'num_transformer_submodules': 1}
    if isinstance(kind, SoftPrompts):
        if kind.tasks > 1:
            raise ConfigError(f'peft has one prompt a folder, and there are {kind.tasks} tasks; save one at a time')
        table = np.asarray(weights['embed.prompts'])[0]
        return {'peft_type': 'PROMPT_TUNING', 'token_dim': table.shape[1], **said}, {'prompt_embeddings': table}
    both = np.empty((kind.length, config.layers, 2, config.kv_heads, config.head_dim), np.float32)
    for path, index, layer, half in _prefixes(model):
        both[:, layer, half] = np.asarray(weights[path])[index]
    said |= {'num_attention_heads': config.kv_heads, 'token_dim': config.kv_heads * config.head_dim}
    said |= {'peft_type': 'PREFIX_TUNING', 'prefix_projection': False, 'encoder_hidden_size': said['token_dim']}
    return said, {'prompt_embeddings': both.reshape(kind.length, -1)}


def _prefixes(model: nnx.Module) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    """Path, index there, layer, and 0 for keys or 1 for values."""
    for path, leaf in named_params(model):
        half = (
            ('prefix_keys', 'prefix_values').index(last) if (last := path.rpartition('.')[2]).startswith('pre') else -1
        )
        for at, layer in enumerate(leaf.get_metadata('layers') if half >= 0 else ()):
            if layer >= 0:
                yield path, (at,) if leaf.get_metadata('dims').startswith('L') else (), layer, half


# ------------------------------------------------------------------------------------------------- load

# What an adapter may say beside what is read, and what it must say then; else it is another method than ours.
_PLAIN: dict[str, tuple[Any, ...]] = {
    'bias': ('none',),
    'fan_in_fan_out': (False, True),
    'modules_to_save': (None,),
    'alpha_pattern': ({}, None),
    'lora_bias': (False,),
    'layer_replication': (None,),
    'trainable_token_indices': (None,),
    'target_parameters': (None, []),
    'use_qalora': (False,),
    'use_bdlora': (None, False),
    'alora_invocation_tokens': (None,),
    'prefix_projection': (False,),
    'num_transformer_submodules': (1,),
}


def read(path: epath.PathLike) -> dict[str, Any]:
    """What an adapter says of itself. Raises ConfigError where there is none."""
    file = epath.Path(path) / CONFIG
    if not file.exists():
        raise ConfigError(
            f'{path} has no {CONFIG}; give the folder of an adapter as peft has it (a run of adapters becomes '
            'one model by python -m tpu_llm.checkpoint convert RUN FOLDER)'
        )
    try:
        said = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f'{file} is not JSON: {error}') from None
    if not isinstance(said, dict):
        raise ConfigError(f'{file} is {type(said).__name__}, not an object of fields')
    return said


def is_folder(path: epath.PathLike) -> bool:
    return (epath.Path(path) / CONFIG).exists()


def apart(path: epath.PathLike) -> str:
    """What such a folder is, and what it takes to be a model."""
    said = read(path)
    base = said.get('base_model_name_or_path') or ''
    if said.get('peft_type') in ('PROMPT_TUNING', 'PREFIX_TUNING'):
        mend = 'no weights can take it up: load it beside its base, checkpoint.adapters.load(model, FOLDER)'
    else:
        mend = f'merge it: python -m tpu_llm.checkpoint merge {path} TARGET{"" if base else " --base=FOLDER"}'
    return f'an adapter of {base or "a base that it does not name"}; {mend}'


def stored(path: epath.PathLike) -> Mapping[str, safetensors_file.Info]:
    """Its tensors, unread."""
    return safetensors_file.Reader(epath.Path(path) / TENSORS).tensors


def load(model: Any, path: epath.PathLike) -> Saved:
    """Wraps a model with the adapter in a folder, in place, its numbers as they are there. What kind it is.

    Raises ConfigError for a method that is not implemented, CheckpointError for an adapter of another base, with all
    that does not fit.
    """
    path, said = epath.Path(path), read(path)
    for key, values in _PLAIN.items():
        if key in said and said[key] not in values:
            raise ConfigError(f'{path}/{CONFIG}: {key} = {said[key]!r} is not implemented')
    file = safetensors_file.Reader(path / TENSORS)
    kinds = {'LORA': _load_maps, 'IA3': _load_maps, 'PROMPT_TUNING': _load_prompt, 'PREFIX_TUNING': _load_prefix}
    loads = config_lib.choose('peft_type', said.get('peft_type', ''), kinds)
    try:
        return loads(model, said, file, str(path))
    except KeyError as error:
        raise ConfigError(f'{path}/{CONFIG} has no {error.args[0]}') from None


def _load_maps(model: Any, said: Mapping[str, Any], file: safetensors_file.Reader, path: str) -> LoRA | IA3:
    known = {each.theirs: each for each in linears(model)}
    kind = _kind(said, file, known)
    if not kind.targets:
        what = _some(file.tensors) or 'in it, for it is empty'
        raise CheckpointError(f'{path} is an adapter for another base: no map here is {what}')
    kind.wrap(model)
    bound = _tensors(model, path)
    shapes = {name: info.shape for name, info in file.tensors.items()}
    renaming.check([bound], shapes, r'(?!)', f'{path}, if it is an adapter for this base at all')
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    leaves = dict(named_params(model))
    like = {
        place.path: jax.ShapeDtypeStruct(leaves[place.path].shape, jnp.float32, sharding=here)
        for each in bound
        for place in each.places
    }
    put(model, renaming.load([bound], like, file.read))
    if isinstance(kind, LoRA) and kind.dora:
        for place in places(model, LoraEinsum):
            place.module.lora_magnitude = place.module.lora_magnitude.replace(_magnitude(place.module, -1))
    return kind


def _kind(said: Mapping[str, Any], file: safetensors_file.Reader, known: Mapping[str, Linear]) -> LoRA | IA3:
    """Its config, in our names. Those that the model does not have are left for the check."""
    ours: dict[str, str] = {}  # of a map of theirs
    ranks: dict[str, int] = {}
    takes: set[str] = set()
    for name, info in file.tensors.items():
        theirs = re.sub(r'^base_model\.model\.|\.(lora_[AB]\.weight|lora_magnitude_vector|ia3_l)$', '', name)
        if theirs not in known:
            continue
        ours[theirs] = known[theirs].ours
        if name.endswith('lora_A.weight'):
            ranks[ours[theirs]] = info.shape[0]
        if name.endswith('ia3_l') and info.shape[0] == 1:
            takes.add(ours[theirs])
    targets = tuple(dict.fromkeys(ours.values()))
    if said['peft_type'] == 'IA3':
        return IA3(targets=targets, inputs=tuple(sorted(takes)) or ('(?!)',))
    return LoRA(
        rank=said['r'],
        alpha=float(said['lora_alpha']),
        targets=targets,
        rank_by={name: rank for name, rank in ranks.items() if rank != said['r']},
        dropout=said.get('lora_dropout', 0.0),
        rslora=said.get('use_rslora', False),
        dora=said.get('use_dora', False),
    )


def _some(names: Sequence[str] | Mapping[str, Any]) -> str:
    patterns = list(dict.fromkeys(re.sub(r'\.\d+\.', '.*.', name) for name in names))
    return ', '.join(patterns[:8]) + (f' and {len(patterns) - 8} more' if len(patterns) > 8 else '')


def _load_prompt(model: Any, said: Mapping[str, Any], file: safetensors_file.Reader, path: str) -> SoftPrompts:
    table, width = file.read('prompt_embeddings'), model.embed.table.shape[-1]
    if table.shape != (said['num_virtual_tokens'], width):
        raise CheckpointError(f'{path} is an adapter for another base: prompts of {table.shape[1]}, not {width}')
    kind = SoftPrompts(length=len(table))
    kind.wrap(model)
    put(model, {'embed.prompts': jnp.asarray(table, jnp.float32)[None]})
    return kind


def _load_prefix(model: Any, said: Mapping[str, Any], file: safetensors_file.Reader, path: str) -> Prefix:
    config = config_lib.load(json.loads(model.described))
    both = file.read('prompt_embeddings')
    wanted = (said['num_virtual_tokens'], config.layers * 2 * config.kv_heads * config.head_dim)
    if both.shape != wanted:
        raise CheckpointError(f'{path} is an adapter for another base: prefixes of {both.shape[1]}, not {wanted[1]}')
    both = both.reshape(len(both), config.layers, 2, config.kv_heads, config.head_dim)
    kind = Prefix(length=len(both))
    kind.wrap(model)
    leaves = dict(named_params(model))
    values = {at: np.zeros(leaves[at].shape, np.float32) for at, *_ in _prefixes(model)}
    for at, index, layer, half in _prefixes(model):
        values[at][index] = both[:, layer, half]
    put(model, {at: jnp.asarray(value) for at, value in values.items()})
    return kind

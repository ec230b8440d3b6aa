"""Where a run starts: its own newest whole checkpoint, else a parent run's, else given weights, else scratch.

A parent run is continued in full (parameters, optimizer, step) under this run's config in its own workdir: a
decay phase branched off a long run, a longer context. Its place in the data is kept where the data config is
the same. Given weights are parameters alone, at step 0. Before any of it, the config is held against the one
the workdir was started with: what would change the numbers is refused.
"""

import dataclasses
import datetime
import json
from typing import Any, Literal

import jax
from etils import epath

from tpu_llm import config as config_lib
from tpu_llm.checkpoint import files, pretrained, reader
from tpu_llm.checkpoint.commit import Checkpoint
from tpu_llm.checkpoint.fence import Fence
from tpu_llm.checkpoint.lanes import Table
from tpu_llm.checkpoint.pretrained import Source
from tpu_llm.config import Change, ConfigError

_DATA = 'config.data'  # the part of a run's config that decides the data


@dataclasses.dataclass(kw_only=True, slots=True)
class Origin:
    """What a run grows from while its workdir has no checkpoint of its own; by default nothing."""

    parent: str = ''  # a workdir, or one folder in its checkpoints/: everything continues from it
    weights: str = ''  # the parameters alone: the same, or a Hugging Face folder or a .gguf file

    def validate(self) -> None:
        if self.parent and self.weights:
            raise ConfigError(f'parent={self.parent!r} and weights={self.weights!r} exclude each other; give one')


@dataclasses.dataclass(frozen=True, slots=True)
class Resumed:
    """The chosen start of a run; its text is the line to log."""

    kind: Literal['run', 'parent', 'weights', 'scratch']
    step: int = 0
    arrays: dict[str, Any] = dataclasses.field(default_factory=dict)  # restored as `like` asks; of weights none yet
    lanes: Table | None = None  # the whole lane table; None: the data starts at its beginning
    folder: epath.Path | None = None

    def __str__(self) -> str:
        match self.kind:
            case 'run':
                return f'continuing at step {self.step} from {self.folder}'
            case 'parent':
                where = 'goes on' if self.lanes else 'starts at its beginning'
                return f'branching off at step {self.step} from {self.folder}; the data {where}'
            case 'weights':
                return f'starting at step 0 with the parameters of {self.folder}'
        return 'starting at step 0 from scratch'


def resume(workdir: epath.PathLike, like: dict[str, Any], origin: Origin, *, config: Any, tokenizer: str) -> Resumed:
    """Chooses and restores; all processes call it together.

    `like` is the whole state as ShapeDtypeStructs with shardings; `tokenizer` is the fingerprint that
    `manifest.describe` was given. Given weights are only looked at: who has the model reads them. Raises
    CheckpointError where a source holds nothing whole, ConfigError where it does not fit the state or the tokenizer.
    """
    own = reader.find(workdir)
    if own:
        restored = _load(own, like, tokenizer)
        return Resumed('run', own.step, restored.arrays, restored.lanes, own.folder)
    if origin.parent:
        parent = _find_given('parent', origin.parent)
        restored = _load(parent, like, tokenizer)
        changed = config_lib.diff(restored.manifest['config'], config)
        same_data = not any(c.mark == 'maths' and f'{c.path}.'.startswith(f'{_DATA}.') for c in changed)
        table = restored.lanes if same_data else None
        return Resumed('parent', parent.step, restored.arrays, table, parent.folder)
    if origin.weights:
        return Resumed('weights', folder=epath.Path(open_weights(origin.weights, config.model, tokenizer).path))
    return Resumed('scratch')


def open_weights(path: str, model: Any, tokenizer: str, field: str = 'weights') -> Source:
    """Parameters to start from or to hold: a run's, a Hugging Face folder's or a GGUF file's; `field` named the path.

    Raises ConfigError where they are of another model or of another tokenizer.
    """
    if pretrained.is_foreign(path):
        source = pretrained.open_source(path)
        _check_model(source, model)
        return source
    given = _find_given(field, path)
    _check_tokenizer(given, tokenizer)
    return pretrained.of_checkpoint(given)


def _find_given(field: str, path: str) -> Checkpoint:
    checkpoint = reader.find(path)
    if checkpoint is None:
        raise ConfigError(f'{field}={path!r} holds no finished checkpoint; give the workdir of a run that has one')
    return checkpoint


# What may be another than when the weights were made: tensors fit it all the same, and training on teaches it.
_MAY_DIFFER = ('dtype', 'dropout', 'max_length', 'rope_theta', 'local_rope_theta', 'rope_scaling', 'windows', 'moe')


def _check_model(source: Source, model: Any) -> None:
    differ = [
        f'{field.name}: {getattr(source.config, field.name)!r} there, {getattr(model, field.name)!r} here'
        for field in dataclasses.fields(source.config)
        if field.metadata.get('mark') != 'machine'
        and field.name not in _MAY_DIFFER
        and getattr(source.config, field.name) != getattr(model, field.name, None)
    ]
    if differ:
        raise ConfigError(
            f'weights={source.path!r} are of another model ({"; ".join(differ)}); take model from the weights, as '
            'configs/finetune.py does'
        )


def _load(checkpoint: Checkpoint, like: dict[str, Any], tokenizer: str) -> reader.Restored:
    _check_tokenizer(checkpoint, tokenizer)
    return reader.load(checkpoint, like)


def _check_tokenizer(checkpoint: Checkpoint, tokenizer: str) -> None:
    trained_with = checkpoint.manifest()['tokenizer']
    if trained_with != tokenizer:
        raise ConfigError(
            f'the tokenizer (fingerprint {tokenizer}) is not the one {checkpoint.folder} was trained with '
            f'({trained_with}); use that one (it is saved there), or another --workdir'
        )


# ------------------------------------------------------------------------------------- the workdir's config


def check_config(workdir: epath.PathLike, config: Any) -> list[Change]:
    """What differs from the config that the workdir was started with; nothing where it is new.

    Call it before `fence.start`, so that a mistaken start does not stop the run that works there. Raises
    ConfigError, listing the fields, where one that decides the numbers changed.
    """
    path = epath.Path(workdir) / 'config.json'
    try:
        stored = json.loads(files.read(path))
    except FileNotFoundError:
        return []
    except ValueError:
        raise ConfigError(f'{path} is not JSON; bring it back, or use another --workdir') from None
    changes = config_lib.diff(stored, config)
    refused = [str(change) for change in changes if change.mark == 'maths']
    if refused:
        raise ConfigError(
            f'{workdir} was started with another config, and this would change its numbers: '
            f'{"; ".join(refused)}; undo that, or use another --workdir'
        )
    return changes


def record_config(fence: Fence, config: Any, changes: list[Change]) -> None:
    """Writes config.json, and what changed in the schedule as a line of changes.jsonl."""
    if jax.process_index() != 0:
        return
    fence.check()
    scheduled = {change.path: [change.old, change.new] for change in changes if change.mark == 'schedule'}
    if scheduled:
        path = fence.workdir / 'changes.jsonl'
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
        line = json.dumps({'time': now, 'start': fence.token, 'changes': scheduled})
        files.write(path, (files.read(path) if files.exists(path) else b'') + line.encode() + b'\n')
    files.write(fence.workdir / 'config.json', config_lib.to_json(config).encode())

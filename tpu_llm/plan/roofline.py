"""A step's time and memory in closed form: rough, in a millisecond, to tell which programs are worth compiling.

A matmul takes its FLOPs at the peak and its bytes at HBM's bandwidth, one after the other, as the compiler's estimates
add up; what is not saved is computed again, and what is saved passes HBM for it. So it pays to save what is dear to
make: on chips of many FLOPs a byte that is the narrow and the rotated, on others nearly all. Collectives of weights go
on while the device computes except for the sums of gradients, and those of activations do not (the scaling book,
chapters 5 and 8, says how much each layout moves). What is estimated here is never shown as more than a guess; plans
are of compiled programs.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from tpu_llm.config import ConfigError
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.flops import forward_flops, visible_keys
from tpu_llm.nn.mlp import GATED
from tpu_llm.parallel import pipeline
from tpu_llm.parallel.chips import Chip, Slice
from tpu_llm.parallel.rules import PRESETS
from tpu_llm.parallel.sharding import partition
from tpu_llm.train.run import Run

_HIDDEN = 0.8  # of the gathers of weights
# How often HBM passes what is saved: written to the stack of all layers; read from there and written; turned round for
# the matmuls over tokens, once more read and written. What waits on the host is read to be sent, too, and written.
_SAVED, _AWAY = 5, 7
_ROTATED = 6  # queries and keys: read, written and read in float32, and written
_WHOLE = ('latent', 'router', 'attention_out', 'mlp_out')  # what `tensor` does not split
_STREAM = 20  # what is between the layers' halves: two norms and two sums, forward, again, and twice as much backward


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """Of one step on one device."""

    seconds: float
    bytes: float


@dataclasses.dataclass(frozen=True, slots=True)
class Made:
    """What a layer makes of a token, going forward; numbers are of the compute dtype, taken to have two bytes."""

    flops: float
    width: int  # numbers of it
    whole: float = 0.0  # numbers that pass HBM for it, of those that `tensor` does not split
    split: float = 0.0  # and of those that it does

    def seconds(self, chip: Chip, tensor: int) -> float:
        """For one token on one of so many devices."""
        return self.flops / tensor / chip.flops + 2 * (self.whole + self.split / tensor) / chip.hbm_bandwidth


def estimate(run: Run, where: Slice, mesh: Mapping[str, int], weights: int) -> Estimate:
    """Of a run on a mesh of that slice, its model having so many parameters.

    Raises ConfigError for a state space, whose scan has no closed form here.
    """
    if run.model.ssm:
        raise ConfigError(
            'a search guesses times in closed form, and there is none for model.ssm; plan layouts one by one instead'
        )
    state, (saved, away) = _state(run, mesh, weights), _activations(run, mesh)
    stream = 2 * _STREAM * _tokens(run, mesh) * run.model.width * run.model.layers / _shares(run, mesh)
    # A microbatch reads the weights forward, again and twice going back.
    moved = (8 * _held(run.model, mesh, weights) + _SAVED * saved + _AWAY * away) * run.accumulate
    moved = (stream + moved + 2 * state) / where.chip.hbm_bandwidth
    seconds = _compute(run, where.chip, mesh) + _waits(run, where.chip, mesh, weights) + moved
    seconds = max(seconds, away * run.accumulate / where.chip.pcie_bandwidth)
    return Estimate(seconds, state + saved + _workspace(run, mesh, weights))


def _tokens(run: Run, mesh: Mapping[str, int]) -> float:
    """That one device works on in a step, through all layers, before `tensor` shares them."""
    parts = math.prod(mesh[axis] for axis in ('stage', 'data', 'fsdp', 'expert', 'seq'))
    return run.data.global_batch * run.data.seq_len / parts


def _shares(run: Run, mesh: Mapping[str, int]) -> int:
    """Devices of the tensor axis that share the stream between the layers; by most rules each has all of it."""
    return mesh['tensor'] if 'tensor' in str(partition(PRESETS[run.rules].activations, 'BTD')) else 1


def _compute(run: Run, chip: Chip, mesh: Mapping[str, int]) -> float:
    model, tensor = run.model, mesh['tensor']
    layers, passes = 0.0, _passes(run)
    for layer, times in _layers(model).items():
        made = forward(model, run.data.seq_len, layer)
        layers += times * sum(
            (passes + _again(model, name)) * each.seconds(chip, tensor) for name, each in made.items()
        )
    if mesh['stage'] > 1:
        count = run.pipeline.count(mesh['stage'])
        layers *= pipeline.overhead(model.layers, mesh['stage'], run.pipeline.circles, count)
    head = _map(model.width, model.vocab_size).seconds(chip, tensor)
    return _tokens(run, mesh) * (layers + passes * head)


def _passes(run: Run) -> float:
    """How often the model's matmuls are made: forward, for what goes back through them, and for weights that train; and
    once more for the model that the objective reads besides.
    """
    return (3 if run.peft is None else 2) + (_reference(run) if run.objective.needs_frozen else 0)


def _reference(run: Run) -> float:
    """The size of the model beside the one that trains over the size of that, by their FLOPs."""
    other = run.reference.model if run.reference else None
    length = run.data.seq_len
    return 1.0 if other is None else forward_flops(other, length) / forward_flops(run.model, length)


def _layers(model: DecoderConfig) -> dict[int, int]:
    """A layer of each kind, and how many there are of it."""
    first: dict[Any, int] = {}
    counts: collections.Counter[int] = collections.Counter()
    for layer in range(model.layers):
        kind = model.windows[layer % len(model.windows)], model.moe is not None and model.moe.at(layer)
        counts[first.setdefault(kind, layer)] += 1
    return counts


def forward(model: DecoderConfig, length: int, layer: int) -> dict[str, Made]:
    """What a layer makes of a token in a row of that length, by the names under which `remat` saves it."""
    keys = visible_keys(length, model.windows[layer % len(model.windows)])
    return _attention(model, keys) | _feed_forward(model, layer)


def _map(source: int, width: int, rotated: int = 0) -> Made:
    return Made(2.0 * source * width, width, source, width + rotated)


def _attention(model: DecoderConfig, keys: float) -> dict[str, Made]:
    size, heads, mla = model.head_dim, model.heads, model.mla
    turned = _ROTATED if model.position == 'rope' else 0
    if mla is None:
        queries, pairs, values = heads * size, model.kv_heads * size, heads * size
        products = Made(4.0 * queries * keys, values, 0.0, 2.0 * (queries + pairs))
        made = {
            'query': _map(model.width, queries, turned * queries),
            'key': _map(model.width, pairs, turned * pairs),
            'value': _map(model.width, pairs),
        }
    else:
        queries, values = heads * (size + mla.rope_dim), heads * mla.value_dim
        products = Made(2.0 * (queries + values) * keys, values, 0.0, 2.0 * (queries + values))
        made = {
            'latent': _map(model.width, mla.query_rank + mla.kv_rank + mla.rope_dim),
            'query': _map(mla.query_rank or model.width, queries, turned * heads * mla.rope_dim),
            'key': _map(mla.kv_rank, heads * size),
            'value': _map(mla.kv_rank, values),
        }
    return made | {'attended': products, 'attention_out': _back(values, model.width)}


def _back(source: int, width: int) -> Made:
    """From what `tensor` splits to what it does not."""
    return Made(2.0 * source * width, width, width, source)


def _feed_forward(model: DecoderConfig, layer: int) -> dict[str, Made]:
    moe = model.moe if model.moe and model.moe.at(layer) else None
    hidden = (moe.chosen + moe.shared) * moe.expert_width if moe else model.mlp_width
    rows = moe.chosen + moe.shared if moe else 1
    kind = (moe.mlp if moe else None) or model.mlp
    into = Made(2.0 * model.width * hidden, hidden, rows * model.width, hidden)
    out = Made(2.0 * model.width * hidden, model.width, rows * model.width, hidden)
    router = {'router': _map(model.width, moe.experts)} if moe else {}
    return router | ({'gate': into} if kind in GATED else {}) | {'up': into, 'mlp_out': out}


def _again(model: DecoderConfig, name: str) -> bool:
    """Whether the backward pass makes it a second time."""
    names = _names(model.remat)
    if names is None or name in names:
        return False
    if name == 'mlp_out':
        return model.norm_place != 'pre'  # nothing wants it but a norm behind it
    return names != ('dots',) or name == 'attended'


def _names(remat: str) -> tuple[str, ...] | None:
    """What is saved: None for everything, nothing for 'full'."""
    if remat == 'none':
        return None
    return () if remat == 'full' else tuple(each.partition('@')[0] for each in remat.split('+'))


def _waits(run: Run, chip: Chip, mesh: Mapping[str, int], weights: int) -> float:
    """Seconds of links that nothing hides."""
    model, held = run.model, _held(run.model, mesh, weights)
    tokens = _tokens(run, mesh) * 2 * model.width * model.layers  # bytes of the stream, through all layers
    passes = 3 if _names(model.remat) is None else 4
    seconds = 0.0
    if mesh['fsdp'] > 1:
        gathers = 2 * held * (2 if passes == 3 else 3) * run.accumulate
        sums = 2 * 2 * held * run.accumulate
        seconds += ((1 - _HIDDEN) * gathers + sums) / chip.ici_bandwidth
    if mesh['data'] > 1:
        seconds += 2 * 2 * held / mesh['fsdp'] / chip.ici_bandwidth
    if mesh['tensor'] > 1:
        seconds += 2 * 2 * passes * tokens * (1 - 1 / mesh['tensor']) / (chip.ici_bandwidth / chip.grid)
    if mesh['seq'] > 1:
        seconds += 2 * tokens * mesh['seq'] * model.kv_heads / model.heads / chip.ici_bandwidth
    if mesh['expert'] > 1 and model.moe:
        sent = tokens * model.moe.chosen * max(1.0, mesh['expert'] / 4)
        seconds += 2 * passes * sent / chip.ici_bandwidth
    if mesh['stage'] > 1:
        seconds += 4 * _tokens(run, mesh) * mesh['stage'] * 2 * model.width / (chip.ici_bandwidth / chip.grid)
    return seconds


def _held(model: DecoderConfig, mesh: Mapping[str, int], weights: int) -> float:
    """Weights that a device works with, gathered over fsdp."""
    experts = _expert_weights(model)
    return (weights - experts + experts / mesh['expert']) / mesh['tensor'] / mesh['stage']


def _expert_weights(model: DecoderConfig) -> float:
    if model.moe is None:
        return 0.0
    each = 3 * model.width * model.moe.expert_width
    return each * model.moe.experts * sum(map(model.moe.at, range(model.layers)))


def _state(run: Run, mesh: Mapping[str, int], weights: int) -> float:
    """Parameters, two moments and gradients of those that train, weights in the compute dtype, and a reference's; all
    sharded.
    """
    model = run.model
    experts = _expert_weights(model)
    shards = math.prod(mesh[axis] for axis in ('stage', 'fsdp', 'tensor'))
    copies = 4 + (8 + 4 if run.peft is None else 0) + (0 if model.dtype == 'float32' else 2)
    if run.reference is not None:
        copies += _reference(run) * (4 if run.reference.dtype == 'float32' else 2)
    return copies * ((weights - experts) + experts / mesh['expert']) / shards


def _activations(run: Run, mesh: Mapping[str, int]) -> tuple[float, float]:
    """What waits for a microbatch's backward pass on the device, and on the host."""
    model, tensor, names = run.model, mesh['tensor'], _names(run.model.remat)
    here = [name for name in model.remat.split('+') if '@' not in name]
    kept = away = 0.0
    for layer, times in _layers(model).items():
        made = forward(model, run.data.seq_len, layer)
        widths = {name: each.width / (1 if name in _WHOLE else tensor) for name, each in made.items()}
        kept += times * model.width / _shares(run, mesh)  # a layer's input
        if names is None:
            kept += times * ((9 / _shares(run, mesh) + 5 / tensor) * model.width + 6 * widths['up'])
        elif names == ('dots',):
            kept += times * sum(widths.values())
        else:
            kept += times * sum(widths.get(name, 0.0) for name in here)
            away += times * sum(widths.get(name, 0.0) for name in names if name not in here)
    tokens = 2.0 * _tokens(run, mesh) / run.accumulate
    return tokens * kept, tokens * away


def _workspace(run: Run, mesh: Mapping[str, int], weights: int) -> float:
    """One layer's gathered weights and gradients, the embedding or the head, and a chunk's logits or a layer's work."""
    model = run.model
    layer = (weights - 2 * model.vocab_size * model.width) / model.layers
    if model.moe and mesh['expert'] > 1:
        layer /= mesh['expert']
    table = 2.0 * model.vocab_size * model.width / mesh['tensor']
    rows = _tokens(run, mesh) / run.accumulate / run.data.seq_len
    chunk = getattr(run.objective, 'chunk', None)  # a reward model's has no logits
    logits = 0.0 if chunk is None else 8.0 * rows * (chunk or 64) * model.vocab_size / mesh['tensor']
    layer_work = 6 * model.width / _shares(run, mesh) + 4 * model.mlp_width / mesh['tensor']
    own = 2.0 * _tokens(run, mesh) / run.accumulate * layer_work
    return 3 * 2.0 * layer / mesh['tensor'] + table + max(logits, own)

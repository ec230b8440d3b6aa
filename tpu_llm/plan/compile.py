"""The very step that a run would take on a slice of TPUs, compiled without one.

libtpu describes the slice's devices and compiles for them on a CPU (`pip install -e '.[plan]'`). Mesh, model,
optimizer and step are made by what makes them in training; state and batch are shapes, so neither data nor tokenizer is
needed. Run it with JAX_PLATFORMS=cpu.
"""

import dataclasses
import hashlib
import math
import os
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from tpu_llm.config import ConfigError, RunError, validate
from tpu_llm.data.length import run_steps
from tpu_llm.parallel.chips import Slice
from tpu_llm.plan import hlo, memory
from tpu_llm.plan.cache import Cache
from tpu_llm.plan.cost import cost
from tpu_llm.plan.links import Torus, torus
from tpu_llm.plan.memory import Memory
from tpu_llm.plan.program import Program, read
from tpu_llm.train.frozen import Frozen
from tpu_llm.train.run import Run
from tpu_llm.train.setup import abstract_batch, make_graphs, make_layout, make_train_step, param_infos
from tpu_llm.train.state import TrainState, abstract_state
from tpu_llm.train.weights import abstract_frozen

# libtpu reads these when it is loaded: there is no TPU here to ask about, nor is one to be locked.
_ENVIRONMENT = {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_STDERR_LOG_LEVEL': '3',
    'TPU_MIN_LOG_LEVEL': '3',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-256',  # any does; without one it complains
}
_NO_LIBTPU = "compiling for TPUs needs libtpu: pip install -e '.[plan]'"
# A run whose length is in epochs needs its data to tell its steps; here they are only a constant of the schedule.
_SOME_STEPS = 10**6


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CompiledStep:
    """A run's step for a slice, and what compiling it took."""

    slice: Slice
    mesh: dict[str, int]
    torus: Torus
    text: str  # of the scheduled program; empty where the compiler gave up
    memory: Memory
    reason: str  # why it gave up, or empty
    cpu_seconds: float  # of the process that compiled it, all its threads; lowering included
    others: tuple['OtherProgram', ...] = ()

    @property
    def peak_bytes(self) -> int:
        """HBM that a device has to have for it."""
        return self.memory.allocated

    def program(self) -> Program:
        return read(self.text)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OtherProgram:
    """What a run has besides its step, such as a rollout."""

    name: str
    memory: Memory
    tokens: int  # that it draws one after another, at most; 0 where it draws none
    seconds: float  # of a call that draws so many; 0 where it does not fit
    reason: str  # why the compiler gave up, or empty


class CompileError(RunError):
    """The compiler gave up for another reason than memory."""


def compile_step(run: Run, where: Slice, *, cache: Cache | None = None, dump: Path | None = None) -> CompiledStep:
    """Compiles the training step of a run for a slice, and what it has besides, unless the cache holds it.

    A program that does not fit has no text, but says where its memory would go. What the compiler writes down goes to
    the folder `dump`, if one is given. Raises ConfigError for a run that the slice cannot hold (its mesh, its batch),
    and CompileError where the compiler fails.
    """
    validate(run)
    start = time.process_time()
    layout = make_layout(run, devices(where))
    graphs = make_graphs(run, layout)
    graph = graphs.model
    steps = _SOME_STEPS if run.epochs else run_steps(run.data, [], steps=run.steps, tokens=run.tokens)
    tx = run.optimizer.make(param_infos(graph), steps)
    state = abstract_state(graph, tx, layout, ema=run.ema > 0)
    step = make_train_step(run, graph, tx, layout, state, graphs.reference)
    frozen = abstract_frozen(run, graphs, layout)
    batch = abstract_batch(run, layout)
    found = _found(step.lower(state, frozen, batch), step.options, where, cache, dump, start)
    held, grid = _held(state, frozen), torus(where.chip, where.topology, list(layout.mesh.devices.flat))
    # These are given all weights as one: those that train and those that do not.
    joined = held | {'parameters': held['parameters'] + held['frozen weights'], 'frozen weights': 0}
    others = tuple(
        _other(name, _found(lowered, {}, where, cache, None, start), tokens, joined, grid, layout.mesh.shape)
        for name, (lowered, tokens) in run.other_programs(graphs, layout, state, frozen).items()
    )
    return CompiledStep(
        slice=where,
        mesh=dict(layout.mesh.shape),
        torus=grid,
        text='' if found['reason'] else found['text'],
        memory=memory.among(memory.read(found['notes'], hlo.parse(found['text'])), held),
        reason=found['reason'],
        cpu_seconds=found['cpu_seconds'],
        others=others,
    )


def _other(
    name: str, found: Mapping[str, Any], tokens: int, held: Mapping[str, int], grid: Torus, mesh: Mapping[str, int]
) -> OtherProgram:
    seconds = 0.0
    if not found['reason']:
        seconds = cost(read(found['text'], turns=max(1, tokens)), grid, mesh, needed=0.0).seconds
    given = memory.read(found['notes'], hlo.parse(found['text']))
    there = memory.among(given, held)
    return OtherProgram(name=name, memory=there, tokens=tokens, seconds=seconds, reason=found['reason'])


def _held(state: TrainState, frozen: Frozen) -> dict[str, int]:
    """Bytes on a device of what a run keeps there from its first step to its last, by the kinds of `memory`."""
    parts = {
        'parameters': state.params,
        'optimizer state': state.optimizer,
        'moving average': state.ema,
        'frozen weights': frozen.base,
        'reference': frozen.other,
    }
    return {
        kind: sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
        for kind, tree in parts.items()
    }


def _found(
    lowered: Any, options: Mapping[str, str], where: Slice, cache: Cache | None, dump: Path | None, start: float
) -> dict[str, Any]:
    """What compiling it for that slice gives, from the cache or anew; `start` is when the process began with it."""
    key = _key(lowered, options, where)
    found = cache.get(key) if cache and dump is None else None
    if found is None:
        found = _compile(lowered, options, dump)
        found['cpu_seconds'] = time.process_time() - start
        if cache:
            cache.put(key, found)
    return found


def _compile(lowered: Any, options: Mapping[str, str], dump: Path | None) -> dict[str, Any]:
    program = lowered.as_text().partition('module @')[2].partition(' ')[0]
    with tempfile.TemporaryDirectory() as folder:
        kept = dump or Path(folder)
        try:
            compiled = lowered.compile(compiler_options={**options, 'xla_dump_to': str(kept)})
        except jax.errors.JaxRuntimeError as error:
            reason = ' '.join(str(error).split())
            # Too large a window in fast memory is exhaustion as well.
            if not re.search(r'out of memory (on|in memory space) hbm', reason, re.IGNORECASE):
                raise CompileError(f'the compiler gave up: {reason[:500]}; its notes: --dump=DIR') from error
            text, notes = memory.scheduled(kept, program), memory.notes(kept, program)
            (kept / 'program.hlo.txt').write_text(text)
            return {'text': text, 'notes': notes, 'reason': reason[:500]}
        text = compiled.as_text()
        (kept / 'program.hlo.txt').write_text(text)
        return {'text': text, 'notes': memory.notes(kept, program), 'reason': ''}


def _key(lowered: Any, options: Mapping[str, str], where: Slice) -> str:
    """Of a program and the names of its parts, for a slice, a compiler and its options; not of the source's lines."""
    names = sorted(set(re.findall(r'"(jit\([^"]*)"', lowered.as_text(debug_info=True))))
    about = [versions(), str(where), sorted(options.items()), names]
    return hashlib.sha256(f'{about}\n{lowered.as_text()}'.encode()).hexdigest()[:32]


def devices(where: Slice) -> list[Any]:
    """The devices of slices that need not exist. Raises ConfigError without libtpu."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # A chip of v4 is one device only if its cores are joined, as they are by default on later chips.
    more: dict[str, Any] = {'chip_config_name': 'megacore'} if where.chip.name == 'v4' else {}
    if where.single.chips == 1:
        more['chips_per_host_bounds'] = (1, 1, 1)  # a host has 4 otherwise
    try:
        topology = topologies.get_topology_desc(
            platform='tpu', topology_name=str(where.single), num_slices=where.count, **more
        )
    except RuntimeError as error:
        if 'TPU support not installed' in str(error):
            raise ConfigError(_NO_LIBTPU) from None
        said = ' '.join(str(error).split())
        raise ConfigError(
            f"libtpu does not describe {where}: {said}; pip install -e '.[plan]' brings the one that fits jax "
            f'{jax.__version__}'
        ) from error
    assert len(topology.devices) == where.devices, f'{where}: {len(topology.devices)} devices'
    return list(topology.devices)


def versions() -> str:
    """`jax 0.10.2, libtpu 0.0.42.1`: compiled programs are theirs."""
    import importlib.metadata

    try:
        return ', '.join(f'{name} {importlib.metadata.version(name)}' for name in ('jax', 'libtpu'))
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(_NO_LIBTPU) from error

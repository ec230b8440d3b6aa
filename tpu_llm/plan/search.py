"""Which mesh, microbatches and remat are fastest on a slice: all in closed form, the most promising compiled.

A choice is a handful of fields and their values; choosing writes them into a copy of the run. Compiles go on in
processes side by side, as many as memory has room for, and what was compiled once is taken from the cache.
"""

import collections
import copy
import dataclasses
import itertools
import math
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tpu_llm.config import ConfigError, validate
from tpu_llm.nn.param import count_parameters
from tpu_llm.parallel.chips import Slice
from tpu_llm.parallel.mesh import AXES, Mesh
from tpu_llm.plan.cache import Cache
from tpu_llm.plan.compile import CompileError, devices
from tpu_llm.plan.plan import Plan, load, make_plan, plain
from tpu_llm.plan.roofline import Estimate, estimate
from tpu_llm.train.run import Run
from tpu_llm.train.setup import make_layout

Changes = Mapping[str, Any]  # 'model.remat' to 'full', 'mesh' to a Mesh

# What to save for the backward pass, from all to nothing; and what may wait on the host meanwhile.
REMAT = (
    'none', 'dots', 'query+key+value+attended+gate+up', 'query+key+value+gate+up', 'key+value+gate+up', 'gate+up',
    'query+key+value', 'gate', 'key+value', 'full',
)  # fmt: skip
OFFLOAD = ('gate@host+up', 'gate@host+up@host', 'query@host+key@host+value@host')
LATENT = ('none', 'latent+attended+gate+up', 'latent+attended+up', 'latent+attended', 'latent', 'full')
_GIB_A_COMPILE = 6


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A choice, and what is thought of it before it is compiled."""

    changes: Changes
    guess: Estimate

    def __str__(self) -> str:
        return ' '.join(flags(self.changes)) or 'the config as it is'


def chosen(run: Run, changes: Changes) -> Run:
    """A copy of the run with these fields."""
    run = copy.deepcopy(run)
    for path, value in changes.items():
        *way, name = path.split('.')
        node: Any = run
        for step in way:
            node = getattr(node, step)
        setattr(node, name, value)
    return run


def flags(changes: Changes) -> list[str]:
    """As one would type them: `--config.mesh.fsdp=16 --config.model.remat=full`."""
    typed = []
    for path, value in changes.items():
        if isinstance(value, Mesh):
            typed += [
                f'--config.mesh.{axis}={getattr(value, axis)}' for axis in AXES if axis == 'fsdp' or _set(value, axis)
            ]
        else:
            typed.append(f'--config.{path}={value}')
    return typed


def _set(mesh: Mesh, axis: str) -> bool:
    return getattr(mesh, axis) != getattr(Mesh(), axis)


# -------------------------------------------------------------------------------------------------- what there is


def space(run: Run, where: Slice) -> Iterator[Changes]:
    """All meshes, microbatches and remat that are worth a thought."""
    remat = LATENT if run.model.mla else (*REMAT, *OFFLOAD)
    for mesh, accumulate, saved in itertools.product(meshes(run, where), (1, 2, 4), remat):
        yield {'mesh': mesh, 'accumulate': accumulate, 'model.remat': saved}


def meshes(run: Run, where: Slice) -> Iterator[Mesh]:
    """Ways to lay that many devices out; rows are split (seq) only as far as the config does so already."""
    model = run.model
    seq = max(1, run.mesh.seq)
    experts = [n for n in _powers(64) if model.moe and model.moe.experts % n == 0] or [1]
    for tensor, stage, data, expert in itertools.product(_powers(8), _powers(8), _powers(16), experts):
        parts = tensor * stage * data * expert * seq
        if where.devices % parts or data % where.count:
            continue
        if model.kv_heads % tensor or stage > model.layers:
            continue
        yield Mesh(stage=stage, data=data, fsdp=where.devices // parts, expert=expert, seq=seq, tensor=tensor)


def _powers(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length()) if 2**n <= most]


def candidates(run: Run, where: Slice, choices: Iterable[Changes], doubt: float = 1.15) -> list[Candidate]:
    """Those that are legal and may fit, fastest guess first. A guess of memory may be too high by `doubt`."""
    found, legal = [], {}
    there, weights = devices(where), count_parameters(run.model.make())
    for changes in choices:
        changed = chosen(run, changes)
        key = str(changed.mesh), changed.accumulate
        if key not in legal:
            legal[key] = _legal(changed, there)
        if not legal[key] or not _valid(changed):
            continue
        sizes = whole(changed.mesh, where)
        guess = estimate(changed, where, sizes, weights)
        if guess.bytes <= doubt * where.chip.hbm:
            found.append(Candidate(changes=changes, guess=guess))
    return sorted(found, key=lambda each: each.guess.seconds)


def varied(ranked: Sequence[Candidate]) -> list[Candidate]:
    """Of each mesh, and of what is saved over how many microbatches, the two best guesses: a guess tells little
    between neighbours, so that few compiles have to go far.
    """
    counts: collections.Counter[str] = collections.Counter()
    kept = []
    for each in ranked:
        rest = {name: value for name, value in each.changes.items() if name != 'mesh'}
        about = str(each.changes['mesh']), str(rest)
        if all(counts[key] < 2 for key in about):
            kept.append(each)
            counts.update(about)
    return kept


def _legal(run: Run, there: Sequence[Any]) -> bool:
    rows = run.data.global_batch / run.accumulate
    if rows % math.prod(max(1, getattr(run.mesh, axis)) for axis in ('stage', 'data', 'fsdp', 'expert')):
        return False
    try:
        make_layout(run, there)
    except ConfigError:
        return False
    return True


def _valid(run: Run) -> bool:
    try:
        validate(run)
    except ConfigError:
        return False
    return True


def whole(mesh: Mesh, where: Slice) -> dict[str, int]:
    """A mesh's sizes, with -1 written out."""
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    known = math.prod(size for size in sizes.values() if size > 0)
    return {axis: size if size > 0 else where.devices // known for axis, size in sizes.items()}


# -------------------------------------------------------------------------------------------------------- compiled


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """A candidate and its plan, or what the compiler said."""

    candidate: Candidate
    plan: Plan | None
    reason: str = ''

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan.fits


def best(
    run: Run, where: Slice, ranked: Sequence[Candidate], compiles: int, cache: Cache | None, skip: bool = True
) -> Iterator[Tried]:
    """Compiles candidates in the order given until so many are.

    With `skip`, of two that differ in nothing but what is saved the hungrier is left out once the other did not fit.
    """
    waiting, running = list(ranked), {}
    try:
        while (waiting and compiles > 0) or running:
            while waiting and compiles > 0 and len(running) < workers():
                candidate, compiles = waiting.pop(0), compiles - 1
                running |= _begin(run, where, candidate, cache)
            for answer in multiprocessing.connection.wait(running):
                tried = _tried(*running.pop(answer), answer)
                if skip and not tried.fits:
                    waiting = [each for each in waiting if not _hungrier(each, tried.candidate)]
                yield tried
    finally:
        for process, _ in running.values():
            process.kill()  # libtpu answers SIGTERM with a page of addresses


def _begin(run: Run, where: Slice, candidate: Candidate, cache: Cache | None) -> dict[Any, tuple[Any, Candidate]]:
    """A process of its own for each: a compiler that dies takes nothing with it, and one that is done frees memory."""
    context = multiprocessing.get_context('spawn')  # a fork would share libtpu and jax's threads
    answer, end = context.Pipe(duplex=False)
    process = context.Process(target=_plan, args=(end, chosen(run, candidate.changes), where, str(candidate), cache))
    process.start()
    end.close()
    return {answer: (process, candidate)}


def _tried(process: Any, candidate: Candidate, answer: Any) -> Tried:
    try:
        result = answer.recv()
    except EOFError:
        process.join()
        return Tried(candidate=candidate, plan=None, reason=f'the compiler died (status {process.exitcode})')
    process.join()
    if 'error' in result:
        return Tried(candidate=candidate, plan=None, reason=result['error'])
    plan = load(result)
    return Tried(candidate=candidate, plan=plan, reason=plan.reason)


def _hungrier(one: Candidate, other: Candidate) -> bool:
    same = all(one.changes.get(name) == other.changes.get(name) for name in ('mesh', 'accumulate'))
    return same and one.guess.bytes >= other.guess.bytes


def _plan(end: Any, run: Run, where: Slice, name: str, cache: Cache | None) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        end.send(plain(make_plan(run, where, config=name, cache=cache)))
    except (ConfigError, CompileError) as error:
        end.send({'error': str(error)})


def end_with_parent() -> None:
    """Waits for the process that started this one and ends with it, in whatever way that was: a search that is killed
    cannot say so, and a compile goes on for minutes.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def workers() -> int:
    """Compiles that may go on at once."""
    there = os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    meminfo = Path('/proc/meminfo')
    if meminfo.exists():
        fields = dict(line.split(':') for line in meminfo.read_text().splitlines())
        there = int(fields['MemAvailable'].split()[0]) * 1024
    return max(1, min(os.cpu_count() or 1, there // (_GIB_A_COMPILE * 2**30)))

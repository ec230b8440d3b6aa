"""What a run on a slice would be: whether it fits, how long a step takes and why, what the whole run takes.

A plan is plain data, and its JSON is the same whichever machine made it. All of it is predicted from the compiled
program: nothing here has run.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpu_llm.config import ConfigError
from tpu_llm.models.flops import active_parameters, forward_flops, train_flops
from tpu_llm.nn.param import count_parameters
from tpu_llm.parallel import chips, pipeline
from tpu_llm.parallel.chips import Slice
from tpu_llm.plan import memory
from tpu_llm.plan.cache import Cache
from tpu_llm.plan.compile import CompiledStep, OtherProgram, compile_step, versions
from tpu_llm.plan.cost import Cost, Share, Traffic, cost
from tpu_llm.plan.links import torus
from tpu_llm.plan.memory import Memory
from tpu_llm.train.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One run on one slice."""

    config: str  # as it was asked for
    slice: str
    devices: int
    mesh: Mapping[str, int]
    choices: Mapping[str, Any]  # fields that decide memory and speed, and no result
    parameters: int
    active_parameters: int
    tokens_per_step: int
    steps: int  # 0 where the length is in epochs, which only the data tells
    memory: Memory
    cost: Cost | None  # None where the program does not fit
    reason: str  # why it does not
    versions: str
    cpu_seconds: float
    others: tuple[OtherProgram, ...] = ()  # what runs besides the step

    @property
    def where(self) -> Slice:
        return chips.find(self.slice)

    @property
    def fits(self) -> bool:
        """Whether the compiler took every program, there is room for what the run holds meanwhile, and what waits on
        the host comes and goes within the step's time.
        """
        programs = [(self.memory, self.reason), *((each.memory, each.reason) for each in self.others)]
        room = all(not reason and memory.allocated <= self.where.chip.hbm for memory, reason in programs)
        return room and self.cost is not None and self.cost.host_seconds <= self.cost.seconds

    @property
    def seconds(self) -> float:
        """Of a step. Raises ConfigError where there is none."""
        if self.cost is None:
            raise ConfigError(f'{self.config} does not fit {self.slice}: {self.reason}')
        return self.cost.seconds

    @property
    def tokens_per_second(self) -> float:
        """On a chip."""
        return self.tokens_per_step / self.seconds / self.where.chips

    @property
    def mfu(self) -> float:
        """FLOPs of the model over those of the chips' peak."""
        assert self.cost is not None
        return self.cost.losses['model'] / self.seconds

    @property
    def chip_hours(self) -> float:
        """Of the whole run, were nothing but steps in it."""
        return self.steps * self.seconds * self.where.chips / 3600


def make_plan(
    run: Run, where: Slice, *, config: str = '', cache: Cache | None = None, dump: Path | None = None
) -> Plan:
    """Compiles a run's step for a slice, or takes it from the cache, and says what it costs.

    Raises ConfigError for a run that the slice cannot hold, and CompileError where the compiler fails.
    """
    if not isinstance(run, Run):
        kind = f'{type(run).__module__}.{type(run).__name__}'
        raise ConfigError(f'{config or "the config"} is a {kind}, which has no training step to plan')
    return _plan(run, where, compile_step(run, where, cache=cache, dump=dump), config)


def _plan(run: Run, where: Slice, step: CompiledStep, config: str) -> Plan:
    tokens = run.data.global_batch * run.data.seq_len
    return Plan(
        config=config,
        slice=str(where),
        devices=where.devices,
        mesh={axis: size for axis, size in step.mesh.items() if size > 1},
        choices=choices(run),
        parameters=count_parameters(run.model.make()),
        active_parameters=active_parameters(run.model),
        tokens_per_step=tokens,
        steps=run.steps or -(-run.tokens // tokens),
        memory=step.memory,
        cost=_cost(run, step),
        reason=step.reason,
        versions=versions(),
        cpu_seconds=step.cpu_seconds,
        others=step.others,
    )


def of_program(run: Run, mesh: Any, compiled: Any) -> Plan:
    """The plan of a step that is compiled already, for the TPUs of a mesh; `compiled` is jax's."""
    there = list(mesh.devices.flat)
    where = chips.of_devices(there)
    sizes = compiled.memory_analysis()
    step = CompiledStep(
        slice=where,
        mesh=dict(mesh.shape),
        torus=torus(where.chip, where.topology, there),
        text=compiled.as_text(),
        memory=Memory(allocated=sizes.peak_memory_in_bytes, peak=sizes.peak_memory_in_bytes, kinds={}, buffers=()),
        reason='',
        cpu_seconds=0.0,
    )
    return _plan(run, where, step, 'this run')


def choices(run: Run) -> dict[str, Any]:
    """What may change without changing what is learnt, as `--config.…` names it."""
    named = {
        'data.global_batch': run.data.global_batch,
        'data.seq_len': run.data.seq_len,
        'accumulate': run.accumulate,
        'rules': run.rules,
        'model.remat': run.model.remat,
        'model.attention': run.model.attention,
    }
    if hasattr(run.objective, 'chunk'):  # a reward model's has no logits
        named['objective.chunk'] = run.objective.chunk
    if run.mesh.seq != 1:
        named['model.sequence'] = run.model.sequence
    if run.mesh.stage > 1:
        named |= {
            'pipeline.microbatches': run.pipeline.count(run.mesh.stage),
            'pipeline.circles': run.pipeline.circles,
        }
    return named


def _cost(run: Run, step: CompiledStep) -> Cost | None:
    if not step.text:
        return None
    tokens = run.data.global_batch * run.data.seq_len
    needed = needed_flops(run) * tokens / step.slice.devices
    return cost(step.program(), step.torus, step.mesh, needed=needed, bubble=_bubble(run, step.mesh['stage']))


def needed_flops(run: Run) -> float:
    """FLOPs a token that a step needs: weights that do not train have no gradient, a model that the objective reads
    besides goes forward once.
    """
    length, own = run.data.seq_len, train_flops(run.model, run.data.seq_len)
    if run.peft is not None:
        own *= 2 / 3
    if not run.objective.needs_frozen:
        return own
    reference = run.reference.model if run.reference is not None and run.reference.model is not None else run.model
    return own + forward_flops(reference, length)


def _bubble(run: Run, stages: int) -> float:
    """The share of the layers' executed work that the pipeline does not need."""
    if stages == 1:
        return 0.0
    stack = run.model.make(stages=stages, schedule=run.pipeline).stack
    return 1 - 1 / pipeline.overhead(stack.repeats, stages, run.pipeline.circles, run.pipeline.count(stages))


def plain(plan: Plan) -> dict[str, Any]:
    """As JSON has it, with what follows from it; `load` is its inverse."""
    values = dataclasses.asdict(plan)
    if plan.cost is not None:
        values['predicted'] = {
            'step_seconds': plan.seconds,
            'tokens_per_second_per_chip': plan.tokens_per_second,
            'mfu': plan.mfu,
            'chip_hours': plan.chip_hours,
        }
    return values


def load(values: Mapping[str, Any]) -> Plan:
    """Raises ConfigError for what is no plan of this version."""
    values = {name: value for name, value in values.items() if name != 'predicted'}
    try:
        found = values['cost']
        if found is not None:
            shares = tuple(Share(**each) for each in found['shares'])
            traffic = tuple(Traffic(**{**each, 'axes': tuple(each['axes'])}) for each in found['traffic'])
            uncounted = tuple(found['uncounted'])
            found = Cost(**{**found, 'shares': shares, 'traffic': traffic, 'uncounted': uncounted})
        others = tuple(OtherProgram(**{**each, 'memory': memory.load(each['memory'])}) for each in values['others'])
        return Plan(**{**values, 'memory': memory.load(values['memory']), 'cost': found, 'others': others})
    except (KeyError, TypeError) as error:
        raise ConfigError(f'this is no plan of this version ({error}); make it again with launch/plan.py') from None

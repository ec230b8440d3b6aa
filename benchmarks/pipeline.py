"""The pipeline, compiled for TPUs: what it executes beside the bubble's formula, and beside the other way to write it.

    JAX_PLATFORMS=cpu python benchmarks/pipeline.py      # minutes; needs pip install -e '.[plan]'

One step of a 16-layer decoder on v5p-16, compiled without stages, with 4 stages x 8 microbatches as
`parallel/pipeline.py` runs them (shard_map over `stage`), and with the stages as one more dim of every array: layers
under vmap, microbatches handed on by a roll, the rest left to the partitioner. Nothing is run: all are predictions.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from configs.pretrain import get_config
from tpu_llm.arrays import Array
from tpu_llm.parallel import chips, pipeline, sharding
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.parallel.pipeline import Layers, Pipeline, overhead
from tpu_llm.parallel.sharding import Layout
from tpu_llm.plan.compile import CompiledStep, compile_step, versions

WHERE, STAGES, MICROBATCHES, LAYERS = chips.find('v5p-16'), 4, 8, 16


def run_of(stages: int) -> Any:
    run = get_config('size=1b')
    run.model.layers, run.model.remat = LAYERS, 'full'
    run.model.attention = 'reference'  # plain matmuls, so that all FLOPs stand in the program
    run.data.seq_len, run.data.global_batch = 1024, 64
    run.mesh = Mesh(stage=stages, data=16 // stages, fsdp=1)
    run.pipeline = Pipeline(microbatches=MICROBATCHES)
    return run


def vmapped(
    run: Layers,
    weights: Any,
    layers: Array,
    x: Array,
    context: Any,
    tokens: Array,
    layout: Layout,
    *,
    circles: int,
    microbatches: int,
) -> tuple[Array, Any]:
    """`pipeline.pipelined` for a dense model and one circle, the stage being the first dim of all it holds."""
    stages = layout.mesh.shape['stage']
    assert circles == 1

    def split(x: Array, spec: PartitionSpec) -> Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, spec))

    def by_stage(x: Array) -> Array:
        return split(x.reshape(stages, -1, *x.shape[1:]), PartitionSpec('stage'))

    rows = PartitionSpec(None, ('data', 'fsdp'))
    weights, layers = jax.tree.map(by_stage, (weights, layers))
    inputs, contexts = jax.tree.map(
        lambda a: split(a.reshape(-1, microbatches, *a.shape[1:]).swapaxes(0, 1), rows), (x, context)
    )
    # Inside, a stage's rows are split over what is left.
    rules = dataclasses.replace(layout.rules, activations={**layout.rules.activations, 'B': ('data', 'fsdp')})

    def of_stage(*args: Any) -> Any:
        with sharding.use(Layout(layout.mesh, rules)):
            return run(*args)

    each = jax.vmap(of_stage, spmd_axis_name='stage')

    def one_tick(held: Array, tick: Array) -> tuple[Array, Array]:
        held = jnp.roll(held, 1, axis=0).at[0].set(inputs[jnp.minimum(tick, microbatches - 1)])
        micro = (tick - jnp.arange(stages)) % microbatches
        held, _ = each(weights, layers, held, jax.tree.map(lambda c: c[micro], contexts))
        return split(held, PartitionSpec('stage', ('data', 'fsdp'))), held[-1]

    held = split(jnp.zeros((stages, *inputs.shape[1:]), x.dtype), PartitionSpec('stage', ('data', 'fsdp')))
    _, results = jax.lax.scan(one_tick, held, jnp.arange(microbatches + stages - 1))
    shapes = jax.eval_shape(each, weights, layers, held, jax.tree.map(lambda c: c[:stages], contexts))[1]
    given = jax.tree.map(lambda s: jnp.zeros((s.shape[0] * s.shape[1], *s.shape[2:]), s.dtype), shapes)
    return results[stages - 1 :].swapaxes(0, 1).reshape(x.shape), given


def outside(run: Any) -> float:
    """FLOPs a device of what is not in the stack: the head, forward and twice backward."""
    tokens = run.data.global_batch * run.data.seq_len / WHERE.devices
    return 6.0 * tokens * run.model.width * run.model.vocab_size


def show(name: str, step: CompiledStep, flat: float, head: float) -> float:
    program = step.program()
    ratio = (program.flops - head) / (flat - head)
    stage = [each for each in program.traffic(step.mesh) if 'stage' in each.axes]
    print(f'{name:28}{program.flops / 1e12:7.2f} TFLOP{ratio:9.3f}{program.cycles / 1e6:12,.0f}M', end='')
    print(
        f'{step.peak_bytes / 2**30:9.2f} GiB{sum(each.bytes for each in stage) / 1e9:9.2f} GB{step.cpu_seconds:9.0f} s'
    )
    return ratio


def main() -> None:
    formula = overhead(LAYERS, STAGES, 1, MICROBATCHES)
    print(f'{WHERE}, {versions()}; {STAGES} stages, {MICROBATCHES} microbatches. Per device and step:')
    print(f'{"":28}{"executed":>13}{"stack":>9}{"cycles":>13}{"peak":>13}{"over stage":>12}{"compile":>11}')
    flat = compile_step(run_of(1), WHERE)
    head, needed = outside(run_of(1)), float(flat.program().flops)
    show('no stages', flat, needed, head)
    ratio = show('shard_map over stage', compile_step(run_of(STAGES), WHERE), needed, head)
    pipeline.pipelined = vmapped
    show('vmapped stages, rolled', compile_step(run_of(STAGES), WHERE), needed, head)
    print(f'stack, executed over needed: {ratio:.4f}; formula {formula:.4f}; off by {ratio / formula - 1:+.2%}')


if __name__ == '__main__':
    main()

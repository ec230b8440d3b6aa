"""A training step of Llama-3.1-8B at T = 1,048,576 on 512 chips of v5p, compiled without them.

JAX_PLATFORMS=cpu python benchmarks/long_context.py          (needs libtpu: pip install -e '.[plan]')

Rows are split 128 ways and joined by ring attention, its parts once the TPU kernel and once plain XLA; weights and
optimizer lie over fsdp = 4.
"""

from configs.sizes import decoder
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Stdlib
from tpu_llm.data.tokenizer import Bytes
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.parallel import chips
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.plan.compile import CompiledStep, compile_step, versions
from tpu_llm.plan.kernels import charged_cycles
from tpu_llm.train.run import Run

LENGTH, ROWS, PEERS = 2**20, 4, 128
BLOCK = 512  # of plain XLA's scores
SLICE = chips.find('v5p-512')
GIB = 2**30


def make_run(layers: int = 32, attention: str = 'auto') -> Run:
    """Saving what was attended (2 GiB a device) spares the backward pass a second ring."""
    model, _ = decoder('8b', vocab_size=128_256, dtype='bfloat16')
    model.layers, model.attention, model.sequence, model.remat = layers, attention, 'ring', 'attended'
    return Run(
        model=model,
        data=Data(
            mixture=Mixture(sources={'text': Stdlib(split='train')}),
            tokenizer=Bytes(),
            seq_len=LENGTH,
            global_batch=ROWS,
        ),
        optimizer=AdamW(schedule=Schedule(peak=1e-5)),
        steps=100,
        mesh=Mesh(seq=PEERS),
    )


def work(step: CompiledStep, layers: int) -> tuple[float, float]:
    """A device's cycles, kernels charged, and the FLOPs of attention.

    The causal mask hides half of the blocks. A plan takes a conditional's costlier branch, so in plain XLA it counts
    them all: what runs as often as there are blocks is halved here.
    """
    program = step.program()
    blocks = layers * PEERS * (LENGTH // PEERS // BLOCK) ** 2
    inner = [each for each in program.executed if each.times >= blocks]
    cycles = program.cycles - sum(each.cycles for each in inner) / 2 + charged_cycles(program.kernels, step.slice.chip)
    kernels = sum(kernel.times * kernel.charge.flops for kernel in program.kernels)
    return cycles, sum(each.flops for each in inner) / 2 + kernels


def needed(run: Run) -> float:
    """A device's FLOPs of causal attention: two matmuls forward, four backward."""
    model = run.model
    return 6 * model.layers * model.heads * ROWS * LENGTH**2 * model.head_dim / SLICE.chips


def show(run: Run, step: CompiledStep) -> float:
    cycles, flops = work(step, run.model.layers)
    print(f'{step.slice.name}, {step.mesh}, {versions()}, attention = {run.model.attention!r}')
    print(f'peak HBM          {step.peak_bytes / GIB:8.1f} GiB of {step.slice.chip.hbm / GIB:.1f}')
    print(f'cycles            {cycles / 1e9:8.1f}e9, kernels charged')
    print(f'FLOPs of attention{flops / needed(run):8.2f} times what a causal mask needs')
    print(f'compiled in       {step.cpu_seconds:8.1f} CPU-seconds')
    for traffic in step.program().traffic(step.mesh)[:6]:
        axes = ', '.join(traffic.axes)
        print(f'{traffic.kind:18} {traffic.bytes / 1e9:8.1f} GB a device over {axes}, {traffic.count} times')
    print(flush=True)
    return cycles


if __name__ == '__main__':
    runs = [make_run(attention=attention) for attention in ('blockwise', 'auto')]
    plain, kernel = (show(run, compile_step(run, SLICE)) for run in runs)
    print(f'the kernel takes {kernel / plain:.2f} of the cycles')

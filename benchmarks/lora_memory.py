"""What LoRA training of a real model takes beside one forward pass, and what QLoRA holds beside LoRA.

    JAX_PLATFORMS=cpu python benchmarks/lora_memory.py

The shapes of SmolLM2-135M (weights of ones: numbers have no say in memory), one row of 512 tokens, float32, LoRA of
rank 8 beside queries and values. The forward pass is `model(tokens)`, its logits and nothing else. `remat` says what of
a layer is kept for the backward pass. Bytes are the compiler's: arguments, temporaries and outputs, what is donated
once. Then each program runs in a process of its own, whose peak of resident memory is counted from before its weights
were made. Goals: training under 1.6x the forward pass with some `remat`; QLoRA's resident weights, embeddings and
adapters included, under 0.35x of LoRA's.
"""

import argparse
import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp

from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Stdlib
from tpu_llm.data.tokenizer import Bytes
from tpu_llm.models.families import published
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.parallel import sharding
from tpu_llm.parallel.compile import Compiled
from tpu_llm.peft.lora import LoRA, QLoRA
from tpu_llm.train.run import Run
from tpu_llm.train.setup import abstract_batch, make_graphs, make_layout, make_train_step, param_infos
from tpu_llm.train.state import abstract_state
from tpu_llm.train.weights import abstract_frozen

LENGTH, STEPS = 512, 2
REMATS = ('none', 'query+key+value+gate+up', 'full')
KINDS = {'LoRA': LoRA(), 'QLoRA': QLoRA()}


def make_run(kind: str, remat: str) -> Run:
    return Run(
        model=dataclasses.replace(published('smollm2-135m'), dtype='float32', remat=remat),
        data=Data(mixture=Mixture(sources={'stdlib': Stdlib()}), tokenizer=Bytes(), global_batch=1, seq_len=LENGTH),
        optimizer=AdamW(schedule=Schedule(peak=1e-4)),
        peft=KINDS.get(kind),
        steps=10,
    )


class Program:
    """The forward pass or the training step of a run, compiled; weights come later."""

    def __init__(self, kind: str, remat: str = 'none'):
        self.run, self.trains = make_run(kind, remat), kind in KINDS
        self.layout = make_layout(self.run)
        self.graphs = make_graphs(self.run, self.layout)
        graph, layout = self.graphs.model, self.layout
        self.tx = self.run.optimizer.make(param_infos(graph), self.run.steps)
        state = abstract_state(graph, self.tx, layout, ema=False)
        batch = abstract_batch(self.run, layout)

        def forward(params, tokens):
            with sharding.use(layout):
                return graph.bind(params)(tokens)

        if kind in KINDS:
            self.call = make_train_step(self.run, graph, self.tx, layout, state)
            self.args = state, abstract_frozen(self.run, self.graphs, layout), batch
        else:
            self.call = Compiled('forward pass', forward)
            self.args = state.params, batch.tokens
        self.program = self.call.program(*self.args)

    def bytes(self) -> int:
        memory = self.program.memory_analysis()
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return held + memory.temp_size_in_bytes

    def weights(self) -> int:
        """Bytes of all weights, those that train included."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in self.graphs.model.shapes().values())

    def peak(self) -> int:
        """Resident bytes at most while it runs, over those before there were weights."""
        before = resident('VmRSS')
        args = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype, device=x.sharding), self.args)
        jax.block_until_ready(args)
        forget()
        for _ in range(STEPS):
            out = jax.block_until_ready(self.call(*args))
            if self.trains:
                args = out[0], *args[1:]  # the old state was donated
            del out
        return resident('VmHWM') - before


def forget() -> None:
    """Starts the count of the peak anew."""
    with open('/proc/self/clear_refs', 'w') as file:
        file.write('5')


def resident(name: str) -> int:
    with open('/proc/self/status') as file:
        return int(next(line for line in file if line.startswith(name)).split()[1]) * 1024


def measured(kind: str, remat: str) -> int:
    command = [sys.executable, __file__, '--measure', kind, remat]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--measure', nargs=2, metavar=('KIND', 'REMAT'))
    args = parser.parse_args()
    if args.measure:
        print(Program(*args.measure).peak())
        return
    forward, told = Program('forward'), {}
    planned, real = forward.bytes(), measured('forward', 'none')
    print(f'{"":42} compiled        resident')
    print(f'{"forward pass":40} {planned / 1e6:7,.0f} MB       {real / 1e6:7,.0f} MB', flush=True)
    for kind in KINDS:
        for remat in REMATS:
            program, name = Program(kind, remat), f'{kind}, remat {remat}'
            ratios = [own / other for own, other in ((program.bytes(), planned), (measured(kind, remat), real))]
            told[name] = [round(ratio, 3) for ratio in ratios]
            print(
                f'{name:40} {ratios[0] * planned / 1e6:7,.0f} MB {ratios[0]:4.2f}x {ratios[1] * real / 1e6:7,.0f} MB '
                f'{ratios[1]:4.2f}x',
                flush=True,
            )
    held = {kind: Program(kind).weights() for kind in KINDS}
    share = held['QLoRA'] / held['LoRA']
    print(f'weights: LoRA {held["LoRA"] / 1e6:,.0f} MB, QLoRA {held["QLoRA"] / 1e6:,.0f} MB: {share:.2f}x (goal 0.35x)')
    print('training under 1.6x the forward pass is the goal')
    print(json.dumps({**told, 'weights': round(share, 3)}))


if __name__ == '__main__':
    main()

"""What learning from preferences costs beside supervised fine-tuning on the same tokens, in one run.

    JAX_PLATFORMS=cpu python benchmarks/preference_step.py

The model of `train_step.py`: 4 layers, width 256, vocabulary 8192, T 256, B 8, float32, AdamW with clipping. A row is a
pair: two texts of 128 tokens, a prompt of 32 and a response. Chosen and rejected tokens count alike, in SFT too. DPO
runs the reference beside the policy, or reads its log-probs from the batch, as it does once they are stored.

The contestants take turns, seven rounds of three steps; each round compares them, and the medians of these ratios are
the figures. Goals: 1.45x the time of SFT's step with the reference, 1.10x with what is stored.
"""

import dataclasses
import json
import statistics
import time

from tpu_llm.parallel import heap

heap.keep()  # before NumPy starts threads

import jax
import model
import numpy as np

from tpu_llm.arrays import Batch, ScoredBatch
from tpu_llm.models.graph import ModelGraph
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.objectives.preference import DPO
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.parallel.compile import Compiled
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.parallel.rules import PRESETS
from tpu_llm.parallel.sharding import Layout
from tpu_llm.train.frozen import start_frozen
from tpu_llm.train.setup import param_infos
from tpu_llm.train.state import create_state
from tpu_llm.train.step import make_step

BATCH, LENGTH, PROMPT, ROUNDS, STEPS = 8, 256, 32, 7, 3
CONTESTANTS = {'SFT': NextToken(), 'DPO': DPO(), 'DPO, stored': DPO(reference='stored')}


def rows(kind):
    """Pairs as plain rows, or as judged ones."""
    tokens = np.random.default_rng(0).integers(0, 8192, (BATCH, LENGTH + 1), dtype=np.int32)
    text = LENGTH // 2
    places = np.tile(np.arange(text, dtype=np.int32), (BATCH, 2))
    fields = {
        'tokens': tokens[:, :-1],
        'targets': tokens[:, 1:],
        'weights': (places >= PROMPT).astype(np.float32),
        'segments': np.tile(np.repeat(np.arange(1, 3, dtype=np.int32), text), (BATCH, 1)),
        'positions': places,
    }
    if kind is Batch:
        return Batch(**fields)
    zeros = np.zeros((BATCH, LENGTH), np.float32)
    marks = (places == text - 1).astype(np.float32)
    reference = np.full_like(zeros, -np.log(8192))
    return ScoredBatch(**fields, values=zeros, marks=marks, examples=np.ones_like(places), reference=reference)


class Contestant:
    def __init__(self, name):
        self.name, objective = name, CONTESTANTS[name]
        layout = Layout(Mesh().make(jax.devices()[:1]), PRESETS['zero3'])
        decoder = dataclasses.replace(model.get_config().model, unroll=0).make()
        graph = ModelGraph(decoder)
        schedule = Schedule(peak=1e-6, warmup=10)
        tx = AdamW(schedule=schedule).make(param_infos(graph), 10_000)
        self.state = create_state(decoder, graph, tx, layout, seed=0, ema=False)
        self.frozen, reference = start_frozen(schedule.peak, 0, layout), None
        if objective.needs_frozen:
            reference = graph
            other = jax.tree.map(lambda x: x.copy(), self.state.params)
            self.frozen = dataclasses.replace(self.frozen, other=other)
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        step = make_step(graph, objective, tx, layout, reference=reference)
        self.step = Compiled('train step', step, donate=(0,), out_shardings=(shardings, None))
        self.batch = jax.device_put(rows(objective.reads), layout.replicated)

    def run(self):
        self.state, metrics = self.step(self.state, self.frozen, self.batch)
        metrics['loss'].block_until_ready()


def main():
    contestants = [Contestant(name) for name in CONTESTANTS]
    for each in contestants:
        each.run()  # compiles
        each.run()
    times = {name: [] for name in CONTESTANTS}
    for _ in range(ROUNDS):
        for each in contestants:
            start = time.perf_counter()
            for _ in range(STEPS):
                each.run()
            times[each.name].append((time.perf_counter() - start) / STEPS)
    for name, seconds in times.items():
        print(f'{name:12} {BATCH * LENGTH / statistics.median(seconds):8,.0f} tokens/s')
    ratios = {
        name: statistics.median(own / sft for own, sft in zip(seconds, times['SFT'], strict=True))
        for name, seconds in times.items()
        if name != 'SFT'
    }
    for name, goal in (('DPO', 1.45), ('DPO, stored', 1.10)):
        print(f'{name}: {ratios[name]:.2f}x the time of an SFT step (goal {goal:.2f}x)')
    print(json.dumps({name: round(ratio, 3) for name, ratio in ratios.items()}))


if __name__ == '__main__':
    main()

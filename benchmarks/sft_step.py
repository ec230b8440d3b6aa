"""What supervised fine-tuning costs beside pretraining on as many tokens, data included, in one run.

    JAX_PLATFORMS=cpu python benchmarks/sft_step.py

The model of `train_step.py`: 4 layers, width 256, vocabulary 8192, T 256, B 8, float32, AdamW with clipping. A step
takes its batch from the loader of a run. Pretraining reads the standard library, cut into full rows; fine-tuning reads
conversations (the sums of `configs/sft.py`), packed whole, trained on the answers alone. Both do 2,048 positions a
step; what share of them holds text, and what share is trained on, is printed.

The contestants take turns, seven rounds of eight steps; each round compares them, and the median of these ratios is the
figure. Goal: at most 1.05x the time of pretraining's step.
"""

import dataclasses
import json
import statistics
import tempfile
import time

from tpu_llm.parallel import heap

heap.keep()  # before NumPy starts threads

import jax
import model
import numpy as np

from tpu_llm.data.loader import Loader, open_documents, open_tokenizer
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Sums
from tpu_llm.models.graph import ModelGraph
from tpu_llm.objectives.next_token import NextToken
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

ROUNDS, STEPS = 7, 8
RUN = model.get_config()
TEXT = RUN.data
TALKS = dataclasses.replace(
    TEXT, mixture=Mixture(sources={'sums': Sums(split='train')}), interleave=1, whole=True, overlong='drop'
)


class Contestant:
    def __init__(self, name, data, folder):
        self.name = name
        layout = Layout(Mesh().make(jax.devices()[:1]), PRESETS['zero3'])
        decoder = RUN.model.make()
        graph = ModelGraph(decoder)
        schedule = Schedule(peak=1e-4, warmup=10)
        tx = AdamW(schedule=schedule).make(param_infos(graph), 10_000)
        self.state = create_state(decoder, graph, tx, layout, seed=0, ema=False)
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        self.frozen = start_frozen(schedule.peak, 0, layout)
        step = make_step(graph, NextToken(), tx, layout)
        self.step = Compiled('train step', step, donate=(0,), out_shardings=(shardings, None))
        self.place = layout.replicated
        tokenizer = open_tokenizer(data, folder)
        self.batches = Loader(data, open_documents(data, tokenizer, folder), tokenizer, seed=0)

    def run(self):
        batch, _ = next(self.batches)
        self.state, metrics = self.step(self.state, self.frozen, jax.device_put(batch, self.place))
        metrics['loss'].block_until_ready()

    def shares(self):
        """Of the positions of a batch: those that hold text, and those that are trained on."""
        batch, _ = next(self.batches)
        return np.mean(batch.segments > 0), np.mean(batch.weights > 0)


def main():
    with tempfile.TemporaryDirectory() as folder:
        contestants = [Contestant('pretraining', TEXT, folder), Contestant('SFT', TALKS, folder)]
        for each in contestants:
            each.run()  # compiles
            each.run()
        times = {each.name: [] for each in contestants}
        for _ in range(ROUNDS):
            for each in contestants:
                start = time.perf_counter()
                for _ in range(STEPS):
                    each.run()
                times[each.name].append((time.perf_counter() - start) / STEPS)
        for each in contestants:
            speed = TEXT.global_batch * TEXT.seq_len / statistics.median(times[each.name])
            text, trained = each.shares()
            print(f'{each.name:12} {speed:8,.0f} tokens/s; text in {text:.0%} of positions, {trained:.0%} trained on')
            each.batches.close()
    ratios = [sft / text for text, sft in zip(*times.values(), strict=True)]
    print(f'SFT: {statistics.median(ratios):.3f}x the time of a pretraining step (goal 1.05x)')
    print(json.dumps({'SFT': round(statistics.median(ratios), 3), 'each': np.round(ratios, 3).tolist()}))


if __name__ == '__main__':
    main()

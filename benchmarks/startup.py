"""From the start of the process to the first finished training step, cold and with a compilation cache.

    JAX_PLATFORMS=cpu python benchmarks/startup.py

Each time is that of a new process of `launch/run.py`, until the first step's loss stands in metrics.jsonl.
"""

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROUNDS = 3


def first_step(cache: str | None) -> float:
    """Seconds until the first step is logged."""
    with tempfile.TemporaryDirectory() as workdir:
        env = {name: value for name, value in os.environ.items() if name != 'JAX_COMPILATION_CACHE_DIR'}
        if cache:
            env |= {'JAX_COMPILATION_CACHE_DIR': cache, 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
        command = [sys.executable, 'launch/run.py', '--config=benchmarks/model.py', f'--workdir={workdir}']
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
        lines = pathlib.Path(workdir) / 'metrics.jsonl'
        while not (lines.exists() and lines.stat().st_size):
            assert process.poll() is None, 'the run failed'
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        process.wait()
        return seconds


def import_seconds(statement: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, '-c', statement], cwd=ROOT, check=True)
    return time.perf_counter() - start


def main() -> None:
    empty = statistics.median(import_seconds('pass') for _ in range(5))
    package = statistics.median(import_seconds('import tpu_llm') for _ in range(5))
    print(f'import tpu_llm                   {package - empty:6.3f} s')
    cold = [first_step(None) for _ in range(ROUNDS)]
    print(f'first step, cold                 {statistics.median(cold):6.1f} s   (each: {_list(cold)})')
    with tempfile.TemporaryDirectory() as cache:
        first_step(cache)
        warm = [first_step(cache) for _ in range(ROUNDS)]
    print(f'first step, compilation cache    {statistics.median(warm):6.1f} s   (each: {_list(warm)})')


def _list(seconds: list[float]) -> str:
    return ', '.join(f'{s:.1f}' for s in seconds)


if __name__ == '__main__':
    main()

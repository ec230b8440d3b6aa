"""How long a law takes to fit to 500 runs with 1,000 bootstraps, beside SciPy's L-BFGS for one bootstrap after another.

    python benchmarks/scaling_fit.py

Runs are of a known law, with half a percent of noise. SciPy gets the same function and gradient, in NumPy, and the same
start; 20 bootstraps tell what 1,000 would take.
"""

import os
import sys
import time
from pathlib import Path

for name in ('OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS', 'OMP_NUM_THREADS'):
    os.environ.setdefault(name, '1')  # as `python -m tpu_llm.scaling` does: threads would wait for each other
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from scipy.optimize import minimize

from tpu_llm.scaling.fit import DELTA, fit
from tpu_llm.scaling.laws import Chinchilla
from tpu_llm.scaling.points import Points, points

TRUE = np.array([1.8172, 477.8, 2143.0, 0.3473, 0.3672])
RUNS, BOOTSTRAPS, COMPARED = 500, 1000, 20


def runs() -> Points:
    random = np.random.default_rng(0)
    n, d = 10 ** random.uniform(6, 10, RUNS), 10 ** random.uniform(8, 12, RUNS)
    e, a, b, alpha, beta = TRUE
    return points(n, d, (e + a / n**alpha + b / d**beta) * np.exp(0.005 * random.normal(size=RUNS)))


def scipy(there: Points, start: np.ndarray) -> float:
    """Seconds of CPU for one bootstrap."""
    law, log_loss = Chinchilla(), np.log(there.loss)
    counts = np.random.default_rng(0).multinomial(RUNS, np.full(RUNS, 1 / RUNS), size=COMPARED)
    began = time.process_time()
    for weights in counts:

        def huber(theta: np.ndarray, weights: np.ndarray = weights) -> tuple[float, np.ndarray]:
            value, by = law.log_loss(theta[None], there)
            error = (value[0] - log_loss) / DELTA
            pull = np.clip(error, -1, 1)
            total = np.sum(weights * pull * (error - 0.5 * pull))
            return total, np.array([np.sum(weights * pull * each[0]) for each in by]) / DELTA

        minimize(huber, start, jac=True, method='L-BFGS-B', options={'ftol': 1e-11, 'maxiter': 2000})
    return (time.process_time() - began) / COMPARED


def main() -> None:
    there = runs()
    wall, cpu = time.perf_counter(), time.process_time()
    found = fit(Chinchilla(), there, bootstraps=BOOTSTRAPS)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    each = scipy(there, Chinchilla().theta(found.constants))
    for label, true, value, error in zip(found.law.labels, TRUE, found.constants, found.standard_errors, strict=True):
        print(f'{label:6} {true:8.4g}, found {value:8.4g}, standard error {error:.2g}')
    print(f'{RUNS} runs, {BOOTSTRAPS} bootstraps: {wall:.2f} s, {cpu:.2f} s of CPU')
    print(f'L-BFGS of SciPy, a bootstrap: {each:.4f} s, so {each * BOOTSTRAPS:.1f} s for {BOOTSTRAPS}')
    print(f'ratio: {each * BOOTSTRAPS / cpu:.1f}x')


if __name__ == '__main__':
    main()

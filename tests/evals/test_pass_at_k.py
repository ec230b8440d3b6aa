"""pass@k without bias, of programs that really run."""

import itertools
import math

import numpy as np
import pytest
from subjects import Table

from tpu_llm.config import RunError
from tpu_llm.evals import sandboxed
from tpu_llm.evals.catalogue import KINDS, find
from tpu_llm.evals.pass_at_k import pass_at_k
from tpu_llm.evals.task import fill, read


def _can_contain() -> bool:
    try:
        sandboxed.run([])
    except RunError:
        return False
    return True


contained = pytest.mark.skipif(not _can_contain(), reason='the kernel refuses namespaces here')


@pytest.mark.parametrize('programs', [1, 2, 5])
def test_it_is_the_share_of_draws_with_one_that_passes(programs):
    for passed in range(programs + 1):
        for k in range(1, programs + 1):
            draws = list(itertools.combinations([True] * passed + [False] * (programs - passed), k))
            assert pass_at_k(programs, passed, k) == pytest.approx(np.mean([any(draw) for draw in draws]))
            closed = 1 - math.comb(programs - passed, k) / math.comb(programs, k)
            assert pass_at_k(programs, passed, k) == pytest.approx(closed)


def test_it_has_no_bias():
    """Each program passes with probability 0.3: on average it is 1 − 0.7^k, exactly."""
    for k in (1, 3, 6):
        mean = sum(math.comb(6, c) * 0.3**c * 0.7 ** (6 - c) * pass_at_k(6, c, k) for c in range(7))
        assert mean == pytest.approx(1 - 0.7**k)


def test_large_numbers_do_not_overflow():
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r'^pass@3 takes at least 3 programs, and there are 2'):
        pass_at_k(2, 1, 3)


@contained
def test_programs_are_run(tmp_path):
    path = tmp_path / 'a.task'
    path.write_text(
        'kind: code\nabout: x\nprompt: "def {name}(x):"\ncontinuation: ""\nprogram: "def {name}(x):{response}"\n'
        'max_new_tokens: 8\nsamples: 4\ntemperature: 0.5\nk: [2, 1]\n---\n'
        '{"name": "double", "tests": ["assert double(2) == 4", "assert double(-1) == -2"]}\n'
        '{"name": "square", "tests": [{"input": "", "output": ""}]}\n'
    )
    bodies = [' return 2 * x', ' return x + 2', ' return (', ' return x + x']
    task = read(path, KINDS)
    found = task.form.outcome(Table(says=lambda prompt, number: bodies[number]), task, 0)
    assert [sample['passed'] for sample in found.samples] == [[True, False, False, True], [True, True, False, True]]
    assert found.metrics['pass@1'].value == pytest.approx((2 / 4 + 3 / 4) / 2)
    assert found.metrics['pass@2'].value == pytest.approx((1 - 1 / 6 + 1) / 2)


@contained
@pytest.mark.full
def test_the_shipped_solutions_pass():
    (task,) = find(['programs'])
    rows = [row.fields for row in (*task.examples, *task.rows)]
    programs = [fill(task.form.program, {**row, 'response': task.form.answered(row)}) for row in rows]
    assert all(map(all, sandboxed.passed_by_each(programs, [row['tests'] for row in rows])))

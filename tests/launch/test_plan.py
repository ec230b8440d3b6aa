"""launch/plan.py as one types it: what it says, and what it says of mistakes."""

import importlib.util
import json
import subprocess
import sys

import pytest
from entry import ROOT

HAS_LIBTPU = importlib.util.find_spec('libtpu') is not None
needs_libtpu = pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu: pip install -e '.[plan]'")
PAGE = '--config=configs/pods/llama2_7b_v5e_256.py:smoke'
# The page's smoke form, with heads that a TPU kernel takes.
SMALL = [
    PAGE,
    '--topology=v5e-4',
    '--config.model.head_dim=128',
    '--config.model.width=256',
    '--config.model.dtype=bfloat16',
    '--config.data.seq_len=256',
]


def plan(*args, cwd=ROOT):
    done = subprocess.run(
        [sys.executable, str(ROOT / 'launch/plan.py'), *args], cwd=cwd, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ([], 'no config given: --config=FILE.py[:arg]'),
        ([PAGE, '--topology=v5e-255'], 'there is no v5e slice of 255 chips (v5e-255); the nearest: v5e-128 and'),
        ([PAGE, '--topology=v7-4'], "unknown TPU generation 'v7'"),
        (['--config=configs/quickstart.py'], 'configs/quickstart.py names no slice; give one: --topology=v5e-256'),
        (
            ['--config=configs/evaluate.py:path=nowhere', '--topology=v5e-4'],
            'is a tpu_llm.evals.run.Run, which has no training step to plan',
        ),
        (['--config=configs/encoder.py'], 'trains a model of type EncoderConfig; only decoders can be planned'),
        ([PAGE, '--toplogy=v5e-4'], "unknown flag --toplogy (did you mean '--topology'?)"),
        (['--toplogy=v5e-4'], "unknown flag --toplogy (did you mean '--topology'?)"),
        ([PAGE, '--search', '--json'], '--search does not go with --json; leave one of them out'),
        ([PAGE, '--topology=v5e-4', '--topologies=v5e-4'], '--topologies does not go with --topology'),
        ([PAGE, '--compiles=0'], 'compiles'),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(args, message):
    code, out, err = plan(*args)
    assert (code, out) == (2, '')
    assert err.startswith('error: ')
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.skipif(HAS_LIBTPU, reason='libtpu is here')
def test_without_libtpu_it_says_what_to_install():
    code, _, err = plan(*SMALL)
    assert code == 2
    assert "needs libtpu: pip install -e '.[plan]'" in err


def test_help_is_the_docstring():
    code, out, _ = plan('--help')
    assert code == 0
    assert out.startswith('Says, without a TPU, whether a run fits')


@needs_libtpu
@pytest.mark.full
def test_a_plan_from_the_command_to_its_files(tmp_path):
    cache, dump, page = f'--cache={tmp_path / "cache"}', tmp_path / 'dump', tmp_path / 'plan.html'
    code, out, err = plan(*SMALL, cache, f'--dump={dump}', f'--html={page}', f'--workdir={tmp_path / "run"}')
    assert code == 0, err
    assert 'fits: ' in out
    assert 'Predicted from the compiled program; nothing has run.' in out
    assert 'ENTRY' in (dump / 'program.hlo.txt').read_text()
    written = json.loads((dump / 'plan.json').read_text())
    assert json.loads((tmp_path / 'run/plan.json').read_text()) == written
    assert json.loads((dump / 'memory.json').read_text()) == written['memory']
    assert '<html' in page.read_text()
    # Again, from the cache: the same figures and no compile.
    code, out, err = plan(*SMALL, cache, '--json')
    again = json.loads(out)
    assert code == 0, err
    assert {**again, 'cpu_seconds': 0} == {**written, 'cpu_seconds': 0}


@needs_libtpu
@pytest.mark.full
def test_slices_beside_each_other(tmp_path):
    code, out, err = plan(*SMALL[:1], *SMALL[2:], '--topologies=v5e-4,v6e-4', f'--cache={tmp_path}')
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines() if line.startswith('v')] == ['v5e-4', 'v6e-4']

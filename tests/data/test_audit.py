"""The command prints what the loader reads, for any config with data and a seed."""

import subprocess
import sys
from pathlib import Path

import pytest

from tpu_llm.data.__main__ import main

CONFIG = """
import dataclasses
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Text
from tpu_llm.data.tokenizer import Bytes

@dataclasses.dataclass(kw_only=True, slots=True)
class Reading:
    data: Data
    seed: int = 0

@dataclasses.dataclass(kw_only=True, slots=True)
class Else:
    seed: int = 0

def get_config(arg=None):
    if arg == 'else':
        return Else()
    mixture = Mixture(sources={'files': Text(paths=('FOLDER/*.txt',))})
    return Reading(data=Data(mixture=mixture, tokenizer=Bytes(), global_batch=2, seq_len=8, interleave=1))
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    for name in ('one', 'two'):
        (tmp_path / f'{name}.txt').write_text(name * 4)  # 12 bytes are 13 pairs
    (tmp_path / 'audited.py').write_text(CONFIG.replace('FOLDER', str(tmp_path)))
    return str(tmp_path / 'audited.py')


def test_rows_of_a_step(config: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(['audit', f'--config={config}', '--step=2']) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if '.txt' in line]
    assert [row[:2] for row in rows] == [['0', '1'], ['0', '2'], ['1', '1'], ['1', '2']]
    assert {row[2] for row in rows} == {'files'}
    assert [row[4:] for row in rows] == [['8–12', '13'], ['0–2', '13']] * 2
    assert {row[3] for row in rows[::2]} == {f'{tmp_path}/one.txt', f'{tmp_path}/two.txt'}, 'one each, in an epoch'


def test_overrides_and_a_process_of_its_own(config: str) -> None:
    command = [sys.executable, '-m', 'tpu_llm.data', 'audit', f'--config={config}', '--step=1']
    done = subprocess.run([*command, '--config.data.global_batch=3'], capture_output=True, text=True, check=True)
    assert sum('.txt' in line for line in done.stdout.splitlines()) == 3


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--config={}', '--step=0'], 'step 0 is behind the loader, which stands after step 0; steps count from 1'),
        (['--config={}:else', '--step=1'], 'describes a Else, which reads no training data'),
        (['--config={}', '--step=1', '--workdir=/nowhere'], 'there is no workdir /nowhere'),
        (
            ['--config={}', '--step=1', '--config.data.seq_length=3'],
            "has no field 'seq_length' (did you mean 'seq_len'?)",
        ),
        (['--config=none.py', '--step=1'], 'config file none.py does not exist'),
    ],
)
def test_mistakes_are_one_line(config: str, capsys: pytest.CaptureFixture, args: list[str], message: str) -> None:
    assert main(['audit', *(arg.replace('{}', config) for arg in args)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith('error: ')
    assert err.count('\n') == 1

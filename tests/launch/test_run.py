"""The entry: a run starts from any folder, and every mistake ends in one line that names the mend."""

import ast
import os
import re
import subprocess
import sys

import pytest
from entry import ROOT, one_line

CONFIG = '''"""A run that writes down what it was given."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from tpu_llm.config import ConfigError, machine, parse_arg


@dataclasses.dataclass(kw_only=True, slots=True)
class Model:
    width: int = 64
    heads: int = 4
    norm: Literal['rms', 'layer'] = 'rms'
    window: int | None = None

    def validate(self):
        if self.width % self.heads:
            raise ConfigError(f'heads {self.heads} does not divide width {self.width}')


@dataclasses.dataclass(kw_only=True, slots=True)
class Source:
    path: str = 'a'
    weight: float = 1.0


@dataclasses.dataclass(kw_only=True, slots=True)
class Run:
    model: Model = dataclasses.field(default_factory=Model)
    lora: Model | None = None
    sources: tuple[Source, ...] = (Source(), Source(path='b'))
    betas: tuple[float, float] = (0.9, 0.95)
    rate: float = 1.0
    packed: bool = True
    name: str | None = None
    named: dict[str, Source] = dataclasses.field(default_factory=lambda: {'web': Source()})
    make: Callable[[str], int] = len
    either: int | str = 1
    level: Literal[1, 2] = 1
    workers: int = machine(2)
    fails: str = ''

    def main(self, workdir):
        if self.fails:
            exec(self.fails, {'run': self})
        print(repr(str(workdir)))
        print(self)


def get_config(arg=None):
    arg = parse_arg(arg, smoke=False, size='1b')
    return Run(model=Model(width=32 if arg.smoke else 64))
'''


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('somewhere')
    (folder / 'plain.py').write_text(CONFIG)
    return folder


def launch(folder, *args):
    return subprocess.run(
        [sys.executable, ROOT / 'launch/run.py', *args],
        cwd=folder,
        env=os.environ | {'JAX_PLATFORMS': 'cpu'},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def said(folder, mistake, monkeypatch):
    """The one line that the entry says of a mistake, called in this process from the folder."""
    monkeypatch.chdir(folder)
    return mistake


# ------------------------------------------------------------------------------------------------- a good run


@pytest.fixture(scope='module')
def good(folder):
    flags = [
        '--config.rate=3e-4',
        '--noconfig.packed',
        '--config.model.norm=layer',
        '--config.model.window=9',
        '--config.betas=(0.8,0.9)',
        '--config.name=Ada',
        '--config.sources[1].weight=0.5',
        '--config.named.web.weight=7',
    ]
    done = launch(folder, '--config=plain.py:smoke,size=3b', *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_flags_reach_the_fields_they_name(good):
    for text in ('rate=0.0003', 'packed=False', "norm='layer'", 'betas=(0.8, 0.9)', 'width=32'):
        assert text in good[1]
    for text in ("Source(path='b', weight=0.5)", "Source(path='a', weight=7.0)", "name='Ada'", 'window=9'):
        assert text in good[1]


def test_the_default_workdir_names_the_config_and_the_maths(good):
    assert re.fullmatch(r'runs/plain-smoke-[0-9a-f]{10}', ast.literal_eval(good[0]))


def test_the_default_workdir_follows_maths_only(folder):
    names = []
    for flag in ('--config.workers=8', '--config.rate=1.0', '--config.rate=2'):
        names.append(launch(folder, '--config=plain.py', flag).stdout.splitlines()[0])
    assert names[0] == names[1] != names[2]


def test_a_shipped_config_is_found_from_any_folder(folder):
    done = launch(folder, '--config=configs/quickstart.py', '--help')
    assert done.returncode == 0, done.stderr


def test_help_shows_usage_examples_and_every_config(folder):
    done = launch(folder, '--help')
    assert done.returncode == 0
    assert '--workdir' in done.stdout
    assert 'python launch/run.py --config=configs/quickstart.py:smoke' in done.stdout
    for path in ROOT.glob('configs/**/*.py'):
        if 'def get_config(' in path.read_text():
            doc = ast.get_docstring(ast.parse(path.read_text()))
            assert f'{path.relative_to(ROOT)}' in done.stdout
            assert doc.splitlines()[0] in done.stdout


def test_help_with_a_config_shows_its_fields_as_flags(folder):
    lines = launch(folder, '--config=plain.py', '--help').stdout.splitlines()
    assert '--config.model.width=64' in lines
    assert '--config.sources[1].weight=1.0' in lines
    assert '--config.named.web.weight=1.0' in lines
    assert '--config.betas=(0.9, 0.95)' in lines
    assert lines[:2] == ['A run that writes down what it was given.', '']


def test_help_with_a_config_that_lacks_something_shows_its_fields(entry, capsys):
    assert entry('--config=configs/eval.py', '--help') == 0
    assert "--config.model.path=''" in capsys.readouterr().out


def test_help_with_a_page_that_asks_for_args_lists_them(entry, capsys):
    assert entry('--config=configs/grpo.py', '--help') == 2
    out, err = capsys.readouterr()
    assert 'configs/grpo.py:model=FOLDER-OR-RUN,data=prompts.jsonl' in out
    assert 'give the policy and its prompts' in one_line(err)


# --------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ([], 'no config given: --config=FILE.py'),
        (['--config=nowhere.py'], 'config file nowhere.py does not exist'),
        (['--config=configs/quickstrat.py'], "does not exist (did you mean 'configs/quickstart.py'?)"),
        (['--cofnig=plain.py'], "unknown flag --cofnig (did you mean '--config'?)"),
        (['--config.rate=3'], 'no config given'),
        (['--config=plain.py', '--rate=3'], "unknown flag --rate (did you mean '--config.rate'?)"),
        (['--config=plain.py', '--config.rate=fast'], '--config.rate=fast: expects a number'),
        (['--config=plain.py', '--workdir=plain.py'], 'the workdir plain.py is a file; give a folder'),
        (['--config=plain.py', '--wrokdir=x'], "unknown flag --wrokdir (did you mean '--workdir'?)"),
        (
            ['--config=plain.py', '--config.rate', '3'],
            "unexpected argument '3'; a value is joined to its flag by =",
        ),
        (
            ['--config=plain.py:smok'],
            "config arg 'smok' is unknown (did you mean 'smoke'?); this config takes",
        ),
        (
            ['--config=plain.py', '--config.model.widht=3'],
            "config.model has no field 'widht' (did you mean 'width'?); it has width, heads, norm, window",
        ),
        (
            ['--config=plain.py', '--config.modle.width=3'],
            "config has no field 'modle' (did you mean 'model'?)",
        ),
        (['--config=plain.py', '--config.rate.x=3'], "config.rate is 1.0 and has no 'x'"),
        (['--config=plain.py', '--config.sources[2].path=c'], 'config.sources is ('),
        (['--config=plain.py', '--config.sources[=c'], '--config.sources[ is not the path of a field'),
        (
            ['--config=plain.py', '--config.lora.width=3'],
            'config.lora is absent, so --config.lora.width has nothing to set; the config arg chooses what there '
            'is, or the config file: run.lora = Model(width=…), of plain',
        ),
        (
            ['--config=plain.py', '--config.model=3'],
            'config.model is a group of fields, not a value; set one of width',
        ),
        (['--config=plain.py', '--config.model.window=None'], 'config.model.window cannot be None by flag'),
        (['--config=plain.py', '--config.name=none'], 'config.name cannot be None by flag'),
        (
            ['--config=plain.py', '--config.model.width=wide'],
            '--config.model.width=wide: expects a whole number',
        ),
        (
            ['--config=plain.py', '--config.model.norm=batch'],
            '--config.model.norm=batch: value should be one of',
        ),
        (
            ['--config=plain.py', '--config.betas=(1,2,3)'],
            'config.betas is (1, 2, 3); expected tuple[float, float]',
        ),
        (['--config=plain.py', '--config.betas[0]=1'], 'config.betas[0] is one item of a tuple; set them all'),
        (['--config=plain.py', '--config.named.wbe.path=c'], "and has no 'wbe'"),
        (['--config=plain.py', '--config.make=max'], 'config.make is of a kind that no flag can set'),
        (
            ['--config=plain.py', '--config.lora=0.1'],
            'no flag can set; set it in the config file: run.lora = Model(width=…), of plain',
        ),
        (['--config=plain.py', '--config.either=1'], 'config.either is of a kind that no flag can set'),
        (['--config=plain.py', '--config.level=2'], 'config.level is of a kind that no flag can set'),
        (['--config=plain.py', '--config.packed=maybe'], '--config.packed=maybe'),
        (['--config=plain.py', '--config.model.heads=5'], 'config.model: heads 5 does not divide width 64'),
        (['--config=plain.py', '--debug=maybe'], '--debug=maybe'),
    ],
)
def test_a_mistake_is_one_line(said, args, message):
    assert message in said(*args)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('def get_config(arg=None):\n    return (1,\n', "bad.py:2: '(' was never closed"),
        ('def config():\n    return 1\n', 'bad.py has no function get_config(arg=None)'),
        ('def get_config(arg=None):\n    pass\n', 'bad.py: get_config returned None, not a config'),
        (
            'def get_config(arg):\n    pass\n',
            "bad.py: get_config(arg): missing a required argument: 'arg'",
        ),
    ],
)
def test_a_wrong_config_file_is_one_line(folder, said, text, message):
    (folder / 'bad.py').write_text(text)
    assert message in said('--config=bad.py')


def test_a_mistake_ends_the_process_with_code_2_and_one_line(folder):
    done = launch(folder, '--config=nowhere.py')
    assert (done.returncode, done.stdout) == (2, '')
    assert 'nowhere.py does not exist' in one_line(done.stderr)


def test_a_mistake_is_found_without_importing_jax(folder):
    flags = ['--config=plain.py', '--config.model.widht=3']
    done = subprocess.run(
        [sys.executable, '-X', 'importtime', ROOT / 'launch/run.py', *flags],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert not re.search(r'\| +(jax|flax)$', done.stderr, re.MULTILINE)


def test_debug_shows_the_traceback(folder):
    done = launch(folder, '--config=plain.py', '--config.model.heads=5', '--debug')
    assert done.returncode == 1
    assert 'Traceback' in done.stderr
    assert 'ConfigError' in done.stderr


@pytest.mark.parametrize(
    ('code', 'message'),
    [
        ('open("/proc/no/such/file", "w")', "[Errno 2] No such file or directory: '/proc/no/such/file'"),
        ('from tpu_llm.config import choose; choose("size", "1g", {"1b": 1})', "unknown size '1g'"),
        ('from tpu_llm.train.metrics import read; read("metrics")', 'metrics does not exist'),
        ('from tpu_llm.train.ledger import load; load("here")', 'is here the workdir of a run?'),
    ],
)
def test_what_goes_wrong_later_is_one_line_too(folder, code, message):
    done = launch(folder, '--config=plain.py', f'--config.fails={code}')
    assert done.returncode == 2
    assert message in one_line(done.stderr)


@pytest.mark.parametrize('saved', [True, False])
def test_ctrl_c_says_what_is_left(folder, entry, capsys, tmp_path, saved):
    if saved:
        (tmp_path / 'checkpoints/00000003.0001-ab').mkdir(parents=True)
        (tmp_path / 'checkpoints/00000003.0001-ab/COMMIT.json').touch()
    flags = ['--config.fails=raise KeyboardInterrupt', f'--workdir={tmp_path}']
    assert entry(f'--config={folder}/plain.py', *flags) == 130
    goes_on = 'the same command continues from the last checkpoint'
    begins = 'nothing was saved yet: the same command begins anew'
    assert one_line(capsys.readouterr().err) == f'interrupted; {goes_on if saved else begins}'


def test_ctrl_c_knows_the_checkpoints_of_stages(folder, entry, capsys, tmp_path):
    (tmp_path / 'sft/checkpoints/00000003.0001-ab').mkdir(parents=True)
    (tmp_path / 'sft/checkpoints/00000003.0001-ab/COMMIT.json').touch()
    flags = ['--config.fails=raise KeyboardInterrupt', f'--workdir={tmp_path}']
    assert entry(f'--config={folder}/plain.py', *flags) == 130
    assert 'continues from the last checkpoint' in capsys.readouterr().err


def test_ctrl_c_within_a_callback_of_the_garbage_collector_is_not_lost(folder):
    """Python prints what is raised there and goes on; jax has such a callback, and starting a run collects a lot."""
    press = 'gc.callbacks.append(lambda *_: gc.callbacks.clear() or signal.raise_signal(signal.SIGINT))'
    code = (
        f'import gc, signal, time; signal.signal(2, signal.default_int_handler); {press}; gc.collect(); time.sleep(30)'
    )
    done = launch(folder, '--config=plain.py', f'--config.fails={code}')
    assert done.returncode == 130
    assert one_line(done.stderr).startswith('interrupted; ')


@pytest.mark.parametrize('code', ['1 / 0', 'int("x")', 'raise ValueError("not ours")'])
def test_a_bug_shows_its_traceback(folder, code):
    done = launch(folder, '--config=plain.py', f'--config.fails={code}')
    assert done.returncode == 1
    assert 'Traceback' in done.stderr


def test_a_bucket_without_gcsfs_names_the_extra(folder):
    blocked = 'import sys; sys.modules["gcsfs"] = None; sys.argv = sys.argv[1:]; '
    done = subprocess.run(
        [
            sys.executable,
            '-c',
            blocked + 'import runpy; runpy.run_path(sys.argv[0], run_name="__main__")',
            ROOT / 'launch/run.py',
            '--config=plain.py',
            '--workdir=gs://bucket/run',
        ],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "pip install -e '.[gcs]'" in one_line(done.stderr)

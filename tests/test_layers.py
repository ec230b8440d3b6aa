"""Imports point down, files stay short, and importing anything has no effect."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Top to bottom; a module may import what stands below it. See docs/architecture.md.
RANKS = (
    ('launch', 'experiments', 'configs'),
    ('tpu_llm',),  # the facade, tpu_llm/__init__.py
    ('rl', 'evals', 'scaling', 'plan'),
    ('train', 'infer'),
    ('objectives', 'peft', 'quant', 'checkpoint'),
    ('models',),
    ('nn', 'data', 'optim'),
    ('kernels',),
    ('parallel',),
    ('arrays', 'config', 'command_line'),
)
BESIDE = {
    ('objectives', 'peft'),
    ('peft', 'quant'),
    ('checkpoint', 'quant'),
    ('checkpoint', 'peft'),
    ('rl', 'evals'),
    ('scaling', 'plan'),
    ('experiments', 'configs'),  # an experiment is a base config and what it changes
    ('command_line', 'config'),
}
RANK = {part: rank for rank, parts in enumerate(RANKS) for part in parts}
PACKAGE = sorted((ROOT / 'tpu_llm').rglob('*.py'))
FILES = [*PACKAGE, *(path for top in RANKS[0] for path in sorted((ROOT / top).rglob('*.py')))]


def part_of(module):
    """The part of the tree that a dotted name belongs to; None for other packages."""
    first, _, rest = module.partition('.')
    below = rest.partition('.')[0]
    part = below if first == 'tpu_llm' and below in RANK else first
    return part if part in RANK else None


def imported(path):
    """Every module that a file imports, inside functions too; `from x import y` counts as x and as x.y."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}:{node.lineno}: write the import in full'
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def may_import(importer, module):
    if importer == module or (importer, module) in BESIDE:
        return True
    return RANK[importer] < RANK[module]


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def test_every_module_has_a_place():
    assert [path for path in PACKAGE if part_of(name_of(path)) == 'tpu_llm'] == [ROOT / 'tpu_llm/__init__.py']


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_imports_point_down(path):
    here = part_of(name_of(path))
    wrong = {module for module in imported(path) if (part := part_of(module)) and not may_import(here, part)}
    assert wrong == set()


@pytest.mark.parametrize(
    ('importer', 'module', 'allowed'),
    [
        ('train', 'models', True),
        ('nn', 'kernels', True),
        ('models', 'train', False),
        ('train', 'infer', False),
        ('data', 'nn', False),
        ('nn', 'nn', True),
        ('objectives', 'peft', True),
        ('peft', 'objectives', False),
        ('launch', 'configs', False),
        ('train', 'tpu_llm', False),
        ('launch', 'tpu_llm', True),
    ],
)
def test_the_rules_are_those_of_the_design(importer, module, allowed):
    assert may_import(importer, module) == allowed


def test_imports_in_functions_count(tmp_path):
    text = 'def f():\n    from tpu_llm.train import loop\n    import tpu_llm.nn.norm, tpu_llm, jax\n'
    (tmp_path / 'a.py').write_text(text)
    assert {part_of(module) for module in imported(tmp_path / 'a.py')} == {'train', 'nn', 'tpu_llm', None}


@pytest.mark.parametrize('path', PACKAGE, ids=name_of)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 500


def test_the_tree_is_two_levels_deep():
    assert [str(path) for path in PACKAGE if len(path.relative_to(ROOT).parts) > 3] == []


IMPORT_ALL = """
import importlib, json, os, sys
from jax._src import xla_bridge
before = dict(os.environ)
awake = []
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
    if xla_bridge._backends:
        awake.append(name)
        xla_bridge._backends.clear()
changed = [name for name in os.environ if os.environ[name] != before.get(name)]
print(json.dumps({'awake': awake, 'environment': changed}))
"""


def python(code, *args):
    done = subprocess.run([sys.executable, '-c', code, *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_importing_touches_no_device_and_prints_nothing():
    names = [name_of(path) for path in PACKAGE if path.name != '__main__.py']
    done = python(IMPORT_ALL, json.dumps(names))
    assert json.loads(done.stdout) == {'awake': [], 'environment': []}
    assert done.stderr == ''


def test_importing_the_package_is_cheap():
    done = python('import sys, tpu_llm; print([name for name in ("jax", "flax", "numpy") if name in sys.modules])')
    assert done.stdout == '[]\n'

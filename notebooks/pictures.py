"""Draws the pictures of docs/notebooks.md, by running the notebooks.

    pip install -e '.[test]'
    JAX_PLATFORMS=cpu python notebooks/pictures.py                          # all of them: some minutes
    JAX_PLATFORMS=cpu python notebooks/pictures.py shapes_and_sharding      # those of one notebook

A cell whose metadata says `picture` gives its figure to docs/pictures under that name. The notebooks themselves stay as
they are, without outputs. Printed are the seconds that each took.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HOME = Path(__file__).resolve().parent
PICTURES = HOME.parent / 'docs' / 'pictures'
KEPT = ('sharding', 'plan-choices')  # those that docs show

# The same numbers give the same file.
STYLE = """
%config InlineBackend.figure_formats = ['svg']
%config InlineBackend.print_figure_kwargs = {'bbox_inches': None, 'dpi': 100, 'metadata': {'Date': None}}
import matplotlib
matplotlib.rcParams['svg.hashsalt'] = 'tpu_llm'
"""


def main(names: list[str]) -> None:
    PICTURES.mkdir(exist_ok=True)
    for path in sorted(HOME.glob('*.ipynb')):
        if not names or path.stem in names:
            begin = time.monotonic()
            drawn = pictures(path)
            print(f'{path.stem}: {time.monotonic() - begin:.0f} s; {", ".join(drawn) or "no picture is kept"}')
            for name, svg in drawn.items():
                (PICTURES / f'{name}.svg').write_text(svg)


def pictures(path: Path) -> dict[str, str]:
    """The figures of an executed notebook by name, as SVG. Raises CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(STYLE))
    with tempfile.TemporaryDirectory() as here:
        client = NotebookClient(notebook, timeout=600, kernel_name='python3', resources={'metadata': {'path': here}})
        client.execute(env=os.environ | {'TMPDIR': here})
    return {
        cell.metadata['picture']: output.data['image/svg+xml']
        for cell in notebook.cells
        if cell.metadata.get('picture') in KEPT
        for output in cell.outputs
        if 'image/svg+xml' in output.get('data', {})
    }


if __name__ == '__main__':
    main(sys.argv[1:])

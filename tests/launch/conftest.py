"""The entry in this process, and what it says when it cannot go on."""

import runpy
import sys

import pytest
from entry import ROOT, one_line


@pytest.fixture(scope='session')
def entry():
    """`launch/run.py` as a function of its arguments, for what needs no process of its own."""
    path = sys.path.copy()
    main = runpy.run_path(str(ROOT / 'launch/run.py'))['main']
    yield lambda *args: main(['run.py', *map(str, args)])
    sys.path[:] = path


@pytest.fixture
def mistake(entry, capsys):
    """Calls the entry with what the user must mend; the one line it says."""

    def said(*args):
        capsys.readouterr()
        assert entry(*args) == 2
        return one_line(capsys.readouterr().err)

    return said

"""What `import tpu_llm` gives before anything is loaded."""

import importlib.metadata
import subprocess
import sys

import pytest

import tpu_llm


def test_the_version_is_the_installed_one():
    assert tpu_llm.__version__ == importlib.metadata.version('tpu_llm')
    assert '__version__' in dir(tpu_llm)


def test_the_version_costs_no_jax():
    code = 'import sys, tpu_llm; tpu_llm.__version__; sys.exit("jax" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(AttributeError, match="has no 'generat'; there are Greedy, Sample, from_pretrained, generate"):
        _ = tpu_llm.generat

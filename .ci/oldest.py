"""Prints pip constraints that pin every dependency of pyproject.toml to its lower bound."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / 'pyproject.toml').read_text())['project']
groups = [project['dependencies'], *project['optional-dependencies'].values()]
bounds = [re.fullmatch(r'([\w.-]+)(?:\[[\w,-]+\])?>=([\w.]+)', line) for group in groups for line in group]
for pin in sorted({f'{bound[1]}=={bound[2]}' for bound in bounds if bound}):
    print(pin)

"""docs/models.md: every published model, how it comes in and goes out, and how far its numbers are from transformers'.

    python benchmarks/zoo.py --write              # the page anew, with the errors that it has
    python benchmarks/zoo.py --write --measure    # and with those of now, on tests/golden/zoo: two minutes
    python benchmarks/zoo.py                      # prints it

Errors are the largest difference of a logit (of a hidden state, where there is no head), float32 on a CPU, over the
tiny checkpoints of the architecture. All else on the page is what the code says: tests/models/test_families.py holds
the two together.
"""

import ast
import collections
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import jax
import numpy as np

from tpu_llm.checkpoint import gguf, huggingface, pretrained
from tpu_llm.checkpoint.family import first
from tpu_llm.config import ConfigError
from tpu_llm.models.fact import Facts
from tpu_llm.models.families import ABSENT, ENCODERS, FAMILIES

PAGE = ROOT / 'docs/models.md'
CHECKPOINTS = ROOT / 'tests/golden/zoo'
NONE = '–'
ALL = FAMILIES | ENCODERS


def page(text: str, errors: Mapping[str, str]) -> str:
    """The text with its tables made anew. `errors` are those of the families, by name."""
    parts = {
        'families': [_HEAD, *(_row(facts, errors.get(facts.family, NONE)) for facts in ALL.values())],
        'absent': list(_absent()),
        'diff': ['```diff\n', *(f'{line}\n' for line in _diff()), '```\n'],
        'sizes': list(_sizes()),
    }
    for name, lines in parts.items():
        before, begin, rest = text.partition(f'<!-- {name}: made by benchmarks/zoo.py -->\n')
        _, end, after = rest.partition('<!-- end -->\n')
        assert end, f'{PAGE} has no place for {name}'
        text = ''.join((before, begin, *lines, end, after))
    return text


def errors_of(text: str) -> dict[str, str]:
    """The errors that a page has."""
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines() if line.startswith('| ')]
    return {row[0]: row[5] for row in rows if len(row) == 7}


_HEAD = """| family | sizes | import | export | GGUF in and out | parity error | parameters |
|---|---|---|---|---|---|---|
"""


def _row(facts: Facts, error: str) -> str:
    configs = [fact.make() for fact in facts.sizes.values()]
    read = facts.architecture in huggingface.ARCHITECTURES
    exact = sum(bool(fact.parameters) for fact in facts.sizes.values())
    cells = (
        facts.family,
        ', '.join(facts.sizes),
        f'`{facts.architecture}`' if read else NONE,
        _names([_transformers(config) for config in configs]) if read else NONE,
        _names([_llama_cpp(config) for config in configs]),
        error,
        f'{exact} of {len(configs)} exact' if exact else f'{len(configs)} as printed',
    )
    return f'| {" | ".join(cells)} |\n'


def _transformers(config: Any) -> str:
    return huggingface.expressible(config)[0].architecture


def _llama_cpp(config: Any) -> str:
    """Empty where it has none."""
    try:
        return first(list(gguf.ARCHITECTURES.values()), config, 'llama.cpp')[0].architecture
    except ConfigError:
        return ''


def _names(names: Sequence[str]) -> str:
    """Each once, with how many there are where not all are the same."""
    counts = collections.Counter(filter(None, names))
    each = [
        f'`{name}`' + (f' ({count} of {len(names)})' if count < len(names) else '') for name, count in counts.items()
    ]
    return ', '.join(each) or NONE


def _absent() -> Iterator[str]:
    for facts in ALL.values():
        if facts.lacks:
            yield f'- **{facts.family}** lacks {facts.lacks}.\n'
    for name, reason in ABSENT.items():
        yield f'- **{name}** is refused: {reason}.\n'
    shapes = ', '.join(facts.family for facts in ALL.values() if not facts.architecture)
    yield f'- Shapes to train, without published weights that transformers reads: {shapes}.\n'
    known = {huggingface.ARCHITECTURES[f.architecture].model_type for f in ALL.values() if f.architecture}
    other = [name for name, each in huggingface.ARCHITECTURES.items() if each.model_type not in known]
    if other:
        yield f'- Read and written, but without sizes above: {", ".join(f"`{name}`" for name in other)}.\n'


def _sizes() -> Iterator[str]:
    yield '| name | parameters | printed |\n|---|---|---|\n'
    for facts in ALL.values():
        for name, fact in facts.sizes.items():
            yield f'| {name} | {f"{fact.parameters:,}" if fact.parameters else NONE} | {fact.printed} |\n'


# ------------------------------------------------------------------------------------------------- the diff


def _diff() -> list[str]:
    """What OLMo 2 takes, as it stands in the files."""
    parts = {
        'tpu_llm/checkpoint/hf_decoders.py': ('OLMO2',),
        'tpu_llm/models/facts_llama.py': ('_olmo2', '_OLMO2', "Facts('OLMo 2'"),
        'tests/golden/zoo/rows_dense.py': ("'olmo2'",),
    }
    lines = []
    for file, names in parts.items():
        lines += [f'--- a/{file}', f'+++ b/{file}']
        for name in names:
            lines += [f'+{line}' for line in _source(ROOT / file, name)]
    return lines


def _source(path: Path, name: str) -> list[str]:
    """Lines of the function or the value of that name, or of the line that begins so."""
    text = path.read_text()
    lines = text.splitlines()
    for node in ast.parse(text).body:
        named = isinstance(node, ast.FunctionDef) and node.name == name
        named |= isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
        if named:
            return lines[node.lineno - 1 : node.end_lineno]
    return [next(line for line in lines if line.strip().startswith(name))]


# ------------------------------------------------------------------------------------------------- the errors


def measured() -> dict[str, str]:
    """Of each family the largest difference of a logit, over the checkpoints of its architecture."""
    worst: dict[str, float] = collections.defaultdict(float)
    for folder in sorted(path.parent for path in CHECKPOINTS.glob('*/expected.npz')):
        source = pretrained.open_source(folder)
        error = _error(source, folder)
        print(f'{folder.name:24} {source.family:28} {error:.1e}', flush=True)
        worst[source.family] = max(worst[source.family], error)
    return {facts.family: f'{worst[facts.architecture]:.1e}' for facts in ALL.values() if facts.architecture in worst}


def _error(source: pretrained.Source, folder: Path) -> float:
    expected, model = np.load(folder / 'expected.npz'), pretrained.read_model(source, 'float32')
    tokens, mask, answer = expected['tokens'], expected['mask'], expected.get('logits')
    with jax.default_matmul_precision('highest'):
        if 'target' in expected:
            target, real = expected['target'], expected['target_mask']
            said = model(tokens, target, source_segments=mask, target_segments=real)
        elif 'types' in expected:
            ask, real = model.hidden if answer is None else model, mask
            said = ask(tokens, segments=mask, token_types=expected['types'])
        else:
            said, real = model(tokens, segments=mask), mask
    answer = expected['hidden'] if answer is None else answer
    return float(np.abs(np.asarray(said) - answer)[real.astype(bool)].max())


def main() -> None:
    text = PAGE.read_text()
    text = page(text, measured() if '--measure' in sys.argv else errors_of(text))
    if '--write' in sys.argv:
        PAGE.write_text(text)
    else:
        print(text)


if __name__ == '__main__':
    main()

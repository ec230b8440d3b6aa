"""Conversations about the standard library, from its own docstrings: what a function is for, and its first sentence."""

import ast
import dataclasses
import json
import re
from collections.abc import Iterator

import numpy as np
from etils import epath

from tpu_llm.data.sources import Stdlib

_SENTENCE = re.compile(r'[A-Z][^.:`*|<>{}\[\]\\]{30,120}\.$')


@dataclasses.dataclass(kw_only=True, slots=True)
class Docstrings:
    """Writes talks.jsonl and heldout-talks.jsonl: `What does the Python function os.path.join do?` and the sentence.

    The first of those that are held out are in heldout-prompts.jsonl too. No function of talks.jsonl is in the others,
    and a sentence that several functions share is left out.
    """

    talks: int = 200
    heldout: int = 40
    asked: int = 8  # of those that are held out, to be answered
    seed: int = 0

    def main(self, workdir: str) -> None:
        folder = epath.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        said: dict[str, list[str]] = {}
        for function, sentence in _functions():
            said.setdefault(sentence, []).append(function)
        known = sorted((functions[0], sentence) for sentence, functions in said.items() if len(functions) == 1)
        assert len(known) >= self.talks + self.heldout, f'the library documents {len(known)} functions only'
        order = np.random.default_rng(self.seed).permutation(len(known))
        held = [_talk(*known[number]) for number in order[: self.heldout]]
        _write(folder / 'talks.jsonl', [_talk(*known[number]) for number in order[self.heldout :][: self.talks]])
        _write(folder / 'heldout-talks.jsonl', held)
        _write(folder / 'heldout-prompts.jsonl', [{'prompt': talk['prompt']} for talk in held[: self.asked]])


def _talk(function: str, sentence: str) -> dict[str, str]:
    return {'prompt': f'What does the Python function {function} do?', 'completion': sentence}


def _write(path: epath.Path, records: list[dict[str, str]]) -> None:
    if not path.exists():
        path.write_text(''.join(json.dumps(record) + '\n' for record in records))


def _functions() -> Iterator[tuple[str, str]]:
    """Every public function at the top of a module whose docstring begins with one plain sentence, and that."""
    for documents in (Stdlib(split='train').open(), Stdlib(split='heldout').open()):
        for number in range(len(documents)):
            path = documents.name(number)
            if not path.endswith('.py'):
                continue
            module = path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')
            for node in ast.parse(documents.read(number).text or '').body:
                if isinstance(node, ast.FunctionDef) and not node.name.startswith('_'):
                    first = ' '.join((ast.get_docstring(node) or '').split('\n\n')[0].split())
                    if _SENTENCE.match(first):
                        yield f'{module}.{node.name}', first

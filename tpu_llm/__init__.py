"""Language models on TPUs, from raw text to an evaluated model.

    import tpu_llm

    model, tokenizer = tpu_llm.from_pretrained('runs/quickstart-…')  # or a Hugging Face folder, or a .gguf file
    texts = tpu_llm.generate(model, tokenizer, ['def main():'], max_new_tokens=64, sampling=tpu_llm.Greedy())
    logits = model(tokens)
    tpu_llm.save_pretrained(model, tokenizer, 'folder')  # for transformers

Importing the package imports neither JAX nor anything else that is slow; each name is loaded at its first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpu_llm.checkpoint.pretrained import from_pretrained, save_pretrained
    from tpu_llm.infer.generate import generate
    from tpu_llm.infer.sampling import Greedy, Sample

__all__ = ['Greedy', 'Sample', 'from_pretrained', 'generate', 'save_pretrained']

_HOMES = {
    'Greedy': 'tpu_llm.infer.sampling',
    'Sample': 'tpu_llm.infer.sampling',
    'from_pretrained': 'tpu_llm.checkpoint.pretrained',
    'generate': 'tpu_llm.infer.generate',
    'save_pretrained': 'tpu_llm.checkpoint.pretrained',
}


def __getattr__(name: str) -> Any:
    if name == '__version__':
        return importlib.import_module('importlib.metadata').version('tpu_llm')
    if name not in _HOMES:
        raise AttributeError(f'tpu_llm has no {name!r}; there are {", ".join(__all__)}')
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, '__version__']

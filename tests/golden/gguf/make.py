"""Makes said.json: what llama.cpp's own converter writes of checkpoints of tests/golden/zoo.

    python tests/golden/gguf/make.py LLAMA_CPP    # its source folder; needs torch, transformers and sentencepiece

Of each: the architecture, its metadata, and for every tensor its dims (fastest first) and a fingerprint, the sum of its
numbers times cos(0), cos(1), ….
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

ZOO = Path(__file__).parents[1] / 'zoo'
# What the converter looks for by other names than transformers writes now.
MISSING = {
    'llama': {},
    'llama-biased': {},
    'qwen2': {},
    'qwen3': {},
    'gemma': {},
    'gemma2': {},
    'gemma3': {},
    'phi3-long': {},
    'stablelm': {},
    'starcoder2': {},
    'olmo': {},
    'olmo2': {},
    'cohere': {},
    'gpt2': {'n_ctx': 64},
    'bigcode': {},
    'neox': {'rotary_pct': 0.5},
    'phi': {},
    'bloom': {},
    'mpt': {'architectures': ['MPTForCausalLM']},
    'falcon7b': {'num_kv_heads': 1},
    'falcon40b': {},
}


def convert(name: str, path: Path) -> None:
    import gguf
    from conversion import ModelBase, get_model_class
    from conversion.base import TextModel

    said = {**ModelBase.load_hparams(ZOO / name, False), **MISSING[name]}
    kind = get_model_class(said['architectures'][0])

    def no_vocab(self):
        self.gguf_writer.add_tokenizer_model('no_vocab')
        self.gguf_writer.add_vocab_size(said['vocab_size'])

    own = {'set_vocab': no_vocab, 'model_arch': kind.model_arch}
    if name == 'gemma3':  # its own asks the tokenizer how many rows of the embedding are real

        def plus_one(self, data, tensor, layer):
            yield from TextModel.modify_tensors(self, data + self.norm_shift(tensor), tensor, layer)

        own['modify_tensors'] = plus_one
    model = type(kind.__name__, (kind,), own)(ZOO / name, gguf.LlamaFileType.ALL_F32, path, hparams=said)
    model.write()


def fingerprint(values: np.ndarray) -> float:
    flat = values.reshape(-1).astype(np.float64)
    return float(flat @ np.cos(np.arange(flat.size)))


def describe(path: Path) -> dict:
    import gguf

    reader = gguf.GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items()}
    name = values['general.architecture']
    return {
        'architecture': name,
        'metadata': {key: value for key, value in values.items() if key.startswith(f'{name}.')},
        'tensors': {each.name: [[int(n) for n in each.shape], fingerprint(each.data)] for each in reader.tensors},
    }


def main() -> None:
    sys.path[:0] = [sys.argv[1], f'{sys.argv[1]}/gguf-py']
    said = {}
    for name in MISSING:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            convert(name, Path(folder) / 'model.gguf')
            said[name] = describe(Path(folder) / 'model.gguf')
    lines = [f'{json.dumps(name)}: {json.dumps(each)}' for name, each in said.items()]
    Path(__file__).with_name('said.json').write_text('{\n' + ',\n'.join(lines) + '\n}\n')


if __name__ == '__main__':
    main()

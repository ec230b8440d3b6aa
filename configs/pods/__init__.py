"""Published models on whole pods: each page is one run, compiled (benchmarks/pods.py) before its slice is rented.

What the pages share is here. Each names its SLICE. `data=…/*.jsonl` is the text, without it the standard library's
sources; `tokenizer=…/some.model` a SentencePiece model, without it one is trained; `smoke` is 20 steps of a tiny model
on whatever devices there are.
"""

from configs.meshes import mesh
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Jsonl, Stdlib
from tpu_llm.data.tokenizer import Bytes, Pretrained, TrainedBPE
from tpu_llm.train.run import Run

ARGS = {'data': '', 'tokenizer': '', 'smoke': False}
# Compiler options: weights are gathered while the device computes. For v5e that is the default.
GATHER_AHEAD = {
    'xla_enable_async_all_gather': 'true',
    'xla_tpu_enable_async_collective_fusion_fuse_all_gather': 'true',
}


def text(data: str, tokenizer: str, vocab_size: int, *, seq_len: int, rows: int) -> Data:
    """What a run reads, `rows` of it a step over all chips."""
    return Data(
        mixture=Mixture(sources={'text': Jsonl(paths=(data,)) if data else Stdlib(split='train')}),
        tokenizer=Pretrained(path=tokenizer) if tokenizer else TrainedBPE(vocab_size=vocab_size),
        seq_len=seq_len,
        global_batch=rows,
        workers=8,
    )


def smoke(run: Run) -> Run:
    """The same run, so small that a laptop takes seconds for it: its pattern of layers and heads stays."""
    model, data = run.model, run.data
    if model.embed_scale != 1.0:
        model.embed_scale *= (64 / model.width) ** 0.5
    model.layers, model.width, model.head_dim, model.mlp_width, model.dtype = 2, 64, 16, 128, 'float32'
    model.heads, model.kv_heads = 4, max(1, 4 * model.kv_heads // model.heads)
    if model.mla:
        model.kv_heads = 4
        model.mla.kv_rank, model.mla.query_rank, model.mla.rope_dim, model.mla.value_dim = 32, 48, 16, 16
    if moe := model.moe:
        moe.expert_width, moe.first_dense = 64, min(moe.first_dense, 1)
        moe.experts = min(moe.experts, 16)
    if isinstance(data.tokenizer, TrainedBPE):
        model.vocab_size, data.tokenizer = 1024, TrainedBPE(vocab_size=1024)
    if isinstance(data.tokenizer, Bytes):
        model.vocab_size = 259
    data.seq_len, data.global_batch, data.workers = 128, 8, 0
    run.steps, run.tokens = (20, 0) if run.steps else (0, 20 * 8 * 128)
    run.optimizer.schedule.warmup, run.mesh = 5, mesh('auto')
    run.compiler_options = {}  # they are of the TPU compiler
    return run

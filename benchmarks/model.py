"""The benchmark model as a run: 4 layers, width 256, vocabulary 8192, T 256, B 8, float32, on the standard library.

python launch/run.py --config=benchmarks/model.py:steps=20
"""

from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import parse_arg
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Stdlib
from tpu_llm.data.tokenizer import Bytes
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.train.run import Run


def get_config(arg: str | None = None) -> Run:
    arg = parse_arg(arg, steps=1)
    return Run(
        model=DecoderConfig(
            vocab_size=8192,
            width=256,
            layers=4,
            heads=4,
            kv_heads=4,
            head_dim=64,
            mlp_width=1024,
            dtype='float32',
            unroll=0,
        ),
        # Bytes for tokens: no tokenizer to train, and the maths does not care which ids it sees.
        data=Data(
            mixture=Mixture(sources={'stdlib': Stdlib()}), tokenizer=Bytes(), global_batch=8, seq_len=256, cache='cache'
        ),
        optimizer=AdamW(schedule=Schedule(peak=1e-3), weight_decay=0.1),
        steps=arg.steps,
        log_every=10,
        checkpoints=Checkpoints(every=10**9),
        report=False,
    )

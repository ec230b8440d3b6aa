"""How much memory the process of a run takes on a CPU, guessed before it starts: enough to choose how many run at once.

A guess, not a bound. Peaks that were measured beside it, in GiB: the quickstart's smoke form 0.76 (0.85 guessed), the
quickstart 0.84 (1.12), `benchmarks/model.py` 1.36 (1.45).
"""

from typing import Any

from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.nn.param import count_parameters
from tpu_llm.scaling import sweep

GIB = float(1 << 30)
PROCESS = 0.7  # GiB of Python, jax and compiled programs
STATE = 28  # bytes a parameter: weights, gradients and Adam's moments in float32, some of it twice while it is updated
LOGITS = 1 << 25  # floats of a chunk of logits at most, with its gradients


def need(config: Any) -> float:
    """GiB that a run takes at its peak; of stages the most that one takes."""
    return max((_of(run) for _, run, _ in sweep.trained(config, '')), default=PROCESS)


def _of(run: Any) -> float:
    model, data = run.model, run.data
    floats = STATE / 4 * count_parameters(model.make())
    if isinstance(model, DecoderConfig):
        rows = data.global_batch // run.accumulate
        positions = rows * data.seq_len
        # What a layer keeps for the backward pass: the stream and maps of its width, the MLP's, the scores.
        layer = positions * (12 * model.width + 5 * model.mlp_width)
        scores = 3 * rows * model.heads * min(data.seq_len, 1024) * data.seq_len
        logits = 3 * min(positions * model.vocab_size, LOGITS)
        floats += model.layers * (layer + scores) + logits
    return PROCESS + 4 * floats / GIB

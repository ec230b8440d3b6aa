"""Tasks as a hook in training: what it logs is what a suite says of the weights that were saved."""

import pytest

from tpu_llm.config import ConfigError, validate
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Sums
from tpu_llm.data.tokenizer import Bytes
from tpu_llm.evals.candidate import Saved
from tpu_llm.evals.kept import read_results
from tpu_llm.evals.suite import Suite
from tpu_llm.evals.task_scores import TaskScores
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.train import metrics
from tpu_llm.train.loop import fit
from tpu_llm.train.run import Run

CHOICE = """kind: choice
about: x
prompt: '{q} = ?'
---
{"q": "1 + 1", "choices": ["2", "3"], "answer": 0}
{"q": "2 + 3", "choices": ["4", "5", "17"], "answer": 1}
{"q": "4 + 4", "choices": ["8", "9"], "answer": 0}
"""
WRITES = """kind: generative
about: x
prompt: "{q} = ?\\n"
metrics: [numeric, chrf]
max_new_tokens: 6
---
{"q": "1 + 1", "answer": 2}
{"q": "2 + 3", "answer": 5}
"""


@pytest.mark.full
def test_it_logs_what_a_suite_says(tmp_path, quick_compile):
    """On eight devices; the suite is on one."""
    files = []
    for name, text in (('picks', CHOICE), ('writes', WRITES)):
        (tmp_path / f'{name}.task').write_text(text)
        files.append(str(tmp_path / f'{name}.task'))
    run = Run(
        model=DecoderConfig(
            vocab_size=259, width=32, layers=1, heads=2, kv_heads=2, head_dim=16, mlp_width=64, dtype='float32'
        ),
        data=Data(
            mixture=Mixture(sources={'sums': Sums(split='train', digits=1)}),
            tokenizer=Bytes(),
            global_batch=8,
            seq_len=64,
            whole=True,
            overlong='drop',
        ),
        optimizer=AdamW(schedule=Schedule(peak=1e-2, warmup=1)),
        steps=2,
        mesh=Mesh(data=2, fsdp=4),
        hooks=(TaskScores(tasks=tuple(files), rows=3),),
        report=False,
    )
    run.checkpoints.best = 'heldout/picks_answer_bits'  # one of the names that it says it logs
    fit(run, tmp_path / 'run')
    line = metrics.read(tmp_path / 'run/metrics.jsonl')[-1]
    Suite(model=Saved(path=str(tmp_path / 'run')), tasks=tuple(files), kept=str(tmp_path / 'kept')).main(
        str(tmp_path / 'scores')
    )
    for score in read_results(tmp_path / 'scores')[1]:
        for name, found in score.metrics.items():
            assert line[f'heldout/{score.task}_{name}'] == pytest.approx(found.value, rel=1e-4)


def test_what_cannot_be_asked_is_told_of_first(tmp_path):
    (tmp_path / 'picks.task').write_text(CHOICE)
    name = str(tmp_path / 'picks.task')
    validate(TaskScores(tasks=(name,)))
    with pytest.raises(ConfigError, match=r'^config: task picks has 0 examples, and shots = 1'):
        validate(TaskScores(tasks=(name,), shots=1))
    with pytest.raises(ConfigError, match=r"^config: there is no task 'pick'"):
        validate(TaskScores(tasks=('pick',)))
    with pytest.raises(ConfigError, match=r'^config: shots = -2 must be -1 or more'):
        validate(TaskScores(tasks=(name,), shots=-2))

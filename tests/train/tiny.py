"""The smallest whole run, as a config file: bytes for tokens, a one-layer decoder, evaluation, checkpoints.

`text` is a folder of .txt files. For the tests: `steps`, `pause` (seconds a step, so that they can hit it) and `stuck`
(host/step/seconds: where one host sleeps, once, or for 0 seconds fails).
"""

import dataclasses
import time

import jax

from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import Periodic, machine, parse_arg
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Text
from tpu_llm.data.tokenizer import Bytes
from tpu_llm.evals.perplexity import HeldOut
from tpu_llm.models.decoder_config import DecoderConfig, Dropout
from tpu_llm.nn.moe import MoE
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.train.run import Run


@dataclasses.dataclass(kw_only=True, slots=True)
class Pause(Periodic):
    seconds: float = machine(0.0)

    def open(self, session):
        def call(step, weights):
            time.sleep(self.seconds)
            return {}

        return call


@dataclasses.dataclass(kw_only=True, slots=True)
class Stuck(Periodic):
    where: str = machine('')

    def open(self, session):
        def call(step, weights):
            host, at, seconds = map(int, self.where.split('/'))
            if (host, at) == (jax.process_index(), step):
                if not seconds:
                    raise OSError('no such disk')
                time.sleep(seconds)
            return {}

        return call


def get_config(arg=None):
    arg = parse_arg(arg, text='', steps=12, every=3, pause=0.0, workers=0, experts=0, stuck='')
    text = (f'{arg.text}/*.txt',)
    model = DecoderConfig(
        vocab_size=259,
        width=32,
        layers=1,
        heads=2,
        kv_heads=2,
        head_dim=16,
        mlp_width=64,
        moe=MoE(experts=arg.experts, chosen=2, expert_width=32) if arg.experts else None,
        dropout=Dropout(residual=0.1, attention=0.1, embedding=0.1),
        dtype='float32',
    )
    return Run(
        model=model,
        data=Data(
            mixture=Mixture(
                sources={'a': Text(paths=text), 'b': Text(paths=text, per='line')}, weights={0: {'a': 0.7, 'b': 0.3}}
            ),
            tokenizer=Bytes(),
            global_batch=8,
            seq_len=32,
            workers=arg.workers,
        ),
        optimizer=AdamW(schedule=Schedule(peak=1e-2, warmup=2)),
        steps=arg.steps,
        log_every=1,
        ema=0.9,
        checkpoints=Checkpoints(every=arg.every, keep=2),
        hooks=(
            HeldOut(source=Text(paths=text), every=4, rows=8),
            Pause(every=1, seconds=arg.pause),
            *([Stuck(every=1, where=arg.stuck)] if arg.stuck else []),
        ),
        report=False,
    )

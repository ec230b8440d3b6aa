"""What the experiments with sums share: a small model, and runs of each kind with what they have in common set.

Each function takes what differs as fields. Paths begin with `stage:` (tpu_llm/train/stages.py): the sums are those of
stage `tables`, and a run starts from the stage that `after` names.
"""

import dataclasses
from typing import Any

from tpu_llm.checkpoint.resume import Origin
from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.data.forms import Texts
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Conversations, Jsonl, Labelled, Preferences, Prompts
from tpu_llm.data.tokenizer import Bytes
from tpu_llm.evals.objective import HeldOutObjective
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.scalar_head import ScalarConfig
from tpu_llm.objectives.policy_gradient import PolicyGradient
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.rl.held_out import HeldOutAnswers
from tpu_llm.rl.run import Rollout
from tpu_llm.rl.run import Run as RLRun
from tpu_llm.rl.verify import ExactMatch, Format
from tpu_llm.train.frozen import Reference
from tpu_llm.train.run import Run

MODEL = DecoderConfig(
    vocab_size=259, width=128, layers=3, heads=4, kv_heads=4, head_dim=32, mlp_width=512, dtype='float32', unroll=0
)
FORM, RIGHT = Format(name='form', pattern=r'<\d+>'), ExactMatch(name='right')
USUAL = ExactMatch(name='usual', field='usual')  # what people who forget carries say most often


def table(name: str) -> tuple[str, ...]:
    return (f'stage:tables/{name}.jsonl',)


def talks(name: str) -> Conversations:
    return Conversations(paths=table(name), template='plain')


def pairs(name: str) -> Preferences:
    return Preferences(paths=table(name), template='plain')


def labelled(name: str) -> Labelled:
    return Labelled(paths=table(name), template='plain')


def rows(source: Any, count: int, length: int = 128, **fields: Any) -> Data:
    return Data(
        mixture=Mixture(sources={'sums': source}),
        tokenizer=Bytes(),
        seq_len=length,
        global_batch=count,
        interleave=1,
        **fields,
    )


def whole(source: Any, count: int, form: Texts | None = None) -> Data:
    return rows(source, count, whole=True, overlong='drop', form=form)


def adam(peak: float) -> AdamW:
    return AdamW(schedule=Schedule(peak=peak, warmup=0.05), weight_decay=0.0)


def answers(every: int = 50) -> HeldOutAnswers:
    """The likeliest answers to the thousand sums that are held out."""
    return HeldOutAnswers(
        source=Prompts(paths=table('heldout-prompts')),
        rewards=(FORM, RIGHT, USUAL),
        every=every,
        prompts=1000,
        prompt_length=8,
        max_new_tokens=8,
        template='plain',
        rows=250,
    )


def heldout(source: Any, every: int = 50) -> HeldOutObjective:
    return HeldOutObjective(source=source, every=every)


def _run(kind: type[Run], seed: int, after: str, fields: dict[str, Any]) -> Any:
    common = {'model': dataclasses.replace(MODEL), 'seed': seed, 'checkpoints': Checkpoints(every=10_000, keep=1)}
    return kind(**common | {'origin': Origin(weights=f'stage:{after}' if after else '')} | fields)


def pretraining(seed: int, **fields: Any) -> Run:
    own = {
        'data': rows(Jsonl(paths=table('corpus')), 32),
        'optimizer': AdamW(schedule=Schedule(peak=3e-3, warmup=0.1), weight_decay=0.1),
        'steps': 500,
        'hooks': (answers(every=0),),
    }
    return _run(Run, seed, '', own | fields)


def supervised(seed: int, after: str = 'pretrain', **fields: Any) -> Run:
    own = {'data': whole(talks('talks'), 8), 'optimizer': adam(5e-4), 'steps': 40, 'hooks': (answers(),)}
    return _run(Run, seed, after, own | fields)


def preferring(seed: int, objective: Any, source: Any, after: str = 'sft', **fields: Any) -> Run:
    own = {'data': whole(source, 16, Texts(most=16)), 'optimizer': adam(3e-4), 'steps': 300, 'hooks': (answers(),)}
    return _run(
        Run,
        seed,
        after,
        own | {'reference': Reference() if objective.needs_frozen else None, 'objective': objective} | fields,
    )


def policy(seed: int, objective: PolicyGradient, rollout: dict[str, Any], after: str = 'sft', **fields: Any) -> RLRun:
    model = ScalarConfig.of(MODEL) if objective.value else dataclasses.replace(MODEL)
    own = {
        'model': model,
        'data': rows(Prompts(paths=table('prompts')), 256, 16, overlong='drop'),
        'optimizer': adam(2e-4),
        'rollout': Rollout(**{'max_new_tokens': 8, 'template': 'plain'} | rollout),
        'rewards': (RIGHT,),
        'steps': 150,
        'hooks': (answers(),),
    }
    run = _run(RLRun, seed, after, own | {'objective': objective} | fields)
    if run.reference is None and run.needs_frozen():
        run.reference = Reference()
    return run

"""DeepSeek-R1's stages on sums that a small model cannot do at once, but can work out: see README.md.

    python launch/run.py --config=experiments/deepseek_r1/config.py --workdir=runs/deepseek-r1-0
    python launch/run.py --config=experiments/deepseek_r1/config.py:seed=1 --workdir=runs/deepseek-r1-1
    python launch/run.py --config=experiments/deepseek_r1/config.py:smoke
    python experiments/curves.py runs/deepseek-r1-* --into=experiments/deepseek_r1 \
        --metrics=heldout_right,heldout_form,heldout_tokens,heldout_known --picture=heldout_right

DeepSeek-AI, 2025, arXiv 2501.12948, section 2.3: few conversations that think (`cold`), GRPO on answers that are
checked (`think`), that policy's own right answers (`kept`), the base trained on them and on what else it should know
(`mix`), and GRPO again (`again`). Beside it, the same reinforcement without thoughts (`direct`, `direct-rl`).
"""

import dataclasses
import math
from typing import Any

from experiments.arithmetic import base
from experiments.arithmetic.base import policy, pretraining, rows, supervised, talks, whole
from experiments.deepseek_r1.task import Tables, length
from tpu_llm.config import parse_arg
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Conversations, Jsonl, Prompts
from tpu_llm.objectives.policy_gradient import PolicyGradient
from tpu_llm.rl.choosing import Choose
from tpu_llm.rl.rewards import Function
from tpu_llm.rl.verify import ExactMatch, Format
from tpu_llm.train.stages import Stages

RIGHT = ExactMatch(name='right', marked=True)
FORM = Format(name='form', pattern=r'\((\d\+\d(\+1)?=\d+,?)+\)####\d+', weight=0.2)
KNOWN = ExactMatch(name='known', marked=True)
TOKENS = Function(name='tokens', call=length, weight=0.0)
NEW, ASKED = 28, 10  # tokens of an answer, of a prompt


def get_config(arg: str | None = None) -> Stages:
    args = parse_arg(arg, seed=0, smoke=False)
    seed = args.seed
    measured = dataclasses.replace(
        base.answers(), rewards=(RIGHT, FORM, TOKENS), prompt_length=ASKED, max_new_tokens=NEW
    )
    general = dataclasses.replace(measured, source=Prompts(paths=base.table('heldout-general')), rewards=(KNOWN,))
    hooks = {'hooks': (general, measured)}
    once: dict[str, Any] = {'hooks': tuple(dataclasses.replace(hook, every=0) for hook in hooks['hooks'])}

    def mixed(data: Any, **sources: Any) -> Any:
        names = tuple(sources)
        data.mixture = Mixture(sources=sources, weights={0: {names[0]: 0.8, names[1]: 0.2}})
        return data

    def asked() -> Any:
        return rows(Prompts(paths=base.table('prompts')), 128, ASKED + NEW, overlong='drop')

    def reinforced(after: str, rewards: tuple[Any, ...] = (RIGHT, FORM), **fields: Any) -> Any:
        rollout = {'prompts': 16, 'group': 8, 'max_new_tokens': NEW, 'advantages': 'grpo'}
        own = {'data': asked(), 'rewards': rewards, 'steps': 80} | hooks | fields
        return policy(seed, PolicyGradient(kl=0.01), rollout, after=after, **own)

    kept = Conversations(paths=('stage:kept/answers-*.jsonl',), template='plain')
    learned = mixed(whole(None, 16), kept=kept, general=talks('general'))
    everything = mixed(asked(), sums=Prompts(paths=base.table('prompts')), general=Prompts(paths=base.table('general')))
    stages = {
        'tables': Tables(seed=seed),
        'pretrain': pretraining(seed, data=rows(Jsonl(paths=base.table('corpus')), 16), steps=500, **once),
        'cold': supervised(seed, data=whole(talks('cold'), 8), steps=80, **once),
        'think': reinforced('cold'),
        'kept': Choose(
            path='stage:think',
            source=Prompts(paths=base.table('prompts')),
            rewards=(RIGHT, FORM),
            keep='best',
            least=1.2,
            prompts=64 if args.smoke else 1024,
            answers=4,
            temperature=1.0,
            prompt_length=ASKED,
            max_new_tokens=NEW,
            template='plain',
            rows=256,
            seed=seed,
        ),
        'mix': supervised(seed, data=learned, steps=150, **once),
        'again': reinforced('mix', data=everything),
        'direct': supervised(seed, data=whole(talks('direct'), 8), steps=80, **once),
        'direct-rl': reinforced('direct', rewards=(RIGHT,)),
    }
    if args.smoke:
        # So many, that answers end, and some of them can be kept.
        steps = {'pretrain': 10, 'cold': 40, 'think': 2, 'mix': 2, 'again': 2, 'direct': 2, 'direct-rl': 2}
        for name, count in steps.items():
            stages[name].steps = count
        stages['tables'] = Tables(seed=seed, texts=2000, sums=64, heldout=8)
        stages['kept'].least = -math.inf
    return Stages(stages=stages)

"""Distillation: a small model learns what a large one, its teacher, holds likely.

    python launch/run.py --config=configs/sft.py --workdir=runs/teacher                # a teacher: it answers sums
    python launch/run.py --config=configs/distill.py:teacher=runs/teacher              # a student of half its layers
    python launch/run.py --config=configs/distill.py:smoke,teacher=runs/teacher        # tiny, of an sft.py:smoke: 20 s
    python launch/run.py --config=configs/distill.py:teacher=FOLDER,model=FOLDER,data=talks.jsonl,mesh=v6e-64
    python launch/run.py --config=configs/distill.py:kind=onpolicy,teacher=FOLDER,model=FOLDER,data=prompts.jsonl

`kind` says what the student learns (docs/post_training.md):

    forward, reverse, js   the teacher's distributions on the responses of conversations, by that divergence
    onpolicy               the same on what the student itself answers to prompts, by the Jensen-Shannon divergence
    store, stored          the teacher's 64 likeliest tokens, stored first, so that it is not there while they learn
    sequence               nothing yet: the teacher answers prompts, and the answers are data for configs/sft.py:

    python launch/run.py --config=configs/distill.py:kind=store,teacher=FOLDER,data=talks.jsonl --workdir=runs/likely
    python launch/run.py --config=configs/distill.py:kind=stored,teacher=FOLDER,data=talks.jsonl,stored=runs/likely
    python launch/run.py --config=configs/distill.py:kind=sequence,teacher=FOLDER,data=prompts.jsonl --workdir=runs/said
    python launch/run.py --config=configs/sft.py:model=FOLDER,data=runs/said/answers-*.jsonl

Teacher and student share a tokenizer, and a mesh. Without `model` the student is the teacher with every second layer
less, drawn anew; without `data` it is taught sums. The report shows `divergence` (nats a token) and, on held-out texts,
`heldout_divergence` and `heldout_nll`.
"""

import dataclasses

from configs.meshes import mesh
from tpu_llm.checkpoint.named import named
from tpu_llm.checkpoint.pretrained import TokenizerOf, open_source
from tpu_llm.checkpoint.resume import Origin
from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import ConfigError, choose, parse_arg
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Conversations, Prompts, Sums
from tpu_llm.data.taught import Taught
from tpu_llm.evals.objective import HeldOutObjective
from tpu_llm.objectives.distill import Distill, DistillStored
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.rl.held_out import HeldOutAnswers
from tpu_llm.rl.on_policy import OnPolicy
from tpu_llm.rl.verify import Numeric
from tpu_llm.rl.writing import Write
from tpu_llm.train.frozen import Reference
from tpu_llm.train.run import Run
from tpu_llm.train.teaching import Teaching

KINDS = {
    # Warm distributions say more of what is unlikely; the labels keep the student at what is right (Hinton et al.).
    'forward': Distill(temperature=2.0, labels=0.5),
    'reverse': Distill(divergence='reverse'),
    'js': Distill(divergence='jensen_shannon', beta=0.5),
    'onpolicy': Distill(divergence='jensen_shannon', beta=0.9),
    'store': None,
    'stored': DistillStored(labels=0.5),
    'sequence': None,
}


def get_config(arg: str | None = None) -> Run | Teaching | Write:
    args = parse_arg(
        arg,
        kind='forward',
        teacher='',
        model='',
        data='',
        heldout='',
        stored='',
        template='',
        mesh='auto',
        seq=1024,
        batch=32,
        new=256,
        smoke=False,
    )
    objective = choose('kind', args.kind, KINDS)
    args.teacher, args.model = named(args.teacher), named(args.model)
    if not args.teacher:
        raise ConfigError(
            'give the teacher, a folder or a run: configs/distill.py:teacher=runs/teacher, made by '
            'launch/run.py --config=configs/sft.py --workdir=runs/teacher'
        )
    if not args.data:
        args.template, args.seq, args.new = 'plain', 64, 20
    if args.kind == 'sequence':
        return _writing(args)
    if args.kind == 'store':
        return Teaching(path=args.teacher, data=_data(args, asked=False), top_k=64, mesh=mesh(args.mesh))
    if bool(args.stored) != (args.kind == 'stored'):
        raise ConfigError('kind=stored reads what kind=store wrote: give stored=FOLDER with it, and only with it')
    return _student(args, dataclasses.replace(objective))


def _source(args, *, asked: bool, held_out: bool = False):
    paths = (args.heldout if held_out else args.data,)
    if args.data:
        return Prompts(paths=paths) if asked else Conversations(paths=paths, template=args.template)
    return Sums(split='heldout' if held_out else 'train', digits=1 if args.smoke else 2, asked=asked)


def _writing(args) -> Write:
    return Write(
        path=args.teacher,
        source=_source(args, asked=True),
        prompt_length=args.seq - args.new,
        max_new_tokens=args.new,
        template=args.template,
        mesh=mesh(args.mesh),
    )


def _data(args, *, asked: bool) -> Data:
    return Data(
        mixture=Mixture(sources={'prompts' if asked else 'talks': _source(args, asked=asked)}),
        tokenizer=TokenizerOf(path=args.teacher),
        seq_len=args.seq,
        global_batch=args.batch,
        interleave=1,
        whole=True,
        overlong='drop',
        form=Taught(path=args.stored, weights=open_source(args.teacher).identity()) if args.stored else None,
    )


def _student(args, objective: Distill | DistillStored) -> Run:
    teacher = open_source(args.teacher).config
    small = dataclasses.replace(teacher, layers=max(1, teacher.layers // 2))
    model = open_source(args.model).config if args.model else small
    model.predict_ahead = 0
    model.remat = 'full'  # as in configs/sft.py: activations are most of the memory
    on_policy = args.kind == 'onpolicy'
    fields = {
        'model': model,
        'reference': None if args.stored else Reference(model=teacher, weights=args.teacher),
        'data': _data(args, asked=on_policy),
        'objective': objective,
        # What is drawn anew has all to learn, and what was trained before should not forget it.
        'optimizer': AdamW(schedule=Schedule(peak=2e-5 if args.model else 2e-3, warmup=0.03), weight_decay=0.0),
        'steps': 400,
        'origin': Origin(weights=args.model),
        'mesh': mesh(args.mesh),
        'checkpoints': Checkpoints(every=200, keep=2),
        'hooks': _hooks(args),
    }
    run = OnPolicy(**fields, max_new_tokens=args.new, template=args.template) if on_policy else Run(**fields)
    if args.smoke:
        run.steps, run.log_every, run.data.global_batch = 40, 5, 8
        run.optimizer.schedule.warmup = 5
        for hook in run.hooks:
            hook.every = 20
    return run


def _hooks(args):
    hooks = ()
    if not args.stored and (args.heldout or not args.data):  # nothing is stored of what is held out
        hooks = (HeldOutObjective(source=_source(args, asked=False, held_out=True), every=100, rows=8),)
    if not args.data:
        answers = HeldOutAnswers(
            source=_source(args, asked=True, held_out=True),
            rewards=(Numeric(),),
            every=100,
            max_new_tokens=args.new,
            template=args.template,
        )
        hooks = (*hooks, answers)
    return hooks

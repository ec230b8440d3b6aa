"""Learning from preferences: of two answers to a prompt, which one was preferred; or answers found good or bad (KTO).

    python launch/run.py --config=configs/preference.py:smoke          # sums, tiny and from scratch: under 30 s
    python launch/run.py --config=configs/preference.py:model=runs/sft-…              # sums, on from configs/sft.py
    python launch/run.py --config=configs/preference.py:model=path/to/folder,data=pairs.jsonl,heldout=more.jsonl
    python launch/run.py --config=configs/preference.py:model=path/to/folder,data=pairs.jsonl,method=simpo
    python launch/run.py --config=configs/preference.py:model=path/to/folder,data=pairs.jsonl,stored
    python launch/run.py --config=configs/preference.py:model=path/to/folder,data=pairs.jsonl,lora=16

A line of the data is `prompt`, `chosen` and `rejected`; for `method=kto` it is `prompt`, `completion` and `label`
(docs/post_training.md). The reference is the model that the run starts from. It is held beside the one that trains;
with `lora` it is that one without its adapters, and with `stored` its log-probs are computed once, before training.

`accuracy` is to rise from 0.5 and `margin` from 0. Watch `log_prob_chosen`: where it falls as fast as
`log_prob_rejected`, the model forgets what it could say; lower the learning rate or raise `--config.objective.beta`.
`smoke` prefers whole sentences to bare numbers.
"""

from configs.meshes import mesh
from tpu_llm.checkpoint.named import named
from tpu_llm.checkpoint.pretrained import TokenizerOf, open_source
from tpu_llm.checkpoint.resume import Origin
from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import ConfigError, choose, parse_arg
from tpu_llm.data.forms import Texts
from tpu_llm.data.judged_sums import JudgedSums
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Labelled, Preferences
from tpu_llm.data.tokenizer import Bytes
from tpu_llm.evals.objective import HeldOutObjective
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.objectives.kto import KTO
from tpu_llm.objectives.preference import CPO, DPO, IPO, ORPO, Hinge, RobustDPO, SimPO
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.peft.lora import LoRA
from tpu_llm.train.frozen import Reference
from tpu_llm.train.run import Run

METHODS = {'dpo': DPO, 'robust': RobustDPO, 'hinge': Hinge, 'ipo': IPO}  # with a reference
METHODS |= {'kto': KTO, 'cpo': CPO, 'simpo': SimPO, 'orpo': ORPO}
STORED = ('dpo', 'robust', 'hinge', 'ipo')


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(
        arg,
        method='dpo',
        model='',
        data='',
        heldout='',
        template='',
        lora=0,
        stored=False,
        mesh='auto',
        seq=1024,
        batch=8,
        smoke=False,
    )
    if args.data and not args.model:
        raise ConfigError('data= is learned by a model that can talk already; give model=FOLDER, or the run of an SFT')
    if args.stored and args.method not in STORED:
        raise ConfigError(
            f'method={args.method} reads no stored reference; take stored out, or use {", ".join(STORED)}'
        )

    objective = choose('method', args.method, METHODS)()
    if args.stored:
        objective.reference = 'stored'
    weights = named(args.model)

    def answers(path: str, split: str):
        if path:
            kind = Labelled if args.method == 'kto' else Preferences
            return kind(paths=(path,), template=args.template)
        return JudgedSums(
            split=split,  # type: ignore[arg-type]
            kind='labelled' if args.method == 'kto' else 'preference',
            fault='terse' if args.smoke else 'wrong',
            digits=1 if args.smoke else 2,
        )

    # Without weights a small model of bytes, as configs/sft.py trains it.
    model = DecoderConfig(
        vocab_size=259,
        width=192,
        layers=4,
        heads=4,
        kv_heads=4,
        head_dim=48,
        mlp_width=512,
        dtype='float32',
        unroll=0,
    )
    if weights:
        model = open_source(weights).config
        model.predict_ahead = 0
        model.remat = 'full'  # as in configs/sft.py: activations are most of the memory

    run = Run(
        model=model,
        data=Data(
            mixture=Mixture(sources={'answers': answers(args.data, 'train')}),
            tokenizer=TokenizerOf(path=weights) if weights else Bytes(),
            seq_len=args.seq if args.data else 256,
            global_batch=args.batch,
            interleave=1,
            whole=True,
            overlong='drop',  # a pair of which one answer were cut says nothing
            form=Texts(most=64),
        ),
        objective=objective,
        reference=Reference() if objective.needs_frozen and not args.lora else None,
        peft=LoRA(rank=args.lora, alpha=2.0 * args.lora) if args.lora else None,
        # Far below SFT's: a policy that runs far from the reference satisfies any pair. Adapters take ten times more.
        optimizer=AdamW(schedule=Schedule(peak=1e-5 if args.lora else 1e-6, warmup=0.03), weight_decay=0.0),
        epochs=1.0 if args.data else 0.0,
        steps=0 if args.data else 300,
        origin=Origin(weights=weights),
        mesh=mesh(args.mesh),
        checkpoints=Checkpoints(every=500, keep=2),
        hooks=(HeldOutObjective(source=answers(args.heldout, 'heldout'), every=50, rows=8),)
        if args.heldout or not args.data
        else (),
    )
    if not args.data:
        run.optimizer.schedule.peak = 1e-4  # of so small a model
    if args.smoke:
        model.dtype, run.epochs, run.steps, run.log_every = 'float32', 0.0, 30, 5
        if not weights:
            model.width, model.layers, model.heads, model.kv_heads, model.head_dim, model.mlp_width = (
                64,
                2,
                2,
                2,
                32,
                128,
            )
        run.data.seq_len, run.optimizer.schedule.peak, run.optimizer.schedule.warmup = 128, 1e-3, 3
        if run.hooks:
            run.hooks[0].every = 10
    return run

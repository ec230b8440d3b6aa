"""A reward model: a scalar head on a decoder learns how good an answer is.

    python launch/run.py --config=configs/reward.py:smoke            # sums, tiny and from scratch: under 30 s
    python launch/run.py --config=configs/reward.py:model=runs/sft-…                   # sums, on from configs/sft.py
    python launch/run.py --config=configs/reward.py:model=path/to/folder,data=pairs.jsonl,heldout=more.jsonl
    python launch/run.py --config=configs/reward.py:model=path/to/folder,data=scores.jsonl,kind=scores

`kind` is what a line of the data is: `pairs` (`prompt`, `chosen`, `rejected` and perhaps a `margin`), `scores`
(`prompt`, `completion`, `score`), `rankings` (`prompt`, `completions`, the best first) or `steps` (`prompt`,
`completions`, `labels`: an answer's steps, and whether each is right).

On held-out pairs `heldout_accuracy` is to rise from 0.5 and `heldout_brier`, the calibration, to fall from 0.25.
`spread` that grows without end says that the model learns pairs by heart: train less, or hold scores near 0 with
`--config.objective.centre=0.01`. `smoke` prefers whole sentences to bare numbers.
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
from tpu_llm.data.sources import Preferences, Ranked, Rated, Steps
from tpu_llm.data.tokenizer import Bytes
from tpu_llm.evals.objective import HeldOutObjective
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.scalar_head import ScalarConfig
from tpu_llm.objectives.reward_model import PairReward, RankReward, ScoreReward, StepReward
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.train.run import Run

KINDS = {
    'pairs': (PairReward, Preferences, 'preference'),
    'scores': (ScoreReward, Rated, 'rated'),
    'rankings': (RankReward, Ranked, 'ranked'),
    'steps': (StepReward, Steps, 'steps'),
}


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(
        arg, kind='pairs', model='', data='', heldout='', template='', mesh='auto', seq=1024, batch=8, smoke=False
    )
    if args.data and not args.model:
        raise ConfigError('data= is judged by a model that can read already; give model=FOLDER, or the run of an SFT')
    objective, source, kind = choose('kind', args.kind, KINDS)
    weights = named(args.model)

    def answers(path: str, split: str):
        if path:
            return source(paths=(path,), template=args.template)
        fault = 'terse' if args.smoke else 'wrong'
        return JudgedSums(split=split, kind=kind, fault=fault, digits=1 if args.smoke else 2)  # type: ignore[arg-type]

    # Without weights a small model of bytes, as configs/sft.py trains it.
    decoder = DecoderConfig(
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
        decoder = open_source(weights).config
        decoder.predict_ahead = 0
        decoder.remat = 'full'  # as in configs/sft.py: activations are most of the memory
    model = ScalarConfig.of(decoder)

    run = Run(
        model=model,
        data=Data(
            mixture=Mixture(sources={'answers': answers(args.data, 'train')}),
            tokenizer=TokenizerOf(path=weights) if weights else Bytes(),
            seq_len=args.seq if args.data else 256,
            global_batch=args.batch,
            interleave=1,
            whole=True,
            overlong='drop',  # an answer that is cut was not judged
            form=Texts(most=64),
        ),
        objective=objective(),
        # One epoch: in a second one it knows the pairs by heart (Ouyang et al., 2022, arXiv 2203.02155, C.2).
        optimizer=AdamW(schedule=Schedule(peak=1e-5, warmup=0.03), weight_decay=0.0),
        epochs=1.0 if args.data else 0.0,
        steps=0 if args.data else 1000,
        origin=Origin(weights=weights),
        mesh=mesh(args.mesh),
        checkpoints=Checkpoints(every=500, keep=2),
        hooks=(HeldOutObjective(source=answers(args.heldout, 'heldout'), every=100, rows=8),)
        if args.heldout or not args.data
        else (),
    )
    if not args.data:
        run.optimizer.schedule.peak = 1e-3  # of so small a model
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
        run.data.seq_len, run.optimizer.schedule.peak, run.optimizer.schedule.warmup = 128, 3e-3, 3
        if run.hooks:
            run.hooks[0].every = 10
    return run

"""Supervised fine-tuning: a model learns to answer from conversations, and is trained on what the assistant says only.

    python launch/run.py --config=configs/sft.py                  # sums, by a small model from scratch, in minutes
    python launch/run.py --config=configs/sft.py:smoke            # the same, tiny: under 20 s
    python launch/run.py --config=configs/sft.py:model=smollm2,data=talks.jsonl
    python launch/run.py --config=configs/sft.py:model=smollm2,data=talks.jsonl,lora=16        # adapters alone
    python launch/run.py --config=configs/sft.py:model=path/to/folder,data=gs://bucket/sft/*.jsonl,mesh=v6e-64
    python -m tpu_llm.data show --config=configs/sft.py:model=smollm2,data=talks.jsonl   # what is trained on

A line of the data is a conversation: `messages`, ShareGPT's `conversations`, `prompt` and `completion`, or
Alpaca's `instruction` and `output` (docs/post_training.md). `heldout` is more of such, which `heldout_loss` is of. The
template is the tokenizer's own; give `template=plain` to a model of plain text, or another (`chatml`, a .jinja file).
`neftune=5` adds noise to embeddings. `lora=16` trains adapters of that rank beside every map of attention and MLP; with
`held=nf4` (or int4, int8) the model below is held in as many bits (docs/peft.md). It reads the data three times,
and says so where that is few steps: for few conversations give smaller `seq` and `batch`, or a length: `steps=100`.

Instructions, dialogues and safety sets are sources of one mixture, in shares of tokens:

    mixture=Mixture(
        sources={'instruct': Conversations(paths=…), 'talk': Conversations(paths=…), 'safe': Conversations(paths=…)},
        weights={0: {'instruct': 0.6, 'talk': 0.3, 'safe': 0.1}},
    )
"""

from configs.meshes import mesh
from tpu_llm.checkpoint.named import named
from tpu_llm.checkpoint.pretrained import TokenizerOf, open_source
from tpu_llm.checkpoint.resume import Origin
from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import ConfigError, parse_arg
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Conversations, Sums
from tpu_llm.data.tokenizer import Bytes
from tpu_llm.evals.objective import HeldOutObjective
from tpu_llm.infer.hook import Samples
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.objectives.noisy import Noisy
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.peft.lora import LoRA, QLoRA
from tpu_llm.train.run import Run


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(
        arg,
        model='',
        data='',
        heldout='',
        template='',
        mesh='auto',
        seq=1024,
        batch=8,
        neftune=0.0,
        lora=0,
        steps=0,
        held='',
        smoke=False,
    )
    if bool(args.model) != bool(args.data):
        raise ConfigError('give model= and data= together, or neither: configs/sft.py:model=FOLDER,data=FILE.jsonl')
    if args.held and not args.lora:
        raise ConfigError(f'held={args.held} is of a model beside which adapters train; give their rank: lora=16')
    run = _tuned(args) if args.model else _from_scratch(args)
    if args.neftune:
        run.objective = Noisy(alpha=args.neftune)
    if args.steps:
        run.steps, run.epochs = args.steps, 0.0
    if args.lora:
        maps = ('query', 'key', 'value', 'out', 'gate', 'up', 'down')
        run.peft = LoRA(rank=args.lora, alpha=2.0 * args.lora, targets=maps)
        # Without it activations are most of the memory: 2.8 times the forward pass, and so 1.5 (benchmarks/README.md).
        run.model.remat = 'query+key+value+gate+up'
        if args.held:
            run.peft = QLoRA(rank=args.lora, alpha=2.0 * args.lora, targets=maps, base=args.held)
        # Adapters bear, and need, ten times the rate of the model itself (Hu et al., 2021, appendix D).
        run.optimizer.schedule.peak *= 10 if args.model else 1
    return run


def _tuned(args) -> Run:
    weights = named(args.model)
    model = open_source(weights).config
    model.predict_ahead = 0
    # Activations of 8 rows of 1,024 tokens would take 33 GiB for 135M parameters, so: 5 in all. 'none' is faster.
    model.remat = 'full'
    if args.smoke:
        model.dtype, args.seq, args.batch = 'float32', 128, 2

    def talks(path: str) -> Conversations:
        return Conversations(paths=(path,), template=args.template)

    run = Run(
        model=model,
        data=Data(
            mixture=Mixture(sources={'talks': talks(args.data)}),
            tokenizer=TokenizerOf(path=weights),
            seq_len=args.seq,
            global_batch=args.batch,
            interleave=1,  # conversations are short: a row holds several, and none spans two
            whole=True,
            overlong='truncate',  # behind the last response that fits; what has none is dropped, and named
        ),
        objective=NextToken(),
        optimizer=AdamW(schedule=Schedule(peak=2e-5, warmup=0.03), weight_decay=0.0),
        epochs=3.0,
        origin=Origin(weights=weights),
        mesh=mesh(args.mesh),
        checkpoints=Checkpoints(every=500, keep=2),
        hooks=(HeldOutObjective(source=talks(args.heldout), every=100, rows=8),) if args.heldout else (),
    )
    if args.smoke:
        run.epochs, run.steps, run.hooks = 0.0, 3, ()
        run.optimizer.schedule.warmup = 1
    return run


def _from_scratch(args) -> Run:
    # Bytes for tokens, the quickstart's shape: it learns to add up numbers of two digits.
    run = Run(
        model=DecoderConfig(
            vocab_size=259,
            width=192,
            layers=4,
            heads=4,
            kv_heads=4,
            head_dim=48,
            mlp_width=512,
            dtype='float32',
            unroll=0,
        ),
        data=Data(
            mixture=Mixture(sources={'sums': Sums(split='train')}),
            tokenizer=Bytes(),
            seq_len=256,
            global_batch=8,
            interleave=1,
            whole=True,
            overlong='drop',
        ),
        objective=NextToken(),
        optimizer=AdamW(schedule=Schedule(peak=2e-3, warmup=40), weight_decay=0.1),
        steps=1000,
        mesh=mesh(args.mesh),
        checkpoints=Checkpoints(every=500, keep=2),
        hooks=(
            HeldOutObjective(source=Sums(split='heldout'), every=100, rows=8),
            Samples(prompts=('12 + 34 = ?\n', '75 + 89 = ?\n'), max_new_tokens=16, temperature=0.0),
        ),
    )
    if args.smoke:
        model = run.model
        model.width, model.layers, model.heads, model.kv_heads, model.head_dim, model.mlp_width = 64, 2, 2, 2, 32, 128
        run.data.mixture = Mixture(sources={'sums': Sums(split='train', digits=1)})
        run.data.seq_len, run.steps, run.log_every = 128, 40, 5
        run.optimizer.schedule.peak, run.optimizer.schedule.warmup = 4e-3, 5
        run.hooks = (
            HeldOutObjective(source=Sums(split='heldout', digits=1), every=10, rows=8),
            Samples(prompts=('1 + 2 = ?\n',), max_new_tokens=12, temperature=0.0),
        )
    return run

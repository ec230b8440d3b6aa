"""Training on from published weights: a Hugging Face folder, a GGUF file, or a run of your own.

    python launch/run.py --config=configs/finetune.py:model=path/to/folder,data=/data/*.jsonl
    python launch/run.py --config=configs/finetune.py:model=path/to/file.gguf,data=/data/*.jsonl
    python launch/run.py --config=configs/finetune.py:model=path/to/folder,mesh=v6e-64,data=gs://bucket/text/*.jsonl

The model, its tokenizer and its marks are those of the folder or the file, whose blocks of few bits become float32
again. `seq` is the length of rows and `batch` how many there are. Without `data` it reads the standard library's
sources. To reach longer texts, give it another rope: `--config.model.rope_theta=…`. `smoke` is 3 short steps.
"""

from configs.meshes import mesh
from tpu_llm.checkpoint.named import named
from tpu_llm.checkpoint.pretrained import TokenizerOf, open_source
from tpu_llm.checkpoint.resume import Origin
from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import ConfigError, parse_arg
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Jsonl, Stdlib
from tpu_llm.evals.perplexity import HeldOut
from tpu_llm.infer.hook import Samples
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.train.run import Run


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(arg, model='', data='', heldout='', mesh='auto', seq=1024, batch=8, smoke=False)
    args.model = named(args.model)
    if not args.model:
        raise ConfigError('give the weights, a folder or a .gguf file: configs/finetune.py:model=path/to/folder')

    # Model: as the weights say. Parameters are float32 whatever they were saved in.
    model = open_source(args.model).config
    model.predict_ahead = 0  # layers for further tokens, which DeepSeek-V3 has, would need objectives.ahead
    model.remat = 'full'  # as in configs/sft.py: activations are most of the memory
    if args.smoke:
        model.dtype, args.seq, args.batch = 'float32', 64, 2

    source = Jsonl(paths=(args.data,)) if args.data else Stdlib(split='train')
    data = Data(
        mixture=Mixture(sources={'text': source}),
        tokenizer=TokenizerOf(path=args.model),
        seq_len=args.seq,
        global_batch=args.batch,
    )
    heldout = Jsonl(paths=(args.heldout,)) if args.heldout else None if args.data else Stdlib(split='heldout')
    scores = (HeldOut(source=heldout, every=200, documents=8, rows=8),) if heldout else ()

    run = Run(
        model=model,
        data=data,
        objective=NextToken(),
        # A tenth of what the model was trained with, or less: what it knows is to stay.
        optimizer=AdamW(schedule=Schedule(peak=2e-5, warmup=20), weight_decay=0.0),
        steps=1000,
        origin=Origin(weights=args.model),
        mesh=mesh(args.mesh),
        checkpoints=Checkpoints(every=500, keep=2),
        hooks=(*scores, Samples(prompts=('The ', 'def '), every=500)),
    )
    if args.smoke:
        run.steps, run.hooks = 3, ()
        run.optimizer.schedule.warmup = 1
    return run

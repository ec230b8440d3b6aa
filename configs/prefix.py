"""The quickstart as a prefix language model: a random beginning of each text is given, and read in both directions.

    python launch/run.py --config=configs/prefix.py          # under 4 minutes on 2 cores
    python launch/run.py --config=configs/prefix.py:smoke    # the same, tiny: under 20 s

It logs `heldout_loss`, nats a token of what follows such beginnings of documents that are never trained on.
"""

from configs import quickstart
from tpu_llm.config import parse_arg
from tpu_llm.data.corrupted import Prefix
from tpu_llm.data.sources import Stdlib
from tpu_llm.data.tokenizer import TrainedBPE
from tpu_llm.evals.objective import HeldOutObjective
from tpu_llm.objectives.prefix import PrefixLM
from tpu_llm.train.run import Run


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(arg, smoke=False)
    run = quickstart.get_config(arg)
    run.data.form, run.objective = Prefix(), PrefixLM()
    run.hooks = (HeldOutObjective(source=Stdlib(split='heldout'), every=200, documents=8),)
    if args.smoke:
        run.data.tokenizer = TrainedBPE(vocab_size=512, sample_bytes=1_000_000)
        run.data.seq_len, run.data.cache, run.model.vocab_size = 128, '', 512
        run.steps, run.log_every = 40, 5
        run.hooks = (HeldOutObjective(source=Stdlib(split='heldout'), every=10, documents=4),)
    return run

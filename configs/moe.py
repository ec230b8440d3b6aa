"""The quickstart with a mixture of experts: in each layer eight, of which a token takes two, and two that all share.

    python launch/run.py --config=configs/moe.py          # about 6 minutes on 2 cores
    python launch/run.py --config=configs/moe.py:smoke    # the same, tiny

A token costs what it does in the quickstart: its four experts are together as wide as that MLP. The model has 1.5 times
the parameters (5.1 million, 3.4 of them active) and ends level with it, at 1.551 held-out bits per byte to 1.550: a
million tokens are too few for more parameters to help. The report shows how the load spreads over the experts.
"""

from configs import quickstart
from tpu_llm.config import parse_arg
from tpu_llm.nn.moe import MoE
from tpu_llm.nn.router import Router
from tpu_llm.train.run import Run


def get_config(arg: str | None = None) -> Run:
    args = parse_arg(arg, smoke=False)

    # Data, optimizer, schedule, evaluation, samples: the quickstart's.
    run = quickstart.get_config('smoke' if args.smoke else None)

    # Dropless: no choice is lost, and what a token gets depends on nothing but itself. Shared experts see every token:
    # in a run this short the others, who see a quarter of them, learn too little alone (1.62 bits per byte).
    run.model.moe = MoE(
        experts=8,
        chosen=2,
        shared=2,
        expert_width=run.model.mlp_width // 4,
        router=Router(choice='topk_then_softmax', balance_loss=0.01, z_loss=1e-3),
    )
    return run

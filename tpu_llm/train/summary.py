"""`summary.json`: where a run ended, from the files of all its starts."""

import json

from tpu_llm.models.flops_encoder import active_parameters
from tpu_llm.train.ledger import load, summarize
from tpu_llm.train.metrics import read
from tpu_llm.train.session import Session

SUMMARY = 'summary.json'


def write_summary(session: Session) -> None:
    """The last value of every metric, the parameters, and the seconds of all starts."""
    latest = {name: value for line in read(session.workdir / 'metrics.jsonl') for name, value in line.items()}
    counts = {'parameters': session.graph.count(), 'active_parameters': active_parameters(session.run.model)}
    # Of a held-out set of which the hooks score a part, the whole is what counts (`evals/perplexity.py`).
    whole = {name.removesuffix('_all'): latest.pop(name) for name in [*latest] if name.endswith('_all')}
    summary = {**counts, 'seconds': summarize(load(session.workdir)).wall, **latest, **whole}
    (session.workdir / SUMMARY).write_text(json.dumps(summary, indent=1))


def withdraw_summary(session: Session) -> None:
    """A run that goes on has not ended."""
    (session.workdir / SUMMARY).unlink(missing_ok=True)

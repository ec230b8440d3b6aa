"""The kinds of source there are, for config pages; your own is any config with `open() -> Documents`."""

from tpu_llm.data.columns import ArrayRecord, Parquet
from tpu_llm.data.conversations import Conversations, Labelled, Preferences, Ranked, Rated, Steps
from tpu_llm.data.files import Jsonl, Text
from tpu_llm.data.prompts import Prompts
from tpu_llm.data.stdlib import Stdlib
from tpu_llm.data.sums import Sums
from tpu_llm.data.tokens import Tokens

__all__ = [
    'ArrayRecord',
    'Conversations',
    'Jsonl',
    'Labelled',
    'Parquet',
    'Preferences',
    'Prompts',
    'Ranked',
    'Rated',
    'Stdlib',
    'Steps',
    'Sums',
    'Text',
    'Tokens',
]

"""The kinds of source a mixture may hold; each is a config with `open() -> Documents`."""

from tpu_llm.data.columns import ArrayRecord, Parquet
from tpu_llm.data.files import Jsonl, Text
from tpu_llm.data.stdlib import Stdlib
from tpu_llm.data.tokens import Tokens

Source = Stdlib | Text | Jsonl | Parquet | ArrayRecord | Tokens
__all__ = ['ArrayRecord', 'Jsonl', 'Parquet', 'Source', 'Stdlib', 'Text', 'Tokens']

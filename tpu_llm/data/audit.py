"""What is in a batch: which part of which document fills each row of the batch of a step."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from tpu_llm.data.documents import Documents
from tpu_llm.data.examples import count_pairs
from tpu_llm.data.loader import Data, Loader, open_documents, open_tokenizer
from tpu_llm.data.packing import Piece


def audit(data: Data, *, seed: int, step: int, workdir: str) -> Table:
    """A table of the pieces of every row, for a person to read. Raises ConfigError."""
    tokenizer = open_tokenizer(data, workdir)
    docs = open_documents(data, tokenizer, workdir)
    rows = Loader(data, docs, tokenizer, seed=seed).describe(step)
    table = Table('row', 'segment', 'source', 'document', 'positions', 'of', box=box.SIMPLE_HEAD)
    for lane, row in enumerate(rows):
        for segment, piece in enumerate(row, 1):
            table.add_row(str(lane), str(segment), *_describe(piece, list(data.mixture.sources), docs))
    return table


def _describe(piece: Piece, names: Sequence[str], docs: Sequence[Documents]) -> tuple[str, ...]:
    name = docs[piece.source].name(piece.document)
    return names[piece.source], name, f'{piece.start}–{piece.stop - 1}', str(count_pairs(piece.ids))

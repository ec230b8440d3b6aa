"""Held-out documents, each exactly once, and what gzip makes of the same bytes.

Bits per byte = summed −log2 p over all targets, divided by the bytes of the documents. Every document's first token and
its end mark are among the targets, so the sum is the length of a code from which the documents can be
told apart and restored; gzip gets their plain concatenation, without the borders.
"""

import functools
import gzip
import itertools
from collections.abc import Iterator

from tpu_llm.arrays import Batch
from tpu_llm.data.documents import Document, Documents, tokens_of
from tpu_llm.data.packing import fill, frame, rows
from tpu_llm.data.streams import in_order
from tpu_llm.data.tokenizer import Tokenizer


def held_out(docs: Documents, tokenizer: Tokenizer, batch: int, seq_len: int) -> tuple[Iterator[Batch], int]:
    """Batches of `batch` rows of `seq_len` positions in the order of the documents, and the documents' bytes.

    The last batch is padded (segment 0, weight 0). The iterator is lazy; call again to read again.
    """
    framed = (
        frame(tokens_of(document, tokenizer, functools.partial(docs.name, i)), tokenizer)
        for i, document in in_order(docs)
    )
    packed = rows(framed, seq_len)
    groups = iter(lambda: list(itertools.islice(packed, batch)), [])
    batches = (fill(group, batch, seq_len, tokenizer.pad) for group in groups)
    return batches, sum(len(_bytes(document, tokenizer)) for _, document in in_order(docs))


def gzip_bits_per_byte(docs: Documents, tokenizer: Tokenizer) -> float:
    """`gzip -9` of the concatenation of the documents, in bits per byte."""
    raw = b''.join(_bytes(document, tokenizer) for _, document in in_order(docs))
    return 8 * len(gzip.compress(raw, 9, mtime=0)) / len(raw)


def _bytes(document: Document, tokenizer: Tokenizer) -> bytes:
    if document.text is not None:
        return document.text.encode()
    assert document.tokens is not None
    return tokenizer.decode_bytes(document.tokens.tolist())

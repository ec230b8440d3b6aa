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
from tpu_llm.config import ConfigError
from tpu_llm.data import forms
from tpu_llm.data.documents import Document, Documents, tokens_of
from tpu_llm.data.loader import Data
from tpu_llm.data.packing import fill, frame, rows, whole_rows
from tpu_llm.data.streams import Stream, in_order
from tpu_llm.data.tokenizer import Tokenizer


def held_out(docs: Documents, tokenizer: Tokenizer, batch: int, seq_len: int) -> tuple[Iterator[Batch], int]:
    """Batches of `batch` rows of `seq_len` positions in the order of the documents, and the documents' bytes.

    The last batch is padded (segment 0, weight 0). The iterator is lazy; call again to read again. Raises ConfigError
    where the documents hold no text, or are examples.
    """
    if docs.kind != 'text':
        raise ConfigError(f'the held-out source is of {docs.kind} examples, not of text; use HeldOutObjective')
    framed = (
        frame(tokens_of(document, tokenizer, functools.partial(docs.name, i)), tokenizer)
        for i, document in in_order(docs)
    )
    packed = rows(framed, seq_len)
    groups = iter(lambda: list(itertools.islice(packed, batch)), [])
    batches = (fill(group, batch, seq_len, tokenizer.pad) for group in groups)
    size = sum(len(_bytes(document, tokenizer)) for _, document in in_order(docs))
    if not size:
        raise ConfigError(f'there is no text in the {len(docs)} held-out documents; check their paths and field')
    return batches, size


def held_out_rows(data: Data, docs: Documents, tokenizer: Tokenizer, batch: int) -> Iterator[Batch]:
    """Batches of `batch` rows of the documents in order, packed and formed as a run's are; each time in the same way.

    Raises ConfigError for examples that do not go with the rows.
    """
    data.check_kind('held out', docs)
    source = Stream('held out', docs.encoded(tokenizer), tokenizer, 0)
    overlong = data.overlong if data.whole else 'split'
    found = (source.fitting(i, data.seq_len, overlong, data.most_texts) for i in range(len(docs)))
    documents = (ids for ids in found if ids is not None)
    packed = whole_rows(documents, data.seq_len, data.most_texts) if data.whole else rows(documents, data.seq_len)
    write = data.form and data.form.make(tokenizer, data.seq_len)
    for number in itertools.count():
        group = list(itertools.islice(packed, batch))
        if not group:
            return
        if data.form is None or write is None:
            yield fill(group, batch, data.seq_len, tokenizer.pad)
            continue
        generators = [forms.generator('held out', number, row) for row in range(batch)]
        group += [[] for _ in range(batch - len(group))]
        yield forms.fill(
            data.form, write, group, data.seq_len, generators, lambda piece, drawing: source.another(piece.ids, drawing)
        )


def gzip_bits_per_byte(docs: Documents, tokenizer: Tokenizer) -> float:
    """`gzip -9` of the concatenation of the documents, in bits per byte."""
    raw = b''.join(_bytes(document, tokenizer) for _, document in in_order(docs))
    return 8 * len(gzip.compress(raw, 9, mtime=0)) / len(raw)


def _bytes(document: Document, tokenizer: Tokenizer) -> bytes:
    if document.text is not None:
        return document.text.encode()
    assert document.tokens is not None
    return tokenizer.decode_bytes(document.tokens.tolist())

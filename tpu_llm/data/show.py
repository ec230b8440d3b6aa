"""What a run trains on, for a person to see: rows of a batch with their texts, and which of it counts in the loss."""

from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Console
from rich.text import Text

from tpu_llm.arrays import Batch, MaskedBatch, ScoredBatch, SourceBatch
from tpu_llm.data.documents import Documents
from tpu_llm.data.examples import count_texts
from tpu_llm.data.loader import Data, Loader, open_documents, open_tokenizer
from tpu_llm.data.packing import Piece
from tpu_llm.data.tokenizer import Tokenizer

_READ, _TRAINED = 'dim', 'green'
_MARK = 'reverse'  # of special tokens, besides
_OPEN, _CLOSE = '⟦⟧'  # around what is trained on, where there are no colours


def show(data: Data, console: Console, *, seed: int, step: int, rows: int, workdir: str) -> None:
    """Prints the first rows of the batch of a step. Raises ConfigError."""
    tokenizer = open_tokenizer(data, workdir)
    docs = open_documents(data, tokenizer, workdir)
    loader = Loader(data, docs, tokenizer, seed=seed, owned=range(min(rows, data.global_batch)))
    batch, pieces = loader.batch(step), loader.describe(step)
    colours = console.is_terminal and not console.no_color
    console.print(_legend(colours), soft_wrap=True)
    names = list(data.mixture.sources)
    for row, of in enumerate(pieces):
        for segment in range(1, int(np.max(batch.segments[row])) + 1):
            console.print()
            console.print(_heading(batch, row, segment, _name(of, segment, batch, names, docs)), soft_wrap=True)
            console.print(_segment(batch, row, segment, tokenizer, colours), soft_wrap=True)
    console.print()
    console.print(_counts(batch), soft_wrap=True)


def _legend(colours: bool) -> Text:
    legend = Text()
    legend.append('trained on', _TRAINED) if colours else legend.append(f'{_OPEN}trained on{_CLOSE}')
    legend.append('  read only', _READ)
    legend.append('  ')
    legend.append('<special token>', _MARK)
    return legend.append('  ⏎ line feed')


def _name(of: Sequence[Piece], segment: int, batch: Batch, names: Sequence[str], docs: Sequence[Documents]) -> str:
    """Of the document of a segment; '' where a form leaves pieces out, so that they cannot be counted."""
    segments = [piece for piece in of for _ in range(count_texts(piece.ids))]
    if isinstance(batch, (MaskedBatch, SourceBatch)) or segment > len(segments):
        return ''
    piece = segments[segment - 1]
    return f'{names[piece.source]}: {docs[piece.source].name(piece.document)}'


def _heading(batch: Batch, row: int, segment: int, name: str) -> Text:
    here = np.asarray(batch.segments[row]) == segment
    said = [f'row {row}', f'segment {segment}', *([name] if name else [])]
    if isinstance(batch, ScoredBatch):
        values = batch.values[row][here & (np.asarray(batch.marks[row]) > 0)]
        said += [f'example {batch.examples[row][here][0]}', 'value ' + ', '.join(f'{value:g}' for value in values)]
    trained = int((np.asarray(batch.weights[row])[here] > 0).sum())
    return Text(' · '.join([*said, f'{trained} of {int(here.sum())} targets trained on']), 'bold')


def _segment(batch: Batch, row: int, segment: int, tokenizer: Tokenizer, colours: bool) -> Text:
    """The text of a segment: what it begins with, then its targets."""
    here = np.asarray(batch.segments[row]) == segment
    targets, weights = np.asarray(batch.targets[row])[here], np.asarray(batch.weights[row])[here] > 0
    text, open_ = Text(), False
    if isinstance(batch, SourceBatch):
        source = np.asarray(batch.source[row])[np.asarray(batch.source_segments[row]) == segment]
        for part, mark in _parts(source, tokenizer):
            text.append(part, f'{_READ} {_MARK}' if mark else _READ)
        text.append(' ⟶ ')
    if not isinstance(batch, MaskedBatch):  # whose targets are its tokens
        targets = np.concatenate([np.asarray(batch.tokens[row])[here][:1], targets])
        weights = np.concatenate([[False], weights])
    for (part, mark), trained in zip(_parts(targets, tokenizer), weights, strict=True):
        if not colours and trained != open_:
            text.append(_OPEN if trained else _CLOSE)
        open_ = bool(trained)
        style = _TRAINED if trained else _READ
        text.append(part, f'{style} {_MARK}' if mark else style)
    if open_ and not colours:
        text.append(_CLOSE)
    if text.plain.endswith('\n'):  # printing adds one
        text.right_crop(1)
    return text


def _parts(ids: np.ndarray, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Of each id, the characters that it completes, or the name of a special token and true."""
    names = {tokenizer.bos: '<bos>', tokenizer.eos: '<eos>', tokenizer.pad: '<pad>'}
    names |= {index: name for name, index in tokenizer.special_tokens.items()}
    stream = tokenizer.stream()
    for index in ids.tolist():
        if index in names or index >= tokenizer.vocab_size:
            yield names.get(index, f'<{index}>'), True
            stream = tokenizer.stream()
        else:
            yield stream.add(index).replace('\n', '⏎\n'), False


def _counts(batch: Batch) -> str:
    size = batch.segments.size
    padding = int((np.asarray(batch.segments) == 0).sum())
    trained = int((np.asarray(batch.weights) > 0).sum())
    counts = {'trained on': trained, 'read only': size - padding - trained, 'padding': padding}
    shares = [f'{name} {count:,} ({count / size:.1%})' for name, count in counts.items()]
    return f'{size:,} positions: ' + ', '.join(shares)

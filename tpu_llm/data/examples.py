"""Examples of post-training as arrays: what is read, what is trained on, and how each text of an example was judged.

An example is one text, or several that are compared: of a preference the chosen one, then the rejected one, of a
ranking the best first. It is one array of `PAIR`, a row for each pair of input and target, its texts one after another.
"""

import numpy as np

PAIR = np.dtype(
    [
        ('token', np.int32),
        ('target', np.int32),
        ('weight', np.float32),  # 1 where the target is part of a response that is trained on, else 0
        ('text', np.int32),  # 0, 1, … within the example
        ('position', np.int32),  # restarts with each text
        ('value', np.float32),  # the text's label (1 or -1), score or margin; of process rewards see `mark`
        ('mark', np.float32),  # 1 where the value counts: at a text's last pair, of process rewards at each step's last
        ('reference', np.float32),  # log p of the target under a frozen model, where that was computed before; else 0
    ]
)


def text_pairs(ids: np.ndarray, trained: np.ndarray, *, text: int = 0, value: float = 0.0) -> np.ndarray:
    """The n - 1 pairs of a text of n ids, of which those where `trained` (bool [n]) are targets that count."""
    pairs = np.zeros(max(len(ids) - 1, 0), PAIR)
    pairs['token'], pairs['target'], pairs['weight'] = ids[:-1], ids[1:], trained[1:]
    pairs['text'], pairs['position'], pairs['value'] = text, np.arange(len(pairs)), value
    pairs['mark'][-1:] = 1.0
    return pairs


def with_steps(pairs: np.ndarray, ends: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The pairs of one text with a value at each step's end: `ends` are the pairs whose input is its last token."""
    pairs = pairs.copy()
    pairs['value'], pairs['mark'] = 0.0, 0.0
    pairs['value'][ends], pairs['mark'][ends] = values, 1.0
    return pairs


def as_pairs(document: np.ndarray) -> np.ndarray:
    """An example as it is; framed ids as a text of which everything is trained on."""
    return document if document.dtype == PAIR else text_pairs(document, np.ones(len(document), bool))


def count_pairs(document: np.ndarray) -> int:
    """How many positions of a row an example, or framed ids, take."""
    return len(document) if document.dtype == PAIR else len(document) - 1


def count_texts(document: np.ndarray) -> int:
    """How many segments of a row an example, or framed ids, take."""
    return int(document['text'][-1]) + 1 if document.dtype == PAIR else 1


def cut(pairs: np.ndarray, length: int) -> np.ndarray | None:
    """The beginning of a conversation, cut behind the last response that fits whole in `length` pairs; None if none."""
    trained = pairs['weight'] > 0
    ends = 1 + np.flatnonzero(trained & ~np.append(trained[1:], False))
    ends = ends[ends <= length]
    if not len(ends):
        return None
    kept = pairs[: ends[-1]].copy()
    kept['mark'][-1] = 1.0
    return kept

"""How near a text comes to what was wanted: equal, in number, in words (F1, ROUGE) or in n-grams (BLEU, chrF).

Each metric takes what was said in each row and all that was wanted there, of which any will do, and gives what rows
add to its sums (`measures`). BLEU and chrF are sacrebleu's, of a whole corpus; ROUGE is Google's rouge-score.
"""

import collections
import dataclasses
import functools
import importlib.util
import re
import string
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from tpu_llm.arrays import Float
from tpu_llm.config import ConfigError
from tpu_llm.evals import answers

Ignore = Literal['case', 'space', 'punctuation', 'articles']
Wanted = Sequence[Sequence[str]]  # of each row


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Leniency:
    """What may differ between two answers that are the same."""

    ignore: tuple[Ignore, ...] = ()
    relative: float = 0.0  # of numbers: max(absolute, relative * |wanted|) may be between them
    absolute: float = 0.0

    def plain(self, text: str) -> str:
        """The text in Unicode's form NFC, without what is ignored and white space at its ends."""
        text = unicodedata.normalize('NFC', text)
        if 'case' in self.ignore:
            text = text.casefold()
        if 'punctuation' in self.ignore:
            text = text.translate(dict.fromkeys(map(ord, string.punctuation)))
        if 'articles' in self.ignore:
            text = re.sub(r'\b(?:a|an|the)\b', ' ', text, flags=re.IGNORECASE)
        return ' '.join(text.split()) if 'space' in self.ignore else text.strip()


# -------------------------------------------------------------------------------------- of a row: a value in [0, 1]


def exact(said: str, wanted: str, leniency: Leniency) -> float:
    """Whether they are equal, letter by letter but for what is ignored. What is said may mark its answer by \\boxed{}
    or ####, and then that is compared.
    """
    mark = answers.marked(said)
    return float(leniency.plain(said if mark is None else mark) == leniency.plain(wanted))


def numeric(said: str, wanted: str, leniency: Leniency) -> float:
    """Whether the last number, or the one that is marked, is the wanted one, in whatever unit."""
    mark = answers.marked(said)
    quantity, other = answers.last_quantity(said if mark is None else mark), quantity_of(wanted)
    if quantity is None:
        return 0.0
    return float(answers.equal(quantity, other, relative=leniency.relative, absolute=leniency.absolute))


def quantity_of(wanted: str) -> answers.Quantity:
    """Raises ValueError where there is no number in it."""
    found = answers.last_quantity(answers.marked(wanted) or wanted)
    if found is None:
        raise ValueError(f"field 'answer' is {wanted!r}, which holds no number for the metric 'numeric'")
    return found


def f1(said: str, wanted: str, leniency: Leniency) -> float:
    """The harmonic mean of precision and recall of words, as in SQuAD (Rajpurkar et al., 2016, arXiv 1606.05250)."""
    ours, theirs = (collections.Counter(leniency.plain(text).split()) for text in (said, wanted))
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((ours & theirs).values())
    return 2 * shared / (sum(ours.values()) + sum(theirs.values()))


def rouge(kind: str, said: str, wanted: str, leniency: Leniency) -> float:
    """The F-measure of rouge1, rouge2 or rougeL (Lin, 2004). Its words are runs of a–z and 0–9, in lower case."""
    del leniency
    return _rouge(kind).score(wanted, said)[kind].fmeasure


@functools.cache
def _rouge(kind: str) -> Any:
    _needs('rouge_score')
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer([kind], use_stemmer=False)


OF_ROWS = {
    'exact': exact,
    'numeric': numeric,
    'f1': f1,
    'rouge1': functools.partial(rouge, 'rouge1'),
    'rouge2': functools.partial(rouge, 'rouge2'),
    'rougeL': functools.partial(rouge, 'rougeL'),
}


# --------------------------------------------------------------------------------------------- of a corpus: 0 to 100


def corpus_statistics(name: str, said: Sequence[str], wanted: Wanted) -> Float[np.ndarray, 'R K']:
    """What each row adds to the counts of BLEU or chrF."""
    most = max(map(len, wanted))
    references = [[row[at] if at < len(row) else None for row in wanted] for at in range(most)]
    return np.asarray(_corpus(name)._extract_corpus_statistics(said, references), np.float64)


def bleu(sums: Float[np.ndarray, '*draws K']) -> np.ndarray:
    return _scores('bleu', sums)


def chrf(sums: Float[np.ndarray, '*draws K']) -> np.ndarray:
    return _scores('chrf', sums)


def _scores(name: str, sums: np.ndarray) -> np.ndarray:
    metric = _corpus(name)
    flat = sums.reshape(-1, sums.shape[-1])
    scores = [metric._compute_score_from_stats(row.astype(int).tolist()).score for row in flat]
    return np.asarray(scores).reshape(sums.shape[:-1])


@functools.cache
def _corpus(name: str) -> Any:
    _needs('sacrebleu')
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # force: no warning about full stops that stand apart.
    return BLEU(force=True) if name == 'bleu' else CHRF()


OF_CORPORA = ('bleu', 'chrf')
METRICS = (*OF_ROWS, *OF_CORPORA)


def check(metrics: Sequence[str]) -> None:
    """Raises ConfigError where a package that one of them needs is not there."""
    for name in metrics:
        if name in OF_CORPORA:
            _corpus(name)
        elif name.startswith('rouge'):
            _rouge(name)


def _needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"BLEU, chrF and ROUGE need {package}, which is not there: pip install -e '.[metrics]'")

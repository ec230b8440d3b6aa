"""What a run reads, and the loader that hands it out as batches.

A loader owns some lanes. It yields `(batch, table)`, where the table is the state of its lanes after that batch,
and goes on from any such table. Reading, tokenizing and packing run in a thread (`workers=0`) or in that many
processes; neither the number of workers nor that of hosts changes a byte.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from etils import epath

from tpu_llm.arrays import Batch
from tpu_llm.config import ConfigError, machine
from tpu_llm.data import cache, forms, lanes, packing, pipeline
from tpu_llm.data.conversations import ChatSource
from tpu_llm.data.corrupted import UL2, Masks, Prefix, Spans
from tpu_llm.data.documents import Documents, is_remote
from tpu_llm.data.forms import Tasks, Texts
from tpu_llm.data.lanes import Table
from tpu_llm.data.mixture import Mixture, most_behind
from tpu_llm.data.packing import Piece
from tpu_llm.data.streams import Overlong, Stream, shuffled
from tpu_llm.data.taught import Taught
from tpu_llm.data.tokenizer import Bytes, Ids, Pretrained, Tokenizer, TrainedBPE


@dataclasses.dataclass(kw_only=True, slots=True)
class Data:
    """What a run reads and how it is packed."""

    mixture: Mixture
    tokenizer: TrainedBPE | Pretrained | Bytes | Ids
    global_batch: int  # rows of a batch, over all hosts
    seq_len: int  # positions of a row
    interleave: int = 8  # documents open at once in each row's place, read in turn
    overlong: Overlong = 'split'  # what becomes of documents longer than a row
    whole: bool = False  # no document is divided over rows: for conversations and other examples
    form: Masks | Spans | UL2 | Prefix | Texts | Tasks | Taught | None = (
        None  # what packed rows become; None: next tokens
    )
    cache: str = machine('')  # folder for tokenized sources, in the workdir unless absolute; '' tokenizes on the fly
    workers: int = machine(0)  # processes that read and tokenize; 0 is a thread of this one
    prefetch: int = machine(2)  # batches made ahead

    def validate(self) -> None:
        for name in ('global_batch', 'seq_len', 'interleave', 'prefetch'):
            if getattr(self, name) < 1:
                raise ConfigError(f'{name} is {getattr(self, name)}; it is at least 1')
        if self.workers < 0:
            raise ConfigError(f'workers is {self.workers}; it is 0 for a thread, or a number of processes')
        if self.whole and self.overlong == 'split':
            raise ConfigError("whole = True divides no document; set overlong to 'drop', 'truncate' or 'stop'")
        if isinstance(self.form, (Texts, Tasks)) and not self.whole:
            raise ConfigError(f'form = {type(self.form).__name__} is of whole texts; set whole = True')
        if isinstance(self.form, Taught) and not (self.whole and self.overlong in ('drop', 'stop')):
            raise ConfigError(
                "form = Taught is of documents as a teacher read them; set whole = True, overlong = 'drop'"
            )

    @property
    def most_texts(self) -> int:
        """Texts that a row may hold; 0 for any number."""
        return self.form.most if isinstance(self.form, (Texts, Tasks)) else 0

    def plan(self, seed: int) -> lanes.Plan:
        return lanes.Plan(
            self.mixture,
            seed,
            self.global_batch,
            self.interleave,
            self.seq_len,
            self.overlong,
            whole=self.whole,
            most_texts=self.most_texts,
        )

    def check_kind(self, name: str, docs: Documents) -> None:
        """Raises ConfigError for examples that rows of this kind would not train on as they are meant."""
        if docs.kind == 'text':
            return
        if docs.kind == 'prompt':
            raise ConfigError(f'source {name!r} is of prompts, which a policy answers: they are for rl.Run')
        if not self.whole:
            raise ConfigError(
                f'source {name!r} is of {docs.kind} examples, which are not divided; set data.whole = True'
            )
        if (self.form is None or isinstance(self.form, (Tasks, Taught))) and docs.kind != 'conversation':
            raise ConfigError(
                f'source {name!r} is of {docs.kind} examples, whose texts are not all to be imitated; set data.form = '
                'Texts() and an objective that reads it'
            )
        if self.form is not None and not isinstance(self.form, (Texts, Tasks, Taught)):
            raise ConfigError(
                f'source {name!r} is of {docs.kind} examples, and data.form = {type(self.form).__name__} is for text; '
                'take one of them out'
            )


def open_tokenizer(data: Data, workdir: epath.PathLike) -> Tokenizer:
    """The tokenizer of a run; one that must be trained learns from the mixture's first stage, in its proportions.

    It has the chat template of the mixture's conversations. Raises ConfigError where they have several.
    """
    made = data.tokenizer.make(_texts(data.mixture), workdir)
    chats = {name: source for name, source in data.mixture.sources.items() if isinstance(source, ChatSource)}
    taught = {name: tokenizer for name, source in chats.items() if (tokenizer := source.taught(made)) is not None}
    first = next(iter(taught), '')
    for name, tokenizer in taught.items():
        if tokenizer.chat_template != taught[first].chat_template:
            raise ConfigError(f'sources {first!r} and {name!r} have different templates; a model has one')
    return taught[first] if taught else made


def _texts(mixture: Mixture) -> Iterator[str]:
    _, weights = mixture.stages()[0]
    readers = [shuffled(_not_empty(name, docs)) for name, docs in opened(mixture).items()]
    taken = [0] * len(readers)
    while any(weights):
        source = most_behind(taken, weights)
        text = next((d.text for d in readers[source] if d.text), None)
        if text is None:
            weights[source] = 0.0  # all read
        else:
            taken[source] += len(text)
            yield text


def cache_folder(data: Data, workdir: epath.PathLike) -> Path:
    """Where what is made of sources is kept: on this machine, since it is read by mapping it into memory."""
    folder = epath.Path(workdir) / (data.cache or 'cache')
    return Path(tempfile.gettempdir()) / 'tpu_llm-cache' if is_remote(folder) else Path(folder)


def open_documents(data: Data, tokenizer: Tokenizer, workdir: epath.PathLike) -> list[Documents]:
    """The mixture's sources in order, text through the cache if there is one, examples ready to be packed.

    Raises ConfigError on an empty source, and on one whose examples do not go with the rows.
    """
    folder = cache_folder(data, workdir)
    if isinstance(data.form, Taught):
        data.form.check(tokenizer)
    found = []
    for name, docs in opened(data.mixture).items():
        data.check_kind(name, docs)
        docs = docs.encoded(tokenizer)
        if data.cache and docs.kind == 'text' and not docs.tokenized:
            docs = cache.cached(docs, tokenizer, folder)
        found.append(_not_empty(name, docs))
        if docs.kind != 'text':
            docs.read_first()
    return found


def opened(mixture: Mixture) -> dict[str, Documents]:
    """The sources as they are."""
    found = {name: source.open() for name, source in mixture.sources.items()}
    for name, docs in found.items():
        docs.skips = f'--config.data.mixture.sources.{name}.on_bad=skip'
    return found


def _not_empty(name: str, docs: Documents) -> Documents:
    if not len(docs):
        raise ConfigError(f'source {name!r} holds no document; check its paths')
    return docs


def make_walk(data: Data, docs: Sequence[Documents], tokenizer: Tokenizer, seed: int, table: Table) -> lanes.Walk:
    """The walk of a table's lanes."""
    streams = [Stream(name, d, tokenizer, seed) for name, d in zip(data.mixture.sources, docs, strict=True)]
    return lanes.Walk(data.plan(seed), streams, table)


def make_form(data: Data, tokenizer: Tokenizer, seed: int, walk: lanes.Walk) -> pipeline.Fill:
    """Batches of packed rows in the config's form."""
    config = data.form
    assert config is not None
    write = config.make(tokenizer, data.seq_len)

    def make(packed: Sequence[Sequence[Piece]], step: int, rows: Sequence[int]) -> Batch:
        generators = [forms.generator(seed, step, row) for row in rows]
        return forms.fill(config, write, packed, data.seq_len, generators, walk.another)

    return make


class Loader:
    """Endless iterator over `(batch, table)`; a batch holds the owned rows (all by default), in order.

    Arrays are NumPy, `[rows, T]`: weights float32, all others int32. Training rows are full, so every weight is 1,
    unless documents are packed whole. With a form the batches, and their weights, are what that gives.
    """

    def __init__(
        self,
        data: Data,
        docs: Sequence[Documents],
        tokenizer: Tokenizer,
        *,
        seed: int,
        owned: Iterable[int] | None = None,
    ):
        self._data, self._pad, self._plan = data, tokenizer.pad, data.plan(seed)
        self._owned = list(range(data.global_batch)) if owned is None else sorted(map(int, owned))
        self._table = lanes.initial(self._plan.of_rows(self._owned), len(docs), whole=data.whole)
        self._walk = functools.partial(make_walk, data, docs, tokenizer, seed)
        self._form = functools.partial(make_form, data, tokenizer, seed) if data.form else None
        self._ahead: pipeline.Closing | None = None

    def restore(self, table: Table) -> None:
        """Goes on after the step at which the table was taken; it may hold lanes of other hosts as well.

        Raises ConfigError where the table is of another global_batch, interleave or number of sources.
        """
        if table['lane'].max() >= self._plan.lanes:
            raise ConfigError(
                f'the lane table has {table["lane"].max() + 1} lanes, global_batch x interleave is {self._plan.lanes}; '
                'go on with those of the run that saved it'
            )
        if table['drawn'].shape[1] != self._table['drawn'].shape[1]:
            raise ConfigError(
                f'the lane table was drawn from {table["drawn"].shape[1]} sources, the mixture has '
                f'{self._table["drawn"].shape[1]}; go on with the mixture of the run that saved it'
            )
        self.close()
        self._table = lanes.select(table, self._plan.of_rows(self._owned))

    def __iter__(self) -> 'Loader':
        return self

    def __next__(self) -> tuple[Batch, Table]:
        if self._ahead is None:
            rows = pipeline.Rows(self._walk, self._table, plan=self._plan, pad=self._pad, form=self._form)
            workers = min(self._data.workers, len(self._owned))
            self._ahead = pipeline.read_ahead(rows, workers=workers, prefetch=self._data.prefetch)
        arrays = next(self._ahead)
        self._table = arrays.pop('state')
        kind = Batch if self._data.form is None else self._data.form.gives
        return kind(**arrays), self._table

    def describe(self, step: int) -> list[list[Piece]]:
        """The pieces of each owned row in the batch of a step, counted from 1 as in `metrics.jsonl`.

        Walks there from where the loader stands, which it leaves as it is. Raises ConfigError on a step behind it.
        """
        return self._before(step).step()

    def batch(self, step: int) -> Batch:
        """The owned rows of the batch of a step, found as `describe` finds them."""
        walk = self._before(step)
        if self._form is not None:
            return self._form(walk)(walk.step(), step - 1, self._owned)
        return packing.fill(walk.step(), len(self._owned), self._data.seq_len, self._pad)

    def _before(self, step: int) -> lanes.Walk:
        done = int(self._table['step'][0])
        if step <= done:
            raise ConfigError(f'step {step} is behind the loader, which stands after step {done}; steps count from 1')
        walk = self._walk(self._table)
        for _ in range(step - done - 1):
            walk.step()
        return walk

    def close(self) -> None:
        """Stops the thread or the workers; the next batch would start them again."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

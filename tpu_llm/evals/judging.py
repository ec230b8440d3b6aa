"""A judge at work on a file: verdicts as JSONL, which `python -m tpu_llm.evals` weighs against people's, or rates.

A record has `prompt`, text or messages, and `response`, which gets a score; or `response_a` and `response_b`, of which
the better is found. Whatever else it has is kept: with names `a` and `b` of who wrote them, verdicts are an arena's
battles; with people's `label`, they are what the judge is measured by.
"""

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from typing import ClassVar

from etils import epath
from rich.console import Console

from tpu_llm.config import ConfigError, digest, machine, validate
from tpu_llm.data import chat
from tpu_llm.evals import agreement, records
from tpu_llm.evals.candidate import Saved, Settings, Untrained
from tpu_llm.evals.intervals import share
from tpu_llm.evals.judge import Compared, Judge, Pair, Verdict, mean_score, said, summary
from tpu_llm.evals.prompting import Write
from tpu_llm.evals.records import Record
from tpu_llm.infer.chat import busy

FILE = 'verdicts.jsonl'
_BLOCK = 64  # records that are judged, and written, together


@dataclasses.dataclass(kw_only=True, slots=True)
class Judging:
    """Writes verdicts.jsonl in the workdir, block by block; what is there is done."""

    saves: ClassVar[bool] = False

    model: Saved | Untrained
    judge: Judge
    data: str  # JSONL
    name: str = ''  # of the judge, in its verdicts; '': its path
    limit: int = 0  # only so many records, the first; 0: all
    chat: bool = True  # questions are what a user says, in the model's own template
    seed: int = 0
    rows: int = 16  # of a batch; draws depend on it
    label: str = machine('label')  # the field of people's verdicts, where records have it

    def validate(self) -> None:
        if self.limit < 0 or self.rows < 1:
            raise ConfigError(f'limit = {self.limit} must not be negative and rows = {self.rows} at least 1')
        if not self.data:
            raise ConfigError('data is empty; give JSONL of what is to be judged')

    def main(self, workdir: str) -> None:
        validate(self)
        given = list(self.records())
        file = epath.Path(workdir) / FILE
        candidate, console = self.model.open(), Console(stderr=True, highlight=False, soft_wrap=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        made = f'{self.name or candidate.name} ({digest(self)})'
        done = _done(file, made, len(given))
        write: Write | None = None
        for start in range(len(done), len(given), _BLOCK):
            begun, part = time.monotonic(), given[start : start + _BLOCK]
            if write is None:
                write = candidate.ask(Settings(rows=self.rows, chat=self.chat, seed=self.seed)).write
            with busy(console, f'judging {len(part)} of {len(given):,}'):
                judged = [{**record, 'judge': made} for record in self.judged(part, write)]
            _append(file, judged)
            done += judged
            console.print(
                f'judged {len(done):,} of {len(given):,}; the last {len(part)} in {time.monotonic() - begun:.0f} s'
            )
        Console(highlight=False, soft_wrap=True).print('\n'.join([*told(done, self.label), str(file)]), markup=False)

    def records(self) -> Iterator[tuple[str, Record]]:
        """Raises ConfigError for a record that cannot be judged, or is of another kind than the first."""
        first = None
        for number, (where, record) in enumerate(records.read(self.data)):
            if self.limit and number == self.limit:
                return
            _check(record, where)
            first = first or (where, 'response' in record)
            if ('response' in record) != first[1]:
                raise ConfigError(f'{where} is of one response or two, and {first[0]} is not; put them in two files')
            yield where, record

    def judged(self, given: Sequence[tuple[str, Record]], write: Write) -> list[Record]:
        """The records with the verdicts on them."""

        def where(at: int) -> str:
            return given[at][0]

        each = [record for _, record in given]
        if 'response' in each[0]:
            verdicts = self.judge.scores([(said(r['prompt']), r['response']) for r in each], write, where)
            return [record | _scored(verdict) for record, verdict in zip(each, verdicts, strict=True)]
        pairs = [Pair(prompt=said(r['prompt']), a=r['response_a'], b=r['response_b']) for r in each]
        compared = self.judge.compare(pairs, write, where)
        return [record | _won(verdict) for record, verdict in zip(each, compared, strict=True)]


def _check(record: Record, where: str) -> None:
    prompt = records.value_of(record, 'prompt', where)
    if not isinstance(prompt, str):
        try:
            chat.check(prompt)
        except ConfigError as error:
            raise ConfigError(f'{where}: {str(error).replace("messages", "prompt", 1)}') from None
    both = [field for field in ('response_a', 'response_b') if field in record]
    if len(both) + ('response' in record) != (1 if 'response' in record else 2):
        raise ConfigError(
            f"{where} has {', '.join(record)}; wanted is 'response', or 'response_a' and 'response_b', beside 'prompt'"
        )
    for field in both or ['response']:
        if not isinstance(record[field], str):
            raise ConfigError(f'{where}: {field} is {record[field]!r}; write a text')


def _scored(verdict: Verdict) -> Record:
    value = None if verdict.value is None else int(verdict.value)
    return {'verdict': value, 'reason': verdict.reason, 'tries': verdict.tries, 'said': verdict.said}


def _won(each: Compared) -> Record:
    both = [dataclasses.asdict(verdict) for verdict in (each.given, each.swapped)]
    return {'winner': each.winner, 'consistent': each.consistent, 'given': both[0], 'swapped': both[1]}


# ---------------------------------------------------------------------------------------------------------- the file


def _done(file: epath.Path, made: str, of: int) -> list[Record]:
    """What was judged before, in whole blocks: a draw depends on its block. The rest is dropped.

    Raises ConfigError where another judge made it.
    """
    if not file.exists():
        return []
    lines = file.read_text().split('\n')[:-1]  # behind the last line feed is what was being written
    whole = len(lines) if len(lines) == of else len(lines) - len(lines) % _BLOCK
    found = [json.loads(line) for line in lines[:whole]]
    for record in found:
        if record['judge'] != made:
            raise ConfigError(f'{file} has verdicts of {record["judge"]}, and this is {made}; give another workdir')
    if len(found) > of:
        raise ConfigError(f'{file} has {len(found)} verdicts and the data {of} records; give another workdir')
    file.write_text(''.join(line + '\n' for line in lines[:whole]))
    return found


def _append(file: epath.Path, judged: Sequence[Record]) -> None:
    with file.open('a') as lines:
        lines.write(''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in judged))


# ----------------------------------------------------------------------------------------------------------- figures


def told(judged: Sequence[Record], label: str) -> list[str]:
    """What the verdicts say, and where people's are known, how far the judge agrees with them."""
    field = 'verdict' if 'verdict' in judged[0] else 'winner'
    lines = _of_scores(judged) if field == 'verdict' else _of_pairs(judged)
    known = [record for record in judged if record.get(label) is not None]
    if sum(record[field] is not None for record in known) > 1:
        found = agreement.measure([record[label] for record in known], [record[field] for record in known])
        lines += ['', f'against {label} of {found.items:,} records', *agreement.lines(found)]
    return lines


def _of_scores(judged: Sequence[Record]) -> list[str]:
    verdicts = [Verdict(value=r['verdict'], reason=r['reason'], tries=r['tries'], said=r['said']) for r in judged]
    in_form = [each.value is not None for each in verdicts]
    return [
        f'responses          {len(judged):>8,}',
        f'in form            {share(sum(in_form), len(judged))}',
        f'in form at once    {share(sum(each.tries == 1 for each in verdicts), len(judged))}',
        f'score              {mean_score(verdicts)}',
    ]


def _of_pairs(judged: Sequence[Record]) -> list[str]:
    compared = [Compared(r['winner'], r['consistent'], Verdict(**r['given']), Verdict(**r['swapped'])) for r in judged]
    found = summary(compared)
    lines = [
        f'pairs              {len(judged):>8,}',
        f'a, b, tie          {found.a:,}, {found.b:,}, {found.ties:,}',
        f'inconsistent       {found.inconsistent:>8,}   ties because the verdict changed with the order',
        f'without a verdict  {found.without:>8,}',
    ]
    if found.without < len(judged):
        lines += [
            f"a's points         {found.points}   a win is 1, a tie a half",
            f'first place        {found.first}   of verdicts for one of the two; 0.5 is fair',
        ]
    return lines

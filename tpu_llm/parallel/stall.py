"""Says where the hosts of a run wait when a step takes ten times as long as those before it.

A thread on each host watches the loop's phases. When one finds its host's step too long, process 0 asks all; each puts
its phase on the board and the Python stacks of its threads in the workdir, and process 0 says in one line who waits
where. The host in another phase than the rest is the one they wait for; one that does not answer stopped altogether.
"""

import collections
import json
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Protocol

from etils import epath

from tpu_llm.parallel import board, handshake
from tpu_llm.parallel.deaths import LostHost, folder, named

FACTOR = 10  # times the median
SHORTEST = 5.0  # seconds: no shorter step is a stall, whatever the median
KNOWN = 5  # steps before the median is trusted
POLL = 1.0  # seconds between two looks
ANSWER = 2.5  # seconds the hosts have to answer: they look every POLL
_STEP = ('step', 'data_wait', 'other')  # phases that make up a step: a host in any of them is judged by their sum
_LATEST = 50


class Phases(Protocol):
    """What is asked of the ledger."""

    @property
    def current(self) -> str:
        """The phase now; read from the watching thread."""
        ...

    def spent(self) -> dict[str, float]:
        """Seconds so far by phase; called from the loop's own thread."""
        ...


class Stall:
    """Watches from its creation to `close()`. The loop calls `begin(step)` at the start of each step."""

    def __init__(self, phases: Phases, workdir: epath.PathLike, say: Callable[[str], None]):
        self._phases, self._say = phases, say
        self._folder = folder(workdir, handshake.start())
        self._step = 0
        self._medians: Mapping[str, float] = {}
        self._spent: dict[str, float] | None = None
        self._history = collections.defaultdict(lambda: collections.deque(maxlen=_LATEST))
        self._asked = self._answered = _question()['number']  # there may have been another run in this process
        self._seen, self._told = board.get('stall/found'), 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name='stall', daemon=True)
        self._thread.start()

    def begin(self, step: int) -> None:
        """The step before is done; its time, by kind, counts for the medians."""
        spent: dict[str, float] = collections.defaultdict(float)
        for phase, seconds in self._phases.spent().items():
            spent[_kind(phase)] += seconds
        if self._spent is not None:
            for kind, seconds in spent.items():
                if took := seconds - self._spent.get(kind, 0.0):
                    self._history[kind].append(took)
        self._spent = spent
        # The other thread sees the old medians or the new.
        self._medians = {kind: statistics.median(of) for kind, of in self._history.items() if len(of) >= KNOWN}
        self._step = step

    def close(self) -> None:
        self._closed.set()
        self._thread.join(2 * ANSWER)

    def _watch(self) -> None:
        doing, since, told = (0, ''), time.monotonic(), 0
        while not self._closed.wait(POLL):
            step, kind, now = self._step, _kind(self._phases.current), time.monotonic()
            if doing != (step, kind):
                doing, since = (step, kind), now
            took, median = now - since, self._medians.get(kind)
            try:
                if median is not None and took > max(SHORTEST, FACTOR * median) and told != step:
                    told = step
                    what = f'step {step}' if kind == 'step' else f'{kind} at step {step}'
                    times = f'{took / median:.0f}x the median of {median:.2g} s'
                    board.put('stall/found', f'{what} has taken {took:.0f} s, {times}')
                if board.index() == 0:
                    self._tell(step)
                elif answer := self._answer():
                    self._keep(*answer)
            except LostHost:
                return  # the loop meets it, too, and says so

    def _tell(self, step: int) -> None:
        """On process 0: says what any host has found, once while its own step lasts, since all wait for each other."""
        found = board.get('stall/found')
        if found != self._seen:
            self._seen = found
            if self._told != step:
                self._told = step
                self._asked += 1
                board.put('stall', json.dumps({'number': self._asked, 'step': step}))
                own = self._answer()
                self._say(f'{found}: {self._heard()}; stacks are in {self._folder}')
                if own:
                    self._keep(*own)

    def _heard(self) -> str:
        """Where each host waits; the question is numbered, so that no answer is taken for that to another one."""
        if board.count() > 1:
            self._closed.wait(ANSWER)
        hosts = collections.defaultdict(list)
        for host in range(board.count()):
            hosts[board.get(f'stall/{self._asked}/{host}')].append(host)
        silent = hosts.pop(None, [])
        most = sorted(hosts.items(), key=lambda item: -len(item[1]))
        said = [f'{named(who)} {"wait" if len(who) > 1 else "waits"} in {phase}' for phase, who in most]
        said += [f'{named(silent)} {"do" if len(silent) > 1 else "does"} not answer'] if silent else []
        return ', '.join(said)

    def _answer(self) -> tuple[int, str] | None:
        """Where there is a new question, puts up the phase; the step and the stacks, to be kept."""
        question = _question()
        if question['number'] == self._answered:
            return None
        self._answered, phase, index = question['number'], self._phases.current, board.index()
        phase = 'other code' if phase == 'other' else phase
        text = f'host {index}, {phase}, {time.strftime("%Y-%m-%d %H:%M:%S")}\n\n{stacks()}'
        board.put(f'stall/{question["number"]}/{index}', phase)
        return question['step'], text

    def _keep(self, step: int, text: str) -> None:
        """Last of all, since the workdir may be what hangs. One that cannot be written is no reason to lose them."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f'stacks-{board.index()}-step{step}.txt').write_text(text)
        except OSError as error:
            print(f'{self._folder}: {error}\n{text}', file=sys.stderr, flush=True)


def _question() -> dict[str, int]:
    return json.loads(board.get('stall') or '{"number": 0, "step": 0}')


def stacks() -> str:
    """The Python stack of every thread but this one, as a traceback shows it, the main thread's first."""
    threads = {thread.ident: thread for thread in [threading.main_thread(), *threading.enumerate()]}
    frames = sys._current_frames()
    found = [(thread.name, frames[ident]) for ident, thread in threads.items() if ident in frames]
    mine = threading.current_thread().name
    return '\n'.join(f'{name}\n{"".join(traceback.format_stack(frame))}' for name, frame in found if name != mine)


def _kind(phase: str) -> str:
    return 'step' if phase in _STEP else phase

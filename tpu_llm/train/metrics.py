"""Where a run's numbers go: `metrics.jsonl`, TensorBoard, Weights & Biases.

The loop feeds one `Writers` with `write(step, values)`, on process 0 only; elsewhere it holds no writers. A
run that continues first calls `cut(step)`, so that every step is recorded once. Lines are safe once
`flush()` returns: flush before a checkpoint is committed, since a run restored from it will not repeat the
steps before it.

In `metrics.jsonl` every line is one JSON object, `step` first. JSON has no word for a number that is not
finite: it is written as the string 'nan', 'inf' or '-inf', and `read` gives the float back. A value may be a list
(a number a layer), or a list of lists; TensorBoard and Weights & Biases get the plain numbers only.
"""

import json
import math
import os
import tempfile
import time
import types
from typing import IO, Any, Protocol, runtime_checkable

from etils import epath

from tpu_llm.config import ConfigError

Values = dict[str, Any]  # numbers by name, or lists of them
NOT_FINITE = ('nan', 'inf', '-inf')


@runtime_checkable
class Writer(Protocol):
    """What the loop and the hooks ask of a place that numbers go to."""

    def write(self, step: int, values: Values) -> None: ...

    def cut(self, step: int) -> None:
        """Forgets everything after `step`: the run continues from there."""

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Writers:
    """Several writers as one; none at all on the processes that keep no record."""

    def __init__(self, *writers: Writer):
        self._writers = writers

    def write(self, step: int, values: Values) -> None:
        for writer in self._writers:
            writer.write(step, values)

    def cut(self, step: int) -> None:
        for writer in self._writers:
            writer.cut(step)

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


# ---------------------------------------------------------------------------------------------- metrics.jsonl


class JsonLines:
    """One JSON object a line: a local file is appended to, an object in a bucket uploaded whole at `flush()`.

    The folder must exist.
    """

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        self._file: IO[str] | None = None  # local
        self._lines: list[str] | None = None  # in a bucket, where nothing can be appended

    def write(self, step: int, values: Values) -> None:
        line = json.dumps({'step': int(step)} | {name: _number(value) for name, value in values.items()})
        if is_remote(self.path):
            if self._lines is None:
                self._lines = whole_lines(self.path)
            self._lines.append(line)
            return
        if self._file is None:
            _mend_tail(self.path)
            self._file = open(self.path, 'a', encoding='utf-8')  # noqa: SIM115 (kept for the whole run)
        self._file.write(line + '\n')
        self._file.flush()

    def cut(self, step: int) -> None:
        """Drops the lines after `step` in one stroke: a kill leaves the old file or the new."""
        self.close()
        lines = whole_lines(self.path)
        kept = [line for line in lines if json.loads(line)['step'] <= step]
        if kept != lines:
            replace_text(self.path, ''.join(f'{line}\n' for line in kept))

    def flush(self) -> None:
        if self._lines is not None:
            replace_text(self.path, ''.join(f'{line}\n' for line in self._lines))
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()
        self._file = self._lines = None


def read(path: epath.PathLike) -> list[dict[str, Any]]:
    """The objects of a `.jsonl` file, without a last line that a kill left unfinished.

    Raises ValueError naming the line that is not JSON, and FileNotFoundError.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f'{path} does not exist')
    records = []
    for number, line in enumerate(whole_lines(path), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f'{path}:{number} is not JSON ({error.msg}): mend or delete the line') from None
        records.append({name: _parsed(value) for name, value in record.items()})
    return records


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(each) for each in value]
    return value if math.isfinite(value) else str(float(value))


def _parsed(value: Any) -> Any:
    if isinstance(value, list):
        return [_parsed(each) for each in value]
    return float(value) if value in NOT_FINITE else value


def _scalars(values: Values) -> Values:
    return {name: value for name, value in values.items() if not isinstance(value, list)}


def _mend_tail(path: epath.Path) -> None:
    """Cuts the half line that a killed writer left behind, so that appending cannot join two lines."""
    if path.exists():
        with open(path, 'r+b') as file:
            file.truncate(file.read().rfind(b'\n') + 1)


# ------------------------------------------------------------------------------------------- TensorBoard, W&B


def _protos() -> Any:
    """TensorBoard's messages, whose classes are made when their modules are imported."""
    from tensorboardX.proto import event_pb2, summary_pb2

    made = vars(summary_pb2) | vars(event_pb2)
    return types.SimpleNamespace(**{name: made[name] for name in ('Summary', 'Event', 'SessionLog')})


class TensorBoard:
    """TensorBoard events, one scalar a name. For a bucket they go to local disk and are copied at
    `flush()`.
    """

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        self._spool = tempfile.TemporaryDirectory() if is_remote(self.path) else None
        self._folder = self._spool.name if self._spool else os.fspath(self.path)
        self._events: Any = None

    def write(self, step: int, values: Values) -> None:
        protos = _protos()
        self._events = self._events or self._open()
        scalars = [protos.Summary.Value(tag=name, simple_value=value) for name, value in _scalars(values).items()]
        summary = protos.Summary(value=scalars)
        self._events.write_event(protos.Event(wall_time=time.time(), step=step, summary=summary))

    def cut(self, step: int) -> None:
        """Event files only grow: a new one tells TensorBoard to hide what older ones say of later steps."""
        self._close_events()
        self._events = self._open(purge_step=step + 1)

    def flush(self) -> None:
        if self._events is not None:
            self._events.flush()
        if self._spool:
            self.path.mkdir(parents=True, exist_ok=True)
            for file in epath.Path(self._folder).iterdir():
                file.copy(self.path / file.name, overwrite=True)

    def close(self) -> None:
        self._close_events()
        self.flush()
        if self._spool:
            self._spool.cleanup()

    def _open(self, purge_step: int | None = None) -> Any:
        # Not its SummaryWriter, whose thread dies of a full disk with a traceback, and then blocks whoever writes.
        from tensorboardX.event_file_writer import EventsWriter

        os.makedirs(self._folder, exist_ok=True)
        # tensorboardX names files by the second: two starts within one would overwrite each other.
        events = EventsWriter(os.path.join(self._folder, 'events'), f'.{time.time_ns()}')
        if purge_step is not None:
            protos = _protos()
            log = protos.SessionLog(status=protos.SessionLog.START)
            events.write_event(protos.Event(step=purge_step, session_log=log))
        return events

    def _close_events(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None


class WandB:
    """Weights & Biases. The run's name is its id, so that a later start continues the same page.

    Raises ConfigError where `wandb` is not installed.
    """

    def __init__(self, project: str, *, name: str, config: dict[str, Any]):
        try:
            import wandb  # pyright: ignore[reportMissingImports] (an extra)
        except ImportError:
            raise ConfigError("Weights & Biases is asked for but not installed: pip install -e '.[wandb]'") from None
        self._run = wandb.init(project=project, name=name, id=name, resume='allow', config=config)
        self._run.define_metric('*', step_metric='step')

    def write(self, step: int, values: Values) -> None:
        self._run.log({'step': step} | _scalars(values))

    def cut(self, step: int) -> None:
        """Nothing to cut: the page is drawn over `step`, and a repeated step gives the same point again."""

    def flush(self) -> None:
        """Nothing to flush: a process of its own uploads."""

    def close(self) -> None:
        self._run.finish()


# ------------------------------------------------------------------------------------------------- text files


def is_remote(path: epath.Path) -> bool:
    """Whether `path` lies in a bucket (`gs://…`), where an object is replaced whole and never appended to."""
    return '://' in os.fspath(path)


def whole_lines(path: epath.Path) -> list[str]:
    """The lines of a text file that end in a newline; none where there is no file."""
    return path.read_text().split('\n')[:-1] if path.exists() else []


def replace_text(path: epath.Path, text: str) -> None:
    """Writes the file in one stroke: a reader, or a kill at any moment, finds the old text or the new."""
    if is_remote(path):
        path.write_text(text)  # an object appears when its upload is complete
        return
    partial = path.with_name(f'.{path.name}.{os.getpid()}')
    with open(partial, 'w', encoding='utf-8') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)

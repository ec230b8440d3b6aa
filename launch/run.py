"""Starts, or continues, the run that a config file describes.

    python launch/run.py --config=configs/quickstart.py
    python launch/run.py --config=configs/quickstart.py:smoke
    python launch/run.py --config=configs/pretrain.py:size=1b,mesh=v5e-256 --config.tokens=2000000000 --workdir=gs://…
    python launch/run.py --config=configs/quickstart.py --help     what the args and the fields of this config are

--config     FILE.py or FILE.py:arg, where the arg chooses the structure (size, mesh, smoke …)
--config.…   sets one field, such as --config.steps=500; a bare --config.flag is true, --noconfig.flag false
--workdir    where the run lives: a folder, a mounted drive or gs://…; default
             runs/<config>-<hash of the fields that decide the numbers>. The same command continues the run.
--debug      shows the traceback of a mistake, too
"""

import ast
import contextlib
import dataclasses
import errno
import importlib.util
import os
import re
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from absl import flags

_INTERRUPTED = 130  # an exit status
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # configs/ and experiments/ import each other from any working directory

from tpu_llm import config as configs  # noqa: E402
from tpu_llm.command_line import find, load, unknown  # noqa: E402
from tpu_llm.parallel import deaths, heap  # noqa: E402


def main(argv: list[str]) -> int:
    heap.keep()
    try:
        run(argv)
    except KeyboardInterrupt as stop:
        return _fail(f'interrupted{stop}', _INTERRUPTED)
    except Exception as error:
        code = _status(error)
        if '--debug' in argv or code == 1:
            raise
        return _fail(str(error) or type(error).__name__, code)
    return 0


def run(argv: list[str]) -> None:
    options = flags.FlagValues()
    flags.DEFINE_string('config', None, 'FILE.py[:arg]', flag_values=options)
    flags.DEFINE_string('workdir', None, 'folder or gs://', flag_values=options)
    flags.DEFINE_bool('debug', False, 'show tracebacks', flag_values=options)
    flags.DEFINE_bool('help', False, 'show this help', short_name='h', flag_values=options)
    overrides = options(argv, known_only=True)[1:]
    if options['help'].value and options['config'].value is None:
        _show(f'{__doc__}\n{_shipped()}')
        return
    if options['config'].value is None:
        if overrides and not re.match('--?(no)?config[.]', overrides[0]):
            raise configs.ConfigError(unknown(overrides[0]))
        raise configs.ConfigError('no config given: --config=FILE.py[:arg]; --help lists those there are')
    if options['help'].value:  # before the page is run, which may want args that its docstring tells of
        _show(_docstring(find(options['config'].value.partition(':')[0])) + '\n')
        config = load(options['config'].value, overrides, checked=False)
        _show('\n'.join(_fields(config, '--config')))
        return
    config = load(options['config'].value, overrides)
    workdir = options['workdir'].value or _default_workdir(options['config'].value, config)
    if '://' in workdir and importlib.util.find_spec('gcsfs') is None:
        raise configs.ConfigError(f"workdir {workdir} needs gcsfs: pip install -e '.[gcs]'")

    if Path(workdir).is_file():
        raise configs.ConfigError(f'the workdir {workdir} is a file; give a folder, there already or not: --workdir=…')

    from tpu_llm.parallel import hosts

    try:
        with hosts.contact(_status):
            hosts.join(config, workdir)
            hosts.announce(workdir)
            config.main(workdir)
    except KeyboardInterrupt:
        saves = getattr(config, 'saves', True)
        raise KeyboardInterrupt(f'; {_what_is_left(workdir)}' if saves else '') from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        mend = 'free some, and the same command goes on from the last checkpoint'
        raise configs.RunError(f'{error.filename or workdir}: {error.strerror}; {mend}') from error


def _fields(value: Any, path: str) -> list[str]:
    """Every field as the flag that would set it to the value it has."""
    if configs.is_config(value):
        names = [field.name for field in dataclasses.fields(value)]
        return [line for name in names for line in _fields(getattr(value, name), f'{path}.{name}')]
    if isinstance(value, tuple) and any(map(configs.is_config, value)):
        return [line for i, item in enumerate(value) for line in _fields(item, f'{path}[{i}]')]
    if isinstance(value, dict):
        return [line for key, item in value.items() for line in _fields(item, f'{path}.{key}')]
    return [f'{path}={value!r}']


def _default_workdir(spec: str, config: Any) -> str:
    """`runs/quickstart-smoke-0123456789`: the arg's bare words are kept; what else matters is in the hash."""
    file, _, arg = spec.partition(':')
    words = [Path(file).stem, *(word for word in arg.split(',') if re.fullmatch(r'[\w.-]+', word))]
    return f'runs/{"-".join(words)}-{configs.digest(config)}'


def _what_is_left(workdir: str) -> str:
    """What the same command would do next; a bucket is not asked, since it may not answer."""
    if '://' in workdir:
        return 'the same command continues from the last checkpoint, or begins anew where none was saved'
    if any(any(Path(workdir).glob(f'{stage}checkpoints/*/COMMIT.json')) for stage in ('', '*/')):
        return 'the same command continues from the last checkpoint'
    return 'nothing was saved yet: the same command begins anew'


def _heard(lost: Any) -> None:
    """Says Ctrl-C again where it fell into a callback of the garbage collector (jax has one) and would be lost."""
    if lost.exc_type is KeyboardInterrupt:
        main = threading.main_thread().ident
        threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(lost)


def _status(error: BaseException) -> int:
    """The exit status: 1 is a fault of this program, 2 a mistake of the user's; after 75 it is worth another try."""
    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED
    return deaths.LOST if isinstance(error, deaths.LostHost) else 2 if _is_users(error) else 1


def _is_users(error: BaseException) -> bool:
    """Whether the error is for the user to mend or to know, rather than a fault of this program."""
    if isinstance(error, (configs.ConfigError, configs.RunError, flags.Error, OSError)):
        return True
    raised = traceback.extract_tb(error.__traceback__)[-1]
    on_purpose = (raised.line or '').startswith('raise') and Path(raised.filename).is_relative_to(ROOT)
    return isinstance(error, ValueError) and on_purpose


def _fail(message: str, code: int) -> int:
    print('error:', ' '.join(message.split()), file=sys.stderr)
    return code


def _shipped() -> str:
    """The configs there are, each with the first line of its docstring."""
    lines = ['Configs:']
    for path in sorted(ROOT.glob('configs/**/*.py')):
        text = path.read_text()
        if 'def get_config(' in text:
            lines.append(f'  {path.relative_to(ROOT)!s:32} {_docstring(path).partition(chr(10))[0]}')
    return '\n'.join(lines)


def _show(text: str) -> None:
    """Prints it, to a reader that may have enough (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own end would complain


def _docstring(page: Path) -> str:
    return ast.get_docstring(ast.parse(page.read_text())) or ''


def _leave(code: int) -> None:
    """Ends the process. Interrupted, it has threads at work (jax's in a compilation), and Python's own end crashes."""
    if code == _INTERRUPTED:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == '__main__':
    sys.unraisablehook = _heard
    _leave(main(sys.argv))

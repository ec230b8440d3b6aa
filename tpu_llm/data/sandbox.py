"""Runs chat templates of strangers: Jinja's immutable sandbox, on a budget.

What a template is given is what `transformers` gives it: blocks trimmed, `raise_exception`, `strftime_now`, `tojson`
without HTML's escapes, `break` and `continue`, and `{% generation %}`. The sandbox keeps it from Python's insides. The
budget keeps it from running or growing for ever: each turn of a loop, each call, each filter and each thousand
characters made cost a step, and no text or list may be longer than `MOST_TEXT`.
"""

import datetime
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType
from typing import Any

import jinja2
from jinja2 import exceptions, ext, nodes, parser, runtime, sandbox, utils, visitor

from tpu_llm.config import ConfigError
from tpu_llm.data.chat import Refused

MOST_STEPS = 200_000  # seconds; a message takes tens
MOST_TEXT = 1 << 24  # beyond a million tokens
# Around what a `{% generation %}` block writes; characters that Unicode sets aside for use inside of programs.
SAID, SAID_END = '\ufdd2\ufdd3'


def run(template: str, variables: Mapping[str, Any]) -> str:
    """What the template writes. Raises ConfigError for one that cannot be read, fails, or spends its budget."""
    try:
        environment = _Sandbox()
        code = _compiled(template)
        loaded = jinja2.Template.from_code(environment, code, environment.make_globals(None))
        return environment.joined(*loaded.generate(variables))
    except _Refusal as error:
        raise Refused(f'the chat template refuses these messages: {_line(error)}') from None
    except RecursionError:
        raise ConfigError('the chat template calls itself without end') from None
    except Exception as error:  # It is a program: it may fail in any way.
        raise ConfigError(f'the chat template does not run: {_line(error)}') from None


def _line(error: Exception) -> str:
    return ' '.join(str(error).split())[:300] or type(error).__name__


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> CodeType:
    return _Sandbox().compile(template)


class _Refusal(jinja2.TemplateError):
    """What `raise_exception` raises."""


def _refuse(message: str) -> None:
    raise _Refusal(str(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Namespace(utils.Namespace):
    """Jinja's, without names that Python itself would look up."""

    def __init__(*args: Any, **attributes: Any) -> None:  # as Jinja's, so that `self` may be an attribute
        self, *given = args
        known = dict(*given, **attributes)
        for name in known:
            _check_name(name)
        utils.Namespace.__init__(self, known)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith('_'):
        raise exceptions.SecurityError(f'a namespace holds no {name!r}: names begin with a letter')


class _Generation(ext.Extension):
    """`{% generation %}…{% endgeneration %}`: what the assistant says."""

    tags = {'generation'}  # noqa: RUF012 (as the base class has it)

    def parse(self, parser: parser.Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (SAID, SAID_END))
        return [begin.set_lineno(line), nodes.Scope(body).set_lineno(line), end.set_lineno(line)]


class _Metered(visitor.NodeTransformer):
    """Puts the budget where Jinja asks nobody: turns of loops, and `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._call('turns', [node.iter], node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call('joined', node.nodes, node.lineno)

    def _call(self, name: str, arguments: list[Any], line: int) -> Any:
        return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None).set_lineno(line)


class _Sandbox(sandbox.ImmutableSandboxedEnvironment):
    """One for each run: it counts."""

    intercepted_binops = frozenset(('+', '*', '**', '%'))

    def __init__(self) -> None:
        extensions = [_Generation, ext.loopcontrols]
        # Constants are not folded, since that is done where nothing counts.
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False)
        self._left = MOST_STEPS
        self.filters = {name: self._metered(run) for name, run in {**self.filters, 'tojson': _tojson}.items()}
        self.globals |= {'raise_exception': _refuse, 'dict': lambda *pairs, **more: dict(*pairs, **more)}
        self.globals |= {'strftime_now': lambda form: datetime.datetime.now().strftime(form), 'namespace': _Namespace}
        del self.globals['lipsum']
        # Where Jinja joins what a block or a macro has written.
        self.concat = lambda parts: self.joined(*parts)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Metered().visit(super()._parse(source, name, filename))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise exceptions.SecurityError(f'{attribute!r} of a {type(obj).__name__} is not for templates')

    def turns(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._spend(1)
            yield item

    def joined(self, *parts: Any) -> str:
        texts, length = [], 0
        for part in parts:
            texts.append(str(part))
            length += len(texts[-1])
            self._check(length)
        return self._made(''.join(texts))

    def call(__self, __context: runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self._taken(getattr(__obj, '__self__', None), *args, *kwargs.values())
        return __self._made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == '**':
            self._check(abs(right) * 64 if isinstance(right, int) else 0)
        for some, times in ((left, right), (right, left)):
            if operator == '*' and isinstance(some, (str, bytes, list, tuple)) and isinstance(times, int):
                self._check(len(some) * times)
        return self._made(super().call_binop(context, operator, left, right))

    def _metered(self, run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def metered(*args: Any, **kwargs: Any) -> Any:
            self._taken(*args, *kwargs.values())
            return self._made(run(*args, **kwargs))

        return metered

    def _taken(self, *values: Any) -> None:
        """Before a call: numbers may be widths, and one text may be put for each character of another."""
        for value in values:
            if isinstance(value, int):
                self._check(abs(value))
        texts = sorted(len(value) for value in values if isinstance(value, str))
        if len(texts) > 1:
            self._check(texts[-1] * texts[-2] // 64)

    def _made(self, value: Any) -> Any:
        size = len(value) if isinstance(value, (str, bytes, list, tuple, dict)) else 0
        self._check(size)
        self._spend(1 + size // 1000)
        return value

    def _check(self, size: int) -> None:
        if size > MOST_TEXT:
            raise ConfigError(f'it makes more than {MOST_TEXT} characters')

    def _spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise ConfigError(f'it takes more than {MOST_STEPS} steps')

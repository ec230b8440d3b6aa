"""A conversation with a model, in a terminal or from a list of questions."""

import contextlib
import dataclasses
import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import jax
from rich.console import Console
from rich.markup import escape

from tpu_llm.checkpoint import pretrained
from tpu_llm.config import ConfigError, machine, validate
from tpu_llm.data.chat import ChatTemplate
from tpu_llm.data.tokenizer import Tokenizer
from tpu_llm.infer.generate import check_new_tokens, for_decoding
from tpu_llm.infer.sampling import Greedy, Sample, Sampling
from tpu_llm.infer.writer import Writer

Message = dict[str, str]


class Conversation:
    """Turns of a user and a model. What was said stays in the cache; a turn reads only what is new."""

    def __init__(self, model: Any, tokenizer: Tokenizer, *, sampling: Sampling, system: str = '', seed: int = 0):
        """Raises ConfigError for a tokenizer without a chat template."""
        if tokenizer.chat_template is None:
            raise ConfigError('the tokenizer has no chat template: this model continues text; use tpu_llm.generate')
        self._template = ChatTemplate(tokenizer.chat_template)
        self._tokenizer = tokenizer
        model = for_decoding(model) if jax.default_backend() == 'cpu' else model
        self._make = lambda: Writer(model, sampling=sampling, vocab_size=tokenizer.vocab_size, seed=seed)
        self._messages: list[Message] = [{'role': 'system', 'content': system}] if system else []
        self._writer = self._make()

    @property
    def fresh(self) -> bool:
        """Whether nothing was read yet, so that the first answer waits for what is compiled."""
        return not self._writer.ids

    def ask(self, text: str, *, max_new_tokens: int) -> Iterator[str]:
        """Yields the answer piece by piece."""
        self._messages.append({'role': 'user', 'content': text})
        ids = self._template.encode(self._tokenizer, self._messages, add_generation_prompt=True).tolist()
        # What the model wrote may be cut into tokens in more ways than one, and a template may change what came before.
        if ids[: len(self._writer.ids)] != self._writer.ids:
            self._writer = self._make()
        self._writer.read(ids[len(self._writer.ids) :])
        pieces, stream = [], self._tokenizer.stream()
        for token in self._writer.write(max_new_tokens, self._tokenizer.stops):
            pieces.append(stream.add(token))
            yield pieces[-1]
        pieces.append(stream.end())
        yield pieces[-1]
        self._messages.append({'role': 'assistant', 'content': ''.join(pieces)})


@dataclasses.dataclass(kw_only=True, slots=True)
class Chat:
    """Answers questions: those of `questions`, else what is typed. Nothing is written."""

    saves: ClassVar[bool] = False
    path: str  # a Hugging Face folder, a GGUF file or a run's workdir
    system: str = ''
    questions: tuple[str, ...] = ()
    max_new_tokens: int = machine(512)
    # 0: the likeliest token. Small models get caught in a loop by it: of the runs of eight tokens in four long answers
    # of SmolLM2, half had been there before, and a fifth at 0.7.
    temperature: float = machine(0.7)
    top_p: float = machine(0.95)
    seed: int = machine(0)
    dtype: Literal['float32', 'bfloat16'] = machine('float32')  # of weights and computation

    def validate(self) -> None:
        if not self.path:
            raise ConfigError('path is empty; give a Hugging Face folder, a .gguf file or the workdir of a run')
        check_new_tokens(self.max_new_tokens)
        self.sampling()

    def sampling(self) -> Sampling:
        return Sample(temperature=self.temperature, top_p=self.top_p) if self.temperature else Greedy()

    def main(self, workdir: str) -> None:
        del workdir
        validate(self)
        console = Console(highlight=False, soft_wrap=True)
        with busy(console, 'reading the weights'):
            source = pretrained.open_source(self.path)
            tokenizer = source.tokenizer()
            # Nothing else holds the weights: on a CPU they are laid out anew for decoding, and memory is what it lacks.
            talk = Conversation(
                pretrained.read_model(source, self.dtype, apart=jax.default_backend() == 'cpu'),
                tokenizer,
                sampling=self.sampling(),
                system=self.system,
                seed=self.seed,
            )
        interactive = not self.questions and sys.stdin.isatty()
        if interactive:
            console.print('[dim]Type a question; end with Ctrl-D.[/dim]')
        for question in self.questions or _typed(interactive):
            if not interactive:
                console.print(f'[bold]> {escape(question)}[/bold]')
            self._answer(talk, question, console)

    def _answer(self, talk: Conversation, question: str, console: Console) -> None:
        start, tokens = time.monotonic(), 0
        pieces = talk.ask(question, max_new_tokens=self.max_new_tokens)
        with busy(console, 'compiling and reading the question' if talk.fresh else 'reading the question'):
            opening = next(pieces)
        first = time.monotonic()
        for piece in itertools.chain([opening], pieces):
            tokens += 1
            console.out(piece, end='')
            console.file.flush()
        cut = f', cut at max_new_tokens = {self.max_new_tokens}' if tokens > self.max_new_tokens else ''
        written = time.monotonic() - first
        speed = f', then {(tokens - 1) / written:.1f} tokens/s' if tokens > 2 else ''
        console.print(f'\n[dim]{first - start:.1f} s to the first token{speed}{cut}[/dim]\n')


def busy(console: Console, what: str) -> contextlib.AbstractContextManager[object]:
    """Says what goes on while it does, in a terminal; elsewhere as a line of the error stream."""
    if console.is_terminal:
        return console.status(what)
    print(what, file=sys.stderr, flush=True)
    return contextlib.nullcontext()


def _typed(interactive: bool) -> Iterator[str]:
    """Lines of the standard input until it ends."""
    while True:
        try:
            line = input('> ' if interactive else '')
        except EOFError:
            return
        if line.strip():
            yield line

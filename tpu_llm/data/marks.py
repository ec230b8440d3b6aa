"""The marks of a foreign tokenizer, from the small JSON files that lie beside its vocabulary.

Hugging Face spreads them: tokenizer_config.json and special_tokens_map.json say how marks are written,
generation_config.json and config.json give ids (of ends there may be several: of the text, of a turn), and the chat
template is a file of its own or a field.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from tpu_llm.config import ConfigError

SETTINGS, SPECIAL, GENERATION = 'tokenizer_config.json', 'special_tokens_map.json', 'generation_config.json'
MODEL, TEMPLATE = 'config.json', 'chat_template.jinja'
FILES = (SETTINGS, SPECIAL, GENERATION, MODEL, TEMPLATE)

# Encoders of the BERT family name theirs otherwise.
_NAMES = {'bos': ('bos_token', 'cls_token'), 'eos': ('eos_token', 'sep_token'), 'pad': ('pad_token',)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Marks:
    """Ids, and what else is not in the vocabulary itself."""

    bos: int
    eos: int
    pad: int
    stops: frozenset[int] = frozenset()  # beside eos
    add_bos: bool | None = None  # not said
    chat_template: str | None = None

    @property
    def all_stops(self) -> frozenset[int]:
        return self.stops | {self.eos}


def read(files: Mapping[str, bytes], id_of: Callable[[str], int | None], vocab_size: int, default: Marks) -> Marks:
    """The marks that `files` (some of FILES, by name) tell; `default` (an id may be -1: none) has the rest.

    Without a begin mark it is the end mark, as in GPT-2; likewise padding. Raises ConfigError for a mark that the
    vocabulary does not have.
    """
    parsed = {name: _parse(name, data) for name, data in files.items() if name.endswith('.json')}
    names = [parsed.get(name, {}) for name in (SETTINGS, SPECIAL)]
    numbers = [parsed.get(name, {}) for name in (GENERATION, MODEL)]
    given = {mark: _ids(numbers, f'{mark}_token_id', vocab_size) for mark in _NAMES}

    def find(mark: str, otherwise: int) -> int:
        written = next((text for name in _NAMES[mark] for f in names if (text := _written(f.get(name)))), None)
        if written is not None:
            index = id_of(written)
            if index is None:
                raise ConfigError(f'{SETTINGS} names {written!r} as {mark}, which the vocabulary does not have')
            return index
        return next(iter(given[mark]), otherwise)

    eos = find('eos', default.eos)
    bos = find('bos', eos if default.bos < 0 else default.bos)
    return Marks(
        bos=bos,
        eos=eos,
        pad=find('pad', max(eos, 0) if default.pad < 0 else default.pad),
        stops=frozenset(given['eos']) or default.stops,
        add_bos=names[0].get('add_bos_token', default.add_bos),
        chat_template=_template(files, names[0]) or default.chat_template,
    )


def write(marks: Marks, token_of: Callable[[int], str], kind: str) -> dict[str, bytes]:
    """Files from which `read` gives these marks, and transformers (where the tokenizer is a `kind`) the same."""
    settings = {f'{mark}_token': token_of(getattr(marks, mark)) for mark in _NAMES}
    settings |= {'add_bos_token': marks.add_bos, 'tokenizer_class': kind}
    if marks.chat_template is not None:
        settings['chat_template'] = marks.chat_template
    return {SETTINGS: _json(settings), GENERATION: _generation(marks)}


def kept(files: Mapping[str, bytes], marks: Marks) -> dict[str, bytes]:
    """Of the `files` that gave the marks, what is the tokenizer's and not the model's; it gives them again."""
    own = {name: files[name] for name in (SETTINGS, SPECIAL, TEMPLATE) if name in files}
    return own | {GENERATION: _generation(marks)}


def _generation(marks: Marks) -> bytes:
    """A generation_config.json of the ids alone."""
    stops = sorted(marks.all_stops, key=lambda index: (index != marks.eos, index))
    ids = {'bos_token_id': marks.bos, 'eos_token_id': stops if len(stops) > 1 else marks.eos, 'pad_token_id': marks.pad}
    return _json(ids)


def with_chat(tokenizer: Any, files: Mapping[str, bytes], template: str, end: int) -> dict[str, bytes]:
    """The files of a tokenizer, from which `read` gives that template, and `end` among the stops."""
    ids = {mark: getattr(tokenizer, mark) for mark in _NAMES}
    marks = Marks(**ids, stops=tokenizer.stops | {end})
    return {**files, TEMPLATE: template.encode(), GENERATION: _generation(marks)}


def framing(marks: Marks, own: Marks | None = None) -> bytes:
    """What a tokenizer's fingerprint holds of the marks: those that documents are framed by, unless they are `own`."""
    pair = (marks.bos, marks.eos)
    return b'' if own and pair == (own.bos, own.eos) else f'{pair}'.encode()


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + '\n').encode()


def _parse(name: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:  # of JSON, or of UTF-8
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f'{name} of the tokenizer is not a JSON object')
    return value


def _written(value: Any) -> str | None:
    """A token is a string, or an object with its properties."""
    value = value.get('content') if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None


def _ids(numbers: list[dict[str, Any]], name: str, vocab_size: int) -> list[int]:
    """One id or several, of the first file that has any."""
    value = next((numbers_of[name] for numbers_of in numbers if numbers_of.get(name) is not None), [])
    ids = value if isinstance(value, list) else [value]
    for index in (ids := [index for index in ids if index != -1]):  # what some write for none
        if not isinstance(index, int) or not 0 <= index < vocab_size:
            raise ConfigError(f'{name} is {index!r}; ids of this vocabulary go from 0 to {vocab_size - 1}')
    return ids


def _template(files: Mapping[str, bytes], settings: dict[str, Any]) -> str | None:
    """The file wins over the field; of several named ones the one called default."""
    if TEMPLATE in files:
        try:
            return files[TEMPLATE].decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f'{TEMPLATE} is not UTF-8 at byte {error.start}') from None
    value = settings.get('chat_template')
    if isinstance(value, list):
        value = {entry.get('name'): entry.get('template') for entry in value}.get('default')
    if value is not None and not isinstance(value, str):
        raise ConfigError(f'chat_template of {SETTINGS} is neither a text nor a list with one called default')
    return value

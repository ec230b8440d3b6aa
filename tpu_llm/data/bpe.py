"""Trains SentencePiece models that lose no byte (see `tokenizer`) and fit source code as well as prose."""

import io
from collections.abc import Iterable, Iterator

import sentencepiece

from tpu_llm.config import ConfigError


def sample(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Whole documents until `limit` bytes are reached."""
    for text in texts:
        yield text
        limit -= len(text.encode())
        if limit <= 0:
            return


def train_bpe(texts: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece model; equal texts give equal bytes. Raises ConfigError where the text is too little."""
    model, unread = io.BytesIO(), []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(_kept(texts, unread)),
            model_writer=model,
            model_type='bpe',
            vocab_size=vocab_size,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            normalization_rule_name='identity',
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            character_coverage=1.0,
            # Bytes a token on held-out text of the standard library, at 4,096 and 8,192 pieces:
            # 2.39          SentencePiece's own choices
            # 3.54   3.92   pieces of white space only (indentation)
            # 3.82   4.42   … and pieces across scripts ('self.', '(x)')
            # 3.85   4.45   … of up to 32 characters
            allow_whitespace_only_pieces=True,
            split_by_unicode_script=False,
            max_sentencepiece_length=32,
            max_sentence_length=4 * _SENTENCE,  # in bytes
            num_threads=4,  # the model records the number, so one for all machines
            minloglevel=2,
        )
    except RuntimeError as error:
        if unread:
            raise unread[0] from None
        reason = str(error).rpartition('] ')[2].strip() or 'there is no text to learn from'
        raise ConfigError(
            f'cannot train {vocab_size} pieces: {reason.rstrip(".")}; give more text, or fewer pieces: '
            'config.data.tokenizer.vocab_size and config.model.vocab_size, which vocab=… of configs/pretrain.py sets'
        ) from None
    return model.getvalue()


def _kept(texts: Iterable[str], errors: list[Exception]) -> Iterator[str]:
    """The texts; what goes wrong while they are read is kept, since SentencePiece makes a RuntimeError of it."""
    try:
        yield from texts
    except Exception as error:
        errors.append(error)
        raise


_SENTENCE = 4000  # characters the trainer takes at once; cut at ends of lines, so that pieces may cross those


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        buffer = ''
        for line in text.splitlines(keepends=True):
            if buffer and len(buffer) + len(line) > _SENTENCE:
                yield buffer
                buffer = ''
            buffer += line[:_SENTENCE]  # of a longer line the beginning serves as well
        if buffer:
            yield buffer

"""Tokenizers of every kind, trained in a moment on Python's reference and on torture: the home library's own."""

import functools
import io
import json
from pydoc_data.topics import topics

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torture import TORTURE

MARKS = ['<unk>', '<s>', '</s>', '<pad>', '<|im_start|>', '<|im_end|>']
_ADDED = [
    AddedToken('<think>', special=False, normalized=False),
    AddedToken('        ', special=False, normalized=False),
]


def corpus() -> list[str]:
    """About 150 kB in pieces that no word is long in."""
    texts = [*list(topics.values())[:12], *TORTURE]
    # SentencePiece takes no NUL.
    return [line for text in texts if '\0' not in text for line in text[:20_000].splitlines(keepends=True)]


def _special(names: list[str]) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False) for name in names]


@functools.cache
def byte_level() -> Tokenizer:
    """As GPT-2's, with marks before and added tokens behind."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=_special(MARKS), initial_alphabet=letters, show_progress=False
    )
    made.train_from_iterator(corpus(), trainer)
    made.add_tokens(_ADDED)
    return made


@functools.cache
def unigram() -> Tokenizer:
    """As T5's, but for the normalization: words with a mark for the space before them."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='always')
    made.decoder = decoders.Metaspace(prepend_scheme='always')
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=_special(MARKS), unk_token='<unk>', show_progress=False
    )
    made.train_from_iterator(corpus(), trainer)
    made.post_processor = processors.TemplateProcessing(single='$A </s>', special_tokens=[('</s>', 2)])
    return made


@functools.cache
def word_piece(cased: bool = False) -> Tokenizer:
    """As BERT's."""
    made = Tokenizer(models.WordPiece(unk_token='[UNK]'))
    made.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    names = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
    trainer = trainers.WordPieceTrainer(vocab_size=900, special_tokens=_special(names), show_progress=False)
    made.train_from_iterator(corpus(), trainer)
    made.post_processor = processors.TemplateProcessing(
        single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)]
    )
    return made


@functools.cache
def sentence_piece(kind: str, **changes: bool) -> bytes:
    """A model as SentencePiece makes it: with a dummy prefix, and by default with its normalizer (NFKC)."""
    model = io.BytesIO()
    options = {'byte_fallback': True, 'user_defined_symbols': '<think>', 'control_symbols': '<|im_end|>'}
    if kind == 'bpe':
        options |= {'normalization_rule_name': 'identity', 'remove_extra_whitespaces': False}
    options |= changes
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        model_type=kind,
        vocab_size=800,
        character_coverage=0.99,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@functools.cache
def byte_fallback() -> Tokenizer:
    """As Llama 2's tokenizer.json: the BPE model above, by merges."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentence_piece('bpe'))
    pieces = [processor.id_to_piece(index) for index in range(processor.vocab_size())]
    ids = {piece: index for index, piece in enumerate(pieces)}
    normal = [
        index
        for index in range(len(pieces))
        if not (processor.is_control(index) or processor.is_byte(index) or processor.is_unknown(index))
    ]
    merges = []
    for index in sorted(normal, key=processor.get_score, reverse=True):
        cuts = [(pieces[index][:i], pieces[index][i:]) for i in range(1, len(pieces[index]))]
        merges += [cut for cut in cuts if cut[0] in ids and cut[1] in ids and pieces[index] != '<think>']
    made = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token='<unk>', fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    made.decoder = decoders.Sequence(
        [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    made.add_special_tokens(_special(['<unk>', '<s>', '</s>', '<|im_end|>']))
    made.add_tokens(_ADDED[:1])
    return made


HOMES = {'byte_level': byte_level, 'unigram': unigram, 'word_piece': word_piece, 'byte_fallback': byte_fallback}


def files(home: Tokenizer, **config: object) -> dict[str, bytes]:
    """The folder of a tokenizer, by name."""
    bert = home.token_to_id('[CLS]') is not None
    named = {} if bert else {'bos_token': '<s>', 'eos_token': {'content': '</s>', '__type': 'AddedToken'}}
    if bert:
        named = {'cls_token': '[CLS]', 'sep_token': '[SEP]', 'pad_token': '[PAD]'}
    settings = json.dumps({**named, **config}).encode()
    return {'tokenizer.json': home.to_str().encode(), 'tokenizer_config.json': settings}

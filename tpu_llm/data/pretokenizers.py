r"""How byte-level vocabularies cut text into the words that merges stay within, by the names GGUF files give them.

GGUF's `tokenizer.ggml.pre` is a name only; what it means is written here as llama.cpp and the models' own tokenizers
have it: regular expressions, each of which cuts further what the one before has left. Where a vocabulary's own
tokenizer composes characters first (Unicode NFC), so do we; llama.cpp does not.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
_CL100K = rf'{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}'
_DIGIT = r'\p{N}'
_QWEN2 = rf'{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}'
_QWEN35 = (
    rf'{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}'
    r'| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_UPPER, _LOWER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]', r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
_LEAD = r'[^\r\n\p{L}\p{N}]?'
_SLASH = r' ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
_TEKKEN = rf'{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASH}'
_GPT4O = rf'{_LEAD}{_UPPER}*{_LOWER}+{_SHORT}?|{_LEAD}{_UPPER}+{_LOWER}*{_SHORT}?|\p{{N}}{{1,3}}|{_SLASH}'
_BLOOM = ' ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+'
_PUNCTUATION = r'[\p{P}\$\+<=>\^~\|]+'
_CJK = '[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+'


def _ranges(codes: str) -> str:
    """A class of characters from their code points in hexadecimal."""
    pairs = [code.partition('-') for code in codes.split()]
    return '[' + ''.join(chr(int(a, 16)) + dash + (chr(int(b, 16)) if b else '') for a, dash, b in pairs) + ']'


# Letters of scripts that have cases, as far as DeepSeek's tokenizer knows them.
_CASED = _ranges(
    '41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376-377 37B-37D 37F 386 388-38A 38C 38E-3A1 '
    '3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 '
    '1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE '
    '1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 '
    '2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183-2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2-2CF3 '
    'A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A '
    '10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943 '
)
_WIDE_MARKS = '\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+'
_DEEPSEEK = ('[\r\n]', rf'\s?{_CASED}+', _WIDE_MARKS, r'\s+$', _CJK, _DIGIT)
_DEEPSEEK_V3 = (
    r'\p{N}{1,3}',
    '[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+',
    r'[!"#$%&\'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*'
    r'|\s*[\r\n]+|\s+(?!\S)|\s+',
)


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """Regular expressions in turn, and what is done beside."""

    patterns: tuple[str, ...]
    on_bytes: tuple[str, ...] = ()  # more of them, of bytes written as characters: some bytes pass for digits there
    nfc: bool = False  # before
    ignore_merges: bool = False  # words that the vocabulary has whole are not built by merges
    add_bos: bool = False  # where a file does not say

    def normalizer(self) -> dict[str, Any] | None:
        """As tokenizer.json has it."""
        return {'type': 'NFC'} if self.nfc else None

    def pre_tokenizer(self) -> dict[str, Any]:
        """As tokenizer.json has it."""
        in_bytes = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
        return {
            'type': 'Sequence',
            'pretokenizers': [*map(_split, self.patterns), in_bytes, *map(_split, self.on_bytes)],
        }


def _split(pattern: str) -> dict[str, Any]:
    return {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}


# The first of equal ones is the name we write.
CUTS: dict[str, Cut] = {
    'gpt-2': Cut((_GPT2,)),
    'llama-bpe': Cut((_CL100K,), ignore_merges=True, add_bos=True),
    'qwen2': Cut((_QWEN2,), nfc=True),
    'smollm': Cut((_DIGIT, _GPT2)),
    'dbrx': Cut((_CL100K,)),
    'stablelm2': Cut((_QWEN2,)),
    'olmo': Cut((_GPT2,), nfc=True),
    'command-r': Cut((_DIGIT, _GPT2), nfc=True),
    'qwen35': Cut((_QWEN35,), nfc=True),
    'deepseek-llm': Cut(_DEEPSEEK),
    'deepseek-coder': Cut(('[\r\n]', r'\s?\p{L}+', r'\s?\p{P}+', _CJK, _DIGIT)),
    'deepseek-v3': Cut(_DEEPSEEK_V3),
    'falcon': Cut((r'[\p{P}\$\+<=>\^~\|`]+', _GPT2), on_bytes=(r'\p{N}+', '[0-9][0-9][0-9]')),
    'bloom': Cut((_BLOOM,)),
    'viking': Cut((_BLOOM, _DIGIT)),
    'tekken': Cut((_TEKKEN,), ignore_merges=True, add_bos=True),
    'gpt-4o': Cut((_GPT4O,)),
    'glm4': Cut((_CL100K,), ignore_merges=True),
    'default': Cut((_PUNCTUATION, _GPT2, r'\p{N}+', '[0-9][0-9][0-9]')),
}
_ALIASES = {
    'gpt-2': 'phi-2 jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe gigachat exaone4 jais '
    'trillion',
    'llama-bpe': 'llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2',
    'qwen2': 'deepseek-r1-qwen megrez',
    'smollm': 'starcoder refact codeshell exaone minerva-7b',
    'dbrx': 'smaug-bpe chatglm-bpe',
    'olmo': 'mpt',
    'bloom': 'poro-chat gpt3-finnish',
    'gpt-4o': 'llama4',
}
CUTS |= {alias: CUTS[name] for name, aliases in _ALIASES.items() for alias in aliases.split()}

# Every pair of cuts above differs in some of these.
PROBES = (
    "I'm here, we'LL see: it's 1234567 and 12 3 at 45,678.90 (x=y*2)...\n\n\n",
    '  def f(self, x1):\t\treturn x[0] != None\r\n \n',
    ' a  b   c\u00a0d\u3000e HTTPServer camelCaseWord XMLs/path//to/it \u00bd\u0663\u0664\u0665',
    '$+<=>^~|` foo/\n?/\n!word #1 @2 (3) [ 4 ] \u2026\uff0c\u060c\u0964 end  ',
    '\u4e2d\u6587\u5b57123\u3001\u65e5\u672c\u8a9e\u3068\u30ab\u30bf\u30ab\u30ca\u3002',
    '\ud55c\uad6d\uc5b4 \u0939\u093f\u0928\u094d\u0926\u0940, \u0440\u0443\u0441\u0441 \u0391\u03b8\u03ae\u03bd\u03b1',
    'cafe\u0301 na\u00efve \ufb01 A\u030a \u212b \U0001f469\u200d\U0001f469 ',
)


def name_of(tokenizer: Any, ignore_merges: bool) -> str | None:
    """The name of what a tokenizer of the `tokenizers` package does before its merges: of the first that cuts alike."""
    import tokenizers

    def cut(one: Any) -> Iterator[list[str]]:
        for probe in PROBES:
            text = one.normalizer.normalize_str(probe) if one.normalizer else probe
            yield [word for word, _ in one.pre_tokenizer.pre_tokenize_str(text)]

    ours = list(cut(tokenizer))
    for name, known in CUTS.items():
        model = {'type': 'BPE', 'vocab': {}, 'merges': []}
        parts = {'model': model, 'normalizer': known.normalizer(), 'pre_tokenizer': known.pre_tokenizer()}
        theirs = tokenizers.Tokenizer.from_str(json.dumps({'added_tokens': [], **parts}))
        if known.ignore_merges == ignore_merges and list(cut(theirs)) == ours:
            return name
    return None

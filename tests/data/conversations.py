"""Chat templates in the manner of ChatML, Llama 2, Gemma and Qwen's tools, written for these tests; what they render.

The tokenizer is a byte-level one whose ids are bytes and a few marks.
"""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

MARKS = ['<s>', '</s>', '<|im_start|>', '<|im_end|>', '<start_of_turn>', '<end_of_turn>']

CHATML = """\
{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' -}}
{%- endif %}
{% for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

LLAMA = """\
{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}{% set rest = messages %}{% set system = false %}{% endif %}
{% for message in rest %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate: user, assistant, user, ...') }}
{% endif %}
{% if loop.first and system %}{% set content = '<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' ~ message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content | trim + ' [/INST]' -}}
{% else %}{% generation %}{{ ' ' + content | trim + ' ' + eos_token }}{% endgeneration %}{% endif %}
{% endfor %}
"""

GEMMA = """\
{{ bos_token }}{% set ns = namespace(turns=0) -%}
{%- for message in messages if message['role'] != 'system' -%}
    {%- set ns.turns = ns.turns + 1 -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    <start_of_turn>{{ role }}
{{ message['content'] | trim }}<end_of_turn>
{% endfor -%}
{% if add_generation_prompt %}<start_of_turn>model
{% endif %}{# {{ ns.turns }} turns #}{{ ns.turns if ns.turns > 99 }}"""

TOOLS = """\
{%- macro show(tool) -%}{{ tool | tojson }}{%- endmacro -%}
{%- if tools %}# Tools{% for tool in tools %}{{ '\\n' ~ show(tool) }}{% endfor %}{% endif %}
{%- for message in messages %}
{%- if message.tool_calls %}{% for call in message.tool_calls %}
<call>{{ {'name': call.name, 'arguments': call.arguments} | tojson(indent=2) }}</call>
{%- endfor %}{% continue %}{% endif %}
<{{ message.role }}>{{ message.content.split('</think>')[-1].strip('\\n') }}</{{ message.role }}>
{%- if loop.last %}{{ '\\n' * 2 }}{% break %}{% endif %}
{%- endfor %}
{%- set when = strftime_now('') %}{{ when }}{{ documents is none }}{{ undefined_thing }}"""

TEMPLATES = {'chatml': CHATML, 'llama': LLAMA, 'gemma': GEMMA, 'tools': TOOLS}

_HELLO = [{'role': 'user', 'content': 'Hello!'}]
_TALK = [
    {'role': 'system', 'content': 'You are "terse" & <b>bold</b>.'},
    {'role': 'user', 'content': '  What is 2 + 2?\n'},
    {'role': 'assistant', 'content': 'Four. \U0001f469\u200d\U0001f467 caf\u00e9'},
    {'role': 'user', 'content': 'Sure?\n\n\tYes: {{ 7 * 7 }} {% if %}'},
    {'role': 'assistant', 'content': '<think>\nhm\n</think>\nYes.'},
]
CONVERSATIONS = {'hello': _HELLO, 'talk': _TALK, 'asked': _TALK[:-1]}
_CALL = {
    'role': 'assistant',
    'content': '',
    'tool_calls': [{'name': 'sum', 'arguments': {'x': [1, 2.5], 'y': '\u00e9<'}}],
}
CALLING = [*_HELLO, _CALL, {'role': 'tool', 'content': '3.5'}]
DOING = [{'type': 'function', 'function': {'name': 'sum', 'parameters': {'type': 'object', 'required': ['x']}}}]


def tokenizer() -> Tokenizer:
    """Ids of bytes in the order of GPT-2's alphabet, then those of the marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    return made

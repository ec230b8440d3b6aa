"""Chat templates for models that come without one; written here, after the formats' published descriptions.

Each has `{% generation %}` around what the assistant says, and needs special tokens that the tokenizer must have.
"""

import re

from etils import epath

from tpu_llm.config import ConfigError, choose
from tpu_llm.data.tokenizer import Tokenizer

PLAIN = 'plain'  # no template: what the messages say, one after another, and `eos` behind each response

# OpenAI's ChatML; tools and calls as Hermes and Qwen write them.
_CHATML = """\
{%- for message in messages %}
{%- if loop.first and tools %}
{{- '<|im_start|>system\\n' }}
{%- if message.role == 'system' %}{{- message.content + '\\n\\n' }}{%- endif %}
{{- 'Tools, each of which you may call with <tool_call>{"name": …, "arguments": …}</tool_call>:' }}
{%- for tool in tools %}{{- '\\n' ~ tool | tojson }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- generation %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' ~ (call.function or call) | tojson ~ '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>' }}
{%- endgeneration %}
{{- '\\n' }}
{%- elif not (loop.first and tools and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Llama 3's.
_LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{- message.content | trim + '<|eot_id|>' }}{%- endgeneration %}
{%- else %}
{{- message.content | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# Gemma's, which has no system turn: the first user's begins with it.
_GEMMA = """\
{{- bos_token }}
{%- set ns = namespace(before='') %}
{%- for message in messages %}
{%- if message.role == 'system' %}
{%- set ns.before = message.content | trim + '\\n\\n' %}
{%- elif message.role == 'assistant' %}
{{- '<start_of_turn>model\\n' }}
{%- generation %}{{- message.content | trim + '<end_of_turn>' }}{%- endgeneration %}
{{- '\\n' }}
{%- else %}
{{- '<start_of_turn>user\\n' + ns.before + message.content | trim + '<end_of_turn>\\n' }}
{%- set ns.before = '' %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

TEMPLATES = {'chatml': _CHATML, 'llama3': _LLAMA3, 'gemma': _GEMMA}
_NEEDED = {
    'chatml': ('<|im_start|>', '<|im_end|>'),
    'llama3': ('<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'),
    'gemma': ('<start_of_turn>', '<end_of_turn>'),
}


def read(name: str) -> str:
    """The template of a name of the table, or of a .jinja file; '' is the tokenizer's own, and is read later.

    Raises ConfigError.
    """
    if name in ('', PLAIN):
        return name
    if not re.search(r'[./\\]', name):
        return choose('template', name, TEMPLATES | {PLAIN: ''})
    path = epath.Path(name).expanduser()
    if not path.exists():
        raise ConfigError(f'there is no template {name}; give a .jinja file, or one of {", ".join(TEMPLATES)}, {PLAIN}')
    return path.read_text()


def check(name: str, tokenizer: Tokenizer) -> None:
    """Raises ConfigError where the tokenizer lacks a special token that a template of the table writes."""
    missing = [token for token in _NEEDED.get(name, ()) if token not in tokenizer.special_tokens]
    if missing:
        raise ConfigError(
            f'template = {name!r} writes {missing[0]}, which is no special token of this tokenizer; use one that it '
            f"was made for, or template = '{PLAIN}'"
        )

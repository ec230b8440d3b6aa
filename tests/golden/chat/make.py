"""Writes rendered.json: tests/data/conversations.py through transformers' apply_chat_template, as text, ids and masks.

python tests/golden/chat/make.py        # pip install transformers tokenizers
"""

import json
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[2] / 'data'))
from conversations import CALLING, CONVERSATIONS, DOING, TEMPLATES, tokenizer


def main() -> None:
    home = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), bos_token='<s>', eos_token='</s>')
    cases = []
    for name, template in TEMPLATES.items():
        for kind, messages in {**CONVERSATIONS, 'calling': CALLING}.items():
            if (kind == 'calling') != (name == 'tools'):
                continue
            for prompt in (False, True):
                given = {'chat_template': template, 'add_generation_prompt': prompt}
                given |= {'tools': DOING} if name == 'tools' else {}
                case = {'template': name, 'conversation': kind, 'prompt': prompt}
                case['text'] = home.apply_chat_template(messages, tokenize=False, **given)
                case['ids'] = home.apply_chat_template(messages, tokenize=True, return_dict=False, **given)
                if 'endgeneration' in template and not prompt:
                    masked = home.apply_chat_template(
                        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **given
                    )
                    case['said'] = masked['assistant_masks']
                cases.append(case)
    lines = ',\n'.join(json.dumps(case, ensure_ascii=True, separators=(',', ':')) for case in cases)
    Path(__file__).with_name('rendered.json').write_text(f'[\n{lines}\n]\n')


if __name__ == '__main__':
    main()

"""What lm-eval makes of a tiny Llama with transformers: the score of each task and the answer to each request.

    pip install -e '.[parity]' lm-eval
    python tests/golden/lm_eval/make.py     # from the root of the checkout; writes data/, model/ and expected.json

The weights are drawn, the tokenizer is trained on this file's sentences. Rows are of 96 tokens at most, so one question
is cut and texts take several windows. Tasks are in tasks/*.yaml.
"""

import json
import random
import shutil
from pathlib import Path

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
MARKS = ['<pad>', '<begin>', '<end>']
WORDS = ('water', 'river', 'mountain', 'light', 'engine', 'music', 'theory', 'value')
WORDS += ('green', 'paper', 'stone', 'cloud', 'simple', 'number', 'house', 'tree')
CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<end>\n{% endfor %}"
    '{% if add_generation_prompt %}assistant:{% endif %}'
)


def sentence(draw: random.Random, least: int, most: int) -> str:
    return ' '.join(draw.choice(WORDS) for _ in range(draw.randint(least, most)))


def write_data(folder: Path) -> list[str]:
    draw = random.Random(0)
    folder.mkdir(exist_ok=True)
    questions = [
        {
            'question': sentence(draw, 3, 12) if number else sentence(draw, 70, 80),
            'choices': [sentence(draw, 1, 5) for _ in range(4)],
            'answer': draw.randrange(4),
        }
        for number in range(12)
    ]
    texts = [{'text': sentence(draw, least, least + 5)} for least in (4, 30, 100)]
    for name, records in (('questions', questions), ('texts', texts)):
        lines = ''.join(json.dumps(record) + '\n' for record in records)
        (folder / f'{name}.jsonl').write_text(lines)
    return [record['question'] for record in questions] + [record['text'] for record in texts]


def write_model(folder: Path, texts: list[str]) -> None:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=320, special_tokens=MARKS, initial_alphabet=letters, show_progress=False)
    )
    made.post_processor = processors.TemplateProcessing(single='<begin> $A', special_tokens=[('<begin>', 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token='<pad>', bos_token='<begin>', eos_token='<end>', chat_template=CHAT
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for _, tensor in sorted(model.named_parameters()):
            around = 1.0 if tensor.ndim == 1 else 0.0
            tensor.copy_(around + torch.randn_like(tensor) * 0.2)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def answers(folder: Path, tasks: list[str], chat: bool) -> dict:
    lm = HFLM(pretrained=str(folder), dtype='float32', device='cpu', batch_size=4)
    found = simple_evaluate(
        model=lm,
        tasks=tasks,
        task_manager=TaskManager(include_path=str(HERE / 'tasks'), include_defaults=False),
        apply_chat_template=chat,
        log_samples=True,
    )
    return {'results': found['results'], 'answers': {name: said(found['samples'][name]) for name in tasks}}


def said(samples: list[dict]) -> list:
    """To each request, in the order of the documents."""
    return [sample['resps'] for sample in sorted(samples, key=lambda sample: sample['doc_id'])]


def main() -> None:
    write_model(HERE / 'model', write_data(HERE / 'data'))
    made = {
        'plain': answers(HERE / 'model', ['words', 'letters', 'texts', 'written'], chat=False),
        'chat': answers(HERE / 'model', ['words', 'written'], chat=True),
    }
    (HERE / 'expected.json').write_text(json.dumps(made, indent=1) + '\n')


if __name__ == '__main__':
    main()

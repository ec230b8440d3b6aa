"""The published sizes: their parameters, counted by hand or by their authors, and that they run (in the abstract).

tests/golden/families holds what transformers counts in the same models, with the script that asks it.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import zoo
from tpu_llm.checkpoint import fields, huggingface
from tpu_llm.config import ConfigError
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.families import ABSENT, FACTS, FAMILIES, published
from tpu_llm.models.flops import active_parameters, forward_flops
from tpu_llm.models.graph import ModelGraph

COUNTS = json.loads((Path(__file__).parents[1] / 'golden/families/counts.json').read_text())
ARCHITECTURES = {name: facts.architecture for facts in FAMILIES.values() for name in facts.sizes}
EXACT = [name for name, fact in FACTS.items() if fact.parameters]
PRINTED = [name for name, fact in FACTS.items() if fact.printed]
# One size of each architecture, and of each family that has none.
UNLIKE = {facts.architecture or facts.family: list(facts.sizes)[-1] for facts in FAMILIES.values()}.values()

# Billions that a token meets, as their authors state them.
ACTIVE = {
    'mixtral-8x7b': 12.9,
    'mixtral-8x22b': 39,
    'qwen1.5-moe-a2.7b': 2.7,
    'qwen2-57b-a14b': 14,
    'qwen3-30b-a3b': 3.3,
    'qwen3-235b-a22b': 22,
    'deepseek-v2': 21,
    'deepseek-v3': 37,
    'dbrx': 36,
    'olmoe-1b-7b': 1.3,
    'glam-64b-64e': 96.6,
    'jamba-v0.1': 12,
    'jamba-1.5-large': 94,
}


@functools.cache
def count(name):
    """Without what predicts further tokens, which neither transformers nor the authors count in a size."""
    config = dataclasses.replace(published(name), predict_ahead=0)
    return ModelGraph(config.make(vocab_multiple=1)).count()


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=[] if name in UNLIKE else pytest.mark.full) for name in FACTS]
)
def test_a_published_size_runs_in_the_abstract(name):
    config = published(name)
    graph = ModelGraph(config.make())
    length = min(config.max_length or 4096, 4096)
    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)
    logits = jax.eval_shape(lambda weights, tokens: graph.bind(weights)(tokens), graph.shapes(), tokens)
    assert logits.shape == (2, length, config.vocab_size)
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize('name', EXACT)
def test_its_parameters_are_those_of_the_published_weights(name):
    """And of the model that transformers makes of the same config."""
    assert count(name) == FACTS[name].parameters == COUNTS[name]['parameters']


@pytest.mark.parametrize('name', EXACT)
def test_transformers_counted_what_our_config_is(name):
    """If not: python tests/golden/families/make.py"""
    items = huggingface.ARCHITECTURES[ARCHITECTURES[name]].items
    counted = fields.read(items, COUNTS[name]['config'], DecoderConfig)
    assert fields.write(items, counted) == fields.write(items, published(name))


def test_what_has_an_architecture_was_counted():
    assert {name for name, architecture in ARCHITECTURES.items() if architecture} == set(EXACT)
    assert set(EXACT) == set(COUNTS) - {'transformers'}


@pytest.mark.parametrize('name', UNLIKE)
def test_a_dense_model_meets_all_of_its_parameters(name):
    config = published(name)
    assert (active_parameters(config) == count(name)) is (config.moe is None)


def is_printed(number, text):
    """Whether that is how a number is printed, rounded or cut: '6.74B', '559,214,592', '540B' (no digit is its 0)."""
    digits, unit = text.rstrip('MBT').replace(',', ''), {'M': 10**6, 'B': 10**9, 'T': 10**12}.get(text[-1], 1)
    whole, _, decimals = digits.partition('.')
    last = unit / 10 ** len(decimals) if decimals else unit * 10 ** (len(whole) - len(whole.rstrip('0')))
    return round(float(digits) * unit / last) in (round(number / last), math.floor(number / last))


def printed_parameters(name):
    """Of those that the authors count."""
    config = published(name)
    if name in ('lamda-137b', 'grok-1'):  # without embeddings
        return count(name) - config.vocab_size * config.width
    return count(name)


@pytest.mark.parametrize('name', PRINTED)
def test_its_parameters_are_those_that_are_printed(name):
    assert is_printed(printed_parameters(name), FACTS[name].printed)


def test_printed_digits_are_checked():
    assert is_printed(6_738_415_616, '6.74B')
    assert is_printed(540_356_474_880, '540.35B')
    assert is_printed(1_161_756_155_904, '1.2T')
    assert is_printed(178_557_088_768, '180B')
    for wrong in ('6.72B', '6.75B', '6,738,415,617', '6.74M', '8B'):
        assert not is_printed(6_738_415_616, wrong)


def test_each_size_has_a_count_or_what_is_printed():
    assert set(FACTS) == set(EXACT) | set(PRINTED)
    assert not ABSENT.keys() & FACTS.keys()


@pytest.mark.parametrize('name', ACTIVE)
def test_what_a_token_meets_is_what_authors_state(name):
    assert active_parameters(published(name)) / 1e9 == pytest.approx(ACTIVE[name], rel=0.02)


def test_mixtral_by_hand():
    """Two of eight experts, the router, and everything else whole."""
    attention = 4096 * (32 + 8 + 8 + 32) * 128
    expert, router, norms, embeddings = 3 * 4096 * 14_336, 4096 * 8, 2 * 4096, 2 * 32_000 * 4096
    active = 32 * (attention + 2 * expert + router + norms) + embeddings + 4096
    config = published('mixtral-8x7b')
    assert active_parameters(config) == active
    matmuls = active - 32_000 * 4096 - 65 * 4096  # but for the embedding and the norms
    assert forward_flops(config, 1024) == 2 * matmuls + 32 * 4 * 4096 * 1025 / 2


def test_palm_by_hand():
    """One key-value head, one norm a layer, no bias; the head is the embedding."""
    attention = 18_432 * (48 + 1 + 1 + 48) * 256
    matmuls, norms, embeddings = attention + 3 * 18_432 * 73_728, 18_432, 256_000 * 18_432
    config = published('palm-540b')
    assert ModelGraph(config.make()).count() == 118 * (matmuls + norms) + embeddings + 18_432
    assert forward_flops(config, 2048) == 2 * (118 * matmuls + embeddings) + 118 * 4 * 48 * 256 * 2049 / 2


def test_gemma_2_27b_by_hand():
    """Four norms a layer; of a row of 8192 every second layer sees no more than 4096 back."""
    matmuls = 4608 * 2 * (32 + 16) * 128 + 3 * 4608 * 36_864
    config = published('gemma-2-27b')
    assert ModelGraph(config.make()).count() == 46 * (matmuls + 4 * 4608) + 256_000 * 4608 + 4608
    near, far = (4096 * 4097 / 2 + 4096 * 4096) / 8192, 8193 / 2
    assert forward_flops(config, 8192) == 2 * (46 * matmuls + 256_000 * 4608) + 23 * 4 * 32 * 128 * (near + far)


def test_gpt_3_by_hand():
    """As many parameters as table D.1 of its paper says, in millions."""
    layer = 12 * 12_288**2 + (4 + 4 + 1 + 4) * 12_288  # matrices; biases, those of the two norms and their scales
    total = ModelGraph(published('gpt-3-175b').make()).count()
    assert total == 96 * layer + (50_257 + 2048) * 12_288 + 2 * 12_288
    assert total // 10**6 == 174_604


def test_deepseek_v3_by_hand():
    graph = ModelGraph(dataclasses.replace(published('deepseek-v3'), predict_ahead=0).make())

    def entries(*parts):
        return sum(leaf.size for name, leaf in graph.leaves.items() if all(part in name for part in parts))

    expert = 3 * 7168 * 2048
    assert entries('.moe.') == 58 * (257 * expert + 7168 * 256 + 256)
    assert entries('.moe.', '.shared.') == 58 * expert
    assert entries('.mlp.') == 3 * 3 * 7168 * 18_432
    queries = 7168 * 1536 + 1536 + 1536 * 128 * (128 + 64)
    keys_and_values = 7168 * (512 + 64) + 512 + 512 * 128 * (128 + 128)
    assert entries('.attention.') == 61 * (queries + keys_and_values + 128 * 128 * 7168)
    assert graph.count() - active_parameters(published('deepseek-v3')) == 58 * 248 * expert


def test_what_deepseek_v3_predicts_further_tokens_with():
    """Of its own 11.6B beside the 671B; 685B in the files, with embedding and head once more and the scales of FP8."""
    config = published('deepseek-v3')
    own = ModelGraph(config.make()).count() - count('deepseek-v3')
    attention = 7168 * 1536 + 1536 + 1536 * 128 * (128 + 64) + 128 * 128 * 7168
    attention += 7168 * (512 + 64) + 512 + 512 * 128 * (128 + 128)
    experts = 257 * 3 * 7168 * 2048 + 7168 * 256 + 256
    assert own == attention + experts + 2 * 7168 * 7168 + 5 * 7168  # two norms, the layer's two and the last
    assert own == 11_610_068_224
    shared, maps = 2 * 129_280 * 7168, count('deepseek-v3') + own - 2 * 129_280 * 7168
    assert is_printed(count('deepseek-v3') + own + shared + maps // 128**2, '685B')  # a scale for 128 x 128 of a map
    family = huggingface.ARCHITECTURES['DeepseekV3ForCausalLM']
    bound = family.bind(config, ModelGraph(config.make(vocab_multiple=1)))
    held = {each.name: math.prod(each.shape) for group in bound for each in group}
    assert sum(held.values()) == count('deepseek-v3') + own + shared
    last = [name for name in held if name.startswith('model.layers.61.')]
    assert sum(held[name] for name in last) == own + shared


@pytest.mark.parametrize('name', UNLIKE)
def test_configs_are_fresh(name):
    one, other = published(name), published(name)
    for field in ('moe', 'mla', 'rope_scaling'):
        assert getattr(one, field) is None or getattr(one, field) is not getattr(other, field)
    assert one.moe is None or one.moe.router is not other.moe.router


def test_an_unknown_name_gets_the_nearest_and_the_families():
    with pytest.raises(
        ConfigError, match=r"unknown model 'mixtral-8x8b' \(did you mean 'mixtral-8x7b'\?\).* of GPT-1, GPT-2, .*Switch"
    ):
        published('mixtral-8x8b')


def test_what_cannot_be_said_says_why():
    with pytest.raises(ConfigError, match='phi-3-small is not implemented: its attention sees blocks'):
        published('phi-3-small')


def test_the_page_is_what_the_code_says():
    """But for the measured errors, which are kept. After a change: python benchmarks/zoo.py --write"""
    kept = zoo.PAGE.read_text()
    assert zoo.page(kept, zoo.errors_of(kept)) == kept

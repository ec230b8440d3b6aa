"""Ladders: which sizes and tokens; their FLOPs are the models' own count."""

import dataclasses

import pytest

from tests import toy
from tpu_llm.config import ConfigError
from tpu_llm.models.encoder import EncoderConfig
from tpu_llm.models.flops import train_flops
from tpu_llm.nn.moe import MoE
from tpu_llm.nn.param import count_parameters
from tpu_llm.scaling.counts import count
from tpu_llm.scaling.ladder import Ladder

MODELS = {'narrow': toy.config(width=8, layers=2), 'wide': toy.config(width=16, layers=2)}
LADDER = Ladder(models=MODELS, batch_tokens=64, seq_len=16)


def test_runs_of_one_budget_cost_what_it_says_up_to_half_a_batch():
    rungs = list(LADDER.isoflop([1e9, 4e9]))
    assert [rung.name for rung in rungs] == ['1e9-narrow', '1e9-wide', '4e9-narrow', '4e9-wide']
    for rung in rungs:
        cost = train_flops(rung.model, 16)
        assert rung.flops == rung.tokens * cost
        assert abs(rung.flops - rung.budget) <= 32 * cost
        assert rung.tokens == rung.steps * 64
        assert rung.parameters == count_parameters(rung.model.make())


def test_tokens_a_parameter():
    for rung in LADDER.per_parameter(20):
        assert abs(rung.tokens - 20 * rung.parameters) <= 32


def test_each_size_with_each_length_and_with_each_amount_of_data():
    rungs = list(LADDER.horizons(640, factors=(1, 4)))
    assert [(rung.name, rung.tokens) for rung in rungs] == [
        ('narrow-6.4e2', 640), ('wide-6.4e2', 640), ('narrow-2.56e3', 2560), ('wide-2.56e3', 2560)
    ]  # fmt: skip
    assert [rung.tokens for rung in LADDER.crossed([128, 6400])] == [128, 128, 6400, 6400]


def test_a_budget_of_less_than_a_batch_is_refused():
    with pytest.raises(ConfigError, match=r'1e3-narrow: .* tokens are no whole batch of 64'):
        list(LADDER.isoflop([1e3]))
    with pytest.raises(ConfigError, match='budgets'):
        list(LADDER.isoflop([0.0]))


@pytest.mark.parametrize(
    'model',
    [
        toy.config(),
        toy.config(windows=(4, 0)),
        toy.config(moe=MoE(experts=4, chosen=2, expert_width=8)),
        EncoderConfig(vocab_size=32, width=16, layers=2, heads=2, mlp_width=32, max_length=64),
    ],
    ids=['dense', 'windowed', 'experts', 'encoder'],
)
def test_attention_is_what_grows_with_the_row(model):
    """With as many FLOPs for each pair, those of attention are in the ratio of the keys that are seen."""
    short, long = count(model, 16), count(model, 32)
    assert long.flops - short.flops == pytest.approx(long.attention - short.attention)
    if isinstance(model, EncoderConfig):
        assert long.attention == pytest.approx(2 * short.attention)
    else:
        seen = {0: 33 / 2, 4: (1 + 2 + 3 + 29 * 4) / 32}  # keys of a query in a row of 32, by the layer's window
        keys = sum(seen[model.windows[layer % len(model.windows)]] for layer in range(model.layers))
        assert long.attention == pytest.approx(12 * model.heads * model.head_dim * keys)


def test_active_parameters_leave_out_what_a_token_does_not_choose():
    counts = count(toy.config(moe=MoE(experts=4, chosen=2, expert_width=8)), 16)
    model = toy.config()
    maps = 3 * model.width * 8
    assert counts.parameters - counts.active == 2 * maps * model.layers
    assert counts.six == 6 * counts.active


def test_embeddings_are_counted_once_where_they_are_tied():
    model = toy.config()
    untied = count(dataclasses.replace(model, tied_embeddings=False), 16)
    tied = count(dataclasses.replace(model, tied_embeddings=True), 16)
    assert untied.embeddings == 2 * tied.embeddings == 2 * model.width * model.vocab_size
    assert untied.parameters - tied.parameters == tied.embeddings

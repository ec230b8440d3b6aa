"""Maximal update parametrisation: its rules, that they are the published ones, and what they refuse."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from tpu_llm import config as config_lib
from tpu_llm.checkpoint import pretrained
from tpu_llm.config import ConfigError, validate
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.graph import ModelGraph
from tpu_llm.models.mup import MuPConfig
from tpu_llm.nn.mamba import Mamba
from tpu_llm.nn.moe import MoE
from tpu_llm.nn.param import Normal, draw, named_params
from tpu_llm.nn.stack import Stack
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.optim.optimizer import AdamW, Group
from tpu_llm.optim.schedule import Schedule
from tpu_llm.train.setup import param_infos

WIDER = {'width': 64, 'heads': 16, 'kv_heads': 8, 'mlp_width': 80}  # four times toy.config's


def mup(depth=1.0, base=None, **changes):
    """A toy four times as wide as its base, which has the changes of both that are no sizes."""
    sizes = {name: value for name, value in WIDER.items() if name not in (base or {})}
    same = {name: value for name, value in changes.items() if name not in ('layers', 'head_dim', *WIDER)}
    return MuPConfig.of(toy.config(**sizes | changes), toy.config(**same | (base or {})), depth)


def rules(config, path):
    """The standard deviation over the base's, the rate and the gain of the parameter whose path ends so."""
    model, base = dict(named_params(config.make(vocab_multiple=1))), dict(named_params(config.smaller().make()))
    (name,) = [name for name in model if name.endswith(path)]
    meta, like = model[name].get_metadata(), base[name].get_metadata('init')
    drawn = meta['init'].std / like.std if isinstance(like, Normal) else meta['init'].value - like.value
    return drawn, meta['rate'], meta['gain']


def test_as_large_as_its_base_it_is_the_base():
    base = toy.config(bias=('qkv', 'out', 'mlp', 'head'), norm='layer')
    model, plain = MuPConfig.of(base, base).make(), base.make()
    for (name, leaf), (other, like) in zip(named_params(model), named_params(plain), strict=True):
        assert name == other
        assert leaf.get_metadata() == like.get_metadata(), name
    one, two = (draw(dict(named_params(each)), 3) for each in (model, plain))
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name], err_msg=name)


# Yang et al., 2022, table 3, the column of Adam; `gain` is Θ(fan-out), as gradients are Θ(1 / fan-out) but of the head.
@pytest.mark.parametrize(
    ('path', 'drawn', 'rate', 'gain'),
    [
        ('embed.table', 1, 1, 4),  # input
        ('attention.query.kernel', 4**-0.5, 1 / 4, 4),  # hidden
        ('attention.key.kernel', 4**-0.5, 1 / 4, 4),
        ('attention.out.kernel', 4**-0.5, 1 / 4, 4),
        ('mlp.gate.kernel', 4**-0.5, 1 / 4, 4),
        ('mlp.down.kernel', 4**-0.5, 1 / 4, 4),
        ('mlp.up.bias', 0, 1, 4),  # vectors
        ('attention_norm.scale', 0, 1, 4),
        ('stack.period.0.mlp.down.bias', 0, 1, 4),
        ('head.kernel', 1 / 4, 1 / 4, 1),  # output
        ('head.bias', 0, 1, 1),
    ],
)
def test_the_rules_of_width(path, drawn, rate, gain):
    assert rules(mup(bias=('mlp', 'head')), path) == pytest.approx((drawn, rate, gain))


def test_tied_embeddings_leave_the_scale_of_logits_to_the_last_norm():
    config = mup(tied_embeddings=True)
    assert rules(config, 'embed.table') == pytest.approx((1, 1, 4))
    leaf = dict(named_params(config.make()))['norm.scale'].get_metadata()
    assert (leaf['init'].value, leaf['rate'], leaf['gain']) == (0.25, 0.25, 1.0)
    offset = dict(named_params(mup(tied_embeddings=True, norm='rms_offset').make()))['norm.scale'].get_metadata()
    assert offset['init'].value == -0.75  # 1 is added to it


# Dey et al., 2025, table 1: what a layer adds times L^-a, steps within layers times L^(a - 1), eps times L^-a. Folded
# into the maps that write to the stream, these are drawn and stepped L^-a as far.
@pytest.mark.parametrize('depth', [1.0, 0.5])
def test_the_rules_of_depth(depth):
    config = mup(depth, layers=12, bias=('mlp',), **{name: getattr(toy.config(), name) for name in WIDER})
    inside = 4 ** (depth - 1)
    assert rules(config, 'mlp.up.kernel') == pytest.approx((1, inside, 4**depth))
    assert rules(config, 'mlp_norm.scale') == pytest.approx((0, inside, 4**depth))
    assert rules(config, 'mlp.down.kernel') == pytest.approx((4**-depth, inside * 4**-depth, 1))
    assert rules(config, 'mlp.down.bias') == pytest.approx((0, inside * 4**-depth, 1))
    assert rules(config, 'attention.out.kernel') == pytest.approx((4**-depth, inside * 4**-depth, 1))
    assert rules(config, 'embed.table') == pytest.approx((1, 1, 1))
    assert rules(config, 'head.kernel') == pytest.approx((1, 1, 1))


def test_wider_heads_have_scores_over_their_width():
    """1 / width of a head instead of its root (definition 4.1), in the queries."""
    config = mup(head_dim=24)
    assert rules(config, 'attention.query.kernel') == pytest.approx((4**-0.5 / 2, 1 / 8, 8))
    assert rules(config, 'attention.key.kernel') == pytest.approx((4**-0.5, 1 / 4, 16))
    assert rules(config, 'attention.out.kernel') == pytest.approx((16**-0.5, 1 / 16, 4))


def test_experts_are_hidden_and_their_router_is_an_output():
    base = {'moe': MoE(experts=4, chosen=2, expert_width=8)}
    big = toy.config(**WIDER, moe=MoE(experts=4, chosen=2, expert_width=32))
    config = MuPConfig.of(big, toy.config(**base))
    assert config.base['moe.expert_width'] == 8
    assert rules(config, 'experts.up.kernel') == pytest.approx((4**-0.5, 1 / 4, 4))
    assert rules(config, 'experts.down.kernel') == pytest.approx((4**-0.5, 1 / 4, 4))
    assert rules(config, 'router.map.kernel') == pytest.approx((1 / 4, 1 / 4, 1))


def test_it_is_table_8_with_the_multiplier_folded_into_the_head():
    """The published form multiplies logits by 1 / 4, and draws and steps its head as the base's: the same model after
    every step, in float32.
    """
    config, plain = mup(), toy.config(**WIDER, logit_scale=0.25)
    optimizer = AdamW(schedule=Schedule(peak=0.02, decay='constant'), eps=1e-30, clip=0.0, weight_decay=0.1)
    hidden = Group(match=r'stack.*\.kernel', learning_rate=0.25, weight_decay=4.0)
    graph, other = (ModelGraph(each.make(vocab_multiple=1)) for each in (config, plain))
    weights, batch = draw(graph.leaves, 0), toy.batch([[1] * 8, [1] * 8])
    ours = trained(graph, weights, optimizer, batch)
    published = weights | {'head.kernel': 4 * weights['head.kernel']}
    theirs = trained(other, published, dataclasses.replace(optimizer, groups=(hidden,)), batch)
    np.testing.assert_allclose(ours, theirs, atol=2e-4)
    assert np.abs(ours - graph.bind(weights)(batch.tokens)).max() > 0.1


def trained(graph, weights, optimizer, batch):
    """Logits after four steps."""
    tx, objective = optimizer.make(param_infos(graph), 4), NextToken()

    def loss(weights, step):
        return objective(graph.bind(weights), batch, frozen=None, key=None, step=step)[0]

    def step(carry, count):
        weights, state = carry
        weights, state, _ = tx(jax.grad(loss)(weights, count), state, weights, count, optimizer.schedule.peak)
        return (weights, state), None

    (weights, _), _ = jax.jit(lambda w: jax.lax.scan(step, (w, tx.init(w)), jnp.arange(4)))(weights)
    return graph.bind(weights)(batch.tokens)


def test_what_was_trained_is_a_plain_model(tmp_path):
    """Its weights are written as any decoder's, and read back as one."""
    graph = ModelGraph(mup(tied_embeddings=True, layers=6).make(vocab_multiple=8))
    model = graph.bind(toy.weights(graph))
    pretrained.save_pretrained(model, None, tmp_path)
    again = pretrained.read_model(pretrained.open_source(tmp_path), 'float32')
    assert type(config_lib.load(json.loads(again.described))) is DecoderConfig
    tokens = np.arange(8)[None]
    np.testing.assert_allclose(again(tokens), model(tokens), atol=1e-5)


def test_stages_and_a_padded_vocabulary_draw_the_same_numbers():
    config = mup(layers=6)
    plain, staged = (dict(named_params(config.make(vocab_multiple=v, stages=s))) for v, s in ((1, 1), (8, 4)))
    one, two = draw(plain, 5), draw(staged, 5)
    np.testing.assert_array_equal(two['head.kernel'][:, :19], one['head.kernel'])
    layers = staged['stack.period.0.mlp.down.kernel'].get_metadata('layers')
    for slot, layer in enumerate(layers):
        if layer >= 0:
            name = 'stack.period.0.mlp.down.kernel'
            np.testing.assert_array_equal(two[name][slot], one[name][layer])
    assert {leaf.get_metadata('rate') for leaf in plain.values()} == {
        leaf.get_metadata('rate') for leaf in staged.values()
    }


def test_it_is_written_down_and_read_back():
    config = mup(0.5, layers=6)
    validate(config)
    assert config_lib.load(json.loads(config_lib.to_json(config))) == config
    assert config.smaller() == toy.config()
    assert config.plain() == toy.config(**WIDER, layers=6)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'base': {'width': 16}}, "base lacks 'layers'"),
        ({'base': {'wdth': 16}}, r"base has 'wdth' \(did you mean 'width'\?\)"),
        ({'depth': 2.0}, 'depth = 2.0; it is a power from 0.5'),
        ({'norm_place': 'post', 'layers': 6}, "the rules of depth are for norm_place = 'pre'"),
        ({'head_dim': 8, 'qk_norm': 'head'}, 'widen by more heads instead'),
        ({'tied_embeddings': True, 'norm': 'layer_fixed'}, 'set tied_embeddings = False'),
        ({'predict_ahead': 1}, 'train this model without a base'),
    ],
)
def test_what_has_no_rule_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        validate(dataclasses.replace(mup(), **change))


def test_a_base_of_another_kind_is_refused():
    with pytest.raises(
        ConfigError, match=r"model.mlp is 'relu' and 'swiglu' in the base: learning rates transfer over"
    ):
        MuPConfig.of(toy.config(mlp='relu'), toy.config())
    state_space = {'mixers': ('ssm',), 'ssm': Mamba(), 'position': 'none', 'heads': 0, 'kv_heads': 0, 'head_dim': 0}
    with pytest.raises(ConfigError, match='train this model without a base'):
        MuPConfig.of(toy.config(**state_space), toy.config(**state_space)).make()


def test_what_only_the_machine_sees_may_differ_from_the_base():
    config = MuPConfig.of(toy.config(**WIDER, remat='full', dtype='bfloat16'), toy.config())
    assert isinstance(config.make().stack, Stack)
    assert config.make().stack.remat == 'full'

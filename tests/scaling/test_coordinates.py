"""The coordinate check tells a parametrisation whose learning rate transfers from one whose does not."""

import dataclasses
import pathlib

import numpy as np
import pytest
import toy

from tests.train import tiny
from tpu_llm.config import ConfigError
from tpu_llm.models.graph import ModelGraph
from tpu_llm.models.mup import MuPConfig
from tpu_llm.nn.mla import MLA
from tpu_llm.nn.moe import MoE
from tpu_llm.nn.param import draw
from tpu_llm.objectives.masked import Masked
from tpu_llm.optim.optimizer import SGD, Adafactor, AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.scaling import coordinates
from tpu_llm.scaling.__main__ import main
from tpu_llm.scaling.coordinates import STEADY, Check, activations, changes, check, larger, random_batch

pytestmark = pytest.mark.usefixtures('quick_compile')

BASE = toy.config(vocab_size=32, width=32, layers=1, heads=2, kv_heads=2, head_dim=16, mlp_width=64)


def make_run(model=BASE, optimizer=None):
    run = tiny.get_config()
    run.model, run.data.form = model, None
    run.optimizer = optimizer or AdamW(schedule=Schedule(peak=4e-3, warmup=2), weight_decay=0.1)
    return run


def checked(run, **options):
    defaults = {'over': 'width', 'times': (1, 4), 'steps': 5, 'seeds': 4, 'rows': 2, 'length': 8}
    return check(run, **(defaults | options))


@pytest.fixture(scope='module')
def both():
    return checked(make_run())


def test_with_mup_nothing_grows_or_shrinks_with_the_width(both):
    _, mup = both
    exponents = mup.exponents()
    assert exponents.keys() >= {'embed', 'attention.query', 'attention.out', 'mlp.up', 'mlp.down', 'stream', 'head'}
    assert max(map(abs, exponents.values())) < STEADY, exponents


def test_in_the_standard_parametrisation_all_of_it_does(both):
    standard, _ = both
    exponents = standard.exponents()
    assert exponents.pop('embed') < -2 * STEADY
    assert min(exponents.values()) > 2 * STEADY, exponents


FULL = {
    'tied': (dataclasses.replace(BASE, tied_embeddings=True), None),
    'experts': (dataclasses.replace(BASE, moe=MoE(experts=4, chosen=2, expert_width=32)), None),
    'latent': (dataclasses.replace(BASE, mla=MLA(kv_rank=16, query_rank=16, rope_dim=8, value_dim=16)), None),
    'learned positions': (dataclasses.replace(BASE, position='learned', max_length=16, norm='layer', mlp='gelu'), None),
    'Adafactor': (BASE, Adafactor(schedule=Schedule(peak=1e-3), min_factored=16)),
    'SGD': (BASE, SGD(schedule=Schedule(peak=0.02), clip=0.0)),
}


@pytest.mark.full
@pytest.mark.parametrize('name', FULL)
def test_so_it_is_of_other_decoders_and_optimizers(name):
    _, mup = checked(make_run(*FULL[name]), seeds=6)
    assert max(map(abs, mup.exponents().values())) < STEADY, mup.exponents()


@pytest.mark.full
def test_with_complete_p_nothing_grows_with_the_depth():
    """From eight layers on: the first differs from the others. Embeddings of size 1, so that they outweigh a layer."""
    model = dataclasses.replace(BASE, layers=8, embed_scale=32**0.5)
    standard, mup = checked(make_run(model, AdamW(schedule=Schedule(peak=5e-4))), over='layers', times=(1, 2))
    assert max(map(abs, mup.exponents().values())) < STEADY, mup.exponents()
    assert standard.furthest()[1] > 4 * STEADY


def test_exponents_are_slopes_of_powers():
    moved = tuple({'up': 3.0 * times**0.5, 'embed': 2.0 / times} for times in (1, 2, 4, 8))
    exponents = Check(name='', times=(1, 2, 4, 8), moved=moved).exponents()
    assert exponents == {'up': pytest.approx(0.5), 'embed': pytest.approx(-1.0)}
    assert Check(name='', times=(1, 2, 4, 8), moved=moved).furthest() == ('embed', pytest.approx(-1.0))


def test_what_is_heard_is_what_the_model_computes():
    graph = ModelGraph(dataclasses.replace(BASE, layers=2).make())
    drawn, other = draw(graph.leaves, 0), draw(graph.leaves, 1)
    batch = random_batch(32, 2, 8)
    model, heard = graph.bind(drawn), activations(graph, drawn, batch)
    np.testing.assert_allclose(heard['hidden'][0], model.hidden(batch.tokens), atol=1e-5)
    np.testing.assert_allclose(heard['embed'][0], drawn['embed.table'][batch.tokens], atol=1e-6)
    assert heard['attention.query'].shape == (2, 2, 8, 2, 16)
    same = changes(graph, drawn, drawn, batch)
    assert set(same) == set(heard) - {'hidden'} | {'head'}
    assert max(same.values()) == 0.0
    moved = changes(graph, drawn, drawn | {'head.kernel': other['head.kernel']}, batch)
    assert {name for name, value in moved.items() if value} == {'head'}
    expected = np.abs(model.hidden(batch.tokens) @ (other['head.kernel'] - drawn['head.kernel'])).mean()
    np.testing.assert_allclose(moved['head'], expected, rtol=1e-5)


def test_larger_models_keep_the_width_of_heads():
    wide = larger(dataclasses.replace(BASE, moe=MoE(experts=4, chosen=2, expert_width=8)), 'width', 4)
    assert (wide.width, wide.heads, wide.kv_heads, wide.head_dim, wide.mlp_width) == (128, 8, 8, 16, 256)
    assert (wide.layers, wide.moe.expert_width, wide.moe.experts) == (1, 32, 4)
    deep = larger(BASE, 'layers', 4)
    assert (deep.width, deep.layers) == (32, 4)


def test_a_model_with_a_base_is_checked_from_it():
    """Over one size and none larger it says so before anything is compiled."""
    run = make_run(MuPConfig.of(larger(BASE, 'width', 4), BASE))
    with pytest.raises(ConfigError, match='at least two sizes, from 1 upwards'):
        checked(run, times=(1,))


@pytest.mark.parametrize(
    ('options', 'message'),
    [({'times': (2, 4)}, 'from 1 upwards'), ({'times': (1, 4, 2)}, 'from 1 upwards'), ({'seeds': 0}, 'at least 1')],
)
def test_what_cannot_be_checked_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        checked(make_run(), **options)


def test_other_objectives_are_refused():
    run = make_run()
    run.objective = Masked()
    with pytest.raises(ConfigError, match='a decoder that learns next tokens; this run trains DecoderConfig by Masked'):
        checked(run)


def test_a_rate_that_diverges_is_named():
    optimizer = SGD(schedule=Schedule(peak=1e30), clip=0.0, momentum=0.0)
    with pytest.raises(ConfigError, match=r'diverged at learning rate 1e\+30; lower it: --config.optimizer'):
        checked(make_run(optimizer=optimizer))


TINY = str(pathlib.Path(tiny.__file__))


@pytest.mark.parametrize(('exponent', 'status'), [(0.02, 0), (-0.3, 1)])
def test_the_command_says_what_moves_and_whether_it_is_steady(exponent, status, monkeypatch, capsys):
    def made(name, power):
        return Check(name=name, times=(1, 4), moved=tuple({'up': times**power, 'embed': 0.5} for times in (1, 4)))

    given = {}

    def pretended(run, **options):
        given.update(options)
        return made('standard parametrisation', 0.5), made('muP', exponent)

    monkeypatch.setattr(coordinates, 'check', pretended)
    assert main(['coordinates', f'--config={TINY}', '--times=1,4', '--seeds=2', '--over=layers']) == status
    assert (given['times'], given['seeds'], given['over']) == ([1, 4], 2, 'layers')
    out = capsys.readouterr().out
    assert 'layers ×4' in out
    assert 'standard parametrisation: furthest from 0 is up with layers^+0.50' in out
    assert f'muP: furthest from 0 is up with layers^{exponent:+.2f}' in out


@pytest.mark.parametrize(
    ('flag', 'message'),
    [
        ('--times=1,x', 'error: --times=1,x; write whole numbers, as in 1,2,4,8'),
        ('--times=2,4', 'error: times = [2, 4]; write at least two sizes'),
        ('--config.optimizer.clip=-1', 'error: config.optimizer: clip = -1.0 and weight_decay'),
    ],
)
def test_the_command_answers_a_mistake_in_one_line(flag, message, capsys):
    assert main(['coordinates', f'--config={TINY}', flag]) == 2
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count('\n') == 1

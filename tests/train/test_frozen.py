"""A part of the model trains, the rest is held: what is saved, what survives a restart, what the objective is given."""

import dataclasses
import importlib.util
import pathlib
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpu_llm
from tpu_llm.checkpoint import reader, tensors
from tpu_llm.checkpoint.resume import Origin
from tpu_llm.config import ConfigError, machine, validate
from tpu_llm.models.scalar_head import ScalarConfig
from tpu_llm.nn.attention import Attention
from tpu_llm.nn.einsum import add_trailing
from tpu_llm.nn.param import Constant, named_params, param
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.peft.lora import LoRA, QLoRA
from tpu_llm.peft.wrapping import Kind
from tpu_llm.train import metrics
from tpu_llm.train.frozen import Reference
from tpu_llm.train.loop import fit

SPEC = importlib.util.spec_from_file_location('tiny', pathlib.Path(__file__).parent / 'tiny.py')
TINY = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TINY)


class Shifted(Attention):
    """Adds a learned vector to what attention gives; one that trains, and one made of a weight that is held."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y, cache = super().__call__(*args, **kwargs)
        return add_trailing(y, self.shift[...] + 0 * self.made[...]), cache


@dataclasses.dataclass(kw_only=True, slots=True)
class Shifts(Kind):
    def wrap(self, model):
        for block in (*model.stack.prefix, *model.stack.period, *model.stack.suffix):
            kernel = block.attention.out.kernel
            dims = 'L' if kernel.get_metadata('dims').startswith('L') else ''
            shape = kernel.shape[: len(dims)]
            declared = param(dims + 'D', (*shape, kernel.shape[-1]), Constant(0.0), added=True)
            block.attention.shift = declared.replace(declared.get_value(), layers=kernel.get_metadata('layers'))
            value = kernel.get_value()
            value = value if isinstance(value, jax.ShapeDtypeStruct) else value.sum(axis=(-3, -2))
            value = (
                jax.ShapeDtypeStruct((*shape, kernel.shape[-1]), value.dtype) if value.ndim > len(dims) + 1 else value
            )
            block.attention.made = kernel.replace(value, dims=dims + 'D', summed='')
            block.attention.__class__ = Shifted

    def trains(self, path):
        return path.endswith('.shift')


@dataclasses.dataclass(kw_only=True, slots=True)
class Apart(NextToken):
    """The loss, and how far the reference's is from it."""

    needs_frozen: ClassVar = True
    weight: float = 0.0
    unused: int = machine(0)

    def __call__(self, model, batch, *, frozen, key, step):
        loss, weight, sums = NextToken.__call__(self, model, batch, frozen=None, key=None, step=step)
        other, _, _ = NextToken.__call__(self, frozen, batch, frozen=None, key=None, step=step)
        return loss, weight, sums | {'apart': jax.lax.stop_gradient(loss - other)}


def config(text, **changes):
    run = TINY.get_config(f'text={text},steps=6,every=3')
    run.ema, run.hooks, run.model.dropout = 0.0, run.hooks[:1], None
    run.objective = Apart()
    return dataclasses.replace(run, **changes)


def arrays(workdir):
    checkpoint = reader.find(workdir)
    return {name: tensors.read_to_host(checkpoint.folder, name) for name in checkpoint.manifest()['tensors']}


def column(workdir, name):
    return [line[name] for line in metrics.read(workdir / 'metrics.jsonl') if name in line]


@pytest.fixture(scope='module')
def whole(text, tmp_path_factory):
    """A run that trains everything, beside where it began."""
    workdir = tmp_path_factory.mktemp('parts') / 'whole'
    fit(config(text, reference=Reference()), workdir)
    return workdir


@pytest.fixture(scope='module')
def part(text, whole, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('parts') / 'part'
    fit(config(text, peft=Shifts(), origin=Origin(weights=str(whole))), workdir)
    return workdir


def test_the_reference_is_where_the_run_began(whole):
    apart = column(whole, 'apart')
    assert apart[0] == 0.0
    assert np.all(np.diff(apart) < 0)


def test_only_what_trains_is_saved(part):
    saved = {name for name in arrays(part) if name.startswith('params.')}
    assert saved == {'params.stack.period.0.attention.shift'}
    assert not [name for name in arrays(part) if 'kernel' in name or 'table' in name]
    assert np.abs(arrays(part)['params.stack.period.0.attention.shift']).max() > 0


def test_without_a_reference_of_its_own_it_is_the_bare_model(whole, part):
    apart = column(part, 'apart')
    assert apart[0] == 0.0
    assert apart[-1] < 0.0
    # It began with the weights that were given: far better than fresh ones.
    assert column(part, 'loss')[0] < column(whole, 'loss')[0] - 0.5


def test_what_is_made_of_held_weights_is_made_and_hooks_see_all(part):
    assert len(column(part, 'bits_per_byte')) >= 1


KINDS = {
    'lora': LoRA(rank=4, targets=('query', 'value')),
    'dora': LoRA(rank=4, targets=('query', 'value', 'up'), dora=True),
    'qlora': QLoRA(rank=4, targets=('query', 'value'), base='nf4'),
}


@pytest.mark.parametrize('kind', ['lora', *(pytest.param(kind, marks=pytest.mark.full) for kind in ('dora', 'qlora'))])
def test_adapters_train_beside_the_model_that_they_stand_on(text, whole, tmp_path, kind):
    """The reference is the base as it is held: at first the same, without a second copy."""
    fit(config(text, peft=KINDS[kind], origin=Origin(weights=str(whole))), tmp_path)
    saved = {name for name in arrays(tmp_path) if name.startswith('params.')}
    assert saved
    assert all('lora' in name or 'magnitude' in name for name in saved)
    apart, losses = column(tmp_path, 'apart'), column(tmp_path, 'loss')
    assert apart[0] == pytest.approx(0.0, abs=1e-5)
    assert apart[-1] < 0.0
    assert losses[0] < column(whole, 'loss')[0] - 0.5


@pytest.mark.parametrize(('kind', 'mesh'), [('lora', {}), pytest.param('qlora', {'tensor': 2}, marks=pytest.mark.full)])
def test_the_next_stage_goes_on_with_what_adapters_learned(text, whole, tmp_path, kind, mesh):
    """Their run loads as the model that it stands on, the adapters in its kernels."""
    fit(config(text, peft=KINDS[kind], origin=Origin(weights=str(whole))), tmp_path / 'first')
    model, _ = tpu_llm.from_pretrained(tmp_path / 'first')
    assert {name.rpartition('.')[2] for name, _ in named_params(model)} == {'kernel', 'scale', 'table'}
    begun, _ = tpu_llm.from_pretrained(whole)
    tokens = np.arange(24).reshape(1, 24)
    assert np.abs(model(tokens) - begun(tokens)).max() > 1e-3
    run = config(text, objective=NextToken(), origin=Origin(weights=str(tmp_path / 'first')), mesh=Mesh(**mesh))
    run.hooks[0].every, run.optimizer.schedule.peak = 1, 1e-9
    fit(run, tmp_path / 'second')
    last = [line for line in metrics.read(tmp_path / 'first/metrics.jsonl') if 'bits_per_byte' in line][-1]
    # What NF4 rounds scales to depends a little on how far the vocabulary is padded, which the mesh decides.
    close = 1e-3 if kind == 'qlora' else 1e-4
    assert column(tmp_path / 'second', 'bits_per_byte')[0] == pytest.approx(last['bits_per_byte'], rel=close)


@pytest.mark.parametrize('kind', ['whole', 'part'])
def test_it_continues_bitwise(text, whole, part, tmp_path, kind):
    changes = (
        {'reference': Reference()} if kind == 'whole' else {'peft': Shifts(), 'origin': Origin(weights=str(whole))}
    )
    run = config(text, **changes)
    run.hooks = (*run.hooks, Stop(every=1))
    with pytest.raises(RuntimeError, match='stop'):
        fit(run, tmp_path)
    fit(config(text, **changes), tmp_path)
    expected = arrays({'whole': whole, 'part': part}[kind])
    for name, array in arrays(tmp_path).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@dataclasses.dataclass(kw_only=True, slots=True)
class Stop(TINY.Periodic):
    def open(self, session):
        def call(step, weights):
            if step == 4:
                raise RuntimeError('stop')
            return {}

        return call


def test_weights_of_a_plain_decoder_fit_one_with_a_scalar_head(text, whole, tmp_path):
    run = config(text, objective=NextToken(), origin=Origin(weights=str(whole)))
    run = dataclasses.replace(run, model=ScalarConfig.of(run.model), steps=3)
    fit(run, tmp_path)
    there, before = arrays(tmp_path), arrays(whole)
    assert there['params.score'].std() > 0
    assert there['params.score'].shape == (32,)
    moved = np.abs(there['params.embed.table'] - before['params.embed.table']).max()
    assert 0 < moved < 0.1
    # And a run with the head goes on with it.
    again = dataclasses.replace(
        run, origin=Origin(weights=str(tmp_path)), optimizer=TINY.AdamW(schedule=TINY.Schedule(peak=1e-9))
    )
    fit(again, tmp_path / 'again')
    np.testing.assert_allclose(arrays(tmp_path / 'again')['params.score'], there['params.score'], atol=1e-6)


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'objective': Apart()}, r'objective Apart needs a frozen model; set reference=Reference\(\)'),
        (
            {'objective': NextToken(), 'reference': Reference()},
            'objective NextToken reads no frozen model; take reference out',
        ),
        ({'reference': Reference(dtype='int8')}, "reference.dtype is 'int8'; write 'float32' or 'bfloat16'"),
    ],
)
def test_what_cannot_be(text, changes, said):
    with pytest.raises(ConfigError, match=said):
        validate(config(text, **changes))


def test_a_reference_elsewhere_is_named_where_it_is_missing(text, tmp_path):
    with pytest.raises(ConfigError, match=r"reference\.weights='/nowhere' holds no finished checkpoint"):
        fit(config(text, reference=Reference(weights='/nowhere')), tmp_path)


def test_a_reference_may_be_held_in_bfloat16(text, tmp_path):
    fit(config(text, reference=Reference(dtype='bfloat16'), steps=3), tmp_path)
    assert 0 < abs(column(tmp_path, 'apart')[0]) < 0.01
    assert jnp.isfinite(column(tmp_path, 'loss')[0])

"""Soft prompts of several tasks train in mixed batches, each by its own rows."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tuned

from tpu_llm.arrays import Batch, TaskBatch
from tpu_llm.checkpoint import reader, tensors
from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import ConfigError, validate
from tpu_llm.data.forms import Tasks
from tpu_llm.data.loader import Data, Loader, open_documents, open_tokenizer
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Conversations
from tpu_llm.data.tokenizer import Bytes
from tpu_llm.evals.objective import HeldOutObjective
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.graph import ModelGraph
from tpu_llm.objectives.each_task import EachTask
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.peft.prompts import SoftPrompts
from tpu_llm.train.loop import fit
from tpu_llm.train.run import Run

pytestmark = pytest.mark.usefixtures('quick_compile')

MODEL = DecoderConfig(
    vocab_size=259, width=32, layers=1, heads=4, kv_heads=4, head_dim=8, mlp_width=64, dtype='float32'
)
SAID = {'first': 'aaaa', 'second': 'bbbb'}


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    """The same prompts, whose answers only the task tells."""
    folder, found = tmp_path_factory.mktemp('tasks'), {}
    for name, answer in SAID.items():
        path = folder / f'{name}.jsonl'
        lines = [json.dumps({'prompt': f'{i}:', 'completion': answer}) for i in range(20)]
        path.write_text('\n'.join(lines))
        found[name] = Conversations(paths=(str(path),), template='plain')
    return found


def config(sources, **changes):
    run = Run(
        model=MODEL,
        data=Data(
            mixture=Mixture(sources=sources, weights={0: dict.fromkeys(sources, 1.0)}),
            tokenizer=Bytes(),
            seq_len=16,
            global_batch=8,
            interleave=1,
            whole=True,
            overlong='drop',
            form=Tasks(),
        ),
        objective=EachTask(),
        optimizer=AdamW(schedule=Schedule(peak=0.1, warmup=1)),
        steps=3,
        peft=SoftPrompts(length=2, tasks=2),
        checkpoints=Checkpoints(every=100, keep=1),
        log_every=1,
        report=False,
    )
    return dataclasses.replace(run, **changes)


def test_a_row_is_one_document_of_its_task(sources, tmp_path):
    data = config(sources).data
    tokenizer = open_tokenizer(data, tmp_path)
    batch = Loader(data, open_documents(data, tokenizer, tmp_path), tokenizer, seed=0).batch(1)
    assert isinstance(batch, TaskBatch)
    assert set(batch.tasks) == {0, 1}
    assert batch.segments.max() == 1
    for task, targets, weights in zip(batch.tasks, batch.targets, batch.weights, strict=True):
        said = targets[weights > 0][:-1].tolist()
        assert tokenizer.decode(said) == list(SAID.values())[task]


def test_a_row_is_as_with_its_prompt_alone():
    model = tuned.noisy(tuned.wrapped(SoftPrompts(length=2, tasks=2), layers=1))
    rows = np.asarray(tuned.TOKENS)
    plain = {'tokens': rows, 'targets': rows, 'segments': np.ones_like(rows), 'weights': np.ones(rows.shape, 'f4')}
    plain['positions'] = np.broadcast_to(np.arange(rows.shape[1], dtype=np.int32), rows.shape)

    def value_and_grad(graph, objective):
        def loss(weights, batch):
            step = jnp.zeros((), jnp.int32)
            return objective(graph.bind(weights), batch, frozen=None, key=None, step=step)[0]

        return jax.jit(jax.value_and_grad(loss))

    mixed, weights = TaskBatch(tasks=np.array([1, 0], np.int32), **plain), tuned.weights(model)
    total, grads = value_and_grad(ModelGraph(model), EachTask())(weights, mixed)
    alone = value_and_grad(ModelGraph(tuned.wrapped(SoftPrompts(length=2), layers=1)), NextToken())
    expected = 0.0
    for row, task in enumerate(mixed.tasks):
        of_row = Batch(**{name: x[row : row + 1] for name, x in plain.items()})
        prompt = weights['embed.prompts'][task : task + 1]
        own, grad = alone({**weights, 'embed.prompts': prompt}, of_row)
        np.testing.assert_allclose(grads['embed.prompts'][task], grad['embed.prompts'][0], rtol=1e-3, atol=1e-4)
        expected += own
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_every_task_trains_on_any_mesh(sources, tmp_path):
    learned = []
    for mesh in (Mesh(), Mesh(fsdp=4, tensor=2)):
        fit(config(sources, mesh=mesh), tmp_path / str(mesh.tensor))
        checkpoint = reader.find(tmp_path / str(mesh.tensor))
        assert checkpoint is not None
        assert [name for name in checkpoint.manifest()['tensors'] if name.startswith('params.')] == [
            'params.embed.prompts'
        ]
        learned.append(tensors.read_to_host(checkpoint.folder, 'params.embed.prompts'))
    assert learned[0].shape == (2, 2, 32)
    np.testing.assert_allclose(learned[0], learned[1], rtol=1e-3, atol=1e-4)
    assert np.abs(learned[0][0] - learned[0][1]).min() > 0


WRONG = [
    ({'peft': SoftPrompts(tasks=3)}, r'each of the 2 sources is a task, and there are prompts for 3; set peft = Soft'),
    ({'peft': None}, r'each of the 2 sources is a task, and there are prompts for 1'),
    ({'objective': NextToken()}, r'objective NextToken reads Batch, and data\.form = Tasks gives TaskBatch'),
]


@pytest.mark.parametrize(('changes', 'said'), WRONG)
def test_what_cannot_be(sources, changes, said):
    with pytest.raises(ConfigError, match=said):
        validate(config(sources, **changes))


def test_rows_are_whole_and_nothing_is_held_out(sources, tmp_path):
    run = config(sources)
    run.data.whole = False
    with pytest.raises(ConfigError, match='form = Tasks is of whole texts; set whole = True'):
        validate(run)
    held_out = config(sources, hooks=(HeldOutObjective(source=sources['first']),))
    with pytest.raises(ConfigError, match='it is not told which task held-out documents are of'):
        fit(held_out, tmp_path)

"""Distillation, by run: on texts, on what the student writes, and on what the teacher wrote."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from tpu_llm.checkpoint import pretrained, reader, tensors
from tpu_llm.checkpoint.resume import Origin
from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import ConfigError, Periodic, validate
from tpu_llm.data.loader import Data, open_tokenizer
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.prompts import Prompts
from tpu_llm.data.sources import Conversations, Sums
from tpu_llm.data.taught import Taught
from tpu_llm.data.tokenizer import Bytes
from tpu_llm.evals.objective import HeldOutObjective
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.projected import ProjectedConfig
from tpu_llm.objectives.distill import Distill, DistillStored
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.rl.on_policy import OnPolicy
from tpu_llm.rl.writing import Write
from tpu_llm.train import metrics
from tpu_llm.train.frozen import Reference
from tpu_llm.train.loop import fit
from tpu_llm.train.run import Run
from tpu_llm.train.teaching import Teaching

pytestmark = pytest.mark.usefixtures('quick_compile')

SHAPE = {'vocab_size': 259, 'layers': 1, 'heads': 4, 'kv_heads': 4, 'head_dim': 8, 'mlp_width': 64, 'dtype': 'float32'}
TEACHER, STUDENT = DecoderConfig(width=48, **SHAPE), DecoderConfig(width=32, **SHAPE)
TALKS = Mixture(sources={'sums': Sums(split='train', digits=1)})
ASKED = Mixture(sources={'sums': Sums(split='train', digits=1, asked=True)})


def config(kind=Run, **changes):
    defaults = {
        'model': STUDENT,
        'data': Data(
            mixture=ASKED if kind is OnPolicy else TALKS,
            tokenizer=Bytes(),
            seq_len=32,
            global_batch=8,
            interleave=1,
            whole=True,
            overlong='drop',
        ),
        'objective': Distill(),
        'optimizer': AdamW(schedule=Schedule(peak=1e-2, warmup=2)),
        'steps': 6,
        'log_every': 1,
        'checkpoints': Checkpoints(every=100, keep=1),
        'report': False,
    }
    return kind(**(defaults | changes))


def on_policy(teacher, **changes):
    own = {'max_new_tokens': 12, 'template': 'plain', 'reference': Reference(model=TEACHER, weights=teacher)}
    return config(OnPolicy, **(own | changes))


def column(workdir, name):
    return [line[name] for line in metrics.read(workdir / 'metrics.jsonl') if name in line]


def arrays(workdir):
    checkpoint = reader.find(workdir)
    return {name: tensors.read_to_host(checkpoint.folder, name) for name in checkpoint.manifest()['tensors']}


@dataclasses.dataclass(kw_only=True, slots=True)
class Stop(Periodic):
    def open(self, session):
        def call(step, weights):
            if step == 3:
                raise RuntimeError('stop')
            return {}

        return call


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """Of a width of its own; it has learned a little."""
    workdir = tmp_path_factory.mktemp('distill') / 'teacher'
    fit(config(model=TEACHER, objective=NextToken(), steps=60), workdir)
    return str(workdir)


@pytest.fixture(scope='module')
def written(teacher, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('distill') / 'on-policy'
    fit(on_policy(teacher), workdir)
    return workdir


def test_a_student_nears_a_teacher_of_another_width(teacher, tmp_path):
    """With nothing to learn from but the teacher; `nll` is of the labels, at temperature 1."""
    run = config(reference=Reference(model=TEACHER, weights=teacher), objective=Distill(temperature=2.0), steps=40)
    fit(run, tmp_path)
    apart, loss, nll = (column(tmp_path, name) for name in ('divergence', 'loss', 'nll'))
    np.testing.assert_allclose(loss, 4 * np.array(apart), rtol=1e-5)
    assert apart[-1] < 0.2 * apart[0]
    assert nll[-1] < nll[0] - 2


def test_hidden_states_follow_through_a_map_that_learns(teacher, tmp_path):
    """And the student goes on without it."""
    run = config(
        model=ProjectedConfig.of(STUDENT, TEACHER.width),
        reference=Reference(model=TEACHER, weights=teacher),
        objective=Distill(hidden=2.0),
        steps=20,
    )
    fit(run, tmp_path / 'mapped')
    apart, hidden, loss = (column(tmp_path / 'mapped', name) for name in ('divergence', 'hidden', 'loss'))
    np.testing.assert_allclose(loss, np.array(apart) + 2 * np.array(hidden), rtol=1e-5)
    assert hidden[-1] < 0.7 * hidden[0]
    assert arrays(tmp_path / 'mapped')['params.project'].shape == (32, 48)
    plain = config(objective=NextToken(), origin=Origin(weights=str(tmp_path / 'mapped')), steps=3)
    fit(plain, tmp_path / 'plain')
    assert column(tmp_path / 'plain', 'loss')[0] < column(tmp_path / 'mapped', 'nll')[0] - 1
    assert 'params.project' not in arrays(tmp_path / 'plain')


def test_the_student_is_taught_on_what_it_writes(written):
    assert len(column(written, 'divergence')) == 6
    assert column(written, 'divergence')[-1] < column(written, 'divergence')[0]
    assert all(0 < length <= 12 for length in column(written, 'response_tokens'))
    assert all(0 <= share <= 1 for share in column(written, 'finished'))


def test_what_it_writes_goes_on_bitwise(teacher, written, tmp_path):
    with pytest.raises(RuntimeError, match='stop'):
        fit(on_policy(teacher, hooks=(Stop(every=1),), checkpoints=Checkpoints(every=3)), tmp_path)
    fit(on_policy(teacher), tmp_path)
    assert column(tmp_path, 'divergence') == column(written, 'divergence')
    expected = arrays(written)
    for name, array in arrays(tmp_path).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize('kind', ['texts', 'on policy'])
@pytest.mark.full
def test_weights_and_vocabulary_split_give_the_same_losses(teacher, tmp_path, kind):
    found = {}
    for name, mesh in (('whole', Mesh(data=8, fsdp=1)), ('split', Mesh(fsdp=4, tensor=2))):
        reference = Reference(model=TEACHER, weights=teacher)
        objective = Distill(divergence='jensen_shannon', labels=0.1)
        make = config if kind == 'texts' else lambda **fields: on_policy(teacher, **fields)
        fit(make(mesh=mesh, steps=3, reference=reference, objective=objective), tmp_path / name)
        found[name] = column(tmp_path / name, 'loss')
    np.testing.assert_allclose(found['split'], found['whole'], rtol=1e-4)


def test_the_teacher_writes_what_the_student_reads(teacher, tmp_path, capfd):
    prompts = tmp_path / 'prompts.jsonl'
    asked = [{'prompt': f'{i} + 2 = ?\n'} for i in range(9)] + [{'prompt': 'x' * 30}]
    prompts.write_text('\n'.join(map(json.dumps, asked)))
    run = Write(
        path=teacher,
        source=Prompts(paths=(str(prompts),)),
        template='plain',
        prompt_length=20,
        max_new_tokens=14,
        rows=4,
        mesh=Mesh(fsdp=4, tensor=2),
    )
    run.main(str(tmp_path / 'answers'))
    (file,) = (tmp_path / 'answers').glob('*')
    assert file.name == 'answers-00000-of-00001.jsonl'
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert 0 < len(records) <= 9
    assert {record['prompt'] for record in records} <= {record['prompt'] for record in asked[:9]}
    assert f'{len(records)} answers' in (said := capfd.readouterr().err)
    assert f'left out {9 - len(records)} cut at max_new_tokens and 1 prompts over prompt_length' in said
    # A file that is there is done.
    file.write_text(file.read_text()[:0] + json.dumps(records[0]) + '\n')
    run.main(str(tmp_path / 'answers'))
    assert len(file.read_text().splitlines()) == 1
    data = dataclasses.replace(
        config().data, mixture=Mixture(sources={'a': Conversations(paths=(str(file),), template='plain')})
    )
    fit(config(data=data, objective=NextToken(), steps=3), tmp_path / 'student')


@pytest.fixture(scope='module')
def stored(teacher, tmp_path_factory):
    """All tokens but the least likely, so that nothing is lost but by rounding."""
    folder = tmp_path_factory.mktemp('distill') / 'likely'
    Teaching(path=teacher, data=config().data, top_k=258, mesh=Mesh(fsdp=4, tensor=2)).main(str(folder))
    return folder


def taught(folder, **changes):
    data = dataclasses.replace(config().data, form=Taught(path=str(folder)), **changes)
    return config(data=data, objective=DistillStored(labels=0.5), steps=4)


def test_from_what_is_stored_a_student_learns_the_same(teacher, stored, tmp_path):
    """float16 is off by 5e-4 of a log-prob."""
    fit(taught(stored), tmp_path / 'stored')
    reference = Reference(model=TEACHER, weights=teacher)
    fit(config(reference=reference, objective=Distill(labels=0.5), steps=4), tmp_path / 'live')
    for name in ('divergence', 'nll', 'loss'):
        found, expected = (column(tmp_path / run, name) for run in ('stored', 'live'))
        np.testing.assert_allclose(found, expected, rtol=2e-3, err_msg=name)


def test_what_is_stored_is_of_the_positions_that_count(teacher, stored, capfd):
    said = about(stored)
    assert (said['top_k'], [source['name'] for source in said['sources']]) == (258, ['sums'])
    spans, likely = np.load(stored / '0' / 'spans.npy'), np.fromfile(stored / '0' / 'likely.bin', np.int32)
    documents = TALKS.sources['sums'].open().encoded(open_tokenizer(config().data, stored))
    counted = [int((documents[i].pairs['weight'] > 0).sum()) for i in range(len(documents))]
    np.testing.assert_array_equal(spans[:, 1] - spans[:, 0], counted)
    assert len(likely) == 258 * sum(counted)
    again = Teaching(path=teacher, data=config().data, top_k=258)
    again.main(str(stored))
    assert 'all is stored' in capfd.readouterr().err
    with pytest.raises(ConfigError, match=r'likely holds 258 tokens of .* as it was then; give another --workdir'):
        dataclasses.replace(again, top_k=64).main(str(stored))


def test_another_teacher_than_the_one_that_was_stored_is_noticed(teacher, stored, tmp_path):
    identity = pretrained.open_source(teacher).identity()
    shutil.copytree(teacher, tmp_path / 'moved')
    assert pretrained.open_source(tmp_path / 'moved').identity() == identity == about(stored)['weights']
    fit(config(model=TEACHER, objective=NextToken(), steps=3), tmp_path / 'other')
    with pytest.raises(ConfigError, match=r'likely holds 258 tokens of .* as it was then; give another --workdir'):
        Teaching(path=str(tmp_path / 'other'), data=config().data, top_k=258).main(str(stored))
    run = taught(stored)
    run.data.form = Taught(path=str(stored), weights=pretrained.open_source(tmp_path / 'other').identity())
    with pytest.raises(ConfigError, match=r'likely is of a teacher with other weights .* store this one, in another'):
        fit(run, tmp_path / 'student')


def test_nothing_is_stored_of_what_is_held_out(stored, tmp_path):
    run = taught(stored)
    run.hooks = (HeldOutObjective(source=Sums(split='heldout', digits=1)),)
    with pytest.raises(ConfigError, match=r'HeldOutObjective: a teacher .* stored of the data .*; take the hook out'):
        fit(run, tmp_path / 'student')


def about(folder):
    return json.loads((folder / 'about.json').read_text())


def test_other_documents_than_the_teachers_are_refused(teacher, stored, tmp_path):
    other = Mixture(sources={'sums': Sums(split='heldout', digits=1)})
    with pytest.raises(ConfigError, match=r'is not what the teacher of .* read; store it again for these sources'):
        fit(taught(stored, mixture=other), tmp_path / 'other')
    with pytest.raises(ConfigError, match='holds no stored teacher; store one there with configs/distill'):
        fit(taught(tmp_path), tmp_path / 'none')
    with pytest.raises(ConfigError, match=r"documents as a teacher read them; set whole = True, overlong = 'drop'"):
        validate(taught(stored, overlong='truncate'))
    for changes, said in (
        ({'top_k': 0}, 'top_k is 0; it is at least 1'),
        ({'path': ''}, 'path is empty; give the teacher'),
        ({'data': taught(stored).data}, r'a teacher reads whole documents; set data\.whole'),
    ):
        with pytest.raises(ConfigError, match=said):
            validate(Teaching(**({'path': 'x', 'data': config().data} | changes)))
    with pytest.raises(ConfigError, match='top_k = 259 is all of the 259 tokens; keep fewer'):
        Teaching(path=teacher, data=config().data, top_k=259).main(str(tmp_path / 'all'))


WRONG = [
    ({'beta': 0.0}, r"beta is 0\.0; write a number between 0 and 1: at the ends are 'forward' and 'reverse'"),
    ({'temperature': 0.0}, r'temperature is 0\.0; it must be above 0'),
    ({'labels': -1.0}, r'labels = -1\.0, hidden = 0\.0 and chunk = 0 must not be negative'),
]


@pytest.mark.parametrize(('fields', 'said'), WRONG)
def test_settings_that_cannot_be_say_why(fields, said):
    with pytest.raises(ConfigError, match=said):
        Distill(**fields).validate()


def test_runs_that_cannot_be_say_why():
    with pytest.raises(ConfigError, match=r'objective Distill needs a frozen model; set reference=Reference\(\)'):
        validate(config())
    other = dataclasses.replace(TEACHER, vocab_size=300)
    with pytest.raises(ConfigError, match=r'reference\.model\.vocab_size = 300 is not model\.vocab_size = 259'):
        validate(config(reference=Reference(model=other, weights='x')))
    same = {'reference': Reference(model=TEACHER, weights='x')}
    with pytest.raises(
        ConfigError, match=r"of width 32 and the teacher's 48; set model to ProjectedConfig\.of\(model, 48"
    ):
        validate(config(objective=Distill(hidden=1.0), **same))
    with pytest.raises(ConfigError, match=r'objective\.hidden = 0, so that its map would not learn'):
        validate(config(model=ProjectedConfig.of(STUDENT, 48), **same))
    with pytest.raises(ConfigError, match=r'teacher_width is 0; it is the width of the teacher'):
        validate(ProjectedConfig.of(STUDENT, 0))
    for changes, said in (
        ({'max_new_tokens': 32}, r'max_new_tokens = 32 must be at least 1 and leave data\.seq_len = 32 room'),
        ({'sampling': 0.0}, r'sampling is 0\.0; it is a temperature above 0'),
        ({'steps': 0, 'epochs': 1.0}, 'is given in steps'),
    ):
        with pytest.raises(ConfigError, match=said):
            validate(on_policy('x', **changes))
    fields = {'path': 'x', 'source': ASKED.sources['sums']}
    for changes, said in (
        ({'answers': 2}, 'answers = 2 and temperature = 0: they would all be the same; raise it'),
        ({'temperature': -1.0}, r'temperature is -1\.0; write 0'),
        ({'rows': 0}, 'rows is 0; it is at least 1'),
        ({'path': ''}, 'path is empty; give the model that is to answer'),
    ):
        with pytest.raises(ConfigError, match=said):
            validate(Write(**(fields | changes)))

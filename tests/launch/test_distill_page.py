"""configs/distill.py: every kind validates, and its smoke form teaches a student."""

import json

import pytest

from configs import distill, sft
from tpu_llm.config import ConfigError, validate
from tpu_llm.rl.on_policy import OnPolicy
from tpu_llm.rl.writing import Write
from tpu_llm.train.loop import fit
from tpu_llm.train.teaching import Teaching

pytestmark = pytest.mark.usefixtures('quick_compile')


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """Of the smoke page, and barely begun."""
    run = sft.get_config('smoke')
    run.steps, run.hooks, run.report, run.optimizer.schedule.warmup = 8, (), False, 2
    workdir = tmp_path_factory.mktemp('distill') / 'teacher'
    fit(run, workdir)
    return workdir


def column(workdir, name):
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.mark.parametrize('kind', ['forward', 'reverse', 'js', 'onpolicy', 'store', 'stored', 'sequence'])
def test_every_kind_validates(teacher, kind):
    for arg in ('', ',smoke', f',model={teacher},data=a.jsonl,heldout=b.jsonl,template=plain'):
        stored = ',stored=there' if kind == 'stored' else ''
        run = distill.get_config(f'kind={kind},teacher={teacher}{arg}{stored}')
        validate(run)
        assert isinstance(run, {'onpolicy': OnPolicy, 'sequence': Write, 'store': Teaching}.get(kind, object))


def test_the_student_is_smaller_unless_it_is_given(teacher):
    run = distill.get_config(f'teacher={teacher}')
    assert (run.model.layers, run.reference.model.layers, run.origin.weights) == (1, 2, '')
    run = distill.get_config(f'teacher={teacher},model={teacher},data=a.jsonl')
    assert (run.model.layers, run.origin.weights, run.hooks) == (2, str(teacher), ())


def test_a_page_without_a_teacher_says_how_to_make_one():
    with pytest.raises(ConfigError, match=r'give the teacher.* launch/run\.py --config=configs/sft\.py --workdir'):
        distill.get_config('smoke')
    for arg in ('kind=stored,teacher=x', 'teacher=x,stored=y'):
        with pytest.raises(ConfigError, match='kind=stored reads what kind=store wrote'):
            distill.get_config(arg)


@pytest.mark.full
@pytest.mark.parametrize('kind', ['forward', 'reverse', 'js', 'onpolicy'])
def test_the_smoke_run_nears_the_teacher(teacher, tmp_path, kind):
    fit(distill.get_config(f'smoke,kind={kind},teacher={teacher}'), tmp_path)
    apart = column(tmp_path, 'divergence')
    assert apart[-1] < 0.5 * apart[0]
    assert len(column(tmp_path, 'heldout_divergence')) == 2


@pytest.mark.full
def test_the_smoke_teacher_is_stored_and_read(teacher, tmp_path):
    distill.get_config(f'smoke,kind=store,teacher={teacher}').main(str(tmp_path / 'likely'))
    fit(distill.get_config(f'smoke,kind=stored,teacher={teacher},stored={tmp_path}/likely'), tmp_path / 'student')
    apart = column(tmp_path / 'student', 'divergence')
    assert apart[-1] < 0.5 * apart[0]


@pytest.mark.full
def test_the_smoke_teacher_writes(teacher, tmp_path):
    distill.get_config(f'smoke,kind=sequence,teacher={teacher}').main(str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ['answers-00000-of-00001.jsonl']

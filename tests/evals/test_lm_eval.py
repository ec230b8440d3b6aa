"""Local tasks through lm-eval give the scores, and each request the answer, that they have with transformers."""

import json
from pathlib import Path

import pytest

from tpu_llm.checkpoint.pretrained import from_pretrained
from tpu_llm.config import ConfigError
from tpu_llm.evals import __main__ as command
from tpu_llm.evals import lm_eval

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / 'tests/golden/lm_eval'
TOLERANCE = 1e-3  # nats, of sums over up to 60 tokens


@pytest.fixture(scope='module', autouse=True)
def here(tmp_path_factory):
    """Task files name their data from the root; what is made of it is not left in the home."""
    datasets = pytest.importorskip('datasets')
    pytest.importorskip('lm_eval')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path_factory.mktemp('datasets'))
        yield


@pytest.fixture(scope='module')
def adapter(quick_compile):
    model, tokenizer = from_pretrained(str(GOLDEN / 'model'))
    return lm_eval.Adapter(model, tokenizer, rows=4)


@pytest.fixture(scope='module')
def expected():
    return json.loads((GOLDEN / 'expected.json').read_text())


@pytest.fixture(scope='module', params=['plain', 'chat'])
def both(request, adapter, expected):
    theirs = expected[request.param]
    found = lm_eval.evaluate(
        adapter,
        list(theirs['answers']),
        include=str(GOLDEN / 'tasks'),
        apply_chat_template=request.param == 'chat',
        log_samples=True,
    )
    return found, theirs


def test_every_request_has_the_answer_that_transformers_gives(both):
    found, theirs = both
    for name, answers in theirs['answers'].items():
        ours = [sample['resps'] for sample in sorted(found['samples'][name], key=lambda sample: sample['doc_id'])]
        assert len(ours) == len(answers)
        for mine, other in zip(flat(ours), flat(answers), strict=True):
            assert mine == (pytest.approx(other, abs=TOLERANCE) if isinstance(other, float) else other), name


def test_scores_are_the_same(both):
    found, theirs = both
    for name, scores in theirs['results'].items():
        for metric, value in scores.items():
            if isinstance(value, float):
                assert found['results'][name][metric] == pytest.approx(value, rel=1e-4), (name, metric)


def flat(value):
    """Numbers, truths and texts of nested lists."""
    return [leaf for each in value for leaf in flat(each)] if isinstance(value, (list, tuple)) else [value]


def test_contexts_that_are_cut_are_counted(adapter, both):
    assert adapter.likelihoods.cut > 0


def test_from_the_command_line(capsys, tmp_path):
    out = tmp_path / 'found.json'
    asked = ['lm-eval', f'--model={GOLDEN / "model"}', '--tasks=letters', f'--include={GOLDEN / "tasks"}']
    assert command.main([*asked, '--limit=2', f'--out={out}']) == 0
    assert '|letters|' in capsys.readouterr().out
    assert len(json.loads(out.read_text())['samples']['letters']) == 2


@pytest.mark.parametrize(
    ('changed', 'said'),
    [
        # It looks through all of lm-eval's own.
        pytest.param('--tasks=leters', "no task leters (did you mean 'letters'?)", marks=pytest.mark.full),
        ('--include=nowhere', 'there is no folder nowhere of task files'),
        ('--model=nowhere', 'nowhere'),
        ('--rows=0', 'rows is 0; it is at least 1'),
    ],
)
def test_mistakes_are_one_line(changed, said, capsys):
    asked = {'--model': GOLDEN / 'model', '--tasks': 'letters', '--include': GOLDEN / 'tasks'}
    options = [f'{name}={value}' for name, value in asked.items()]
    assert command.main(['lm-eval', *options, changed]) == 2
    told = capsys.readouterr().err
    assert told.startswith('error:')
    assert told.count('\n') == 1
    assert said in told


def test_ways_to_write_that_are_not_known():
    with pytest.raises(ConfigError, match=r"has temprature \(did you mean 'temperature'\?\), which is not known here"):
        lm_eval._ask({'temprature': 1.0})
    asked = lm_eval._ask({'until': '\n', 'max_new_tokens': 5, 'temperature': 0.7, 'do_sample': False})
    assert (asked.stop, asked.max_new_tokens, asked.temperature) == (('\n',), 5, 0.0)

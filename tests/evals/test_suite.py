"""A suite as a run: what it prints and writes, what it keeps, and what makes it ask again."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import toy

from configs import eval as page
from tpu_llm import config as configs
from tpu_llm.config import ConfigError, validate
from tpu_llm.data.tokenizer import Bytes
from tpu_llm.evals import __main__ as command
from tpu_llm.evals import candidate as candidates
from tpu_llm.evals.candidate import Settings, Untrained
from tpu_llm.evals.kept import read_results
from tpu_llm.evals.subject import Ask
from tpu_llm.evals.suite import Suite
from tpu_llm.evals.writing import cut, enders
from tpu_llm.infer.generate import generate
from tpu_llm.infer.sampling import Greedy
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.param import named_params

CHOICE = """kind: choice
about: x
prompt: '{q}:'
---
{"example": true, "q": "one", "choices": ["a", "b"], "answer": 0}
{"q": "two", "choices": ["a", "bc"], "answer": 1}
{"q": "three", "choices": ["a", "bc"], "answer": 0}
{"q": "four", "choices": ["ab", "c"], "answer": 0}
"""
WRITES = """kind: generative
about: x
prompt: '{q}:'
metrics: [exact, f1]
max_new_tokens: 4
---
{"q": "two", "answer": "a"}
{"q": "three", "answer": "b"}
"""
TEXTS = 'kind: perplexity\nabout: x\n---\n{"text": "two words"}\n{"text": "and three more, été"}\n'


@pytest.fixture(scope='module')
def model():
    return Untrained(model=toy.config(vocab_size=259, layers=1), tokenizer=Bytes())


@pytest.fixture(scope='module')
def opened(model):
    """The model, read once for all tests here."""
    candidate = model.open()
    return candidate, candidate.ask(Settings(rows=4, chat=False, seed=0))


@pytest.fixture
def suite(model, opened, tmp_path, monkeypatch):
    """A suite over three files; what was asked of the model is in `suite.asked`."""
    _, subject = opened
    asked = []

    class Watched:
        def __init__(self, name):
            self.name = name

        def __getattr__(self, name):
            asked.append(name)
            return getattr(subject, name)

    monkeypatch.setattr(candidates.Candidate, 'ask', lambda self, settings: Watched(self.name))
    for name, text in (('picks', CHOICE), ('writes', WRITES), ('texts', TEXTS)):
        (tmp_path / f'{name}.task').write_text(text)
    files = tuple(str(tmp_path / f'{name}.task') for name in ('picks', 'writes', 'texts'))
    made = Suite(model=model, tasks=files, rows=4, kept=str(tmp_path / 'kept'))
    return made, asked, tmp_path


def test_scores_are_written_and_shown(suite, capsys):
    made, asked, folder = suite
    made.main(str(folder / 'run'))
    assert asked == ['likelihoods', 'write', 'rolling']
    about, scores = read_results(folder / 'run')
    assert about['model'] == 'untrained'
    assert [(score.task, score.rows, score.shots) for score in scores] == [
        ('picks', 3, 0),
        ('writes', 2, 0),
        ('texts', 2, 0),
    ]
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == 'untrained'
    assert shown.splitlines()[-1] == f'{folder}/run/results.json'
    for score in scores:
        assert score.task in shown
        for name, found in score.metrics.items():
            assert name in shown
            assert score.measured(name).value == pytest.approx(found.value)
            assert found.low <= found.value <= found.high
    samples = [json.loads(line) for line in (folder / 'run/samples/picks.jsonl').read_text().splitlines()]
    assert [sample['line'] for sample in samples] == [6, 7, 8]
    assert [sample['asked'] for sample in samples] == ['two:', 'three:', 'four:']


def test_the_scores_are_those_of_the_model(suite, opened):
    """Log-probs of a plain forward pass over each text, and greedy continuations."""
    made, _, folder = suite
    made.main(str(folder / 'run'))
    scores = {score.task: score for score in read_results(folder / 'run')[1]}
    model, tokenizer = opened[0]._read()
    graph, weights = ModelGraph(model), {path: leaf.get_value() for path, leaf in named_params(model)}
    forward = jax.jit(lambda weights, ids: graph.bind(weights)(ids))

    def log_prob(context, text):
        ids = np.concatenate([[tokenizer.bos], tokenizer.encode(context + text)]).astype(np.int32)
        padded = np.pad(ids, (0, 32 - len(ids)))  # behind the text, where nothing sees it
        logits = np.asarray(forward(weights, padded[None]), np.float64)[0, : len(ids)]
        logs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        each = logs[np.arange(len(ids) - 1), ids[1:]]
        return each[len(ids) - 1 - len(text.encode()) :].sum()

    for sample, choices in zip(scores['picks'].samples, (['a', 'bc'], ['a', 'bc'], ['ab', 'c']), strict=True):
        behind = [log_prob(sample['asked'], f' {choice}') for choice in choices]
        anyway = [log_prob('', f' {choice}') for choice in choices]
        assert sample['log_probs'] == pytest.approx(behind, abs=1e-4)
        assert sample['anyway'] == pytest.approx(anyway, abs=1e-4)
        assert sample['chosen']['accuracy_pmi'] == int(np.argmax(np.subtract(behind, anyway)))
    texts = ['two words', 'and three more, été']
    nats = -sum(log_prob('', text) for text in texts)
    found = {name: each.value for name, each in scores['texts'].metrics.items()}
    assert found['bits_per_byte'] == pytest.approx(nats / np.log(2) / (9 + 21), rel=1e-5)
    assert found['word_perplexity'] == pytest.approx(np.exp(nats / 6), rel=1e-4)
    said = generate(model, tokenizer, ['two:', 'three:'], max_new_tokens=4, sampling=Greedy())
    assert [sample['said'] for sample in scores['writes'].samples] == [text.split('\n')[0] for text in said]


def test_what_was_asked_is_kept(suite, capsys):
    made, asked, folder = suite
    made.main(str(folder / 'run'))
    first = capsys.readouterr().out
    asked.clear()
    made.main(str(folder / 'again'))
    assert asked == []
    assert capsys.readouterr().out == first.replace(f'{folder}/run', f'{folder}/again')
    assert (folder / 'again/results.json').read_text() == (folder / 'run/results.json').read_text()
    (folder / 'texts.task').write_text(TEXTS.replace('words', 'sword'))
    made.main(str(folder / 'again'))
    assert asked == ['rolling']
    asked.clear()
    made.shots, made.tasks = 1, made.tasks[:1]
    made.main(str(folder / 'again'))
    assert asked == ['likelihoods']
    asked.clear()
    made.model = dataclasses.replace(made.model, seed=1)
    made.main(str(folder / 'again'))
    assert asked == ['likelihoods']
    asked.clear()
    made.rows, made.seed = 5, 1  # nothing that is weighed depends on them
    made.main(str(folder / 'again'))
    assert asked == []


def test_a_damaged_score_is_asked_again(suite):
    made, asked, folder = suite
    made.tasks = made.tasks[:1]
    made.main(str(folder / 'run'))
    (kept,) = (folder / 'kept').glob('*.json')
    for damage in ('', '{}', kept.read_text()[:-9]):
        kept.write_text(damage)
        asked.clear()
        made.main(str(folder / 'run'))
        assert asked == ['likelihoods']


def test_a_suite_that_was_killed_goes_on(suite, monkeypatch):
    made, asked, folder = suite
    (folder / 'writes.task').rename(folder / 'away.task')
    kept = made.tasks
    made.tasks = kept[:1]
    made.main(str(folder / 'run'))
    (folder / 'away.task').rename(folder / 'writes.task')
    asked.clear()
    made.tasks = kept
    made.main(str(folder / 'run'))
    assert asked == ['write', 'rolling']


def test_two_models_on_the_same_rows(suite, capsys):
    made, _, folder = suite
    made.main(str(folder / 'a'))
    made.shots, made.tasks = 1, made.tasks[:1]
    made.main(str(folder / 'b'))
    capsys.readouterr()
    assert command.main(['compare', str(folder / 'a'), str(folder / 'b')]) == 0
    shown = capsys.readouterr().out
    assert 'McNemar' in shown
    assert 'paired bootstrap' in shown
    assert 'writes' not in shown  # only the first was asked it
    made.limit = 2
    made.main(str(folder / 'c'))
    assert command.main(['compare', str(folder / 'a'), str(folder / 'c')]) == 2
    assert 'error: task picks has other rows in the second (3 and 2); evaluate both' in capsys.readouterr().err
    assert command.main(['compare', str(folder / 'a'), str(folder)]) == 2
    assert f'error: there is no file {folder}/results.json; give the workdir of' in capsys.readouterr().err


def test_too_few_examples_are_told_of_first(suite):
    made, asked, folder = suite
    made.shots = 2
    with pytest.raises(ConfigError, match=r'^task picks has 1 examples, and shots = 2'):
        made.main(str(folder / 'run'))
    assert asked == []


def test_programs_are_written_many_times(opened):
    """As many as asked of each prompt, of any lengths, in the prompts' order; and the same each time."""
    _, subject = opened
    prompts = ['x' * 40, 'y', 'z' * 5]
    ask = Ask(max_new_tokens=4, temperature=1.0, times=3)
    written = subject.write(prompts, ask)
    assert [len(each) for each in written] == [3, 3, 3]
    assert len({text for each in written for text in each}) > 3
    assert subject.write(prompts, ask) == written


def test_stops():
    assert cut('a\nb. c', ['.', '\n']) == 'a'
    assert cut('a\nb', ['x']) == 'a\nb'
    tokenizer = Bytes().make(iter(()), '.')
    ends = enders(tokenizer, ['\nQ', '.'])
    assert ends == (tokenizer.eos, *tokenizer.encode('.').tolist())  # a byte does not begin with two
    assert enders(tokenizer, []) == (tokenizer.eos,)


def test_the_page():
    suite = page.get_config('path=runs/x,tasks=facts+my/own.task,shots=5,limit=9,chat,dtype=bfloat16')
    validate(suite)
    assert (suite.model.path, suite.model.dtype, suite.tasks) == ('runs/x', 'bfloat16', ('facts', 'my/own.task'))
    assert (suite.shots, suite.limit, suite.chat) == (5, 9, True)
    assert configs.load(configs.dump(suite)) == suite
    validate(page.get_config('smoke'))
    with pytest.raises(ConfigError, match=r'^config\.model: path is empty; give the workdir of a run'):
        validate(page.get_config())

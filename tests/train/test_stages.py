"""Stages hand over by checkpoint: each in its folder, none twice, and none behind one that was stopped."""

import dataclasses
import signal

import pytest
import tiny

from tpu_llm.checkpoint.resume import Origin
from tpu_llm.config import ConfigError, Periodic, validate
from tpu_llm.train import metrics
from tpu_llm.train.stages import Stages


@dataclasses.dataclass(kw_only=True, slots=True)
class Preempt(Periodic):
    """SIGTERM to this very process, once in a folder."""

    def open(self, session):
        mark = session.workdir / 'preempted'

        def call(step, weights):
            if step == self.every and not mark.exists():
                mark.write_text('')
                signal.raise_signal(signal.SIGTERM)
            return {}

        return call


def pipeline(text, preempt=0):
    first = dataclasses.replace(tiny.get_config(f'text={text},steps=4'), hooks=())
    second = dataclasses.replace(
        first, origin=Origin(weights='stage:first'), hooks=(Preempt(every=preempt, last=False),) if preempt else ()
    )
    third = dataclasses.replace(first, origin=Origin(weights='stage:second'))
    return Stages(stages={'first': first, 'second': second, 'third': third})


def losses(folder):
    return [line['loss'] for line in metrics.read(folder / 'metrics.jsonl')]


def test_each_goes_on_from_the_one_before_and_none_runs_twice(text, tmp_path, capsys):
    pipeline(text).main(str(tmp_path))
    first, second, third = (losses(tmp_path / name) for name in ('first', 'second', 'third'))
    assert len(first) == len(second) == len(third) == 4
    assert third[-1] < second[-1] < first[-1]
    capsys.readouterr()
    pipeline(text).main(str(tmp_path))
    said = capsys.readouterr().out
    assert said.count('all 4 steps are done') == 3
    assert losses(tmp_path / 'third') == third


def test_a_stage_that_is_stopped_stops_the_pipeline_and_goes_on(text, tmp_path, capsys):
    pipeline(text, preempt=2).main(str(tmp_path))
    assert 'stopped in stage second' in capsys.readouterr().out
    assert not (tmp_path / 'third').exists()
    pipeline(text, preempt=2).main(str(tmp_path))
    assert [len(losses(tmp_path / name)) for name in ('first', 'second', 'third')] == [4, 4, 4]


def test_a_longer_stage_that_is_stopped_has_not_ended_though_it_once_had(text, tmp_path):
    stages = pipeline(text, preempt=6)
    stages.main(str(tmp_path))
    assert (tmp_path / 'third').exists()
    stages.stages['second'].steps = 8
    stages.stages['third'].steps = 5
    stages.main(str(tmp_path))
    assert 4 < len(losses(tmp_path / 'second')) < 8
    assert len(losses(tmp_path / 'third')) == 4


def test_a_stage_that_is_not_before_it_is_named_with_its_neighbour(text):
    stages = pipeline(text)
    stages.stages['third'].origin.weights = 'stage:secnod'
    with pytest.raises(ConfigError, match=r"stage third reads stage:secnod, .*did you mean 'second'"):
        validate(stages)


def test_a_stage_is_named_as_a_folder(text):
    with pytest.raises(ConfigError, match="'a/b' is to be a folder"):
        validate(Stages(stages={'a/b': tiny.get_config(f'text={text}')}))

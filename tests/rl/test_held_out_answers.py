"""The hook that asks held-out prompts: answers, judged, whatever the batch's size."""

import dataclasses

import jax
import numpy as np
import pytest

from tpu_llm.config import ConfigError, validate
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.sources import Sums
from tpu_llm.data.tokenizer import Bytes
from tpu_llm.infer.generate import generate
from tpu_llm.infer.sampling import Greedy
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.graph import ModelGraph
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.rl.held_out import HeldOutAnswers
from tpu_llm.rl.rewards import Function, Sample
from tpu_llm.train import metrics
from tpu_llm.train.loop import fit
from tpu_llm.train.run import Run

PROMPTS: list[Sample] = []


def remembered(sample: Sample) -> float:
    PROMPTS.append(sample)
    return float(len(sample.response))


def config(**hook):
    fields = {'prompt_length': 16, 'max_new_tokens': 6, 'template': 'plain', 'rows': 4, 'prompts': 7} | hook
    source = Sums(split='heldout', digits=1, asked=True)
    return Run(
        model=DecoderConfig(
            vocab_size=259, width=32, layers=1, heads=2, kv_heads=2, head_dim=16, mlp_width=64, dtype='float32'
        ),
        data=Data(
            mixture=Mixture(sources={'sums': Sums(split='train', digits=1)}),
            tokenizer=Bytes(),
            global_batch=8,
            seq_len=64,
            whole=True,
            overlong='drop',
        ),
        optimizer=AdamW(schedule=Schedule(peak=1e-2, warmup=1)),
        steps=4,
        hooks=(HeldOutAnswers(source=source, rewards=(Function(call=remembered, name='length'),), **fields),),
        report=False,
    )


def test_each_prompt_is_answered_once_and_greedily(tmp_path):
    PROMPTS.clear()
    run = config()
    state = fit(run, tmp_path)
    questions = Sums(split='heldout', digits=1, asked=True).open()
    assert [sample.prompt for sample in PROMPTS] == [questions[i].text for i in range(len(questions))]
    assert [sample.record for sample in PROMPTS] == [questions[i].record for i in range(len(questions))]
    model = run.model.make(vocab_multiple=128)
    said = generate(
        ModelGraph(model).bind(jax.device_get(state.params)),
        Bytes().make(iter(()), tmp_path),
        [sample.prompt for sample in PROMPTS],
        max_new_tokens=6,
        sampling=Greedy(),
    )
    assert [sample.response for sample in PROMPTS] == said
    line = metrics.read(tmp_path / 'metrics.jsonl')[-1]
    assert line['heldout_length'] == pytest.approx(np.mean([len(text) for text in said]))
    assert 0 <= line['heldout_finished'] <= 1


def test_on_a_mesh_the_answers_are_the_same(tmp_path):
    PROMPTS.clear()
    fit(config(), tmp_path / 'one')
    alone = [sample.response for sample in PROMPTS]
    PROMPTS.clear()
    fit(dataclasses.replace(config(), mesh=Mesh(fsdp=4, tensor=2)), tmp_path / 'many')
    assert [sample.response for sample in PROMPTS] == alone


def test_with_a_temperature_they_are_drawn_by_the_seed(tmp_path):
    said = []
    for number, run in enumerate((config(temperature=1.0), config(temperature=1.0), config(temperature=9.0))):
        PROMPTS.clear()
        fit(dataclasses.replace(run, steps=2), tmp_path / str(number))
        said.append([sample.response for sample in PROMPTS])
    assert said[0] == said[1] != said[2]
    assert len(set(said[2])) == len(said[2])


@pytest.mark.parametrize(
    ('hook', 'said'),
    [
        ({'temperature': -1.0}, r'temperature is -1\.0; write 0 for the likeliest answer'),
        ({'rewards': ()}, 'rewards is empty; give what the answers are judged by'),
        ({'rows': 0}, 'rows is 0; it is at least 1'),
        ({'max_new_tokens': 0}, 'max_new_tokens is 0; it must be at least 1'),
    ],
)
def test_what_cannot_be(hook, said):
    run = config()
    with pytest.raises(ConfigError, match=said):
        validate(dataclasses.replace(run.hooks[0], **hook))


def test_a_prompt_that_is_too_long_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r'a held-out prompt has \d+ tokens, more than prompt_length = 4; raise that'):
        fit(config(prompt_length=4), tmp_path)

"""Bad input to a real run: each thing is named in one line with its mend, and what can be read is trained on."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from entry import ROOT, one_line

from tpu_llm.config import ConfigError
from tpu_llm.data import __main__ as data_command
from tpu_llm.data.documents import BadRecord
from tpu_llm.data.tokenizer import train_bpe
from tpu_llm.train import metrics

SMOKE = '--config=configs/quickstart.py:smoke'
# The general page made tiny: one layer, 8 x 32 tokens a step.
TINY = [f'--config.model.{field}' for field in ('width=32', 'layers=1', 'heads=2', 'kv_heads=1', 'head_dim=16')]
TINY += [f'--config.model.{field}' for field in ('mlp_width=64', 'dtype=float32')]
TINY += [f'--config.data.{field}' for field in ('seq_len=32', 'global_batch=8', 'workers=0')]
TINY += ['--config.tokens=0', '--config.steps=3', '--config.optimizer.schedule.warmup=1', '--noconfig.report']
TINY += ['--config.hooks[0].every=0', '--noconfig.hooks[0].last']
SKIP = '--config.data.mixture.sources.text.on_bad=skip'

GOOD = [f'{i} times {n} is {i * n}.' for i in range(20) for n in range(20)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Files to train on, good and bad, and a tokenizer of 300 pieces."""
    folder = tmp_path_factory.mktemp('input')
    (folder / 'tokenizer.model').write_bytes(train_bpe(GOOD, 300))
    (folder / 'other.model').write_bytes(train_bpe((text.upper() for text in GOOD), 290))
    lines = [json.dumps({'text': text}) for text in GOOD]
    (folder / 'good.jsonl').write_text('\n'.join(lines))
    (folder / 'empty.jsonl').write_text('\n\n')
    (folder / 'wordless.jsonl').write_text('{"text": ""}\n')
    (folder / 'ids.jsonl').write_text('{"text": [5, 6, 400]}\n' * 20)
    for name, bad in BAD.items():
        (folder / f'{name}.jsonl').write_bytes('\n'.join([*lines[:5], bad, *lines[5:10]]).encode('latin-1'))
    return folder


BAD = {
    'not-json': '{"text": oops}',
    'not-utf8': '{"text": "caf\xe9"}',
    'no-object': '["text"]',
    'no-field': '{"body": "text"}',
    'no-text': '{"text": 1.5}',
}
SAYS = {
    'not-json': 'not JSON (Expecting value at character 10)',
    'not-utf8': 'byte 0xe9 is not UTF-8; convert the file',
    'no-object': "no field 'text' (the record is no object); set field=",
    'no-field': "no field 'text' (the record has 'body'); set field=",
    'no-text': "'text' is neither text nor a list of token ids",
}


@pytest.fixture
def page(folder, tmp_path):
    """The arguments of a tiny run over one of the files."""

    def arguments(data='good.jsonl', *flags, tokenizer='tokenizer.model', vocab=512, **args):
        given = {'data': folder / data, 'tokenizer': folder / tokenizer, 'vocab': vocab} | args
        arg = ','.join(f'{name}={value}' for name, value in given.items())
        return [f'--config=configs/pretrain.py:{arg}', *TINY, f'--workdir={tmp_path}/run', *flags]

    return arguments


# ------------------------------------------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (
            ['--config=configs/quikstart.py'],
            "config file configs/quikstart.py does not exist (did you mean 'configs/quickstart.py'?)",
        ),
        ([f'{SMOKE},tiny'], "config arg 'tiny' is unknown; this config takes muon=False, smoke=False"),
        ([SMOKE, '--config.model.widht=64'], "config.model has no field 'widht' (did you mean 'width'?); it has"),
        ([SMOKE, '--config.model.width=wide'], '--config.model.width=wide: expects a whole number'),
        ([SMOKE, '--config.model.dropout=0.1'], 'dropout = Dropout(residual=…), of tpu_llm.models.decoder_config'),
        ([SMOKE, '--config.mesh.tp=2'], "config.mesh has no field 'tp' (did you mean 'tensor'?)"),
        ([SMOKE, '--config.mesh.pipeline=2'], "config.mesh has no field 'pipeline' (did you mean 'stage'?)"),
        ([SMOKE, '--config.mesh.data=0'], 'config.mesh: data = 0 must be positive, or -1 for all the devices'),
        ([SMOKE, '--config.data.overlong=cut'], 'value should be one of <split|truncate|drop|stop>'),
        ([SMOKE, '--config.model.kv_heads=3'], 'config.model: heads = 2 is not divisible by kv_heads = 3'),
        ([SMOKE, '--config.steps=0'], 'the length of a run is one of steps, tokens and epochs, above 0; given: none'),
        ([SMOKE, '--config.steps=-1'], 'above 0; given: steps = -1'),
        (
            [SMOKE, '--config.tokens=9'],
            'given: steps = 20 and tokens = 9; switch off what you do not mean: --config.steps=0 or --config.tokens=0',
        ),
        ([SMOKE, '--steps=5'], "unknown flag --steps (did you mean '--config.steps'?)"),
        (
            [SMOKE, '--config.checkpoints.best=bits'],
            "checkpoints.best = 'bits' is not a metric of the hooks; there are: heldout_loss, bits_per_byte",
        ),
        (['--config=configs/pretrain.py:size=2b'], "unknown size '2b' (did you mean '8b'?); there are 125m, 350m"),
        (
            ['--config=configs/pretrain.py:mesh=v5e-255'],
            "unknown mesh 'v5e-255' (did you mean 'v5e-256'?); there are auto",
        ),
        (['--config=configs/pretrain.py:size'], 'config arg size needs a value: size=…'),
    ],
)
def test_a_wrong_config_is_one_line(mistake, tmp_path, args, message):
    assert message in mistake(*args, f'--workdir={tmp_path}/run')
    assert not (tmp_path / 'run').exists()


WRONG_PAGE = """import dataclasses

@dataclasses.dataclass(kw_only=True, slots=True)
class Dropout:
    residual: float = 0.0

def get_config(arg=None):
    if arg == 'made':
        return Dropout(residul=0.1)
    if arg == 'set':
        dropout = Dropout()
        dropout.residul = 0.1
    return Drop(residual=0.1)
"""


@pytest.mark.parametrize(
    ('arg', 'message'),
    [
        ('made', "9: TypeError: Dropout.__init__() got an unexpected keyword argument 'residul'"),
        ('set', "12: AttributeError: 'Dropout' object has no attribute 'residul'"),
        ('else', "13: NameError: name 'Drop' is not defined"),
    ],
)
def test_a_mistake_in_a_config_file_names_its_line(mistake, entry, tmp_path, arg, message):
    path = tmp_path / 'wrong.py'
    path.write_text(WRONG_PAGE)
    said = mistake(f'--config={path}:{arg}')
    assert said.startswith(f'{path}:{message}')
    assert ("(did you mean 'residual'?)" in said) == (arg != 'else')
    with pytest.raises(ConfigError):
        entry(f'--config={path}:{arg}', '--debug')


# --------------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ({'data': 'none.jsonl'}, "no file matches '{}/none.jsonl'; check the path"),
        ({'data': '*.json'}, "no file matches '{}/*.json'; check the path"),
        ({'data': ''}, "'{}' is a folder; name its files with a glob, such as {}/*"),
        ({'data': 'empty.jsonl'}, "source 'text' holds no document; check its paths"),
        ({'heldout': '/none.jsonl'}, "no file matches '/none.jsonl'; check the path"),
        ({'tokenizer': 'none.model'}, 'there is no tokenizer {}/none.model; give a SentencePiece'),
        ({'tokenizer': 'good.jsonl'}, '{}/good.jsonl is not a SentencePiece model'),
        ({'vocab': 299}, 'the tokenizer has ids up to 299 but model.vocab_size is 299; set it to at least 300'),
        ({'data': 'ids.jsonl'}, 'holds id 400, but the vocabulary has 300; use the tokenizer with which it was made'),
        ({'mesh': 'v5e-256'}, 'mesh (fsdp=256) needs 256 devices but there are 8 (cpu); change config.mesh so that'),
    ],
)
def test_a_file_that_does_not_serve_is_one_line(mistake, page, folder, args, message):
    said = mistake(*page(**args))
    assert message.replace('{}', str(folder)) in said


def test_a_batch_that_the_mesh_does_not_divide(mistake, page):
    said = mistake(*page('good.jsonl', '--config.data.global_batch=12'))
    assert said.startswith('data.global_batch / accumulate = 12 rows are not divisible by ')
    assert said.endswith(' = 8; make the batch a multiple of 8')


def test_held_out_documents_without_text(mistake, page, folder):
    flags = ['--config.hooks[0].rows=8', '--config.hooks[0].last', '--config.hooks[0].every=1']
    said = mistake(*page('good.jsonl', *flags, heldout=folder / 'wordless.jsonl'))
    assert said == 'there is no text in the 1 held-out documents; check their paths and field'


TOKENS_PAGE = """from configs.pretrain import get_config as pretrain
from tpu_llm.data.sources import Tokens
from tpu_llm.data.tokenizer import Ids

def get_config(arg=None):
    run = pretrain('data=-,vocab=1024')
    run.data.mixture.sources['text'] = Tokens(paths=(arg,), end=0)
    run.data.tokenizer = Ids(vocab_size=1024, bos=1, eos=2)
    return run
"""


def test_a_file_of_ids_beyond_the_vocabulary(mistake, tmp_path):
    np.save(tmp_path / 'ids.npy', np.array([5, 6, 7, 0, 8, 1024, 9], np.uint16))
    (tmp_path / 'tokens.py').write_text(TOKENS_PAGE)
    said = mistake(f'--config={tmp_path}/tokens.py:{tmp_path}/ids.npy', *TINY, f'--workdir={tmp_path}/run')
    assert said.startswith(f'{tmp_path}/ids.npy, ids 4 to 7 holds id 1024, but the vocabulary has 1024; use the')


# -------------------------------------------------------------------------------------------------- bad records


@pytest.mark.parametrize('kind', BAD)
def test_a_bad_record_stops_the_run(mistake, page, folder, kind):
    said = mistake(*page(f'{kind}.jsonl'))
    assert said == f"{folder}/{kind}.jsonl, line 6: {SAYS[kind]} (on_bad='skip' passes over such records: {SKIP})"


@pytest.mark.parametrize('kind', ['not-json', 'not-utf8'])
def test_a_bad_record_is_skipped_by_choice(entry, page, folder, tmp_path, kind, caplog):
    assert entry(*page(f'{kind}.jsonl', SKIP)) == 0
    assert metrics.read(tmp_path / 'run/metrics.jsonl')[-1]['step'] == 3
    skipped = [record.getMessage() for record in caplog.records if 'skipped' in record.getMessage()]
    records = [said.rpartition(' (')[0] for said in skipped]
    assert records == [f'skipped {folder}/{kind}.jsonl, line 6: {SAYS[kind]}'], 'once, however often it is drawn'
    assert skipped[0].endswith(' so far)')


@pytest.mark.parametrize('flags', [[], ['--config.data.cache=cache']])
def test_a_bad_record_is_named_wherever_it_is_met_first(mistake, page, folder, tmp_path, flags):
    """While a tokenizer is trained, while a cache is written."""
    arg = f'data={folder}/not-json.jsonl,vocab=300'
    said = mistake(f'--config=configs/pretrain.py:{arg}', *TINY, f'--workdir={tmp_path}/run', *flags)
    assert said.startswith(f'{folder}/not-json.jsonl, line 6: not JSON (Expecting value at character 10) (on_bad=')
    if flags:
        assert said in mistake(*page('not-json.jsonl', *flags))


def test_debug_shows_where_a_bad_record_was_met(entry, page):
    with pytest.raises(BadRecord):
        entry(*page('not-json.jsonl', '--debug'))


@pytest.mark.parametrize('workers', [0, pytest.param(1, marks=pytest.mark.full)])
def test_a_bad_record_ends_the_process_with_one_line(page, folder, workers):
    """Whichever process reads it, and however many threads wait for it."""
    command = [sys.executable, 'launch/run.py', *page('not-utf8.jsonl', f'--config.data.workers={workers}')]
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert one_line(done.stderr).startswith(f'{folder}/not-utf8.jsonl, line 6: byte 0xe9 is not UTF-8')


# ------------------------------------------------------------------------------------------------ long documents


def test_a_document_longer_than_the_context_is_trained_in_pieces(entry, page, folder, tmp_path, capsys):
    (folder / 'long.jsonl').write_text(json.dumps({'text': ' '.join(GOOD)}))
    arguments = page('long.jsonl', '--config.data.interleave=1', '--config.data.global_batch=8')
    assert entry(*arguments) == 0
    capsys.readouterr()
    parts = []
    for step in (1, 2):
        assert data_command.main(['audit', *arguments, f'--step={step}']) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines() if 'long.jsonl' in line]
        parts.append([row[-2] for row in rows])
    assert parts == [['0–31'] * 8, ['32–63'] * 8]


def test_a_document_longer_than_the_context_stops_the_run_by_choice(mistake, page, folder):
    (folder / 'long.jsonl').write_text(json.dumps({'text': ' '.join(GOOD)}))
    said = mistake(*page('long.jsonl', '--config.data.overlong=stop'))
    assert said.startswith(f'{folder}/long.jsonl, line 1 is ')
    assert "more than the context of 32; use overlong='split', 'truncate' or 'drop', or a longer seq_len" in said


# --------------------------------------------------------------------------------------- tokenizer and checkpoint


def test_a_tokenizer_that_does_not_match_the_checkpoint(entry, mistake, page, folder, tmp_path):
    changing = folder / 'changing.model'
    changing.write_bytes((folder / 'tokenizer.model').read_bytes())
    arguments = page(tokenizer='changing.model')
    assert entry(*arguments) == 0
    (saved,) = (tmp_path / 'run/checkpoints').iterdir()

    changing.write_bytes((folder / 'other.model').read_bytes())
    said = mistake(*arguments)
    assert f'is not the one {saved} was trained with' in said
    assert 'use that one (it is saved there), or another --workdir' in said
    grown = [f'--workdir={tmp_path}/grown', f'--config.origin.weights={tmp_path}/run']
    assert f'is not the one {saved} was trained with' in mistake(*arguments, *grown)

    said = mistake(*page(tokenizer='other.model'))
    assert f"config.data.tokenizer.path: '{changing}' → '{folder}/other.model'; undo that, or use another" in said
    assert (saved / 'COMMIT.json').exists()

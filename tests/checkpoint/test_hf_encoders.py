"""Files of encoders and encoder-decoders as they are found: older names, other classes, what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tpu_llm.checkpoint import huggingface, pretrained, safetensors_file
from tpu_llm.checkpoint.files import CheckpointError
from tpu_llm.config import ConfigError
from tpu_llm.nn.param import named_params

ZOO = Path(__file__).parents[1] / 'golden/zoo'


@pytest.fixture
def changed(tmp_path):
    """Copies a folder of the zoo with other keys in its config and other names of its tensors; None leaves one out."""

    def change(name, config=None, rename=lambda tensor: tensor):
        folder = tmp_path / name
        shutil.copytree(ZOO / name, folder)
        said = json.loads((folder / 'config.json').read_text()) | (config or {})
        (folder / 'config.json').write_text(
            json.dumps({key: value for key, value in said.items() if value != 'absent'})
        )
        theirs = {
            rename(tensor): (tensor, reader) for tensor, reader in safetensors_file.open_folder(ZOO / name).items()
        }
        theirs.pop(None, None)
        listed = [(new, np.dtype(np.float32), reader.tensors[old].shape) for new, (old, reader) in theirs.items()]
        arrays = {new: reader.read(old) for new, (old, reader) in theirs.items()}
        safetensors_file.write(folder / 'model.safetensors', listed, arrays.__getitem__, {'format': 'pt'})
        return folder

    return change


def weights(folder):
    return dict(named_params(pretrained.read_model(pretrained.open_source(folder), 'float32')))


def same(one, other):
    assert set(one) == set(other)
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf[...], other[name][...], err_msg=name)


def test_the_first_files_call_norms_gamma_and_beta(changed):
    def older(tensor):
        return tensor.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta')

    same(weights(changed('bert', rename=older)), weights(ZOO / 'bert'))


def test_a_published_bert_has_heads_that_its_class_does_not_compute(changed):
    folder = changed('bert-pretraining', {'architectures': ['BertForMaskedLM']})
    assert not {name for name in weights(folder) if name.startswith(('pooler', 'pair'))}


def test_a_published_bart_names_its_body_and_lacks_the_bias_of_logits(changed):
    def body(tensor):
        return None if tensor == 'final_logits_bias' else tensor.removeprefix('model.')

    found, whole = weights(changed('bart', {'architectures': ['BartModel']}, body)), weights(ZOO / 'bart')
    assert not np.asarray(found.pop('head.bias')[...]).any()
    del whole['head.bias']
    same(found, whole)


@pytest.mark.parametrize(
    ('name', 'config', 'tied', 'scale'),
    [
        # As files were before transformers said whether the outputs are scaled.
        ('t5', {'scale_decoder_outputs': 'absent', 'tie_word_embeddings': 'absent'}, True, 0.25),
        ('t5-v1.1', {'scale_decoder_outputs': 'absent', 'tie_word_embeddings': False}, False, 1.0),
    ],
)
def test_t5_says_in_two_ways_whether_its_head_is_its_own(changed, name, config, tied, scale):
    said = huggingface.open_folder(changed(name, config)).config
    assert (said.tied_embeddings, said.logit_scale) == (tied, scale)


def test_t5_without_a_depth_of_the_decoder_has_that_of_the_encoder(changed):
    said = huggingface.open_folder(changed('t5', {'num_decoder_layers': None})).config
    assert said.decoder_layers == said.encoder_layers == 1


@pytest.mark.parametrize(
    ('name', 'config', 'message'),
    [
        ('bert', {'is_decoder': True}, 'is_decoder = True is not implemented'),
        ('bert', {'add_cross_attention': True}, 'add_cross_attention = True is not implemented'),
        ('bert', {'position_embedding_type': 'relative_key'}, "position_embedding_type = 'relative_key' is not"),
        ('bert', {'tie_word_embeddings': False}, 'tie_word_embeddings = False is not implemented'),
        ('roberta', {'hidden_act': 'relu'}, "hidden_act = 'relu' is not implemented; known are 'gelu'"),
        ('t5', {'feed_forward_proj': 'gated-tanh'}, "feed_forward_proj = 'gated-tanh' is not implemented"),
        ('t5', {'relative_attention_max_distance': 64}, 'relative_attention_max_distance = 64 is not implemented'),
        ('bart', {'decoder_ffn_dim': 8}, 'ffn_dim of 24 and 8 on the two sides is not implemented'),
        ('bart', {'normalize_before': True}, 'normalize_before = True is not implemented'),
        ('bart', {'surprise': 1}, 'the config says surprise = 1, which is not implemented'),
    ],
)
def test_what_would_change_numbers_is_refused(changed, name, config, message):
    with pytest.raises(ConfigError, match=message):
        huggingface.open_folder(changed(name, config))


def test_what_is_missing_is_named(changed):
    folder = changed('t5', rename=lambda tensor: None if 'EncDecAttention.k' in tensor else tensor)
    with pytest.raises(CheckpointError, match=r'2 missing: decoder.block.\*.layer.\*.EncDecAttention.k.weight'):
        weights(folder)


@pytest.mark.parametrize('name', ['bert-pretraining', 'roberta', 't5-v1.1', 'bart'])
def test_what_is_saved_is_what_was_loaded(name, tmp_path):
    model = pretrained.read_model(pretrained.open_source(ZOO / name), 'float32')
    pretrained.save_pretrained(model, None, tmp_path)
    assert huggingface.open_folder(tmp_path).config == huggingface.open_folder(ZOO / name).config
    same(weights(tmp_path), weights(ZOO / name))

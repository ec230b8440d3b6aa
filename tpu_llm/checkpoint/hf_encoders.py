"""Encoders and encoder-decoders of transformers: BERT and RoBERTa, T5 and BART."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tpu_llm.checkpoint.family import PLAIN, Family, activation, attention, linear, mlp, norm
from tpu_llm.checkpoint.fields import Choice, Fixed, Item, Must, Rule, Same, Theirs, Unused
from tpu_llm.checkpoint.renaming import Row
from tpu_llm.config import ConfigError
from tpu_llm.models.encoder import EncoderConfig
from tpu_llm.models.encoder_decoder import EncoderDecoderConfig
from tpu_llm.nn.mlp import GATED


def _within(stack: str, rows: Sequence[Row]) -> list[Row]:
    """The rows of the layers of one of a model's stacks."""
    return [dataclasses.replace(row, within=stack) for row in rows]


# ------------------------------------------------------------------------------------------------- BERT, RoBERTa


def _body(at: str) -> list[Row]:
    layer = f'{at}encoder.layer.{{i}}'
    return [
        Row(f'{at}embeddings.word_embeddings.weight', {'embed.table': 'VD'}),
        Row(f'{at}embeddings.position_embeddings.weight', {'tower.position_embed.table': 'TD'}),
        Row(f'{at}embeddings.token_type_embeddings.weight', {'token_types': 'ID'}),
        *norm(f'{at}embeddings.LayerNorm', 'tower.embed_norm'),
        *_within(
            'tower.',
            [
                *attention(f'{layer}.attention', 'self.query self.key self.value output.dense'),
                *norm(f'{layer}.attention.output.LayerNorm', 'attention_norm'),
                *mlp(layer, 'intermediate.dense output.dense'),
                *norm(f'{layer}.output.LayerNorm', 'mlp_norm'),
            ],
        ),
        *linear(f'{at}pooler.dense', 'pooler', 'YD', 'Y'),
    ]


def _masked(dense: str, norm_name: str, bias: str) -> list[Row]:
    return [
        *linear(dense, 'masked.map', 'YD', 'Y'),
        *norm(norm_name, 'masked.norm'),
        Row(bias, {'masked.out.bias': 'V'}),
    ]


_BERT_HEADS = [
    *_masked('cls.predictions.transform.dense', 'cls.predictions.transform.LayerNorm', 'cls.predictions.bias'),
    *linear('cls.seq_relationship', 'pair', 'ID', 'I'),
]
_ENCODER: tuple[Item, ...] = (
    Same('vocab_size', 'vocab_size'),
    Same('hidden_size', 'width'),
    Same('num_hidden_layers', 'layers'),
    Same('num_attention_heads', 'heads'),
    Same('intermediate_size', 'mlp_width'),
    Same('layer_norm_eps', 'norm_eps', 1e-12),
    Same('type_vocab_size', 'token_types', 2),
    Must('tie_word_embeddings', (True,)),
    Must('is_decoder', (False,)),
    Must('add_cross_attention', (False,)),
    Must('position_embedding_type', ('absolute',)),
)
_BERT: tuple[Item, ...] = (
    *_ENCODER,
    Same('max_position_embeddings', 'max_length', 512),
    activation(PLAIN, 'gelu'),
    # The first library's; this one reads none of them.
    Unused(('directionality', 'pooler_fc_size', 'pooler_num_attention_heads', 'pooler_num_fc_layers')),
    Unused(('pooler_size_per_head', 'pooler_type')),
)
_GAMMA_BETA = {'LayerNorm.gamma': 'LayerNorm.weight', 'LayerNorm.beta': 'LayerNorm.bias'}
_IDS = r'.*position_ids'
_POOLER = r'\w+\.pooler\..*'

BERT = Family(
    architecture='BertForMaskedLM',
    model_type='bert',
    items=(*_BERT, Fixed({'masked_head': True})),
    rows=[*_body('bert.'), *_BERT_HEADS],
    # Published files have what only the next class computes.
    ignored=rf'cls\.predictions\.decoder\..*|cls\.seq_relationship\..*|{_POOLER}|{_IDS}',
    older=_GAMMA_BETA,
    make=EncoderConfig,
)

BERT_PRETRAINING = Family(
    architecture='BertForPreTraining',
    model_type='bert',
    items=(*_BERT, Fixed({'masked_head': True, 'pooler': True, 'next_sentence': True})),
    rows=[*_body('bert.'), *_BERT_HEADS],
    ignored=rf'cls\.predictions\.decoder\..*|{_IDS}',
    older=_GAMMA_BETA,
    make=EncoderConfig,
)

BERT_BODY = Family(
    architecture='BertModel',
    model_type='bert',
    items=(*_BERT, Fixed({'masked_head': False, 'pooler': True})),
    rows=_body(''),
    ignored=_IDS,
    older=_GAMMA_BETA,
    make=EncoderConfig,
)


def _roberta_positions(theirs: Theirs) -> Mapping[str, Any]:
    """The first token has the position after that of padding."""
    offset = theirs.take('pad_token_id', 1) + 1
    return {'position_offset': offset, 'max_length': theirs.take('max_position_embeddings', 512) - offset}


def _roberta_positions_back(ours: Any) -> Mapping[str, Any]:
    offset = ours.position_offset
    if offset < 1:
        raise ConfigError('position_offset = 0 leaves padding no position')
    return {'pad_token_id': offset - 1, 'max_position_embeddings': ours.max_length + offset}


ROBERTA = Family(
    architecture='RobertaForMaskedLM',
    model_type='roberta',
    items=(
        *_ENCODER,
        Rule(_roberta_positions, _roberta_positions_back),
        activation({'gelu': 'gelu_exact'}, 'gelu'),  # whatever it says, the head's is this
        Fixed({'masked_head': True}),
    ),
    rows=[*_body('roberta.'), *_masked('lm_head.dense', 'lm_head.layer_norm', 'lm_head.bias')],
    ignored=rf'lm_head\.decoder\..*|{_POOLER}|{_IDS}',
    older=_GAMMA_BETA,
    make=EncoderConfig,
)

# ------------------------------------------------------------------------------------------------- T5


def _t5_rows(config: EncoderDecoderConfig) -> list[Row]:
    maps = 'wi_0 wi_1 wo' if config.mlp in GATED else 'wi wo'
    reading, writing = 'encoder.block.{i}.layer', 'decoder.block.{i}.layer'
    return [
        Row('shared.weight', {'embed.table': 'VD'}),
        Row('lm_head.weight', {'head.kernel': 'VD'}),
        *_t5_ends('encoder'),
        *_within(
            'encoder.',
            [
                *attention(f'{reading}.0.SelfAttention', 'q k v o'),
                *norm(f'{reading}.0.layer_norm', 'attention_norm'),
                *mlp(f'{reading}.1.DenseReluDense', maps),
                *norm(f'{reading}.1.layer_norm', 'mlp_norm'),
            ],
        ),
        *_t5_ends('decoder'),
        *_within(
            'decoder.',
            [
                *attention(f'{writing}.0.SelfAttention', 'q k v o'),
                *norm(f'{writing}.0.layer_norm', 'attention_norm'),
                *_cross(attention(f'{writing}.1.EncDecAttention', 'q k v o')),
                *norm(f'{writing}.1.layer_norm', 'cross_norm'),
                *mlp(f'{writing}.2.DenseReluDense', maps),
                *norm(f'{writing}.2.layer_norm', 'mlp_norm'),
            ],
        ),
    ]


def _t5_ends(side: str) -> list[Row]:
    relative = f'{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
    return [Row(relative, {f'{side}.position_bias.table': 'AN'}), *norm(f'{side}.final_layer_norm', f'{side}.norm')]


def _cross(rows: Sequence[Row]) -> list[Row]:
    """The rows of attention as those of attention to the source."""
    return [
        Row(row.theirs, {name.replace('attention.', 'cross.'): dims for name, dims in row.ours.items()}) for row in rows
    ]


def _t5_head(theirs: Theirs) -> Mapping[str, Any]:
    """The first T5 scales logits and ties its head. Its descendants do neither: later files say that of the scale, and
    always that it is tied; earlier ones the other way round.
    """
    tied = theirs.take('tie_word_embeddings', True)
    first = theirs.take('scale_decoder_outputs', tied)
    return {'tied_embeddings': first, 'logit_scale': theirs['d_model'] ** -0.5 if first else 1.0}


def _t5_head_back(ours: Any) -> Mapping[str, Any]:
    return {'tie_word_embeddings': ours.tied_embeddings, 'scale_decoder_outputs': ours.tied_embeddings}


_T5_MLP = {
    'relu': 'relu',
    'gated-gelu': 'geglu',
    'gated-silu': 'swiglu',
    'gated-relu': 'reglu',
    'gelu': 'gelu_exact',
    'gelu_new': 'gelu',
}

T5 = Family(
    architecture='T5ForConditionalGeneration',
    model_type='t5',
    items=(
        Same('vocab_size', 'vocab_size'),
        Same('d_model', 'width'),
        Same('num_layers', 'encoder_layers'),
        Same('num_decoder_layers', 'decoder_layers', lambda theirs: theirs['num_layers']),
        Same('num_heads', 'heads'),
        Same('d_kv', 'head_dim'),
        Same('d_ff', 'mlp_width'),
        Same('layer_norm_epsilon', 'norm_eps', 1e-6),
        Same('decoder_start_token_id', 'start_token', 0),
        Choice('feed_forward_proj', 'mlp', _T5_MLP, 'relu'),
        Rule(_t5_head, _t5_head_back),
        Must('relative_attention_num_buckets', (32,)),
        Must('relative_attention_max_distance', (128,)),
        Fixed({'norm': 'rms', 'norm_place': 'pre', 'position': 'relative', 'attention_scale': 1.0}),
        Unused(('dense_act_fn', 'is_gated_act', 'n_positions')),
    ),
    rows=_t5_rows,
    ignored=r'(en|de)coder\.embed_tokens\.weight|decoder\.block\.0\.layer\.1\.\w+\.relative_attention_bias\.weight',
    make=EncoderDecoderConfig,
)

# ------------------------------------------------------------------------------------------------- BART


def _bart_side(side: str) -> list[Row]:
    at, layer = f'model.{side}', f'model.{side}.layers.{{i}}'
    maps = 'q_proj k_proj v_proj out_proj'
    return [
        Row(f'{at}.embed_positions.weight', {f'{side}.position_embed.table': 'TD'}),
        *norm(f'{at}.layernorm_embedding', f'{side}.embed_norm'),
        *_within(
            f'{side}.',
            [
                *attention(f'{layer}.self_attn', maps),
                *norm(f'{layer}.self_attn_layer_norm', 'attention_norm'),
                *_cross(attention(f'{layer}.encoder_attn', maps)),
                *norm(f'{layer}.encoder_attn_layer_norm', 'cross_norm'),
                *mlp(layer, 'fc1 fc2'),
                *norm(f'{layer}.final_layer_norm', 'mlp_norm'),
            ],
        ),
    ]


def _both_sides(theirs_name: str, ours_name: str, default: int) -> Item:
    """A size of which we have one for both sides."""

    def reads(theirs: Theirs) -> Mapping[str, Any]:
        sizes = [theirs.take(f'{side}_{theirs_name}', default) for side in ('encoder', 'decoder')]
        if sizes[0] != sizes[1]:
            raise ConfigError(f'{theirs_name} of {sizes[0]} and {sizes[1]} on the two sides is not implemented')
        return {ours_name: sizes[0]}

    def writes(ours: Any) -> Mapping[str, Any]:
        return {f'{side}_{theirs_name}': getattr(ours, ours_name) for side in ('encoder', 'decoder')}

    return Rule(reads, writes)


def _bart_scale(theirs: Theirs) -> Mapping[str, Any]:
    scaled = theirs.take('scale_embedding', False)
    heads = theirs.take('encoder_attention_heads', 16)
    return {'embed_scale': theirs['d_model'] ** 0.5 if scaled else 1.0, 'head_dim': theirs['d_model'] // heads}


BART = Family(
    architecture='BartForConditionalGeneration',
    model_type='bart',
    items=(
        Same('vocab_size', 'vocab_size'),
        Same('d_model', 'width'),
        Same('encoder_layers', 'encoder_layers', 12),
        Same('decoder_layers', 'decoder_layers', 12),
        _both_sides('attention_heads', 'heads', 16),
        _both_sides('ffn_dim', 'mlp_width', 4096),
        Same('max_position_embeddings', 'max_length', 1024),
        Same('decoder_start_token_id', 'start_token', 2),
        activation(PLAIN, 'gelu', 'activation_function'),
        Rule(_bart_scale, lambda ours: {'scale_embedding': ours.embed_scale != 1.0}),
        Fixed({'norm': 'layer', 'norm_eps': 1e-5, 'position': 'learned', 'position_offset': 2, 'embed_norm': True}),
        Fixed({'bias': ('qkv', 'out', 'mlp', 'head')}),
        Must('tie_word_embeddings', (True,)),
        # Of the first releases' files; the class reads none of them.
        *(Must(key, (False,)) for key in ('normalize_before', 'add_final_layer_norm', 'static_position_embeddings')),
        Must('normalize_embedding', (True,)),
        Must('extra_pos_embeddings', (2,)),
        Unused(('add_bias_logits', 'num_hidden_layers', 'encoder_layerdrop', 'decoder_layerdrop')),
        # How text is drawn.
        Unused(('early_stopping', 'num_beams', 'no_repeat_ngram_size', 'length_penalty', 'max_length', 'min_length')),
        Unused(('force_bos_token_to_be_generated',)),
    ),
    rows=[
        Row('model.shared.weight', {'embed.table': 'VD'}),
        *_bart_side('encoder'),
        *_bart_side('decoder'),
        Row('final_logits_bias', {'head.bias': '1V'}, optional=True),
    ],
    ignored=r'model\.(en|de)coder\.embed_tokens\.weight|lm_head\.weight',
    prefix='model.',
    make=EncoderDecoderConfig,
)

ENCODERS = {family.architecture: family for family in (BERT, BERT_PRETRAINING, BERT_BODY, ROBERTA, T5, BART)} | {
    'BartModel': BART
}  # as published files name it

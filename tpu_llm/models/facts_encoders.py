"""BERT, RoBERTa, the 2017 Transformer, T5 and its descendants, BART."""

from typing import Any

from tpu_llm.models.encoder import EncoderConfig
from tpu_llm.models.encoder_decoder import EncoderDecoderConfig
from tpu_llm.models.fact import Fact, Facts


def _bert(width: int, layers: int) -> EncoderConfig:
    """Devlin et al., 2018, arXiv 1810.04805, section 3, and the model cards' config.json: heads of 64."""
    return EncoderConfig(
        vocab_size=30_522,
        width=width,
        layers=layers,
        heads=width // 64,
        mlp_width=4 * width,
        max_length=512,
        pooler=True,
        next_sentence=True,
    )


def _roberta(width: int, layers: int) -> EncoderConfig:
    """Liu et al., 2019, arXiv 1907.11692, and the model cards' config.json: no second sentence to predict."""
    return EncoderConfig(
        vocab_size=50_265,
        width=width,
        layers=layers,
        heads=width // 64,
        mlp_width=4 * width,
        norm_eps=1e-5,
        max_length=512,
        position_offset=2,
        token_types=1,
    )


def _transformer(width: int, heads: int) -> EncoderDecoderConfig:
    """Vaswani et al., 2017, arXiv 1706.03762, section 3 and table 3; the vocabulary is that of English and German."""
    return EncoderDecoderConfig(
        vocab_size=37_000,
        width=width,
        encoder_layers=6,
        decoder_layers=6,
        heads=heads,
        head_dim=64,
        mlp_width=4 * width,
        bias=('mlp',),
        embed_scale=width**0.5,
    )


def _t5(width: int, layers: int, heads: int, head_dim: int, mlp_width: int, **rest: Any) -> EncoderDecoderConfig:
    """Raffel et al., 2019, arXiv 1910.10683, section 3.7, and the model cards' config.json."""
    return EncoderDecoderConfig(
        vocab_size=32_128,
        width=width,
        encoder_layers=layers,
        decoder_layers=layers,
        heads=heads,
        head_dim=head_dim,
        mlp_width=mlp_width,
        norm='rms',
        norm_place='pre',
        position='relative',
        attention_scale=1.0,
        **{'logit_scale': width**-0.5, **rest},
    )


def _flan(width: int, layers: int, heads: int, head_dim: int, mlp_width: int) -> EncoderDecoderConfig:
    """Shazeer, 2020, arXiv 2002.05202; Chung et al., 2022, arXiv 2210.11416: T5 v1.1, trained further."""
    return _t5(width, layers, heads, head_dim, mlp_width, mlp='geglu', tied_embeddings=False, logit_scale=1.0)


def _ul2() -> EncoderDecoderConfig:
    """Tay et al., 2022, arXiv 2205.05131, section 4, and the model card's config.json."""
    return _t5(4096, 32, 16, 256, 16_384, mlp='swiglu', tied_embeddings=False, logit_scale=1.0)


def _bart(width: int, layers: int) -> EncoderDecoderConfig:
    """Lewis et al., 2019, arXiv 1910.13461, section 2.1, and the model cards' config.json."""
    return EncoderDecoderConfig(
        vocab_size=50_265,
        width=width,
        encoder_layers=layers,
        decoder_layers=layers,
        heads=width // 64,
        head_dim=64,
        mlp_width=4 * width,
        mlp='gelu_exact',
        norm_eps=1e-5,
        position='learned',
        max_length=1024,
        position_offset=2,
        embed_norm=True,
        bias=('qkv', 'out', 'mlp', 'head'),
        start_token=2,
    )


_BERT = {
    'bert-base': Fact(lambda: _bert(768, 12), 110_106_428, '110M'),
    'bert-large': Fact(lambda: _bert(1024, 24), 336_226_108, '336M'),
}
_ROBERTA = {
    'roberta-base': Fact(lambda: _roberta(768, 12), 124_697_433, '125M'),
    'roberta-large': Fact(lambda: _roberta(1024, 24), 355_412_057, '355M'),
}
_TRANSFORMER = {
    'transformer-base': Fact(lambda: _transformer(512, 8), printed='65M'),
    'transformer-big': Fact(lambda: _transformer(1024, 16), printed='213M'),
}
_T5 = {
    't5-small': Fact(lambda: _t5(512, 6, 8, 64, 2048), 60_506_624, '60.5M'),
    't5-base': Fact(lambda: _t5(768, 12, 12, 64, 3072), 222_903_552, '223M'),
    't5-large': Fact(lambda: _t5(1024, 24, 16, 64, 4096), 737_668_096, '738M'),
    't5-3b': Fact(lambda: _t5(1024, 24, 32, 128, 16_384), 2_851_598_336, '2.85B'),
    't5-11b': Fact(lambda: _t5(1024, 24, 128, 128, 65_536), 11_307_321_344, '11.3B'),
}
_FLAN = {
    'flan-t5-small': Fact(lambda: _flan(512, 8, 6, 64, 1024), 76_961_152, '77M'),
    'flan-t5-base': Fact(lambda: _flan(768, 12, 12, 64, 2048), 247_577_856, '248M'),
    'flan-t5-large': Fact(lambda: _flan(1024, 24, 16, 64, 2816), 783_150_080, '783M'),
    'flan-t5-xl': Fact(lambda: _flan(2048, 24, 32, 64, 5120), 2_849_757_184, '2.85B'),
    'flan-t5-xxl': Fact(lambda: _flan(4096, 24, 64, 64, 10_240), 11_135_332_352, '11.1B'),
}
_UL2 = {'ul2': Fact(_ul2, printed='20B')}
# Published without the bias of logits, 50,265 numbers that its authors keep at 0.
_BART = {
    'bart-base': Fact(lambda: _bart(768, 6), 139_420_416 + 50_265),
    'bart-large': Fact(lambda: _bart(1024, 12), 406_291_456 + 50_265),
}
_VOCABULARY = 'the vocabulary that was counted: "about 37000" tokens give 63M and 214M, where 65M and 213M are printed'
FACTS = (
    Facts('BERT', _BERT, 'BertForPreTraining'),
    Facts('RoBERTa', _ROBERTA, 'RobertaForMaskedLM'),
    Facts('Transformer', _TRANSFORMER, lacks=_VOCABULARY),
    Facts('T5', _T5, 'T5ForConditionalGeneration'),
    Facts('Flan-T5', _FLAN, 'T5ForConditionalGeneration'),
    Facts('UL2', _UL2, 'T5ForConditionalGeneration'),
    Facts('BART', _BART, 'BartForConditionalGeneration'),
)

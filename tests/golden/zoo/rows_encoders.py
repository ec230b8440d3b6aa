"""Encoders, and encoder-decoders, as in `rows_dense.py`; their test is tests/contract/test_encoders.py."""

ENCODERS = {
    'bert': ('Bert', {}, 'ForMaskedLM'),
    'bert-pretraining': ('Bert', {'hidden_act': 'gelu_new', 'type_vocab_size': 3}, 'ForPreTraining'),
    'bert-body': ('Bert', {'hidden_act': 'relu'}, 'Model'),
    'roberta': ('Roberta', {'pad_token_id': 1, 'type_vocab_size': 1}, 'ForMaskedLM'),
}
_T5 = {'d_ff': 24, 'd_kv': 6, 'num_layers': 1, 'num_decoder_layers': 2, 'decoder_start_token_id': 0}
_BART = {
    'encoder_ffn_dim': 24,
    'decoder_ffn_dim': 24,
    'encoder_attention_heads': 4,
    'decoder_attention_heads': 4,
    'encoder_layers': 1,
    'decoder_layers': 2,
    'decoder_start_token_id': 7,
    'forced_eos_token_id': None,
}
ENCODER_DECODERS = {
    't5': ('T5', _T5, 'ForConditionalGeneration'),
    't5-v1.1': (
        'T5',
        {**_T5, 'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False},
        'ForConditionalGeneration',
    ),
    'ul2': ('T5', {**_T5, 'feed_forward_proj': 'gated-silu', 'tie_word_embeddings': False}, 'ForConditionalGeneration'),
    'bart': ('Bart', _BART, 'ForConditionalGeneration'),
    'bart-scaled': ('Bart', {**_BART, 'scale_embedding': True}, 'ForConditionalGeneration'),
}

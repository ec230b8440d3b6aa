"""Decoders with state spaces, as in `rows_dense.py`."""

JAMBA = {
    'num_hidden_layers': 4,
    'num_key_value_heads': 2,
    'attn_layer_period': 4,
    'attn_layer_offset': 2,
    'mamba_d_state': 5,
    'mamba_d_conv': 3,
    'mamba_dt_rank': 2,
}
SSM = {
    'mamba': ('Mamba', {'state_size': 6}),
    'mamba-untied': (
        'Mamba',
        {'state_size': 5, 'conv_kernel': 3, 'expand': 3, 'time_step_rank': 2, 'tie_word_embeddings': False},
    ),
    # Rows of 14 tokens are several chunks.
    'mamba2': ('Mamba2', {'num_heads': 4, 'head_dim': 8, 'state_size': 6, 'n_groups': 2, 'chunk_size': 4}),
    'mamba2-tied': (
        'Mamba2',
        {
            'num_heads': 8,
            'head_dim': 4,
            'state_size': 5,
            'n_groups': 1,
            'conv_kernel': 3,
            'tie_word_embeddings': True,
        },
    ),
    'jamba': ('Jamba', {**JAMBA, 'num_experts': 3, 'num_experts_per_tok': 2}),
    'jamba-dense': ('Jamba', {**JAMBA, 'num_hidden_layers': 3, 'num_experts': 1, 'tie_word_embeddings': True}),
}

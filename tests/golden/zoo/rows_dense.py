"""Dense decoders: the start of transformers' classes, what differs from `make.SMALL`, and the end of the model's class
where it is not ForCausalLM.
"""

LLAMA3_ROPE = {
    'rope_type': 'llama3',
    'rope_theta': 500.0,
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 16,
}
LONGROPE = {
    'rope_type': 'longrope',
    'rope_theta': 100.0,
    'short_factor': [1.0, 1.3],
    'long_factor': [1.5, 3.0],
}
HALF_ROPE = {'rope_type': 'default', 'rope_theta': 100.0, 'partial_rotary_factor': 0.5}
GEMMA3 = {
    'num_hidden_layers': 4,
    'num_key_value_heads': 2,
    'head_dim': 4,
    'query_pre_attn_scalar': 9,
    'sliding_window': 4,
    'sliding_window_pattern': 3,
    'rope_scaling': {'rope_type': 'linear', 'factor': 4.0},
}
DENSE = {
    'llama': ('Llama', {'num_key_value_heads': 2}),
    'llama31': ('Llama', {'num_key_value_heads': 2, 'rope_parameters': LLAMA3_ROPE, 'tie_word_embeddings': True}),
    'llama-biased': ('Llama', {'attention_bias': True, 'mlp_bias': True, 'head_dim': 6}),
    'mistral': ('Mistral', {'num_key_value_heads': 2, 'sliding_window': 5}),
    'qwen2': ('Qwen2', {'num_key_value_heads': 2, 'tie_word_embeddings': True}),
    'qwen2-window': (
        'Qwen2',
        {
            'num_hidden_layers': 3,
            'num_key_value_heads': 4,
            'use_sliding_window': True,
            'sliding_window': 4,
            'max_window_layers': 1,
        },
    ),
    'qwen3': ('Qwen3', {'num_key_value_heads': 2, 'head_dim': 6}),
    'gemma': ('Gemma', {'num_key_value_heads': 1, 'head_dim': 6}),
    'gemma2': (
        'Gemma2',
        {
            'num_hidden_layers': 3,
            'num_key_value_heads': 2,
            'head_dim': 6,
            'query_pre_attn_scalar': 9,
            'sliding_window': 4,
            'attn_logit_softcapping': 2.0,
            'final_logit_softcapping': 1.5,
        },
    ),
    'gemma3': ('Gemma3', GEMMA3),
    'phi3': (
        'Phi3',
        {
            'num_key_value_heads': 2,
            'sliding_window': 6,
            'original_max_position_embeddings': 32,
            'rope_parameters': LONGROPE,
        },
    ),
    'phi3-long': ('Phi3', {'original_max_position_embeddings': 4, 'rope_parameters': LONGROPE}),
    'stablelm': ('StableLm', {'num_key_value_heads': 2, 'partial_rotary_factor': 0.5}),
    'stablelm-parallel': (
        'StableLm',
        {
            'num_key_value_heads': 2,
            'partial_rotary_factor': 0.5,
            'use_qkv_bias': True,
            'qk_layernorm': True,
            'use_parallel_residual': True,
        },
    ),
    'starcoder2': ('Starcoder2', {'num_key_value_heads': 2, 'sliding_window': 5}),
    'olmo': ('Olmo', {'num_key_value_heads': 2, 'clip_qkv': 0.5}),
    'olmo2': ('Olmo2', {'num_key_value_heads': 2}),
    'cohere': ('Cohere', {'num_key_value_heads': 2, 'logit_scale': 0.25}),
    'cohere-normed': ('Cohere', {'num_key_value_heads': 2, 'use_qk_norm': True, 'attention_bias': True}),
    'cohere2': (
        'Cohere2',
        {'num_hidden_layers': 4, 'num_key_value_heads': 2, 'sliding_window': 4, 'logit_scale': 0.25},
    ),
    'smollm3': ('SmolLM3', {'num_hidden_layers': 5, 'num_key_value_heads': 2}),
    'smollm3-window': (
        'SmolLM3',
        {
            'num_hidden_layers': 3,
            'num_key_value_heads': 2,
            'no_rope_layer_interval': 2,
            'use_sliding_window': True,
            'sliding_window': 4,
            'tie_word_embeddings': False,
        },
    ),
    'gpt2': ('GPT2', {}, 'LMHeadModel'),
    'gpt1': ('OpenAIGPT', {}, 'LMHeadModel'),
    'bigcode': ('GPTBigCode', {}),
    'bigcode-heads': ('GPTBigCode', {'multi_query': False}),
    'gptneo': ('GPTNeo', {'attention_types': [[['global', 'local'], 1]], 'window_size': 4}),
    'gptj': ('GPTJ', {'num_attention_heads': 2, 'rotary_dim': 4, 'n_inner': 24}),
    'neox': ('GPTNeoX', {'rope_parameters': HALF_ROPE}),
    'neox-serial': ('GPTNeoX', {'rope_parameters': HALF_ROPE, 'use_parallel_residual': False, 'attention_bias': False}),
    'phi': ('Phi', {'intermediate_size': 64}),
    'phi-normed': ('Phi', {'intermediate_size': 64, 'qk_layernorm': True}),
    'opt': ('OPT', {'ffn_dim': 24}),
    'opt-post': ('OPT', {'ffn_dim': 24, 'do_layer_norm_before': False, 'enable_bias': False}),
    'opt-350m': ('OPT', {'ffn_dim': 24, 'do_layer_norm_before': False, 'word_embed_proj_dim': 10}),
    'bloom': ('Bloom', {'hidden_size': 12, 'num_attention_heads': 6}),
    'mpt': (
        'Mpt',
        {'hidden_size': 12, 'num_attention_heads': 6, 'attn_config': {'clip_qkv': 0.5, 'softmax_scale': 0.7}},
    ),
    'falcon7b': ('Falcon', {}),
    'falcon40b': ('Falcon', {'num_kv_heads': 2, 'new_decoder_architecture': True}),
    'falcon-rw': ('Falcon', {'multi_query': False, 'parallel_attn': False, 'bias': True, 'alibi': True}),
    'falcon-serial': ('Falcon', {'multi_query': False, 'parallel_attn': False, 'bias': True}),
}

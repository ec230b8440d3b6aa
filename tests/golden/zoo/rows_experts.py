"""Decoders with experts, latent attention or both, as in `rows_dense.py`."""

YARN = {
    'rope_type': 'yarn',
    'rope_theta': 100.0,
    'factor': 4.0,
    'original_max_position_embeddings': 16,
    'beta_fast': 4,
    'beta_slow': 1,
}
LATENT = {
    'num_hidden_layers': 3,
    'kv_lora_rank': 8,
    'q_lora_rank': 10,
    'qk_nope_head_dim': 6,
    'qk_rope_head_dim': 4,
    'v_head_dim': 5,
    'moe_intermediate_size': 4,
    'n_routed_experts': 8,
    'num_experts_per_tok': 3,
    'first_k_dense_replace': 1,
}
QWEN3 = {
    'num_hidden_layers': 4,
    'num_key_value_heads': 2,
    'head_dim': 6,
    'moe_intermediate_size': 4,
    'num_experts': 6,
    'num_experts_per_tok': 3,
}
EXPERTS = {
    'mixtral': ('Mixtral', {'num_key_value_heads': 2, 'num_local_experts': 4, 'intermediate_size': 12}),
    'qwen3-moe': ('Qwen3Moe', {**QWEN3, 'norm_topk_prob': True, 'decoder_sparse_step': 2}),
    'qwen3-moe-unnormed': (
        'Qwen3Moe',
        {**QWEN3, 'num_hidden_layers': 3, 'mlp_only_layers': [0], 'attention_bias': True, 'tie_word_embeddings': True},
    ),
    'qwen2-moe': (
        'Qwen2Moe',
        {
            'num_key_value_heads': 2,
            'num_hidden_layers': 3,
            'moe_intermediate_size': 4,
            'shared_expert_intermediate_size': 8,
            'num_experts': 6,
            'num_experts_per_tok': 3,
            'mlp_only_layers': [0],
        },
    ),
    'olmoe': ('Olmoe', {'num_key_value_heads': 2, 'num_experts': 6, 'num_experts_per_tok': 3, 'intermediate_size': 8}),
    'deepseek-v2': (
        'DeepseekV2',
        {
            **LATENT,
            'n_shared_experts': 2,
            'n_group': 4,
            'topk_group': 2,
            'topk_method': 'group_limited_greedy',
            'routed_scaling_factor': 4.0,
            'rope_parameters': {**YARN, 'mscale': 1.0, 'mscale_all_dim': 0.7},
        },
    ),
    'deepseek-v2-lite': (
        'DeepseekV2',
        {
            **LATENT,
            'q_lora_rank': None,
            'rms_norm_eps': 0.05,
            'n_shared_experts': 2,
            'rope_parameters': {**YARN, 'mscale': 0.707, 'mscale_all_dim': 0.707},
        },
    ),
    'deepseek-v3': (
        'DeepseekV3',
        {
            **LATENT,
            'num_key_value_heads': 4,
            'n_group': 4,
            'topk_group': 2,
            'rope_parameters': {**YARN, 'mscale': 1.0, 'mscale_all_dim': 1.0},
        },
    ),
    'deepseek-v3-ahead': (
        'DeepseekV3',
        {
            **LATENT,
            'vocab_size': 31,
            'num_hidden_layers': 1,
            'first_k_dense_replace': 0,
            'num_key_value_heads': 4,
            'n_routed_experts': 4,
            'num_experts_per_tok': 2,
            'n_group': 2,
            'topk_group': 1,
            'num_mtp_layers': 2,
        },
    ),
    'glm4-moe': (
        'Glm4Moe',
        {
            'num_key_value_heads': 2,
            'head_dim': 8,
            'attention_bias': True,
            'use_qk_norm': True,
            'moe_intermediate_size': 4,
            'n_routed_experts': 6,
            'num_experts_per_tok': 3,
            'routed_scaling_factor': 1.5,
        },
    ),
    'dbrx': (
        'Dbrx',
        {
            'd_model': 16,
            'n_heads': 4,
            'n_layers': 2,
            'rope_parameters': {'rope_type': 'default', 'rope_theta': 100.0},
            'attn_config': {'clip_qkv': 0.5, 'kv_n_heads': 2, 'rope_theta': 100.0},
            'ffn_config': {'ffn_hidden_size': 8, 'moe_num_experts': 6, 'moe_top_k': 3},
        },
    ),
}
# Those whose checkpoint has the layers that predict further tokens; transformers saves none.
AHEAD = ('deepseek-v3-ahead', 'glm4-moe')

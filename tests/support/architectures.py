"""Small networks of many architectures: those that read flat rows, and those that cannot."""

from __future__ import annotations

import transformers as tf

SHAPE = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 0,
    "bos_token_id": 1,
}
FEW_HEADS = {**SHAPE, "num_key_value_heads": 2, "intermediate_size": 64}
GEMMA = {**FEW_HEADS, "head_dim": 16, "sliding_window": 9}
READ = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**FEW_HEADS)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**FEW_HEADS, head_dim=16)),
    "a sliding window": lambda: tf.MistralForCausalLM(
        tf.MistralConfig(**FEW_HEADS, sliding_window=9)
    ),
    "soft caps": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**GEMMA, attn_logit_softcapping=2.0)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GEMMA)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=260,
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=128,
            bos_token_id=1,
            eos_token_id=0,
        )
    ),
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=32)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SHAPE, intermediate_size=64)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SHAPE, intermediate_size=64)),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**FEW_HEADS)),
}
FEW_STATES = {**FEW_HEADS, "head_dim": 16}
OWN_RULES = {
    "chunks": lambda: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(
            **FEW_STATES,
            intermediate_size_mlp=64,
            num_local_experts=2,
            num_experts_per_tok=1,
            attention_chunk_size=16,
            no_rope_layers=[1, 1],
            moe_layers=[],
        )
    ),
    "attention twice a layer": lambda: tf.DiffLlamaForCausalLM(tf.DiffLlamaConfig(**FEW_STATES)),
    "convolutions": lambda: tf.Lfm2ForCausalLM(
        tf.Lfm2Config(**FEW_HEADS, layer_types=["conv", "full_attention"])
    ),
}

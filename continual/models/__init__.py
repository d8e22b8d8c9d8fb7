"""Models: loading, adapters, sharding, weights as values, loss, importance, generation.

Other folders may import:

- generation: generate_answers, generate_ids, next_logits, prefill, top_k_rule
- importance: fisher, is_linear, per_example_gradients, sensitivity
- loading: DTYPES, add_adapter, assemble, load_pretrained, make_tokenizing_model
- lora: factors
- loss: accumulate, capture_logits, evaluate_at, forward, gradient_of, nll, number_examples,
  response_logits, token_nll
- model: Model, pick_device
- sharding: clip_gradients, gather_on_cpu, is_sharded, shard_like, shard_model, synced_passes
- weights: Weights, all_finite, combine, flatten_weights, gradient, restore, safe_ratio,
  set_gradient, snapshot, to_float32, top_mask, unflatten_weights, weights, zeros
"""

"""Models: loading, adapters, sharding, weights as values, loss, importance, generation.

Other folders may import:

- generation: answer, complete, follow, read, sampled
- importance: by_example, fisher, linear, sensitivity
- loading: DTYPES, adapt_with, assemble, hf, reader
- lora: factors
- loss: accumulate, evaluated_at, forward, gradient_of, nll, numbered, overheard, responses,
  token_nll
- model: Model, pick_device
- sharding: clip, collected, cut_as, in_shards, in_step, shard
- weights: Weights, combine, finite, flat, gradient, portion, restore, set_gradient, snapshot,
  top, unflat, weights, wide, zeros
"""

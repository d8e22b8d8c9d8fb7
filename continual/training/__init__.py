"""Training: recipe, stage, early stopping, precision, checkpoints, models from scratch.

Other folders may import:

- checkpoint: Found, find, load, number, progress, prune, save, size
- precision: settle
- recipe: Recipe
- serialization: to_json
- stage: learn
- stage_state: random_state, set_random_state
"""

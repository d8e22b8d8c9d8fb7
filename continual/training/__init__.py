"""Training: recipe, stage, early stopping, precision, checkpoints, models from scratch.

Other folders may import:

- checkpoint: ResumePoint, find_resume_point, load, load_stage_state, load_within_stage, prune,
  save, size_bytes, stage_number
- precision: choose_precision
- recipe: Recipe
- serialization: serialize_value
- stage: train_stage
- stage_state: capture_rng_state, restore_rng_state
"""

"""Hydra config groups: model, stream, strategy, train, score, experiment."""

"""How much each weight matters to what has been learned, from per-example gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from continual.data import Encoded
from continual.errors import ConfigError, unknown
from continual.loss import forward
from continual.model import Model
from continual.packing import Batch
from continual.weights import Weights, weights, zeros

LABELS = ("empirical", "sampled")


def fisher(model: Model, examples: Sequence[Encoded], labels: str = "empirical",
           generator: torch.Generator | None = None) -> Weights:
    """The diagonal of the Fisher information: the mean over examples of the squared gradient of log p(y | x).

    One gradient an example, of the log-likelihood summed over its response tokens, squared after that sum; over
    trainable parameters only, at the weights as they are. With `labels="empirical"` y is the response in the data;
    with "sampled" each response token is drawn from the model's own distribution given the tokens before it, which
    makes it the true Fisher of the token distributions (Kunstner et al. 2019, eq. 2 against eq. 3).
    Raises ConfigError for other labels.
    """
    if labels not in LABELS:
        raise ConfigError(unknown("Fisher labels", labels, LABELS))
    total = zeros(model)
    live = weights(model)
    layout = replace(model.layout, instruction_weight=0.0)  # a dual objective's prompt is no part of the response
    for example in examples:
        batch = Batch((example,), layout)
        log_p = _log_likelihood(model, batch, labels, generator)
        grads = torch.autograd.grad(log_p, list(live.values()), allow_unused=True)
        for name, g in zip(live, grads, strict=True):
            if g is not None:
                total[name] += g.square() / len(examples)
    return total


def _log_likelihood(model: Model, batch: Batch, labels: str, generator: torch.Generator | None) -> Tensor:
    """log p of the response tokens of the data, or of ones drawn from the model; a scalar."""
    log_probs = forward(model, batch).log_softmax(-1)
    y = batch.targets
    if labels == "sampled":
        y = torch.multinomial(log_probs.detach().exp().cpu(), 1, generator=generator)[:, 0].to(log_probs.device)
    return log_probs.gather(1, y[:, None]).sum()

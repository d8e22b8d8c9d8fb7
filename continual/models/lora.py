"""Access the factors of a LoRA: a module's weight change is scale * B A, A (R, in), B (out, R)."""

from __future__ import annotations

from torch import Tensor

from continual.errors import ConfigError, listed
from continual.models.model import Model
from continual.models.weights import weights


def factors(model: Model) -> list[tuple[Tensor, Tensor]]:
    """Return the trainable A and B of each module.

    The rank R is the first dimension of A and the second of B, also for convolutions. Raises
    ConfigError if anything else trains.
    """
    live = weights(model)
    pairs = {n: n.replace(".lora_A.", ".lora_B.") for n in live if ".lora_A." in n}
    other = sorted(live.keys() - pairs.keys() - set(pairs.values()))
    if other:
        raise ConfigError(
            "this strategy works on the factors of a LoRA, but these weights train: "
            f"{listed(other, 3)}; set model.adapter=lora, its target_modules linear layers, and "
            "neither bias nor use_dora"
        )
    return [(live[a], live[b]) for a, b in pairs.items()]

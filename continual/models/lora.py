"""The LoRA that trains, as pairs of factors: a module's change of weight is scale * B A, A (R, in)
and B (out, R).
"""

from __future__ import annotations

from torch import Tensor

from continual.errors import ConfigError, listed
from continual.models.model import Model
from continual.models.weights import weights


def factors(model: Model) -> list[tuple[Tensor, Tensor]]:
    """The live A and B of each module; of a convolution's, too, R is an A's first dimension and a
    B's second.

    Raises ConfigError where anything else trains.
    """
    live = weights(model)
    pairs = {n: n.replace(".lora_A.", ".lora_B.") for n in live if ".lora_A." in n}
    if other := sorted(live.keys() - pairs.keys() - set(pairs.values())):
        raise ConfigError(
            "this strategy works on the factors of a LoRA, and what trains is "
            f"{listed(other, 3)}; set model.adapter=lora, its target_modules linear layers, and "
            "neither bias nor use_dora"
        )
    return [(live[a], live[b]) for a, b in pairs.items()]

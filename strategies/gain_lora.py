"""A branch of the LoRA for each task, and for each prompt a learned gate on every branch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from continual.data.types import Encoded, Task
from continual.errors import ConfigError
from continual.models.lora import factors
from continual.models.model import Model
from continual.models.weights import weights
from continual.packing.layout import response_start
from continual.strategy.instructions import mean_embedding
from continual.strategy.interface import memory, to_param_groups
from continual.strategy.projection import project_out
from strategies.incremental_lora import IncrementalLoRA

Gate = list[Tensor]  # G_1 (H, D), G_2 (D, H) and G_3 (1, D); D of an embedding, H hidden
GATE_SLOPE = (
    4.0  # of a gate at 0, over the cosine: the authors' code, where the paper has G_3 p_2 itself
)


@dataclass(kw_only=True)
class GainLoRA(IncrementalLoRA):
    """GainLoRA (Liang et al. 2025, arXiv 2505.15424): W x + sum_i g_i(prompt) B_i A_i x, over one
    branch a task.

    The branches are the blocks of incremental LoRA, and learn as those do; listed beside `olora`,
    as O-LoRA's do. A gate of an earlier task is frozen with its branch. The new one is 0 for the
    prompts of all of them, at first and ever after (section 3): it begins as the gate before it but
    for G_3, which is orthogonal to all that they gave there (eq. 10), and what it learns in each
    layer is orthogonal to what that layer read of them (eq. 12), up to the share of its squares
    that `threshold` leaves out (appendix A.1, eq. 16).

    Different from the paper and the authors' code: eq. 12 holds for whatever the optimizer does,
    for what it changes is a free matrix whose orthogonal part is added, where they project AdamW's
    step after it and restore the norms of the rows; `threshold` stays, where theirs goes up to 1
    over 15 tasks; and a causal model's gates read the prompt alone, as the encoder's do in their
    T5.

    Each example has gates of its own, so no prefix is shared: examples are read, and answered, in
    padded rows of one each. A checkpoint's own weights are the branches without their gates, a
    model that never answered.
    """

    stores: ClassVar[str] = "T gates, and the directions of what one read"
    costs: ClassVar[str] = "1, with no shared prefix"
    weights_are_complete = False
    hidden_size: int = 100  # the authors' mlp_hidden_dim
    threshold: float = 0.995  # the authors' transthreshold
    seed: int = 0
    gates: dict[int, Gate] = memory(dict)  # by the first row of the branch in A
    known: list[Tensor] = memory(
        list
    )  # (n, k) of each layer: an orthonormal basis of what it read of earlier tasks
    change: Tensor = memory(
        lambda: torch.zeros(0)
    )  # of the new gate while it learns: the free matrices, as one row

    def __post_init__(self) -> None:
        """Refuse a gate without hidden units, and what is no share."""
        super().__post_init__()
        if self.hidden_size < 1 or not 0 < self.threshold <= 1:
            raise ConfigError(
                f"found hidden_size={self.hidden_size} and threshold={self.threshold} for gain_lora; "
                "expected at least 1 unit, and a share of more than 0, up to 1"
            )

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """A new branch with its gate; raises ConfigError where no gate can be open for its prompts
        alone.
        """
        trained = super().begin(model, task)
        if not self.rank:
            return trained
        if self.first_row in self.gates and not len(self.change):  # it has ended
            raise ConfigError(
                f"the branch from row {self.first_row} of the LoRA on has the gate of an earlier "
                "stage, and its B is zero: that stage changed nothing, or a strategy that is "
                "listed beside gain_lora put the weights back; raise train.lr, or leave that "
                "strategy out"
            )
        self.install_gates(model)
        self.gates[self.first_row] = gate = self.init_gate(model, task)
        self.known = self.known or [g.new_zeros(g.shape[1], 0) for g in gate]
        self.change = Parameter(gate[0].new_zeros(sum(g.numel() for g in gate)))
        return [*to_param_groups(trained), {"params": [self.change], "weight_decay": 0.0}]

    def install_gates(self, model: Model) -> None:
        """Let the model read each example with its gates, from padded rows."""
        model.layout, model.forward_context = replace(model.layout, packed=False), self.apply_gates

    @torch.no_grad()
    def init_gate(self, model: Model, task: Task[Encoded]) -> Gate:
        """The new gate: G_3 points to where most of what the task's prompts give is beside what is
        known.

        So does the authors' code. G_1 and G_2 of a first one are drawn as `nn.Linear` does.
        """
        said = mean_prompt_embeddings(model, task.train)
        if self.gates:
            front = [*self.gates.values()][-1][:-1]
        else:
            rng = torch.Generator().manual_seed(self.seed)
            shapes = ((self.hidden_size, said.shape[1]), (said.shape[1], self.hidden_size))
            front = [
                ((2 * torch.rand(s, generator=rng) - 1) / s[1] ** 0.5).to(said) for s in shapes
            ]
        told = gate_layer_inputs([*front, said], said)[-1].double()
        left = project_out(told, self.known[-1].double()) if self.known else told
        if not left.norm() > 1e-6 * told.norm():
            raise ConfigError(
                f"the prompts of {task.name!r} lie within what gates have read of earlier tasks, "
                "so that a gate that is 0 for those is 0 for these; lower "
                f"strategy.gain_lora.threshold={self.threshold}, or choose another strategy"
            )
        return [*front, torch.linalg.eigh(left.T @ left)[1][:, -1:].T.to(said)]

    def current_gates(self) -> dict[int, Gate]:
        """The gates as they are, the one that learns with what it has learned."""
        if not len(self.change):
            return self.gates
        gate = self.gates[self.first_row]
        free = torch.split(self.change, [g.numel() for g in gate])
        return self.gates | {
            self.first_row: [
                g + project_out(f.view_as(g), k)  # eq. 12
                for g, f, k in zip(gate, free, self.known, strict=True)
            ]
        }

    def gate_values(self, model: Model, examples: Sequence[Encoded]) -> Tensor:
        """(E, R) of each example the gate of each row of A: 1 for a branch that has none."""
        said = mean_prompt_embeddings(model, examples)
        found = said.new_ones(len(said), max(len(a) for a, _ in factors(model)))
        for row, gate in self.current_gates().items():
            b = GATE_SLOPE * F.cosine_similarity(gate[-1], gate_layer_inputs(gate, said)[-1])
            found[:, row : row + self.rank] = (2 * b.sigmoid() - 1).abs()[:, None]  # eq. 8
        return found

    @contextmanager
    def apply_gates(self, model: Model, examples: Sequence[Encoded]) -> Iterator[None]:
        """Within it each example's row goes through the branches by its gates: B_i g_i A_i x."""
        opened = self.gate_values(model, examples)[:, None]

        def turned(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            if out.ndim != 3 or len(out) != len(opened):
                raise ConfigError(
                    f"gain_lora: found a LoRA on what is {tuple(out.shape)} for {len(opened)} "
                    "examples, expected a row for each; leave that layer out of "
                    "model.adapters.lora.target_modules"
                )
            return out * opened[..., : out.shape[2]].to(out.dtype)

        readers = [
            model.net.get_submodule(n.rpartition(".")[0]) for n in weights(model) if ".lora_A." in n
        ]
        handles = [reader.register_forward_hook(turned) for reader in readers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def end(self, model: Model, task: Task[Encoded]) -> None:
        """Keep the gate, and what it reads of the task's prompts."""
        super().end(model, task)
        if self.rank:
            gate = [g.detach().clone() for g in self.current_gates()[self.first_row]]
            self.gates[self.first_row], self.change = gate, torch.zeros(0)
            self.known = [
                extend_basis(k, p, self.threshold)
                for k, p in zip(
                    self.known,
                    gate_layer_inputs(gate, mean_prompt_embeddings(model, task.train)),
                    strict=True,
                )
            ]

    def dispatch(self, model: Model, prompts: Sequence[Sequence[int]]) -> Iterator[Sequence[int]]:
        """All prompts at once, each with its own gates."""
        if self.rank:
            self.install_gates(model)
        yield from super().dispatch(model, prompts)


@torch.no_grad()
def mean_prompt_embeddings(model: Model, examples: Sequence[Encoded]) -> Tensor:
    """Return p_0 (E, D), the mean of each prompt's input embeddings, in float32 at least.

    A prompt ends before the first supervised token: of a conversation that is learned whole, it is
    one turn.
    """
    embeddings = model.net.get_input_embeddings().weight
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    means = []
    for e in examples:
        end = max(1, response_start(e)) if True in e.response_mask else None
        means.append(mean_embedding(embeddings, e.ids[:end], dtype))
    return torch.stack(means)


def gate_layer_inputs(gate: Sequence[Tensor], prompt_embeddings: Tensor) -> list[Tensor]:
    """Return the input (E, n) of each layer of a gate: p_0, p_1, p_2, with p_l = SiLU(G_l p_l-1)."""
    inputs = [prompt_embeddings]
    for g in gate[:-1]:
        inputs.append(F.silu(inputs[-1] @ g.T))
    return inputs


def extend_basis(basis: Tensor, rows: Tensor, threshold: float) -> Tensor:
    """Add the fewest columns to `basis` (n, k) that hold this share of the squares of rows (E, n).

    GPM (Saha et al. 2021), as in appendix A.1, eq. 15 and 16.
    """
    residual = project_out(rows.double(), basis.double())
    energy, directions = (t.flip(-1) for t in torch.linalg.eigh(residual.T @ residual))
    total = rows.double().square().sum()
    missing = energy.sum() - (1 - threshold) * total
    # The largest first, up to the share; without those that are zero up to rounding.
    is_missing = energy.cumsum(0) - energy < missing
    is_nonzero = energy > total * len(energy) * torch.finfo(energy.dtype).eps
    count = int((is_missing & is_nonzero).sum())
    return torch.cat([basis, directions[:, :count].to(basis)], 1)

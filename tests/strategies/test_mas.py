"""Memory aware synapses: the logits' sensitivity in closed form and by finite differences, added up
over tasks.
"""

from dataclasses import dataclass, field, replace

import pytest
import torch

from continual.models.importance import sensitivity
from continual.models.weights import combine, snapshot, weights
from continual.strategy.replay_buffer import sample_task_examples
from strategies.ewc import MAS
from tests.support import toy


def squared_logits(net, e) -> torch.Tensor:
    """The squared norms of the logits that predict an example's response, straight from the
    network; a scalar.
    """
    logits = net(input_ids=torch.tensor([e.ids])).logits[0]
    return sum(logits[t - 1].square().sum() for t in range(1, len(e.ids)) if e.response_mask[t])


def test_of_a_linear_layer_it_is_its_closed_form():
    """Of |W h|^2 the gradient is 2 W h h^T: summed over an example's positions, then absolute, then
    the mean.
    """
    made = toy.make_model(torch.float64)
    made.net.requires_grad_(False)
    head = made.net.lm_head.weight.requires_grad_(True)
    expected = torch.zeros_like(head)
    for e in toy.make_examples(0):
        with torch.no_grad():
            hidden = made.net.model(input_ids=torch.tensor([e.ids])).last_hidden_state[0]
            h = torch.stack([hidden[t - 1] for t in range(1, len(e.ids)) if e.response_mask[t]])
            expected += (2 * head @ h.T @ h).abs() / 12
    found = sensitivity(made, toy.make_examples(0))
    assert list(found) == ["lm_head.weight"]
    assert torch.allclose(found["lm_head.weight"], expected, rtol=1e-6, atol=1e-9)


def test_of_any_weight_it_is_the_mean_absolute_finite_difference_of_each_example():
    made, few = toy.make_model(torch.float64, kind="gpt2"), toy.make_examples(1, 4)
    found, eps = sensitivity(made, few), 1e-6
    for name in (
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.1.mlp.c_fc.bias",
        "transformer.ln_f.weight",
    ):
        w = weights(made)[name].data.view(-1)
        for i in (0, 7):
            ends = []
            for sign in (1, -2):
                w[i] += sign * eps
                with torch.no_grad():
                    ends.append([squared_logits(made.net, e).item() for e in few])
            w[i] += eps
            expected = sum(
                abs(up - down) / (2 * eps) for up, down in zip(*ends, strict=True)
            ) / len(few)
            assert found[name].view(-1)[i].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_only_response_positions_count_whatever_the_instruction_weighs_in_the_loss():
    made = toy.make_model(torch.float64)
    dual = replace(made, layout=replace(made.layout, instruction_weight=0.7))
    assert toy.bitwise_equal(
        sensitivity(dual, toy.make_examples(0)), sensitivity(made, toy.make_examples(0))
    )


@dataclass(kw_only=True)
class Recording(MAS):
    """Remembers the importance of every task."""

    parts: list = field(init=False, default_factory=list)

    def consolidate(self, end_weights, task_importance):
        self.parts.append(task_importance)
        super().consolidate(end_weights, task_importance)


def test_importances_of_all_tasks_add_up_around_the_last_weights():
    made, strategy = toy.make_model(torch.float64), Recording(num_examples=4)
    toy.train_stages(made, strategy, 0, 1, size=6)
    assert toy.all_close(strategy.importance, combine(torch.add, *strategy.parts))
    assert toy.bitwise_equal(strategy.anchor, snapshot(made))
    last = sensitivity(made, sample_task_examples(toy.make_task(1, 6), 4, "0/2"))
    assert toy.all_close(strategy.parts[1], last)

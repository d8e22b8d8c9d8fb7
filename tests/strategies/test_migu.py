"""MIGU's masks against the outputs of every layer for one example at a time."""

from dataclasses import replace

import pytest
import torch

from continual.errors import ConfigError
from continual.models.loading import add_adapter
from continual.models.weights import gradient
from continual.strategy.compose import compose
from continual.strategy.interface import Strategy
from strategies.der import DER
from strategies.migu import MIGU, count_neurons, trained_linear_layers
from strategies.multitask import MultiTask
from tests.support import models, toy


def later(**settings) -> MIGU:
    """As it is after the first stage."""
    strategy = MIGU(**settings)
    strategy.later = True
    return strategy


def loudest(made, chosen, kept: float) -> dict[str, set[int]]:
    """Of each linear layer the loudest neurons, from passes of one example each that know nothing
    of batches.
    """
    sums, outputs = {}, {}
    handles = [
        m.register_forward_hook(lambda m, args, out, n=n: outputs.update({n: out.detach()[0]}))
        for n, m in trained_linear_layers(made).items()
    ]
    for e in chosen:
        made.net(input_ids=torch.tensor([e.ids]))
        for n, out in outputs.items():
            for t in range(1, len(e.ids)):
                if e.response_mask[t]:
                    sums[n] = sums.get(n, 0) + out[t - 1].abs() / out[t - 1].abs().sum()
    for handle in handles:
        handle.remove()
    return {
        n: set(s.sort(descending=True).indices[: max(1, round(kept * len(s)))].tolist())
        for n, s in sums.items()
    }


def step(made, strategy, chosen) -> dict[str, torch.Tensor]:
    made.net.zero_grad()
    strategy.backward(made, made.batch(chosen))
    return gradient(made)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loudest_neurons_of_each_layer_have_their_gradient_and_no_others(kind, flat):
    made = toy.make_model(torch.float64, kind=kind)
    made.layout = replace(made.layout, packed=flat and made.layout.packed)
    chosen = toy.make_examples(1, 5)
    plain, masked = step(made, Strategy(), chosen), step(made, later(neuron_share=0.3), chosen)
    layers, names = trained_linear_layers(made), {p: n for n, p in made.net.named_parameters()}
    for name, loud in loudest(made, chosen, 0.3).items():
        for p in layers[name].parameters(recurse=False):
            turned = p.ndim > 1 and not isinstance(layers[name], torch.nn.Linear)  # GPT-2's
            whole, found = (g[names[p]].T if turned else g[names[p]] for g in (plain, masked))
            heard = torch.tensor([i in loud for i in range(len(found))])
            assert torch.allclose(found[heard], whole[heard], rtol=1e-6, atol=1e-10), name
            assert not found[~heard].any(), name
    others = set(plain) - {names[p] for m in layers.values() for p in m.parameters(recurse=False)}
    assert others
    assert all(torch.equal(plain[n], masked[n]) for n in others)


def test_an_encoder_s_layers_are_masked_too_and_padding_does_not_count():
    made = models.make_text_model("t5", dtype=torch.float64)
    short, long = (
        models.make_encoded([5, 6, 7], [8, 9]),
        models.make_encoded([9, 8, 7, 6, 5, 4], [3, 2, 9, 4]),
    )
    made.layout = replace(made.layout, tokens_per_microbatch=1)
    apart = step(made, later(), [short, long])
    made.layout = replace(made.layout, tokens_per_microbatch=100)
    assert toy.all_close(step(made, later(), [short, long]), apart, rtol=1e-7, atol=1e-10)
    for name, layer in trained_linear_layers(made).items():
        if name != "lm_head":
            rows = apart[f"{name}.weight"].any(1).sum()
            assert 0 < rows <= round(0.3 * count_neurons(layer)), name


def test_weights_in_bfloat16_have_gradients_in_bfloat16():
    found = step(toy.make_model(torch.bfloat16), later(), toy.make_examples(1, 5))
    assert {g.dtype for g in found.values()} == {torch.bfloat16}


def test_the_first_stage_is_as_if_alone():
    made, plain, strategy = toy.make_model(), toy.make_model(), MIGU()
    toy.train_stages(made, strategy, 0)
    toy.train_stages(plain, Strategy(), 0)
    assert toy.bitwise_equal(toy.copy_parameters(made), toy.copy_parameters(plain))
    toy.train_stages(made, strategy, 1)
    toy.train_stages(plain, Strategy(), 1)
    assert not toy.bitwise_equal(toy.copy_parameters(made), toy.copy_parameters(plain))


def test_a_layer_that_is_silent_is_not_masked():
    """A LoRA's B before its first step."""
    made = toy.make_model()
    made.net = add_adapter(
        made.net, "lora", {"lora": {"r": 4, "target_modules": ["q_proj"]}}, seq2seq=False
    )
    found = step(made, later(), toy.make_examples(1, 5))
    assert all(g.any(1).all() for n, g in found.items() if "lora_B" in n)
    with torch.no_grad():
        for n, p in made.net.named_parameters():
            if "lora_B" in n:
                p += torch.rand(p.shape, generator=torch.Generator().manual_seed(0))
    found = step(made, later(), toy.make_examples(1, 5))
    for n, g in found.items():
        assert g.any(1).sum() == round(0.3 * len(g)), n


def test_passes_of_other_examples_within_the_loss_are_not_overheard():
    """DER answers remembered examples beside the step's own."""
    made, chosen = toy.make_model(torch.float64), toy.make_examples(1, 5)
    strategy = compose(later(), DER(capacity=8, alpha=0.5, minibatch_size=4))
    toy.train_stages(made, strategy, 0)
    strategy.begin(made, toy.make_task(1))
    found = step(made, strategy, chosen)
    for name, loud in loudest(made, chosen, 0.3).items():
        assert set(found[f"{name}.weight"].any(1).nonzero()[:, 0].tolist()) == loud


def test_weights_of_tasks_that_are_learned_along_change_no_mask():
    made, chosen = toy.make_model(torch.float64), toy.make_examples(1, 5)
    strategy = compose(MIGU(), MultiTask(weighting="uncertainty"))
    strategy.begin(made, toy.make_task(1))
    strategy.later = True
    found = step(made, strategy, chosen)
    for name, loud in loudest(made, chosen, 0.3).items():
        assert set(found[f"{name}.weight"].any(1).nonzero()[:, 0].tolist()) == loud


@pytest.mark.parametrize("updated", [0.0, 1.2])
def test_a_part_that_is_none_is_refused(updated):
    with pytest.raises(ConfigError, match="expected more than 0, up to 1"):
        MIGU(neuron_share=updated)

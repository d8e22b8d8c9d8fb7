"""The diagonal Fisher information against closed forms, a loop of one example at a time, and
Avalanche.
"""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import transformers

from continual.data.types import Encoded
from continual.errors import ConfigError
from continual.models import importance
from continual.models.importance import LABELS, fisher, fisher_per_example
from continual.models.loading import add_adapter
from continual.models.model import Model
from continual.packing.batch import Layout
from tests.support import toy

WORDS = 6  # the vocabulary of the model with a closed form


def biased(probabilities: torch.Tensor) -> Model:
    """A model that gives every token these probabilities, whatever came before; only the LM head's
    bias trains.
    """
    net = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=WORDS,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=32,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
        )
    ).double()
    net.lm_head = torch.nn.Linear(8, WORDS, bias=True, dtype=torch.float64)
    net.requires_grad_(False)
    net.lm_head.weight.zero_()
    net.lm_head.bias.copy_(probabilities.log())
    net.lm_head.bias.requires_grad_(True)
    return Model(net.eval(), None, Layout(pad_token_id=1, device=torch.device("cpu")))


P = torch.tensor([0.3, 0.1, 0.1, 0.2, 0.2, 0.1], dtype=torch.float64)


def answers(*responses: tuple[int, ...], prompt: tuple[int, ...] = (5, 5)) -> list[Encoded]:
    return [
        Encoded(str(i), 0, (*prompt, *r), (False,) * len(prompt) + (True,) * len(r))
        for i, r in enumerate(responses)
    ]


def bias_fisher(made: Model, examples, *more) -> torch.Tensor:
    found = fisher(made, examples, *more)
    assert list(found) == ["lm_head.bias"]
    return found["lm_head.bias"]


def test_the_empirical_fisher_of_one_token_is_the_squared_error():
    expected = torch.stack(
        [(torch.eye(WORDS, dtype=torch.float64)[y] - P).square() for y in (3, 3, 0)]
    ).mean(0)
    assert torch.allclose(bias_fisher(biased(P), answers((3,), (3,), (0,))), expected)


def test_the_gradient_is_summed_over_an_example_s_tokens_before_it_is_squared():
    responses = [(3, 4, 3), (0,), (2, 5)]
    counts = torch.stack(
        [torch.bincount(torch.tensor(r), minlength=WORDS).double() for r in responses]
    )
    expected = (counts - torch.tensor([[3.0], [1.0], [2.0]]) * P).square().mean(0)
    assert torch.allclose(bias_fisher(biased(P), answers(*responses)), expected)


@pytest.mark.parametrize("tokens", [1, 3])
def test_the_sampled_fisher_is_the_variance_of_the_model_s_own_labels(tokens):
    """E (n_k - T p_k)^2 = T p_k (1 - p_k) for T tokens drawn from p, whatever the data says."""
    drawn = bias_fisher(
        biased(P), answers((2,) * tokens) * 800, "sampled", torch.Generator().manual_seed(0)
    )
    ratio = drawn / (tokens * P * (1 - P))
    assert torch.allclose(ratio, torch.ones_like(ratio), rtol=0.3)
    assert ratio.mean().item() == pytest.approx(1, rel=0.05)


def test_sampled_labels_follow_their_generator():
    def drawn(seed):
        return bias_fisher(
            biased(P), answers((2, 3), (0,)), "sampled", torch.Generator().manual_seed(seed)
        )

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_only_response_tokens_count_whatever_the_instruction_weighs_in_the_loss(weight):
    made = biased(P)
    dual = replace(made, layout=replace(made.layout, instruction_weight=weight))
    plain = bias_fisher(made, answers((3, 4), (0,)))
    assert torch.equal(bias_fisher(dual, answers((3, 4), (0,), prompt=(2, 4, 4))), plain)


def by_hand(made: Model, examples) -> dict[str, torch.Tensor]:
    """A copy of the network, one example at a time, by .backward() of the log-likelihood from all
    its logits.
    """
    net = deepcopy(made.net)
    total = {n: torch.zeros_like(p) for n, p in net.named_parameters() if p.requires_grad}
    for e in examples:
        net.zero_grad()
        toy.log_likelihood(net, e).backward()
        for n, p in net.named_parameters():
            if p.requires_grad:
                total[n] += p.grad**2 / len(examples)
    return total


def test_it_equals_a_loop_of_one_example_at_a_time():
    made, examples = toy.make_model(torch.float64), toy.make_examples(0)
    assert toy.all_close(fisher(made, examples), by_hand(made, examples), rtol=1e-8, atol=1e-14)


def test_it_has_trainable_parameters_only():
    made, examples = toy.make_model(torch.float64), toy.make_examples(0)
    made.net.model.layers[0].requires_grad_(False)
    found = fisher(made, examples)
    assert set(found) == {n for n, p in made.net.named_parameters() if p.requires_grad}
    assert toy.all_close(found, by_hand(made, examples), rtol=1e-8, atol=1e-14)


def test_it_is_no_squared_mean_gradient():
    """Two examples that pull against one another matter to the weights, and their mean gradient
    does not see it.
    """
    halves = torch.tensor([0.5, 0, 0, 0, 0.5, 0], dtype=torch.float64) + 1e-12
    made, pair = biased(halves), answers((0,), (4,))
    net = deepcopy(made.net)
    (sum(toy.log_likelihood(net, e) for e in pair) / 2).backward()
    assert net.lm_head.bias.grad.abs().max() < 1e-9
    assert torch.allclose(
        bias_fisher(made, pair), torch.tensor([0.25, 0, 0, 0, 0.25, 0], dtype=torch.float64)
    )


@pytest.mark.parametrize("tokens", [1, 14])
def test_it_does_not_depend_on_how_batches_are_laid_out(tokens):
    made, examples = toy.make_model(torch.float64), toy.make_examples(0)
    cut = fisher(toy.limit_micro_batch(made, tokens), examples)
    assert toy.all_close(cut, fisher(made, examples), rtol=1e-8, atol=1e-14)


def test_one_row_of_all_examples_and_a_row_each_give_the_same():
    made, examples = toy.make_model(torch.float64), toy.make_examples(0)
    assert made.layout.packed
    assert made.last_layer
    padded = replace(made, layout=replace(made.layout, packed=False))
    assert toy.all_close(fisher(padded, examples), fisher(made, examples), rtol=1e-8, atol=1e-14)


# Examples together


def lora(made: Model, **keys) -> Model:
    """Both halves of every adapter away from zero."""
    net = add_adapter(made.net, "lora", {"lora": {"r": 4, **keys}}, seq2seq=made.layout.seq2seq)
    for p in net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    return replace(made, net=net.to(torch.float64).eval())


def tied(made: Model) -> Model:
    made.net.lm_head.weight = made.net.model.embed_tokens.weight
    return made


def only(made: Model, *endings: str) -> Model:
    for name, p in made.net.named_parameters():
        p.requires_grad_(name.endswith(endings))
    return made


def of(kind: str, **keys) -> Model:
    if kind == "t5":
        keys["decoder_start_token_id"] = 1
    return toy.make_model(torch.float64, kind=kind, **keys)


def experts() -> Model:
    """Tokens of several examples meet in an expert."""
    net = (
        transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                num_local_experts=2,
                max_position_embeddings=32,
                experts_implementation="eager",
            )
        )
        .double()
        .eval()
    )
    return Model(net, None, Layout(pad_token_id=1, device=torch.device("cpu")))


TOGETHER = {
    "llama": lambda: of("llama"),
    "llama, head tied to the embedding": lambda: tied(of("llama")),
    "llama, only the tied weight": lambda: only(tied(of("llama")), "embed_tokens.weight"),
    "llama, only the last norm": lambda: only(of("llama"), "model.norm.weight"),
    "llama with lora": lambda: lora(of("llama"), target_modules=["q_proj", "v_proj"]),
    "llama with lora, a whole head": lambda: lora(
        of("llama"), target_modules="all-linear", modules_to_save=["lm_head"]
    ),
    "gpt2": lambda: of("gpt2"),
    "gpt2 with lora": lambda: lora(of("gpt2"), target_modules=["c_attn"]),
    "qwen3": lambda: of("qwen3"),
    "t5 with lora": lambda: lora(of("t5"), target_modules=["q", "v", "wi"]),
    "experts with lora": lambda: lora(experts(), target_modules=["q_proj", "o_proj"]),
}
APART = {
    "t5": lambda: of("t5"),
    "experts": experts,
    "opt": lambda: of("opt"),
    "llama with dora": lambda: lora(of("llama"), target_modules=["q_proj"], use_dora=True),
}


def repeating() -> list[Encoded]:
    """Tokens that come twice in an example and in others, padding among them, and as many examples
    as positions.
    """
    more = [
        Encoded("r", 0, ids, (False, False, False, True, True))
        for ids in [(5, 1, 5, 6, 6), (9, 9, 9, 9, 9), (5, 6, 1, 1, 5), (2, 3, 4, 5, 6)]
    ]
    return [*toy.make_examples(0, 10), *more]


def not_so(*_):
    raise AssertionError("not in this way")


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("kind", TOGETHER)
def test_examples_together_give_what_a_loop_gives(kind, labels, monkeypatch):
    made = TOGETHER[kind]()
    expected = fisher_per_example(made, repeating(), labels, torch.Generator().manual_seed(0))
    assert all(f.abs().max() > 0 for f in expected.values())
    monkeypatch.setattr(importance, "_sum_one_by_one", not_so)
    found = fisher(made, repeating(), labels, torch.Generator().manual_seed(0))
    assert toy.all_close(found, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("kind", APART)
def test_models_whose_weights_mix_examples_run_one_at_a_time(kind, labels):
    made = APART[kind]()
    with pytest.raises(importance._NotSeparable):
        importance._sum_batched(made, repeating(), [None] * len(repeating()))
    one, other = (
        f(made, repeating(), labels, torch.Generator().manual_seed(0))
        for f in (fisher, fisher_per_example)
    )
    assert toy.bitwise_equal(one, other)


def test_how_many_gradients_are_held_at_a_time_changes_nothing(monkeypatch):
    made, examples = of("gpt2"), repeating()
    whole = fisher(made, examples)
    monkeypatch.setattr(importance, "PRODUCTS", 3 * 32 * 32)
    assert toy.all_close(fisher(made, examples), whole, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_network_is_left_as_it_was(kind):
    made = of(kind)
    before = toy.copy_parameters(made)
    fisher(made, repeating())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.net.modules())
    assert all(p.grad is None for p in made.net.parameters())
    assert toy.bitwise_equal(toy.copy_parameters(made), before)


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_in_bfloat16_it_is_the_loop_s_to_its_rounding(how):
    made = toy.make_model()
    made = replace(made, bf16=True) if how == "autocast" else replace(made, net=made.net.bfloat16())
    found, expected = fisher(made, repeating()), fisher_per_example(made, repeating())
    for name, f in expected.items():
        assert found[name].dtype == f.dtype
        assert (found[name] - f).float().norm() < 0.05 * f.float().norm(), name


def test_no_examples_tell_of_no_importance():
    assert not any(f.any() for f in fisher(toy.make_model(), []).values())


def test_unknown_labels_are_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="did you mean 'sampled'"):
        fisher(toy.make_model(), toy.make_examples(0), "sample")


class LastToken(torch.nn.Module):
    """The toy model as Avalanche wants one: (N, T) ids to (N, V) logits of the token that follows."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, ids):
        return self.net(input_ids=ids).logits[:, -1]


@pytest.mark.filterwarnings("ignore")  # of Avalanche's own imports
def test_it_equals_avalanche_s_importances_at_batch_size_one():
    pytest.importorskip("avalanche")
    from avalanche.training.plugins import EWCPlugin

    made = toy.make_model(torch.float64)
    examples = [
        Encoded(str(i), 0, e.ids[:3], (False, False, True))
        for i, e in enumerate(e for e in toy.make_examples(0, 40) if len(e.ids) > 2)
    ]
    module = LastToken(deepcopy(made.net))
    rows = [(torch.tensor(e.ids[:2]), torch.tensor(e.ids[2]), torch.tensor(0)) for e in examples]
    theirs = EWCPlugin(ewc_lambda=1.0).compute_importances(
        module,
        torch.nn.CrossEntropyLoss(),
        torch.optim.SGD(module.parameters(), lr=0.1),
        rows,
        "cpu",
        batch_size=1,
    )
    expected = {
        n.removeprefix("net."): p.data.double() for n, p in theirs.items()
    }  # it adds up in float32
    assert toy.all_close(fisher(made, examples), expected, rtol=1e-5, atol=1e-10)

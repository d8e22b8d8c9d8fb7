"""What a batch's loss is: which tokens count, by how much, and that no layout of the batch changes
it.
"""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from continual.data.template import Encoder
from continual.errors import ConfigError
from continual.models.loss import accumulate, forward, nll, token_nll
from continual.models.weights import gradient, snapshot
from continual.training.recipe import Recipe
from continual.training.stage import mask_prompt_tokens
from tests.support.models import make_encoded, make_text_model, some

LLAMA = make_text_model(dtype=torch.float64)
T5 = make_text_model("t5", dtype=torch.float64)


def weighted(net, weight: float):
    return replace(net, layout=replace(net.layout, instruction_weight=weight))


def by_hand(net, e):
    """The negative log-likelihood of every token but the first, straight from the network's own
    logits.
    """
    logits = net.net(input_ids=torch.tensor([e.ids])).logits[0, :-1]
    return F.cross_entropy(logits, torch.tensor(e.ids[1:]), reduction="none"), torch.tensor(
        e.response_mask[1:]
    )


# What counts


def test_only_response_tokens_count_and_all_count_alike():
    batch = LLAMA.batch(some(5))
    each = [by_hand(LLAMA, e) for e in batch.examples]
    expected = sum(n[r].sum() for n, r in each) / sum(int(r.sum()) for _, r in each)
    torch.testing.assert_close(nll(LLAMA, batch), expected)
    assert batch.supervised_tokens == sum(sum(e.response_mask) for e in batch.examples)


def test_it_is_the_networks_own_loss_with_the_prompt_labelled_minus_100():
    (e,) = some(1)
    labels = [t if r else -100 for t, r in zip(e.ids, e.response_mask, strict=True)]
    own = LLAMA.net(input_ids=torch.tensor([e.ids]), labels=torch.tensor([labels])).loss
    torch.testing.assert_close(nll(LLAMA, LLAMA.batch([e])), own.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.5, 1.0])
def test_an_instruction_weight_counts_each_prompt_token_by_that_much(weight):
    batch = weighted(LLAMA, weight).batch(some(4, seed=1))
    each = [by_hand(LLAMA, e) for e in batch.examples]
    total = sum(n[r].sum() + weight * n[~r].sum() for n, r in each)
    count = sum(int(r.sum()) + weight * int((~r).sum()) for _, r in each)
    torch.testing.assert_close(nll(LLAMA, batch), total / count, check_dtype=False)
    assert batch.supervised_tokens == pytest.approx(count)


def test_instruction_weight_one_is_plain_language_modelling():
    (e,) = some(1)
    ids = torch.tensor([e.ids])
    own = LLAMA.net(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(
        nll(LLAMA, weighted(LLAMA, 1.0).batch([e])), own.double(), rtol=1e-6, atol=1e-6
    )


def test_an_encoder_decoders_loss_is_its_own_loss_for_the_response_as_labels():
    for e in some(3):
        at = e.response_mask.index(True)
        own = T5.net(input_ids=torch.tensor([e.ids[:at]]), labels=torch.tensor([e.ids[at:]])).loss
        torch.testing.assert_close(nll(T5, T5.batch([e])), own.double(), rtol=1e-6, atol=1e-6)


def test_a_conversations_later_prompts_do_not_count():
    e = replace(some(1)[0], ids=(7, 8, 9, 10, 11), response_mask=(False, True, False, False, True))
    n, _ = by_hand(LLAMA, e)
    torch.testing.assert_close(token_nll(LLAMA, LLAMA.batch([e])), n[[0, 3]])


@pytest.mark.parametrize("net", [LLAMA, T5], ids=["llama", "t5"])
def test_prompt_tokens_and_padding_never_reach_the_lm_head(net):
    seen = []
    hook = net.net.get_output_embeddings().register_forward_hook(
        lambda _, args, out: seen.append(args[0].shape[:-1])
    )
    batch = net.batch(some(6))
    logits = forward(net, batch)
    hook.remove()
    responses = sum(sum(e.response_mask) for e in batch.examples)
    assert [shape.numel() for shape in seen] == [responses]
    assert logits.shape == (responses, net.net.config.vocab_size)


def test_the_networks_head_is_as_it_was_after_a_forward_pass():
    forward(LLAMA, LLAMA.batch(some(2)))
    assert not LLAMA.net.get_output_embeddings()._forward_pre_hooks


# No layout changes it


@pytest.mark.parametrize("net", [LLAMA, T5], ids=["llama", "t5"])
@given(st.integers(1, 7), st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_padded_together_equals_one_at_a_time(net, n, seed):
    batch = net.batch(some(n, seed))
    together = token_nll(net, batch)
    for i in range(n):
        torch.testing.assert_close(
            together[batch.example_index == i], token_nll(net, batch.select([i]))
        )


@pytest.mark.parametrize("net", [LLAMA, T5], ids=["llama", "t5"])
@pytest.mark.parametrize(("tokens", "least"), [(1, 7), (40, 3), (1000, 1)])
def test_accumulated_micro_batches_give_the_gradient_of_one_large_batch(net, tokens, least):
    whole = net.batch(some(7, seed=3))
    parts = replace(whole, layout=replace(net.layout, tokens_per_microbatch=tokens)).micro_batches()
    assert sorted(e.id for p in parts for e in p.examples) == [f"e{i}" for i in range(7)]
    assert len(parts) == 7 if tokens == 1 else len(parts) >= least
    for part in parts:
        assert len(part.examples) == 1 or part.inputs["input_ids"].numel() <= tokens
    found = []
    for step in ([whole], parts):
        net.net.zero_grad()
        loss = accumulate(nll, net, step)
        found.append((loss, gradient(net)))
    torch.testing.assert_close(found[0][0], found[1][0], check_dtype=False)
    for name, g in found[0][1].items():
        torch.testing.assert_close(g, found[1][1][name])


def test_each_supervised_position_knows_its_example_and_task():
    batch = LLAMA.batch(some(5, tasks=3))
    for i, e in enumerate(batch.examples):
        mine = batch.example_index == i
        assert batch.targets[mine].tolist() == [
            t for t, r in zip(e.ids, e.response_mask, strict=True) if r
        ]
        assert set(batch.task_index[mine].tolist()) == {e.task_index}
    assert {t: len(b.examples) for t, b in batch.split_by_task().items()} == {
        t: sum(e.task_index == t for e in batch.examples)
        for t in sorted({e.task_index for e in batch.examples})
    }


def test_a_scale_multiplies_an_examples_weight():
    a, b = some(2)
    scaled = LLAMA.batch([a, b]).with_examples([a, b], example_weights=[3.0, 1.0])
    mine, other = (token_nll(LLAMA, LLAMA.batch([e])).sum() for e in (a, b))
    tokens = 3 * sum(a.response_mask) + sum(b.response_mask)
    torch.testing.assert_close(nll(LLAMA, scaled), (3 * mine + other) / tokens)


def test_the_loss_at_given_weights_leaves_the_models_own_alone():
    batch, here = LLAMA.batch(some(2)), snapshot(LLAMA)
    zero = {n: torch.zeros_like(w) for n, w in here.items()}
    torch.testing.assert_close(
        nll(LLAMA, batch, at=zero).exp(),
        torch.tensor(float(LLAMA.net.config.vocab_size)),
        check_dtype=False,
    )
    assert all(torch.equal(w, snapshot(LLAMA)[n]) for n, w in here.items())


# Hidden instruction tokens


def hidden(share, how, e, seed=0):
    recipe = Recipe(lr=0.0, prompt_mask_prob=share, prompt_mask_mode=how)
    return mask_prompt_tokens(e, recipe, LLAMA, random.Random(seed))


LONG = make_encoded([LLAMA.tokenizer.eos_token_id, *range(10, 210), *range(10, 210)], [7, 8, 9])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_about_the_asked_share_of_the_instruction_is_replaced_or_dropped(share):
    replaced, dropped = hidden(share, "replace", LONG), hidden(share, "drop", LONG)
    assert len(replaced.ids) == len(LONG.ids)
    changed = sum(a != b for a, b in zip(replaced.ids, LONG.ids, strict=True))
    assert changed / 400 == pytest.approx(share, abs=0.07)
    assert 1 - (len(dropped.ids) - 4) / 400 == pytest.approx(share, abs=0.07)


@given(st.floats(0, 1), st.sampled_from(["replace", "drop"]), st.integers(0, 9))
@settings(deadline=None)
def test_the_response_and_special_tokens_are_never_hidden(share, how, seed):
    made = hidden(share, how, LONG, seed)
    assert made.ids[0] == LLAMA.tokenizer.eos_token_id
    assert [t for t, r in zip(made.ids, made.response_mask, strict=True) if r] == [7, 8, 9]
    assert len(made.ids) == len(made.response_mask)


@pytest.mark.parametrize("how", ["replace", "drop"])
def test_the_same_seed_hides_the_same_tokens(how):
    assert hidden(0.5, how, LONG, 3) == hidden(0.5, how, LONG, 3) != hidden(0.5, how, LONG, 4)


def test_dropping_the_whole_prompt_still_leaves_every_response_token_learned():
    short = make_encoded([10, 11], [7, 8])
    made = hidden(1.0, "drop", short)
    assert LLAMA.batch([made]).supervised_tokens == 2


def test_replacements_are_tokens_of_the_model_and_none_is_special():
    made = hidden(1.0, "replace", make_encoded(list(range(10, 210)), [7]))
    assert all(0 <= t < len(LLAMA.tokenizer) for t in made.ids)
    assert not set(made.ids) & set(LLAMA.tokenizer.all_special_ids)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"prompt_mask_prob": 1.5},
            "loss.prompt_mask_prob=1.5: expected a share or probability in",
        ),
        (
            {"prompt_mask_mode": "dorp"},
            r"unknown loss.prompt_mask_mode 'dorp'; did you mean 'drop'",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Recipe(lr=0.1, **settings)


def test_the_encoder_and_the_batch_agree_on_what_is_learned():
    from tests.support.models import make_example

    e = Encoder(LLAMA.tokenizer).encode_example(make_example("Do it.", "a b", "red"), 0).require()
    assert LLAMA.tokenizer.decode(LLAMA.batch([e]).targets) == "red<eos>"

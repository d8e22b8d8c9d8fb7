"""One flat row is the same batch as one padded row an example: same losses, same gradients, nothing
mixed.
"""

import random
from dataclasses import replace
from itertools import product

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from continual.data.types import Encoded
from continual.models.loss import nll, token_nll
from continual.models.model import Model
from continual.models.weights import gradient
from continual.packing.batch import Layout
from continual.packing.layout import BLOCK_OVERHEAD_TOKENS, block_by_length, group_by_prefix
from continual.packing.support import detect_packing_support
from tests.support.architectures import OWN_RULES, READ
from tests.support.models import make_encoded, make_text_model

LLAMA = make_text_model(dtype=torch.float64)


def made(network) -> Model:
    torch.manual_seed(0)
    net = network().double().eval()
    flat, last = detect_packing_support(net)
    assert flat
    return Model(
        net, None, Layout(pad_token_id=0, device=torch.device("cpu"), packed=True), last_layer=last
    )


def draw(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(5, 250) for _ in range(n)]


def two_instructions(n: int = 12, length: int = 30) -> list[Encoded]:
    """Examples of two tasks behind their instructions, some of the same length, and one of no
    task's making.
    """
    rng = random.Random(0)
    before = [draw(rng, length), draw(rng, length)]
    return [
        *(
            make_encoded(before[i % 2] + draw(rng, i % 5 * 2), draw(rng, 1 + i % 3), f"e{i}", i % 2)
            for i in range(n)
        ),
        make_encoded([7], [8, 9], "other", 2),
    ]


def padded(net: Model) -> Model:
    return replace(net, layout=replace(net.layout, packed=False))


def losses(net: Model, examples) -> torch.Tensor:
    """(E,) each example's summed loss."""
    batch = net.batch(examples)
    each = token_nll(net, batch)
    return torch.zeros(len(examples), dtype=each.dtype).index_add(0, batch.example_index, each)


# The same numbers


@pytest.mark.parametrize("kind", READ)
def test_every_architecture_that_reads_flat_rows_gives_the_padded_losses_and_gradients(kind):
    net = made(READ[kind])
    found = []
    for way in (net, replace(net, last_layer=None), padded(net)):
        way.net.zero_grad()
        each = losses(way, two_instructions())
        nll(way, way.batch(two_instructions())).backward()
        found.append((each.detach(), gradient(way)))
    for each, gradients in found[:2]:
        torch.testing.assert_close(each, found[2][0], rtol=1e-6, atol=1e-6)
        for (
            name,
            g,
        ) in gradients.items():  # some norms of transformers round through float32 even in float64
            torch.testing.assert_close(g, found[2][1][name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", [kind for kind in READ if kind not in ("gpt2", "olmo2")])
def test_of_the_last_layer_only_keys_and_values_are_computed_everywhere(kind):
    net, seen = made(READ[kind]), []
    examples = two_instructions()
    hook = net.last_layer.layer.register_forward_hook(
        lambda _, args, out: seen.append((out[0] if isinstance(out, tuple) else out).shape)
    )
    token_nll(net, net.batch(examples))
    hook.remove()
    assert seen == [(1, sum(sum(e.response_mask) for e in examples), 32)]


@pytest.mark.parametrize("kind", ["gpt2", "olmo2"])
def test_a_network_that_is_built_otherwise_computes_its_last_layer_whole(kind):
    assert made(READ[kind]).last_layer is None


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_in_float64_without_such_norms_they_agree_to_rounding(kind, weight):
    net = made(READ[kind])
    net.layout = replace(net.layout, instruction_weight=weight)
    found = []
    for way in (net, padded(net)):
        way.net.zero_grad()
        nll(way, way.batch(two_instructions())).backward()
        found.append(gradient(way))
    for name, g in found[0].items():
        torch.testing.assert_close(g, found[1][name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "network",
    [
        lambda: tf.BloomForCausalLM(
            tf.BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=2)
        ),
        lambda: tf.MambaForCausalLM(
            tf.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1)
        ),
        *OWN_RULES.values(),
    ],
    ids=["alibi", "state space", *OWN_RULES],
)
@pytest.mark.filterwarnings("ignore")
def test_networks_that_cannot_read_a_flat_row_are_found_out(network):
    assert detect_packing_support(network()) == (False, None)


def test_a_network_that_cannot_read_a_flat_row_says_so_and_is_padded(capsys):
    from continual.models.loading import assemble
    from tests.support.models import train_byte_bpe

    net = assemble(
        tf.BloomForCausalLM(tf.BloomConfig(vocab_size=400, hidden_size=32, n_layer=1, n_head=2)),
        train_byte_bpe(),
    )
    assert not net.layout.packed
    assert capsys.readouterr().err == (
        "bloom: its attention cannot read several examples in one packed row; batches are padded\n"
    )


def test_the_network_attends_as_before_after_a_flat_row():
    before = LLAMA.net.config._attn_implementation
    losses(LLAMA, two_instructions())
    assert LLAMA.net.config._attn_implementation == before


# Nothing mixed


@st.composite
def batches(draw_one):
    """A batch over few tokens, so that prefixes of all lengths are shared, and one example of it
    changed.
    """
    tokens = st.lists(st.integers(5, 7), min_size=1, max_size=6)
    stem = st.sampled_from([(), (5,) * 60, (6,) * 90, (5,) * 30 + (7,) * 40])
    one = st.builds(
        lambda s, prompt, response: make_encoded([*s, *prompt], response), stem, tokens, tokens
    )
    return (
        draw_one(st.lists(one, min_size=1, max_size=9)),
        draw_one(one),
        draw_one(st.integers(0, 8)),
    )


@given(batches())
@settings(max_examples=60, deadline=None)
def test_changing_one_example_changes_no_other_examples_loss(drawn):
    examples, other, at = drawn
    at %= len(examples)
    before, after = (
        losses(LLAMA, e) for e in (examples, [*examples[:at], other, *examples[at + 1 :]])
    )
    keep = [i for i in range(len(examples)) if i != at]
    torch.testing.assert_close(before[keep], after[keep], rtol=1e-6, atol=1e-6)


@given(batches())
@settings(max_examples=30, deadline=None)
def test_a_row_gives_each_example_the_loss_it_has_alone(drawn):
    examples, _, _ = drawn
    alone = torch.cat([losses(padded(LLAMA), [e]) for e in examples])
    torch.testing.assert_close(losses(LLAMA, examples), alone, rtol=1e-6, atol=1e-6)


# As few tokens as can be


def test_a_tasks_shared_instruction_is_read_once():
    instruction = list(range(10, 110))
    examples = [make_encoded([*instruction, i], [7], f"e{i}") for i in range(9)]
    batch = LLAMA.batch(examples)
    assert batch.inputs["input_ids"].shape == (1, 100 + 9)


def test_several_tasks_in_one_batch_share_a_prefix_each():
    found = sorted((n, sorted(members)) for n, members in group_by_prefix(two_instructions()))
    assert found == [(0, [12]), (30, [0, 2, 4, 6, 8, 10]), (30, [1, 3, 5, 7, 9, 11])]


def test_a_response_is_never_part_of_a_shared_prefix():
    same = [make_encoded(list(range(10, 90)), [7, 8, 9], f"e{i}") for i in range(4)]
    assert list(group_by_prefix(same)) == [(80, [0, 1, 2, 3])]


@given(st.dictionaries(st.integers(0, 9), st.integers(0, 60), max_size=6))
@settings(deadline=None)
def test_blocks_have_the_least_padding_and_overhead_of_all_ways_to_cut(lengths):
    def cost(runs):
        return sum(len(run) * max(lengths[k] for k in run) + BLOCK_OVERHEAD_TOKENS for run in runs)

    blocks = block_by_length(lengths)
    keys = sorted((k for k, n in lengths.items() if n), key=lengths.__getitem__)
    assert sorted(k for run in blocks for k in run) == sorted(keys)
    ways = []
    for cuts in product([False, True], repeat=max(0, len(keys) - 1)):
        runs = [[keys[0]]] if keys else []
        for key, cut in zip(keys[1:], cuts, strict=True):
            if cut:
                runs.append([key])
            else:
                runs[-1].append(key)
        ways.append(cost(runs))
    assert cost(blocks) == min(ways)

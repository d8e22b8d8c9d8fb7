"""One FlexAttention kernel for a flat row gives what SDPA gives block by block, and visits what is
visible alone.

On a CPU most tests run the kernel uncompiled, which reads the mask alone; the tables of blocks have
tests of their own.
"""

import shutil

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from continual.models import loss
from continual.models.loss import nll, token_nll
from continual.models.weights import gradient
from continual.packing import attention, attention_cpu, attention_flex, support
from continual.packing.attention import PackedRow, PrefixGroup
from continual.packing.layout import group_by_prefix
from tests.support.models import make_encoded, make_text_model

CPU = torch.device("cpu")
KERNEL_AND_ORACLE = (attention_flex.flex_row_attention, attention.sdpa_row_attention)
ROW = PackedRow(
    (PrefixGroup(0, ((2, 40), (1, 90))), PrefixGroup(140, ((3, 1), (2, 30))), PrefixGroup(7, ()))
)


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    """Without a compiler torch has no gradients of it on a CPU, unless its debugging form is asked
    for.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        patch.setattr(torch_flex, "_validate_device", lambda query, key, value: None)
        yield


def rows(longest: int):
    block = st.tuples(st.integers(1, 3), st.integers(1, longest))
    one = st.builds(
        lambda prefix, blocks: PrefixGroup(prefix, tuple(blocks)),
        st.sampled_from([0, 1, longest // 2, longest]),
        st.lists(block, min_size=1, max_size=2),
    )
    return st.builds(lambda groups: PackedRow(tuple(groups)), st.lists(one, min_size=1, max_size=2))


WINDOW = st.one_of(st.none(), st.integers(1, 200))


def length(row: PackedRow) -> int:
    return sum(g.prefix_length + sum(b * n for b, n in g.blocks) for g in row.groups)


def visible(row: PackedRow, window: int | None) -> torch.Tensor:
    """(N, N) by the definition: the same group, the prefix or the same example, not later, not too
    long ago.
    """
    told, example = [], 0
    for number, group in enumerate(row.groups):
        told += [(number, -1, p) for p in range(group.prefix_length)]
        for b, n in group.blocks:
            for _ in range(b):
                example += 1
                told += [(number, example, group.prefix_length + p) for p in range(n)]
    group, example, position = torch.tensor(told).T
    ago = position[:, None] - position
    seen = (
        (group[:, None] == group) & ((example == -1) | (example[:, None] == example)) & (ago >= 0)
    )
    return seen if window is None else seen & (ago < window)


def states(row: PackedRow, heads=(4, 2), dtype=torch.float64, device=CPU, size=16):
    """Queries, keys and values as a network's layer lays them, and what their output's gradient is."""
    torch.manual_seed(0)
    laid = [
        torch.randn(1, length(row), h, size, device=device, dtype=dtype)
        for h in (heads[0], *heads, heads[1])
    ]
    return [x.transpose(1, 2).requires_grad_() for x in laid[1:]], laid[0]


def attended(by, row: PackedRow, told, up, **more):
    """The output, and the gradients of queries, keys and values."""
    out, _ = by(None, *told, None, row=row, **more)
    return [out, *torch.autograd.grad(out, told, up)]


@pytest.fixture
def kernels(monkeypatch):
    """A list that grows by one for each call of the kernel."""
    called, kernel = [], attention_flex.flex_attention
    monkeypatch.setattr(
        attention_flex, "flex_attention", lambda *a, **more: called.append(1) or kernel(*a, **more)
    )
    return called


# The same numbers


@given(
    rows(50),
    WINDOW,
    st.sampled_from([None, 2.0]),
    st.sampled_from([(4, 2), (2, 2), (3, 1)]),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=15, deadline=None)
def test_outputs_and_gradients_are_those_of_the_blocks(row, window, cap, heads, dtype):
    told, up = states(row, heads, dtype)
    more = {"sliding_window": window, "softcap": cap, "scaling": 0.3}
    tolerance = (
        {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    )
    for one, other in zip(
        *(attended(attend, row, told, up, **more) for attend in KERNEL_AND_ORACLE),
        strict=True,
    ):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_a_networks_losses_and_gradients_are_the_same(kind, monkeypatch, kernels):
    net = make_text_model(kind, dtype=torch.float64)
    stem = list(range(10, 100))
    batch = [
        *(make_encoded([*stem, 5 + i % 4], list(range(20, 22 + i)), f"e{i}") for i in range(6)),
        make_encoded([7], [8, 9], "alone"),
    ]
    assert len(list(group_by_prefix(batch))) == 2
    found = []
    for on in (support.select_attention, lambda device: attention_flex.flex_row_attention):
        monkeypatch.setattr(loss, "select_attention", on)
        net.net.zero_grad()
        nll(net, net.batch(batch)).backward()
        found.append({"loss": token_nll(net, net.batch(batch)).detach(), **gradient(net)})
    assert len(kernels) == 4  # two layers, twice
    for name, value in found[
        1
    ].items():  # some norms of transformers round through float32 even in float64
        torch.testing.assert_close(value, found[0][name], rtol=1e-4, atol=1e-8, msg=name)


def test_under_autocast_it_computes_in_the_type_asked_for(kernels):
    (query, key, value), _ = states(ROW, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        one, other = (
            attend(None, query, key, value.bfloat16(), None, row=ROW)[0]
            for attend in KERNEL_AND_ORACLE
        )
    assert kernels
    assert one.dtype == other.dtype == torch.bfloat16
    torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


# What is visited


@given(rows(150), WINDOW)
@settings(max_examples=15, deadline=None)
def test_a_token_sees_its_own_example_and_prefix_up_to_itself(row, window):
    mask, n = attention_flex.make_block_mask(row, window, CPU), length(row)
    i = torch.arange(mask.seq_lengths[0])
    seen = mask.mask_mod(None, None, i[:, None], i)
    expected = torch.eye(len(i), dtype=torch.bool)  # what fills the last block sees itself
    expected[:n, :n] = visible(row, window)
    assert torch.equal(seen, expected)


@given(rows(150), WINDOW)
@settings(max_examples=15, deadline=None)
def test_no_block_without_a_visible_pair_is_visited_and_none_with_a_hidden_pair_unmasked(
    row, window
):
    mask = attention_flex.make_block_mask(row, window, CPU)
    i = torch.arange(mask.seq_lengths[0])
    blocks = (
        mask.mask_mod(None, None, i[:, None], i)
        .view(len(i) // 128, 128, -1, 128)
        .transpose(1, 2)
        .flatten(2)
    )
    visited, whole = torch.zeros(2, *blocks.shape[:2], dtype=torch.bool)
    for at in range(len(blocks)):
        whole[at, mask.full_kv_indices[0, 0, at, : mask.full_kv_num_blocks[0, 0, at]].long()] = True
        visited[at, mask.kv_indices[0, 0, at, : mask.kv_num_blocks[0, 0, at]].long()] = True
    assert torch.equal(visited | whole, blocks.any(2))
    assert torch.equal(whole, blocks.all(2))


@given(rows(150), WINDOW)
@settings(max_examples=15, deadline=None)
def test_its_tables_are_those_that_torch_finds_in_the_dense_mask(row, window):
    mask = attention_flex.make_block_mask(row, window, CPU)
    dense = torch_flex.create_block_mask(mask.mask_mod, 1, 1, *mask.seq_lengths, device="cpu")
    for name in (
        "kv_num_blocks",
        "kv_indices",
        "full_kv_num_blocks",
        "full_kv_indices",
        "q_num_blocks",
        "q_indices",
        "full_q_num_blocks",
        "full_q_indices",
    ):
        assert torch.equal(getattr(mask, name), getattr(dense, name)), name


def test_of_many_examples_behind_an_instruction_few_blocks_are_visited():
    """64 examples of 64 tokens behind 128 shared ones: each block of two examples meets the prefix
    and itself.
    """
    mask = attention_flex.make_block_mask(PackedRow((PrefixGroup(128, ((64, 64),)),)), None, CPU)
    assert int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()) == 1 + 32 * 2
    assert int(mask.full_kv_num_blocks.sum()) == 32  # the prefix is seen whole


def test_all_layers_of_a_kind_share_a_rows_mask():
    assert (
        attention_flex.make_block_mask(ROW, 9, CPU)
        is attention_flex.make_block_mask(ROW, 9, CPU)
        is not attention_flex.make_block_mask(ROW, None, CPU)
    )


# Where the kernel cannot


def test_on_cuda_the_kernel_attends_and_elsewhere_another():
    assert support.select_attention(torch.device("cuda:1")) is attention_flex.flex_row_attention
    assert support.select_attention(CPU) is attention_cpu.flash_row_attention


def test_attention_dropout_is_left_to_the_blocks(kernels):
    told, up = states(ROW)
    drawn = []
    for attend in KERNEL_AND_ORACLE:
        torch.manual_seed(1)
        drawn.append(attended(attend, ROW, told, up, dropout=0.5))
    assert not kernels
    for one, other in zip(*drawn, strict=True):
        assert torch.equal(one, other)


def test_second_derivatives_are_left_to_the_blocks(kernels):
    told, _ = states(ROW)
    found = []
    with sdpa_kernel(SDPBackend.MATH):
        for attend in KERNEL_AND_ORACLE:
            out, _ = attend(None, *told, None, row=ROW)
            first = torch.autograd.grad(out.square().sum(), told, create_graph=True)
            found.append(torch.autograd.grad(sum(g.square().sum() for g in first), told))
    assert not kernels
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# Compiled


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's advice
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize(
    "more", [{}, {"sliding_window": 100, "softcap": 2.0}], ids=["plain", "window and softcap"]
)
def test_compiled_it_visits_the_listed_blocks_and_no_other(more, monkeypatch):
    """For a CPU the kernel reads the block tables too: its output is right, and wrong where they
    lack a block.
    """
    monkeypatch.setattr(
        attention_flex, "flex_attention", torch.compile(torch_flex.flex_attention, dynamic=False)
    )
    row = PackedRow((PrefixGroup(300, ((3, 40), (2, 333))),))
    (query, key, value), _ = states(row, dtype=torch.float32, size=32)
    with torch.no_grad():
        one, other = (
            attend(None, query, key, value, None, row=row, **more)[0]
            for attend in KERNEL_AND_ORACLE
        )
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        attention_flex.make_block_mask(row, more.get("sliding_window"), CPU).kv_num_blocks[
            ..., -1
        ] -= 1
        assert (
            attention_flex.flex_row_attention(None, query, key, value, None, row=row, **more)[0]
            - other
        ).abs().max() > 1e-2
    attention_flex.make_block_mask.cache_clear()


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@cuda
@pytest.mark.filterwarnings("ignore")  # the compiler's advice
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize(
    "more", [{}, {"sliding_window": 50}, {"softcap": 5.0}], ids=["plain", "window", "softcap"]
)
def test_compiled_on_cuda_it_equals_sdpa(dtype, tolerance, more):
    torch._dynamo.reset()
    attention_flex._compiled_kernel.cache_clear()
    for row in (
        PackedRow((PrefixGroup(0, ((2, 40),)),)),
        PackedRow(ROW.groups),
        PackedRow((PrefixGroup(300, ((9, 100), (3, 333))),)),
        PackedRow((PrefixGroup(128, ((64, 64),)), PrefixGroup(0, ((1, 900),)))),
        PackedRow(ROW.groups[:2]),
    ):
        told, up = states(row, (8, 2), dtype, torch.device("cuda"), 64)
        for one, other in zip(
            *(attended(attend, row, told, up, **more) for attend in KERNEL_AND_ORACLE),
            strict=True,
        ):
            assert one.isfinite().all()
            assert (one - other).float().norm() <= tolerance * other.float().norm()


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize(
    ("size", "dtype"), [(8, torch.float32), (64, torch.float64)], ids=["narrow heads", "float64"]
)
def test_on_cuda_what_the_kernel_does_not_know_is_left_to_the_blocks(size, dtype):
    row = PackedRow(ROW.groups)
    told, up = states(row, dtype=dtype, device=torch.device("cuda"), size=size)
    for one, other in zip(
        *(attended(attend, row, told, up) for attend in KERNEL_AND_ORACLE), strict=True
    ):
        torch.testing.assert_close(one, other)

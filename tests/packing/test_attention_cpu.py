"""A row's attention through the fused kernel is the row's attention block by block, which is its
oracle.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from continual.packing import attention, attention_cpu
from continual.packing.attention import PackedRow, PrefixGroup

GROUPS = st.builds(
    PrefixGroup,
    st.integers(0, 9),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), max_size=3).map(tuple),
)


@st.composite
def rows(draw) -> tuple[PackedRow, int]:
    groups = tuple(draw(st.lists(GROUPS, min_size=1, max_size=3)))
    n = sum(g.prefix_length + sum(b * length for b, length in g.blocks) for g in groups)
    return (PackedRow(groups), n) if n else (PackedRow((PrefixGroup(3, ()),)), 3)


def states(n: int, heads: int = 4, keys: int = 4, dtype=torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, h, n, 8, dtype=dtype, requires_grad=True) for h in (heads, keys, keys)]


def both(row: PackedRow, given, weigh: torch.Tensor, **more) -> list[tuple[torch.Tensor, ...]]:
    """Output and gradients of the kernel and of its oracle."""
    found = []
    for attend in (attention_cpu.flash_row_attention, attention.sdpa_row_attention):
        out = attend(None, *given, None, row=row, **more)[0]
        found.append((out, *torch.autograd.grad((out * weigh).sum(), given)))
    return found


@given(rows())
@settings(deadline=None, max_examples=40)
def test_every_row_has_the_outputs_and_gradients_of_attention_block_by_block(drawn):
    row, n = drawn
    for one, other in zip(
        *both(row, states(n), torch.randn(1, n, 4, 8, dtype=torch.float64)), strict=True
    ):
        torch.testing.assert_close(one, other)


@given(rows(), st.data())
@settings(deadline=None, max_examples=60)
def test_where_few_tokens_are_asked_for_these_alone_are_right_and_the_gradients_are_those_of_all(
    drawn, data
):
    row, n = drawn
    asked = sorted(data.draw(st.sets(st.integers(0, n - 1), max_size=6)))
    weigh = torch.zeros(1, n, 4, 8, dtype=torch.float64)
    weigh[:, asked] = torch.randn(len(asked), 4, 8, dtype=torch.float64)
    given_states = states(n)
    ours, theirs = both(PackedRow(row.groups, query_positions=tuple(asked)), given_states, weigh)
    torch.testing.assert_close(ours[0][:, asked], theirs[0][:, asked])
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(one, other)


def test_queries_may_share_their_keys():
    row = PackedRow((PrefixGroup(7, ((3, 5), (2, 8))),))
    for one, other in zip(
        *both(row, states(38, keys=2), torch.ones(1, 38, 4, 8, dtype=torch.float64)), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_a_scale_of_the_networks_own_is_kept():
    row = PackedRow((PrefixGroup(7, ((3, 5),)),))
    for one, other in zip(
        *both(row, states(22), torch.ones(1, 22, 4, 8), scaling=0.7), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_second_derivatives_come_from_attention_block_by_block():
    row, given_states = PackedRow((PrefixGroup(7, ((3, 5),)),)), states(22)
    with sdpa_kernel(SDPBackend.MATH):
        out = attention_cpu.flash_row_attention(None, *given_states, None, row=row)[0]
        first = torch.autograd.grad(out.square().sum(), given_states[0], create_graph=True)[0]
        second = torch.autograd.grad(first.square().sum(), given_states[1])[0]
    assert second.abs().sum() > 0

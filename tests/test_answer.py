"""Answers from flat rows are those of transformers' generate, token for token."""

import random
from dataclasses import replace

import pytest
import torch
from small import encoded, model
from test_flat_rows import READ

from continual import answer as answers
from continual.cache import Cache
from continual.data import Encoded
from continual.model import Model
from continual.packing import Layout

END = 0


class Eos:
    eos_token_id = END


def made(network, dtype) -> Model:
    """Large weights: varied answers with clear margins, of which some end early."""
    torch.manual_seed(0)
    net = network().to(dtype).eval()
    with torch.no_grad():
        for w in net.parameters():
            w.mul_(3)
        head = net.get_output_embeddings()
        head.register_forward_hook(lambda m, args, out: out.index_add(
            -1, torch.tensor([END]), 0.6 * out.amax(-1, keepdim=True).abs()))
    return Model(net, Eos(), Layout(pad=0, device=torch.device("cpu"), flat=True, tokens=200))


def prompts() -> list[Encoded]:
    """Two instructions, texts of many lengths, a prompt that is another's beginning, one twice, one of one token."""
    rng = random.Random(0)
    before = [[rng.randrange(5, 250) for _ in range(40)] for _ in range(2)]
    rows = [before[i % 2] + [rng.randrange(5, 250) for _ in range(i * 7 % 12)] for i in range(14)]
    rows += [rows[3], [9], rows[5][:10]]
    return [Encoded(str(i), 0, tuple(r), (False,) * len(r)) for i, r in enumerate(rows)]


def cut(ids: list[int]) -> list[int]:
    return ids[: ids.index(END) + 1] if END in ids else ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", READ)
def test_every_architecture_answers_as_generate_does(kind, dtype):
    net = made(READ[kind], dtype)
    alone = [cut(answers._generated(net, [p], 12)[0].tolist()) for p in prompts()]
    assert answers._from_flat_rows(net, prompts(), 12) == alone
    assert len({tuple(a) for a in alone}) > 5


def test_a_finished_answer_leaves_the_batch(monkeypatch):
    net = made(READ["llama"], torch.float64)
    sizes = []
    before = Cache.next

    def counted(self):
        positions = before(self)
        sizes.append(len(positions))
        return positions

    monkeypatch.setattr(Cache, "next", counted)
    said = answers._from_flat_rows(net, prompts(), 12)
    assert sizes == [sum(len(a) > t for a in said) for t in range(max(map(len, said)))]
    assert sizes[0] > sizes[-1] > 0


def test_a_shared_instruction_is_read_and_kept_once():
    shared = tuple(range(10, 110))
    rows = [encoded([*shared, i, i + 1], [7]) for i in range(9)]
    asked = [replace(e, ids=e.ids[:-1], response=(False,) * 101 + (True,)) for e in rows]
    cache = Cache(asked, 0, 4, 2)
    assert cache.lay(range(9)).shape == (2, 100 + 9)
    assert [(b.prefix, b.own, len(b.lengths)) for b in cache.blocks] == [(100, 1, 9)]


def test_no_pass_reads_more_tokens_than_were_asked_for_unless_a_single_prompt_does():
    assert answers._passes([(1, 2), (1, 2)], 16) == [[0, 1]]
    rows = [(1, 2, 3, *range(4, 4 + n)) for n in (1, 2, 5, 9, 9, 30)]
    assert answers._passes(rows, 16) == [[0, 1, 2], [3], [4], [5]]


def test_batches_do_not_change_the_answers():
    net = model(dtype=torch.float64)
    whole = answers.answer(net, prompts(), 6, 128)
    assert answers.answer(net, prompts(), 6, 3) == whole
    net.layout = replace(net.layout, flat=False)
    assert answers.answer(net, prompts(), 6, 128) == whole

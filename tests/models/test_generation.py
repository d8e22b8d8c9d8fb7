"""Answers from flat rows are those of transformers' generate, token for token."""

import random
from dataclasses import replace

import pytest
import torch

from continual.data.types import Encoded
from continual.evaluation.likelihood import label_log_likelihoods
from continual.models import generation as answers
from continual.models.loss import token_nll
from continual.models.model import Model
from continual.packing.batch import Layout
from continual.packing.kv_cache import KVCache
from continual.packing.support import detect_packing_support
from tests.support.architectures import OWN_RULES, READ
from tests.support.models import make_text_model

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
        head.register_forward_hook(
            lambda m, args, out: out.index_add(
                -1, torch.tensor([END]), 0.6 * out.amax(-1, keepdim=True).abs()
            )
        )
    return Model(
        net,
        Eos(),
        Layout(pad_token_id=0, device=torch.device("cpu"), packed=True, tokens_per_microbatch=200),
    )


def prompts() -> list[Encoded]:
    """Two instructions, texts of many lengths, a prompt that is another's beginning, one twice, one
    of one token.
    """
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
    padded = replace(net, layout=replace(net.layout, packed=False))
    alone = [cut(answers.generate_ids(padded, [p], 12, 1, END)[0]) for p in prompts()]
    assert answers.generate_ids(net, prompts(), 12, 128, END) == alone
    assert len({tuple(a) for a in alone}) > 5


@pytest.mark.parametrize("kind", OWN_RULES)
def test_a_network_that_attends_by_a_rule_of_its_own_answers_as_generate_does_and_has_its_own_loss(
    kind,
):
    net = made(OWN_RULES[kind], torch.float32)
    net.layout = replace(net.layout, packed=detect_packing_support(net.net)[0])
    for e, said in zip(prompts(), answers.generate_ids(net, prompts(), 12, 128, END), strict=True):
        ids = torch.tensor([e.ids])
        whole = net.net.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=END,
        )
        assert said == whole[0, len(e.ids) :].tolist()
    rows = [
        replace(p, response_mask=(False, *[True] * (len(p.ids) - 1)))
        for p in prompts()
        if len(p.ids) > 1
    ]
    batch = net.batch(rows)
    with torch.no_grad():
        each = token_nll(net, batch).split(torch.bincount(batch.example_index).tolist())
        for e, found in zip(rows, each, strict=True):
            ids = torch.tensor([e.ids])
            own = torch.nn.functional.cross_entropy(
                net.net(ids).logits[0, :-1], ids[0, 1:], reduction="none"
            )
            torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)


def test_a_finished_answer_leaves_the_batch(monkeypatch):
    net = made(READ["llama"], torch.float64)
    sizes = []
    before = KVCache.advance

    def counted(self, count):
        positions = before(self, count)
        sizes.append(len(positions))
        return positions

    monkeypatch.setattr(KVCache, "advance", counted)
    said = answers.generate_ids(net, prompts(), 12, 128, END)
    assert sizes == [sum(len(a) > t for a in said) for t in range(max(map(len, said)))]
    assert sizes[0] > sizes[-1] > 0


def read(rows: list[tuple[int, ...]], most: int) -> tuple[KVCache, list[int]]:
    """What is kept of these prompts, and how many tokens each pass reads."""
    cache = KVCache(
        [Encoded(str(i), 0, r, (False,) * len(r)) for i, r in enumerate(rows)], 0, range(-1, 3), 2
    )
    return cache, [p.shape[1] for p in cache.prefill_passes(most)]


def test_a_shared_instruction_is_read_and_kept_once():
    shared = tuple(range(10, 110))
    cache, passes = read([(*shared, i, 7) for i in range(9)], 104)
    assert passes == [104, 5]
    assert [(b.prefix.length, b.own_length, len(b.lengths)) for b in cache.blocks] == [(100, 1, 9)]


def test_no_pass_reads_more_tokens_than_were_asked_for_unless_a_single_prompt_does():
    assert read([(1, 2), (1, 2)], 16)[1] == [2]
    rows = [tuple(range(i, i + n)) for i, n in enumerate((5, 5, 5, 4, 5, 33))]
    assert read(rows, 18)[1] == [16, 4, 32]
    shared = [(*range(10, 110), i, 7) for i in range(9)]
    assert read(shared, 5)[1] == [100, 5, 4], (
        "a prefix longer than a pass is read alone, and reading goes on"
    )


def test_prompts_are_kept_in_few_blocks_whose_padding_is_bounded():
    rng = random.Random(0)
    rows = [tuple(rng.randrange(9) for _ in range(n)) for n in range(2, 300)]
    blocks = read(rows, 4096)[0].blocks
    assert len(blocks) < 12
    assert sum(b.own_length * len(b.lengths) for b in blocks) < 1.2 * sum(map(len, rows))


def test_batches_do_not_change_the_answers():
    net = make_text_model(dtype=torch.float64)
    whole = answers.generate_answers(net, prompts(), 6, 128)
    assert answers.generate_answers(net, prompts(), 6, 3) == whole
    net.layout = replace(net.layout, packed=False)
    assert answers.generate_answers(net, prompts(), 6, 128) == whole


# Likelihoods

LABELS = [
    (5, 6, 0),
    (5, 6, 7, 0),
    (5, 6, 7),
    (5, 8, 0),
    (9,),
    (5, 6, 0),
    (0,),
]  # some begin with others, one is twice


@pytest.mark.parametrize("batch_size", [3, 128])
@pytest.mark.parametrize("kind", READ)
def test_labels_read_as_a_tree_have_the_likelihoods_that_each_has_alone(kind, batch_size):
    net = made(READ[kind], torch.float64)
    padded = replace(net, layout=replace(net.layout, packed=False))
    alone = torch.cat(
        [label_log_likelihoods(padded, [p], [ids], 1) for p in prompts() for ids in LABELS]
    ).view(-1, len(LABELS))
    together = label_log_likelihoods(net, prompts(), LABELS, batch_size)
    # some norms of transformers round through float32 even in float64
    torch.testing.assert_close(
        together, alone, **({} if kind in ("gpt2", "opt") else {"rtol": 1e-5, "atol": 1e-5})
    )
    assert together.argmax(1).tolist() == alone.argmax(1).tolist()


def test_what_labels_begin_with_alike_is_read_once_behind_each_prompt(monkeypatch):
    net, read = made(READ["llama"], torch.float32), []
    before = KVCache.advance
    monkeypatch.setattr(
        KVCache,
        "advance",
        lambda self, count: read.append((len(self.prompt_order), count)) or before(self, count),
    )
    label_log_likelihoods(net, prompts(), LABELS, 128)
    assert read == [(17, 5)], "the prompt's last token and 5, 5 6, 5 6 7, 5 8"


def test_no_more_labels_are_read_at_once_than_a_pass_has_tokens():
    net, read = made(READ["llama"], torch.float64), []
    net.layout = replace(net.layout, tokens_per_microbatch=16)
    labels = [(i, j, 0) for i in range(5, 9) for j in range(9, 12)]
    hook = net.net.get_output_embeddings().register_forward_hook(
        lambda m, args, out: read.append(args[0].shape[1])
    )
    label_log_likelihoods(net, prompts()[:3], labels, 128)
    hook.remove()
    assert read == [17, 17, 17]

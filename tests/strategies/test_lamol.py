"""Generative replay: what the model writes, how much of it takes part, what is learned for it, and
what is kept.
"""

import json
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from continual.data.types import Encoded, Task
from continual.errors import ConfigError, DataError
from continual.models.generation import generate_ids, top_k_rule
from continual.models.loss import forward
from continual.models.weights import restore, snapshot
from continual.packing.layout import response_start
from continual.strategy.compose import compose
from continual.training import checkpoint
from continual.training.recipe import Recipe
from continual.training.stage import train_stage
from strategies.lamol import LAMOL, make_prompt
from strategies.lwf import LwF
from tests.support import toy

END, MARK = 0, 1
LONG = Recipe(lr=5e-3, epochs=40, batch_size=8)


def rows(task: int, n: int = 16) -> list[Encoded]:
    """Prompts of a task's own two first tokens and one or two of its own words; the answer is the
    last word, closed.
    """
    rng, found = random.Random(task), []
    for i in range(n):
        words = [rng.randrange(20 + 10 * task, 26 + 10 * task) for _ in range(rng.randint(1, 2))]
        ids = (2, 3 + task, *words, words[-1], END)
        found.append(
            Encoded(f"{task}/{i}", task, ids, (False,) * (len(ids) - 2) + (True, True), "its text")
        )
    return found


def task(index: int, n: int = 16) -> Task[Encoded]:
    return Task(toy.TASK_NAMES[index], tuple(rows(index, n)), task_names=toy.TASK_NAMES)


@pytest.fixture(scope="module")
def learned():
    """A model that has learned two tasks well, and its strategy before a third."""
    made, strategy = toy.make_model(), LAMOL(share=0.5)
    for i in (0, 1):
        train_stage(made, task(i), strategy, LONG, seed=i, log_event=lambda event: None)
    strategy.begin(made, task(2))
    return made, strategy


def test_what_the_model_writes_has_the_form_of_the_task_s_examples(learned):
    _, strategy = learned
    for t, name in enumerate(("a", "b")):
        written = strategy.buffer.tasks[name]
        assert len(written) >= 4
        for e in written:
            assert e.task_index == t
            assert e.ids[:2] == (2, 3 + t)
            assert e.ids[-1] == END
            assert 2 < response_start(e) <= 4
            assert all(e.response_mask[response_start(e) :])
            assert MARK not in e.ids
            assert not any(e.response_mask[: response_start(e)])


WORDINGS = {0: [(2, *[40] * 7), (2, *[42] * 7)], 1: [(2, *[41] * 7), (2, *[43] * 7)]}


def test_what_is_written_for_a_task_begins_with_one_of_its_wordings_as_often_as_its_examples_did(
    monkeypatch,
):
    monkeypatch.setattr(
        "strategies.lamol.generate_ids",
        lambda model, prompts, room, n, end, *pick: [[end]] * len(prompts),
    )
    made, strategy = toy.make_model(), LAMOL()
    for t, (often, seldom) in WORDINGS.items():
        worded = [
            replace(
                e,
                ids=(*(seldom if i % 4 == 3 else often), *e.ids[2:]),
                response_mask=(*[False] * 6, *e.response_mask),
            )
            for i, e in enumerate(rows(t, 64))
        ]
        strategy.update_buffer(
            made, Task(toy.TASK_NAMES[t], tuple(worded), task_names=toy.TASK_NAMES)
        )
    for t, (often, seldom) in WORDINGS.items():
        written = strategy.generate_examples(made, t, 400)
        found = Counter(e.ids[:8] for e in written)
        assert found.keys() == {often, seldom}
        assert 1 / 8 < found[seldom] / len(written) < 3 / 8
        assert {e.task_index for e in written} == {t}


def test_a_prompt_like_no_other_is_not_kept():
    own = [(5, 6, 7), (8, 9)]
    alone = [
        Encoded(str(i), 0, (*ids, END), (False,) * len(ids) + (True,)) for i, ids in enumerate(own)
    ]
    for some in (alone, alone[:1]):
        strategy = LAMOL()
        strategy.update_buffer(toy.make_model(), Task("a", tuple(some), task_names=toy.TASK_NAMES))
        assert strategy.tasks[0]["begins"] == [([], len(some))]


def test_the_old_model_answers_what_it_wrote_greedily(learned):
    made, strategy = learned
    for e in strategy.buffer.examples:
        prompt = make_prompt("p", e.task_index, e.ids[: response_start(e)])
        assert generate_ids(made, [prompt], 2, 1, END) == [list(e.ids[response_start(e) :])]


def test_each_earlier_task_gets_an_equal_part_of_what_is_written(learned):
    made, strategy = learned
    sizes = {t: len(strategy.generate_examples(made, t, 200)) for t in (0, 1)}
    assert all(n > 100 for n in sizes.values())
    assert all(
        len(kept) <= 8 for kept in strategy.buffer.tasks.values()
    )  # 16 new ones, as many written


@pytest.mark.parametrize("share", [0.25, 1 / 6, 0.5])
def test_the_share_of_written_examples_in_a_stage_is_gamma_of_the_new_ones(share, learned):
    made, strategy = learned[0], LAMOL(share=share, lm_weight=0.0)
    strategy.buffer.tasks = {"a": rows(0)}
    old = sum(
        len(strategy.add_replay_examples(made.batch(rows(2)[:5])).examples) - 5 for _ in range(24)
    )
    assert old == pytest.approx(120 * share / (1 - share), abs=1)


def test_nothing_of_the_old_data_is_kept_but_how_prompts_begin_and_their_lengths(tmp_path):
    made, strategy = toy.make_model(), LAMOL()
    train_stage(made, task(0), strategy, toy.RECIPE, seed=0, log_event=lambda event: None)
    checkpoint.save(tmp_path / "one", made, strategy, toy.empty_matrix())
    told = (tmp_path / "one" / "memory.json").read_text("utf-8")
    assert strategy.tasks == {0: {"begins": [([2, 3], 16)], "prompt": 4, "response": 2}}
    assert "example" not in told
    assert "its text" not in told
    assert dict(json.loads(told)["dict"])["buffer"]["fields"]["tasks"] == {"dict": []}


def test_the_loss_is_that_of_the_responses_and_of_the_prompts_by_their_weight():
    made, strategy = toy.make_model(torch.float64), LAMOL(lm_weight=0.4)
    new = rows(0)[:5]
    loss = strategy.backward(made, made.batch(new))
    prompts = [
        replace(
            e,
            ids=(MARK, *e.ids[: response_start(e)], MARK),
            response_mask=(False, *(True,) * (response_start(e) + 1)),
        )
        for e in new
    ]
    expected = (toy.mean_loss(made.net, new) + 0.4 * toy.mean_loss(made.net, prompts)) / 1.4
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_beside_lwf_the_teacher_is_asked_for_the_responses_alone():
    """The prompts to be written are of the same examples, and other tokens."""
    made, strategy = toy.make_model(torch.float64), compose(LAMOL(), LwF(strength=3.0))
    strategy.begin(made, task(0))
    restore(made, {n: w * 1.1 for n, w in snapshot(made).items()})
    batch = made.batch(rows(0)[:5])
    both = strategy.backward(made, batch)
    expected = (
        LAMOL().backward(made, batch) + 3 * strategy.divergence(batch, forward(made, batch)) / 1.25
    )
    assert both.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_same_seed_writes_the_same_and_another_seed_something_else(learned):
    made = learned[0]
    found = []
    for seed in (0, 0, 1):
        strategy = LAMOL(share=0.5, seed=seed)
        strategy.tasks = learned[1].tasks
        strategy.begin(made, task(2))
        found.append(strategy.buffer.tasks)
    assert found[0] == found[1] != found[2]


def test_sampling_follows_the_model_s_distribution_over_the_likeliest_tokens():
    logits, n = torch.tensor([0.1, 0.5, 0.4]).log(), 4000
    draws = torch.rand(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = torch.bincount(top_k_rule(2, draws)(logits.expand(n, 3), range(n), 0), minlength=3)
    assert found[0] == 0
    assert abs(found[1] / n - 5 / 9) < 4 * (5 / 9 * 4 / 9 / n) ** 0.5


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_what_is_sampled_behind_one_prompt_does_not_depend_on_the_others(batch_size):
    made, prompts = (
        toy.make_model(torch.float64),
        [make_prompt(str(i), 0, e.ids) for i, e in enumerate(toy.make_examples(0))],
    )
    draws = torch.rand(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = generate_ids(made, prompts, 6, batch_size, END, top_k_rule(20, draws))
    padded = replace(made, layout=replace(made.layout, packed=False))
    alone = [
        generate_ids(made, [p], 6, 1, END, top_k_rule(20, draws[i : i + 1]))[0]
        for i, p in enumerate(prompts)
    ]
    assert (
        found == alone == generate_ids(padded, prompts, 6, batch_size, END, top_k_rule(20, draws))
    )
    assert any(a != b for a, b in zip(found, generate_ids(made, prompts, 6, 12, END), strict=True))


def test_a_prompt_that_holds_the_mark_is_refused():
    wrong = replace(task(0), train=(Encoded("x", 0, (2, MARK, 4), (False, False, True)),))
    with pytest.raises(DataError, match="a prompt of task 'a' holds the padding token"):
        LAMOL().begin(toy.make_model(), wrong)


def test_an_encoder_decoder_model_is_refused():
    made = toy.make_model()
    made.layout = replace(made.layout, decoder_start_token_id=1)
    with pytest.raises(ConfigError, match="choose a causal model"):
        LAMOL().begin(made, task(0))


@pytest.mark.parametrize("wrong", [{"lm_weight": -1}, {"top_k": 0}])
def test_numbers_that_cannot_work_are_refused(wrong):
    with pytest.raises(ConfigError, match="LAMOL with"):
        LAMOL(**wrong)

"""An adapter a task: each is what it would be if learned alone, and finds its prompts by name or by
instruction.
"""

import json
from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from continual.data.types import Example, Task
from continual.errors import ConfigError, ContinualError
from continual.evaluation import scoring
from continual.models.weights import restore, snapshot, zeros
from continual.strategy.instructions import extract_instructions
from continual.strategy.interface import Strategy
from strategies.per_task import PerTask
from strategies.router import Router, mean_prefix_embeddings
from tests.support import toy
from tests.support.models import TASKS, load_json_lines, make_encoded, run_in_process


@pytest.mark.parametrize("lora", [0, 4], ids=["whole network", "lora"])
def test_each_adapter_is_bit_for_bit_the_one_learned_alone(lora):
    made, strategy = toy.make_model(lora_rank=lora), PerTask()
    toy.train_stages(made, strategy, 0, 1, 2)
    for i, name in enumerate(toy.TASK_NAMES[:3]):
        alone = toy.make_model(lora_rank=lora)
        toy.train_stages(alone, Strategy(), i)
        assert toy.bitwise_equal(strategy.adapters[name], snapshot(alone))
        strategy.route(made, name)
        assert toy.bitwise_equal(snapshot(made), snapshot(alone))


def test_begun_at_the_last_one_each_adapter_is_the_sequence_so_far():
    made, strategy, plain = toy.make_model(), PerTask(adapter_init="last"), toy.make_model()
    for i, name in enumerate(toy.TASK_NAMES[:3]):
        strategy.route(made, "a")  # whatever was tested last
        toy.train_stages(made, strategy, i)
        toy.train_stages(plain, Strategy(), i)
        assert toy.bitwise_equal(strategy.adapters[name], snapshot(plain))


def test_a_task_that_no_stage_learned_is_answered_by_what_its_adapter_would_start_from():
    for start in ("base", "last"):
        made, strategy = toy.make_model(), PerTask(adapter_init=start)
        base = snapshot(made)
        strategy.route(made, "c")
        assert toy.bitwise_equal(snapshot(made), base)
        toy.train_stages(made, strategy, 0, 1)
        last = snapshot(made)
        strategy.route(made, "a")
        strategy.route(made, "c")
        assert toy.bitwise_equal(snapshot(made), base if start == "base" else last)


def test_tasks_that_were_learned_in_one_stage_share_its_adapter():
    made, strategy = toy.make_model(), PerTask()
    mixed = Task(
        "mixed", (*toy.make_examples(0, 4), *toy.make_examples(2, 4)), task_names=toy.TASK_NAMES
    )
    strategy.begin(made, mixed)
    strategy.end(made, mixed)
    assert strategy.home == {"a": "mixed", "c": "mixed"}
    restore(made, zeros(made))
    strategy.route(made, "c")
    assert toy.bitwise_equal(snapshot(made), strategy.adapters["mixed"])


def test_an_unknown_start_is_refused():
    with pytest.raises(
        ConfigError, match=r"unknown start of an adapter 'first'.* Known: base, last"
    ):
        PerTask(adapter_init="first")


# By instruction

SAY, COUNT, LOUD = [10, 11, 12, 13, 14], [10, 11, 20, 21, 22], [10, 11, 12]


def task(index: int, *openings: list[int], n: int = 30) -> Task:
    rows = [
        make_encoded([*opening, 30 + i % 30, 30 + 7 * i % 29], [9], f"{index}/{i}", index)
        for opening in openings
        for i in range(n)
    ]
    return Task(toy.TASK_NAMES[index], tuple(rows), task_names=toy.TASK_NAMES)


def routed(*tasks: Task) -> tuple:
    """A router after these tasks, whose adapters differ only in what was left there."""
    made, strategy = toy.make_model(), Router()
    for i, t in enumerate(tasks):
        strategy.begin(made, t)
        restore(made, {n: w + i + 1 for n, w in strategy.base.items()})
        strategy.end(made, t)
    return made, strategy


def test_a_prompt_is_answered_by_the_adapter_whose_instruction_it_begins_with():
    made, strategy = routed(task(0, SAY), task(1, COUNT))
    prompts = [[*SAY, 40], [*COUNT, 40, 41], [*SAY, 22], [*COUNT, 14]]
    assert strategy.nearest_adapters(made, prompts) == ["a", "b", "a", "b"]
    turns = []
    for turn in strategy.dispatch(made, prompts):
        turns.append([*turn])
        answering = "a" if 0 in turn else "b"
        assert toy.bitwise_equal(snapshot(made), strategy.adapters[answering])
    assert turns == [[0, 2], [1, 3]]


def test_where_one_instruction_begins_another_the_longer_one_counts():
    for tasks in ((task(0, SAY), task(1, LOUD)), (task(1, LOUD), task(0, SAY))):
        made, strategy = routed(*tasks)
        assert strategy.nearest_adapters(made, [[*SAY, 40], [*LOUD, 40, 41]]) == ["a", "b"]


def test_an_instruction_worded_in_a_new_way_goes_to_the_nearest_by_cosine():
    made, strategy = routed(task(0, SAY), task(1, COUNT))
    words = (
        made.net.get_input_embeddings().weight.detach() - 2
    )  # the router looks at those before the first stage
    prompts = torch.randint(3, 60, (40, 9), generator=torch.Generator().manual_seed(0)).tolist()
    here = torch.stack([words[p[:5]].mean(0) for p in prompts])
    near = torch.stack([F.cosine_similarity(here, words[x].mean(0)[None]) for x in (SAY, COUNT)])
    assert strategy.nearest_adapters(made, prompts) == [("a", "b")[i] for i in near.argmax(0)]


def test_it_chooses_alike_whichever_adapter_the_model_has():
    made, strategy = routed(task(0, SAY), task(1, COUNT, LOUD))
    prompts = torch.randint(3, 60, (40, 9), generator=torch.Generator().manual_seed(1)).tolist()
    found = strategy.nearest_adapters(made, prompts)
    assert len(set(found)) == 2
    restore(made, strategy.adapters["a"])
    assert strategy.nearest_adapters(made, prompts) == found
    assert [strategy.nearest_adapters(made, [p])[0] for p in prompts] == found


def test_several_wordings_of_one_task_are_prototypes_each():
    _, strategy = routed(task(0, SAY, [50, 51, 52, 53, 54]))
    assert sorted(strategy.instructions["a"]) == sorted(
        ids for ids, _ in extract_instructions(task(0, SAY, [50, 51, 52, 53, 54]).train)
    )


def test_the_task_s_name_changes_nothing():
    made, strategy = routed(task(0, SAY), task(1, COUNT))
    before = snapshot(made)
    strategy.route(made, "a")
    assert toy.bitwise_equal(snapshot(made), before)


@cache
def three() -> tuple:
    return routed(task(0, SAY), task(1, COUNT), task(2, [60, 61, 62]))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(2, 63), min_size=1, max_size=12), min_size=1, max_size=9))
def test_every_prompt_has_its_turn_once(prompts):
    made, strategy = three()
    assert sorted(i for turn in strategy.dispatch(made, prompts) for i in turn) == [
        *range(len(prompts))
    ]


def test_the_mean_of_each_beginning_is_that_of_its_tokens():
    words = torch.randn(9, 4, dtype=torch.float64)
    found = mean_prefix_embeddings(words, [3, 3, 7, 1])
    assert all(torch.allclose(found[i], words[[3, 3, 7, 1][: i + 1]].mean(0)) for i in range(4))


# In a run


def test_a_run_that_routes_by_instruction_scores_as_one_that_is_told_the_task(run_keys, tmp_path):
    """Each task of the test stream has one instruction: the two differ on tasks not learned yet
    alone.
    """
    told, _ = run_in_process(tmp_path / "told", run_keys, "strategy=per_task")
    found, _ = run_in_process(tmp_path / "found", run_keys, "strategy=router")
    assert found.scores[0] == told.scores[0]
    for stage in (1, 2, 3):
        for name in TASKS[:stage]:
            path = f"predictions/stage-0{stage}/{name}.jsonl"
            assert load_json_lines(tmp_path / "found" / path) == load_json_lines(
                tmp_path / "told" / path
            )
    for name in TASKS:  # an adapter never changes, and before there is one the base answers
        rows = [
            json.dumps(load_json_lines(tmp_path / f"told/predictions/stage-0{i}/{name}.jsonl"))
            for i in range(4)
        ]
        begun = TASKS.index(name) + 1
        assert len(set(rows[:begun])) == len(set(rows[begun:])) == 1


@dataclass(kw_only=True)
class Forgetful(Strategy):
    """Leaves out the last prompt."""

    def dispatch(self, model, prompts):
        yield range(len(prompts) - 1)


def perplexities(prompts: int) -> scoring.EvalSet:
    """A test that takes no decoding."""
    asked = tuple(make_encoded([5, 6 + i], [7, 8][: 1 + i % 2], str(i)) for i in range(prompts))
    return scoring.EvalSet(
        "a", "perplexity", [Example(e.id, "a", "Say it.", outputs=("x",)) for e in asked], asked, 3
    )


def test_a_strategy_that_leaves_prompts_out_is_told_so():
    made, test = toy.make_model(), perplexities(3)
    with pytest.raises(
        ContinualError,
        match="task 'a': found 2 dispatched prompts of 3, expected each once",
    ):
        scoring.score_task(made, test, 8, Forgetful().dispatch(made, test.prompt_ids))


def test_a_strategy_sees_of_a_test_what_is_asked_and_no_answer():
    asked = (make_encoded([5, 6], [7]), make_encoded([5, 6, 8], []))
    assert scoring.EvalSet("a", "perplexity", asked, asked, 3).prompt_ids == [(5, 6), (5, 6, 8)]


def test_the_order_of_turns_does_not_change_the_order_of_answers():
    made, test = toy.make_model(), perplexities(5)
    value, rows = scoring.score_task(made, test, 8)
    shuffled, again = scoring.score_task(made, test, 8, iter([[3, 1], [4], [0, 2]]))
    assert [r.id for r in again] == [r.id for r in rows] == [*"01234"]
    assert shuffled == pytest.approx(value)

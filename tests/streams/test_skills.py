from itertools import pairwise

import pytest

from continual.errors import ConfigError
from streams.skills.labels import LABELLING_SKILLS, make_labelling_skill
from streams.skills.rules import BASIC_SKILLS, SKILLS
from streams.skills.stream import HELD_OUT_SKILLS, LABELS_HELD_OUT, ORDERS, generate_skills

BY_NAME = {skill.name: skill for skill in (*SKILLS, *BASIC_SKILLS, *LABELLING_SKILLS)}
SMALL = {"seed": 0, "train_size": 40, "dev_size": 10, "test_size": 20, "pretraining_size": 30}


@pytest.mark.parametrize(
    ("name", "words", "answer"),
    [
        ("reverse", "cat two fig axe", "axe fig two cat"),
        ("swap_ends", "cat two fig axe", "axe two fig cat"),
        ("nouns_only", "cat two fig five", "cat fig"),
        ("first_and_third", "cat two fig axe", "cat fig"),
        ("third", "cat two fig axe", "fig"),
        ("count_animals", "cat two dog axe", "two"),
        ("count_fruits", "cat two dog axe", "zero"),
        ("add", "four cat five fig", "nine"),
        ("subtract", "two cat five fig", "three"),
        ("majority", "cat two dog axe", "animal"),
        ("alphabetical_last", "cat whale fig two", "whale"),
    ],
)
def test_each_skill_answers_by_its_rule(name: str, words: str, answer: str) -> None:
    assert BY_NAME[name].accepts(words.split())
    assert BY_NAME[name].solve(words.split()) == answer


@pytest.mark.parametrize(
    ("name", "words", "answer"),
    [
        ("copy", "cat two fig axe", "cat two fig axe"),
        ("rotate", "cat two fig axe", "two fig axe cat"),
        ("last_three_backwards", "cat two fig axe", "axe fig two"),
        ("kinds", "cat two fig axe", "animal number fruit tool"),
        ("one_more", "two cat four fig", "three five"),
        ("count_tools", "cat two saw axe", "two"),
    ],
)
def test_basic_operations_answer_by_their_rule(name: str, words: str, answer: str) -> None:
    assert BY_NAME[name].solve(words.split()) == answer


def test_a_labelling_calls_each_word_by_the_label_of_its_kind() -> None:
    skill = make_labelling_skill(["kiwi", "saw", "two", "lion"])
    assert skill.name == "call_kiwi_saw_two_lion"
    assert skill.solve(["cat", "nine", "fig", "axe"]) == "kiwi lion saw two"
    assert all(
        label in text.split()
        for text in skill.phrasings
        for label in ("kiwi", "saw", "two", "lion")
    )


def test_each_order_of_labellings_is_a_part_of_the_longer_ones_and_leaves_out_the_same_eight() -> (
    None
):
    orders = [ORDERS[f"labels_{n}"] for n in (6, 12, 24, 48, 96)]
    for few, more in pairwise(orders):
        assert more[: len(few)] == few
    assert [len({*order}) for order in orders] == [6, 12, 24, 48, 96]
    assert len({*LABELS_HELD_OUT}) == 8
    assert not {*orders[-1]} & {*LABELS_HELD_OUT}


def test_a_random_order_is_of_the_eleven_skills() -> None:
    assert {task.name for task in generate_skills(**SMALL, order="random").tasks} == {
        skill.name for skill in SKILLS
    }


def test_inputs_without_one_answer_fit_no_skill_that_needs_it() -> None:
    assert not BY_NAME["majority"].accepts(["cat", "two", "fig", "three"])
    assert not BY_NAME["add"].accepts(["cat", "two", "fig", "axe"])


def test_the_default_order_covers_six_kinds_of_skill_and_leaves_the_held_out_ones_for_adapt() -> (
    None
):
    stream = generate_skills(**SMALL)
    assert [task.name for task in stream.tasks] == list(ORDERS["default"])
    assert len({task.category for task in stream.tasks}) == 6
    assert {*ORDERS["default"], *HELD_OUT_SKILLS} == {skill.name for skill in SKILLS}
    assert not {*ORDERS["default"]} & {*HELD_OUT_SKILLS}


@pytest.mark.parametrize("order", ["long", "labels_6"])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_no_input_that_is_scored_was_seen_in_any_training(level: int, order: str) -> None:
    stream = generate_skills(order=order, difficulty=level, **SMALL)
    trained = {row.input for task in stream.tasks for row in task.train} | {
        row.input for row in stream.pretraining
    }
    dev = {row.input for task in stream.tasks for row in task.dev}
    test = {row.input for task in stream.tasks for row in task.test}
    assert trained
    assert not trained & dev
    assert not trained & test
    assert not dev & test


@pytest.mark.parametrize("order", ["long", "labels_6"])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_every_row_holds_the_right_answer_under_one_of_its_skills_phrasings(
    level: int, order: str
) -> None:
    stream = generate_skills(order=order, difficulty=level, **SMALL)
    rows = [row for task in stream.tasks for row in (*task.train, *task.dev, *task.test)] + [
        *stream.pretraining
    ]
    for row in rows:
        mark, *words = row.input.split()
        assert (mark, len(words)) == ("-", level + 3)
        assert row.outputs == (BY_NAME[row.task].solve(words),)
        assert row.instruction in BY_NAME[row.task].phrasings


def test_every_phrasing_of_a_skill_is_used() -> None:
    for task in generate_skills(order="long", **SMALL).tasks:
        assert {row.instruction for row in task.train} == set(BY_NAME[task.name].phrasings)


def test_no_instruction_belongs_to_two_skills() -> None:
    phrasings = [text for skill in BY_NAME.values() for text in skill.phrasings]
    assert len(phrasings) == len(set(phrasings))


def test_pretraining_holds_other_skills_than_the_stream() -> None:
    stream = generate_skills(order="long", **SMALL)
    assert {row.task for row in stream.pretraining} == {skill.name for skill in BASIC_SKILLS}
    assert not {row.task for row in stream.pretraining} & {task.name for task in stream.tasks}


def test_the_most_common_answer_of_a_skill_is_no_way_to_pass_it() -> None:
    for task in generate_skills(seed=0, order="long").tasks:
        answers = [row.outputs[0] for row in task.test]
        assert max(map(answers.count, answers)) <= 2 / 3 * len(answers), task.name


def test_the_seed_shuffles_the_random_order_and_leaves_the_rows_as_they_are() -> None:
    one, two = generate_skills(**SMALL), generate_skills(**{**SMALL, "seed": 1})
    assert one == two
    shuffled = {
        tuple(
            task.name for task in generate_skills(**{**SMALL, "seed": seed}, order="random").tasks
        )
        for seed in range(4)
    }
    assert len(shuffled) > 1


def test_another_data_seed_draws_other_rows() -> None:
    assert (
        generate_skills(**SMALL).tasks[0].train
        != generate_skills(**SMALL, data_seed=1).tasks[0].train
    )


def test_sizes_and_limit_say_how_many_rows_a_task_has() -> None:
    task = generate_skills(**SMALL).tasks[0]
    assert (len(task.train), len(task.dev), len(task.test)) == (40, 10, 20)
    assert len(generate_skills(**SMALL, max_train_rows=7).tasks[0].train) == 7


def test_more_rows_begin_with_the_same_rows() -> None:
    few, many = generate_skills(**SMALL), generate_skills(**{**SMALL, "train_size": 60})
    assert many.tasks[0].train[:40] == few.tasks[0].train


def test_a_held_out_skill_can_be_asked_for_by_name() -> None:
    assert [task.name for task in generate_skills(**SMALL, tasks=["third", "add"]).tasks] == [
        "third",
        "add",
    ]


def test_the_joint_arrangement_learns_all_skills_in_one_stage() -> None:
    stream = generate_skills(**SMALL, arrangement="joint")
    assert len(stream.tasks) == 6
    assert [len(stage.train) for stage in stream.stages] == [240]


def test_there_need_be_no_pretraining_rows() -> None:
    assert generate_skills(**{**SMALL, "pretraining_size": 0}).pretraining == ()


@pytest.mark.parametrize(
    "key",
    [
        {"difficulty": 4},
        {"train_size": 0},
        {"test_size": 6000},
        {"pretraining_size": -1},
        {"tasks": ["revers"]},
        {"order": "defalt"},
    ],
)
def test_what_cannot_be_is_refused_with_its_name(key: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=str(next(iter(key)))):
        generate_skills(**{**SMALL, **key})

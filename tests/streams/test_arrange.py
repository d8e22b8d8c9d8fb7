"""Tasks, orders, limits and stages of any stream."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from continual.data.types import Example, Stream, Task
from continual.errors import ConfigError, DataError
from streams.arrange import arrange, choose_tasks

ORDERS = {"backwards": ["c", "b", "a"], "short": ["c", "a"]}


def task(name: str, train: int, dev: int = 1) -> Task[Example]:
    rows = {
        split: tuple(
            Example(f"{name}/{split}/{i}", name, "ask", str(i), ("yes",)) for i in range(size)
        )
        for split, size in (("train", train), ("dev", dev))
    }
    return Task(name, rows["train"], rows["dev"], metric="rougeL", labels=("yes",))


def stream(**sizes: int) -> Stream:
    tasks = tuple(task(name, size) for name, size in (sizes or {"a": 3, "b": 4, "c": 5}).items())
    return Stream("toy", "default", tasks, tasks)


def arranged(of: Stream | None = None, **asked) -> Stream:
    settings = {
        "orders": ORDERS,
        "tasks": None,
        "order": None,
        "max_train_rows": None,
        "arrangement": "sequential",
        "seed": 0,
    }
    return arrange(of or stream(), **{**settings, **asked})


def names(tasks) -> list[str]:
    return [task.name for task in tasks]


def ids(tasks) -> Counter:
    return Counter(row.id for task in tasks for row in task.train)


def test_asking_for_nothing_gives_every_task_in_its_natural_order():
    result = arranged()
    assert names(result.tasks) == names(result.stages) == ["a", "b", "c"]
    assert result.order == "default"


def test_tasks_are_taken_in_the_order_they_are_listed():
    assert names(arranged(tasks=["c", "a"]).stages) == ["c", "a"]


def test_a_named_order_is_followed_and_recorded():
    result = arranged(order="backwards")
    assert names(result.tasks) == ["c", "b", "a"]
    assert result.order == "backwards"


def test_an_order_that_leaves_tasks_out_shortens_the_stream():
    assert names(arranged(order="short").tasks) == ["c", "a"]


def test_a_named_order_is_restricted_to_the_picked_tasks():
    assert names(arranged(order="backwards", tasks=["a", "b"]).tasks) == ["b", "a"]


def test_the_order_named_default_holds_when_no_order_is_asked():
    assert names(arranged(orders={"default": ["b", "a", "c"]}).tasks) == ["b", "a", "c"]


def test_listed_tasks_overrule_the_order_named_default():
    assert names(arranged(orders={"default": ["b", "a", "c"]}, tasks=["a", "b"]).tasks) == [
        "a",
        "b",
    ]


@given(st.integers(0, 50))
def test_random_order_is_the_seeds_and_keeps_every_task(seed):
    many = [str(i) for i in range(12)]
    drawn = choose_tasks(many, orders={}, tasks=None, order="random", seed=seed)
    assert drawn == choose_tasks(many, orders={}, tasks=None, order="random", seed=seed)
    assert sorted(drawn) == sorted(many)


def test_random_orders_differ_between_seeds():
    many = [str(i) for i in range(12)]
    assert (
        len(
            {
                tuple(choose_tasks(many, orders={}, tasks=None, order="random", seed=s))
                for s in range(5)
            }
        )
        == 5
    )


def test_random_order_leaves_the_global_generator_alone():
    state = random.getstate()
    arranged(order="random")
    assert random.getstate() == state


def test_limit_keeps_the_first_train_rows_and_all_dev_rows():
    result = arranged(stream(a=9, b=1), max_train_rows=2)
    assert [[row.id for row in t.train] for t in result.tasks] == [
        ["a/train/0", "a/train/1"],
        ["b/train/0"],
    ]
    assert [len(t.dev) for t in result.tasks] == [1, 1]


def test_joint_learns_all_tasks_in_one_stage_and_scores_each():
    result = arranged(arrangement="joint", order="backwards", max_train_rows=2)
    assert names(result.tasks) == ["c", "b", "a"]
    assert names(result.stages) == ["joint"]
    assert ids(result.stages) == ids(result.tasks)
    assert [row.task for row in result.stages[0].dev] == ["c", "b", "a"]


def test_cumulative_stage_learns_every_task_so_far():
    result = arranged(arrangement="cumulative")
    assert names(result.stages) == ["a", "b", "c"]
    assert [len(s.train) for s in result.stages] == [3, 7, 12]
    assert [[row.task for row in s.dev] for s in result.stages] == [
        ["a"],
        ["a", "b"],
        ["a", "b", "c"],
    ]


def test_mixed_rows_keep_the_name_of_their_own_task():
    assert Counter(row.task for row in arranged(arrangement="joint").stages[0].train) == {
        "a": 3,
        "b": 4,
        "c": 5,
    }


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.one_of(st.none(), st.integers(1, 7)),
    st.integers(0, 9),
)
def test_no_arrangement_adds_or_loses_a_train_row(sizes, limit, seed):
    of = stream(**{f"t{i}": size for i, size in enumerate(sizes)})
    kept = {
        kind: arranged(
            of, orders={}, order="random", max_train_rows=limit, arrangement=kind, seed=seed
        )
        for kind in ("sequential", "joint", "cumulative")
    }
    assert (
        ids(kept["sequential"].stages)
        == ids(kept["joint"].stages)
        == ids(kept["cumulative"].stages[-1:])
    )
    assert all(ids(result.tasks) == ids(kept["sequential"].stages) for result in kept.values())


def test_an_unknown_task_is_refused_with_the_nearest_names():
    with pytest.raises(
        ConfigError, match=r"unknown task in stream.tasks 'agnew'; did you mean 'agnews'\?"
    ):
        arranged(stream(agnews=1, yelp=1), tasks=["agnew"])


def test_all_wrong_names_are_told_at_once():
    with pytest.raises(ConfigError, match=r"(?s)'x'.*'y'.*found task 'a' more than once"):
        arranged(tasks=["a", "x", "a", "y"])


def test_an_unknown_order_is_refused_with_the_nearest_names():
    with pytest.raises(
        ConfigError, match=r"unknown stream.order 'backward'; did you mean 'backwards'.*random"
    ):
        arranged(order="backward")


def test_an_order_without_a_picked_task_is_refused():
    with pytest.raises(
        ConfigError,
        match=r"found b in stream.tasks, expected tasks of order 'short' \(c, a\); drop",
    ):
        arranged(order="short", tasks=["a", "b"])


def test_an_unknown_arrangement_is_refused():
    with pytest.raises(
        ConfigError, match=r"unknown stream.arrangement 'joined'; did you mean 'joint'"
    ):
        arranged(arrangement="joined")


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(
        ConfigError, match=f"found stream.max_train_rows={limit}, expected at least 1"
    ):
        arranged(max_train_rows=limit)


def test_no_task_at_all_is_refused():
    with pytest.raises(
        ConfigError, match=r"found no task in stream.tasks, expected at least one of a, b, c"
    ):
        arranged(tasks=[])


def test_one_text_in_place_of_the_list_of_tasks_is_refused():
    with pytest.raises(
        ConfigError, match=r"found the text 'abc' in stream.tasks, expected a list.*\[abc\]"
    ):
        arranged(tasks="abc")


def test_a_task_without_train_rows_is_refused_with_the_mend():
    with pytest.raises(DataError, match=r"no train rows in task 'b'.*add rows.*stream.tasks=\[a\]"):
        arranged(stream(a=1, b=0))

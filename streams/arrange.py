"""Which tasks of a stream, in which order, and in which stages they are learned.

Every stream takes the same keys (`tasks`, `order`, `limit`, `arrangement`, `seed`) and ends in
`arrange`, so that any stream can be shortened, reordered, or turned into the joint or cumulative
reference of itself.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from continual.data.types import Example, Stream, Task
from continual.errors import ConfigError, DataError, gathered, unknown

Tasks = tuple[Task[Example], ...]
EPISODE_ROWS = 12  # rows: half a step of 24, or six to adapt with and six to judge


def arrange(
    stream: Stream,
    *,
    orders: Mapping[str, Sequence[str]],
    tasks: Sequence[str] | None,
    order: str | None,
    max_train_rows: int | None,
    arrangement: str,
    seed: int,
) -> Stream:
    """The `stream` (its natural order, a stage a task) with the asked tasks, order, size and
    stages.

    `limit` keeps the first so many train rows of each task. Raises ConfigError for a name or a
    limit that cannot be, DataError for a stage without train rows.
    """
    by_name = {task.name: task for task in stream.tasks}
    names = choose_tasks(list(by_name), orders=orders, tasks=tasks, order=order, seed=seed)
    return apply_arrangement(
        [by_name[name] for name in names],
        stream,
        order=order,
        max_train_rows=max_train_rows,
        arrangement=arrangement,
    )


def choose_tasks(
    names: Sequence[str],
    *,
    orders: Mapping[str, Sequence[str]],
    tasks: Sequence[str] | None,
    order: str | None,
    seed: int,
) -> list[str]:
    """The names of the tasks to be learned, in their order, before any of their data is read.

    `tasks` picks among `names`; None is all. `order` sorts them: a named one of `orders`, "random"
    (by the `seed`), or none: as `tasks` lists them, or else the order named "default" if there is
    one, or else as in `names`. An order that leaves tasks out shortens the stream, unless `tasks`
    asks for them.
    """
    picked = _validate_names(names if tasks is None else tasks, names, "stream.tasks")
    if order == "random":
        return random.Random(seed).sample(picked, len(picked))
    if not order and (tasks is not None or "default" not in orders):
        return picked
    name = order or "default"
    if name not in orders:
        raise ConfigError(unknown("stream.order", name, [*orders, "random"]))
    ordered = _validate_names(orders[name], names, f"order {name!r}")
    if tasks is not None and (left_out := [task for task in picked if task not in ordered]):
        raise ConfigError(
            f"found {', '.join(left_out)} in stream.tasks, expected tasks of order {name!r} "
            f"({', '.join(ordered)}); drop them from stream.tasks or choose another stream.order"
        )
    return [task for task in ordered if task in picked]


def apply_arrangement(
    tasks: Sequence[Task[Example]],
    stream: Stream,
    *,
    order: str | None,
    max_train_rows: int | None,
    arrangement: str,
) -> Stream:
    """The `stream` of these `tasks`, in this order, learned in the stages of the `arrangement`."""
    if max_train_rows is not None and max_train_rows < 1:
        raise ConfigError(
            f"found stream.max_train_rows={max_train_rows}, expected at least 1 train row a task; null keeps all rows"
        )
    if arrangement not in ARRANGEMENTS:
        raise ConfigError(unknown("stream.arrangement", arrangement, ARRANGEMENTS))
    # The first rows, not a seeded draw: limits are nested (the 100 rows are among the 200),
    # whatever the seed.
    limited = tuple(replace(task, train=task.train[:max_train_rows]) for task in tasks)
    stages = ARRANGEMENTS[arrangement](limited)
    _check_train_rows(stages, limited)
    return replace(stream, order=order or "default", tasks=limited, stages=stages)


def mixture(name: str, tasks: Sequence[Task[Example]]) -> Task[Example]:
    """A mixture of tasks is a task: the train and the dev rows of all, in turn; each row keeps its
    task's name.
    """
    train = tuple(row for task in tasks for row in task.train)
    return Task(name=name, train=train, dev=tuple(row for task in tasks for row in task.dev))


def sequential(tasks: Tasks) -> Tasks:
    """A stage a task."""
    return tasks


def joint(tasks: Tasks) -> Tasks:
    """One stage of all tasks: the multitask ceiling."""
    return (mixture("joint", tasks),)


def cumulative(tasks: Tasks) -> Tasks:
    """As many stages as tasks; stage i, named for task i, learns all tasks up to i: replay without
    a limit.
    """
    return tuple(mixture(task.name, tasks[: i + 1]) for i, task in enumerate(tasks))


def none(tasks: Tasks) -> Tasks:
    """No stage: the tasks are only scored, as a probe's are."""
    return ()


def episodes(tasks: Tasks) -> Tasks:
    """One stage of all tasks, in episodes of one instruction type each: what meta-learning prepares
    new ones with.

    `maml` and its kin take half of an episode to adapt and half to judge; a step has
    train.batch_size / EPISODE of them. To `naive` it is the joint stage but for the order of the
    rows.
    """
    return (replace(mixture("episodes", tasks), episode_size=EPISODE_ROWS),)


ARRANGEMENTS: dict[str, Callable[[Tasks], Tasks]] = {
    f.__name__: f for f in (sequential, joint, cumulative, episodes, none)
}


def _validate_names(asked: Sequence[str], known: Sequence[str], where: str) -> list[str]:
    """The `asked` names, if all are `known`, none is there twice, and there is one at all."""
    if isinstance(asked, str):
        raise ConfigError(
            f"found the text {asked!r} in {where}, expected a list of tasks; write [{asked}]"
        )
    problems = [unknown(f"task in {where}", name, known) for name in asked if name not in known]
    twice = [name for name, n in Counter(asked).items() if n > 1]
    problems += [
        f"found task {name!r} more than once in {where}, expected each task once; drop the rest"
        for name in twice
    ]
    if not asked:
        problems += [
            f"found no task in {where}, expected at least one of {', '.join(known) or 'none'}"
        ]
    if problems:
        raise ConfigError(gathered(problems))
    return list(asked)


def _check_train_rows(stages: Tasks, tasks: Tasks) -> None:
    """Raise DataError for the stages that would train on nothing."""
    if empty := [task.name for task in stages if not task.train]:
        rest = [task.name for task in tasks if task.train]
        leave_out = f", or leave it out: stream.tasks=[{','.join(rest)}]" if rest else ""
        raise DataError(
            gathered(
                [
                    f"found no train rows in task {name!r}, expected at least one to learn from; "
                    f"add rows to its train split{leave_out}"
                    for name in empty
                ]
            )
        )

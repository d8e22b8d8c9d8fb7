"""Examples, tasks and streams: plain frozen values, as text and as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from continual.errors import DataError


@dataclass(frozen=True, slots=True)
class Constraint:
    """One thing asked of an answer, by its id in CHECKS and the keywords of that check."""

    id: str
    kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One row: what is asked, and the answers that count as right (the first one is trained on).

    A row of `messages` has no instruction of its own; its `outputs` holds the last assistant turn.
    `task` is the name of the task it belongs to, also inside a mixture; `where` is its file and
    line, for errors. Measures of an answer ask for more than `outputs`: `constraints` can be
    checked, `requirements` are put to a judge, and `level` says how the instruction is composed.
    """

    id: str
    task: str
    instruction: str
    input: str = ""
    outputs: tuple[str, ...] = ()
    messages: tuple[Message, ...] = ()
    location: str = ""
    constraints: tuple[Constraint, ...] = ()
    requirements: tuple[str, ...] = ()
    level: str = ""

    @property
    def user_request(self) -> str:
        """The instruction, or what the last turn of the user says."""
        return self.instruction or next(
            (m.content for m in reversed(self.messages) if m.role == "user"), ""
        )


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as token ids: `ids` (T,) and, of the same length, which of them are a response to
    be learned.

    `task` is the index of its task among the stream's tasks; `text` is what was tokenised, for
    people who inspect it.
    """

    id: str
    task_index: int
    ids: tuple[int, ...]
    response_mask: tuple[bool, ...]
    text: str = ""


E = TypeVar("E", Example, Encoded)


@dataclass(frozen=True)
class Task(Generic[E]):
    """An instruction dataset: `train` is learned, `dev` or `test` is scored by `metric`.

    Once encoded, `columns` names the stream's tasks in the order of its examples' task indices. In
    a mixture so many rows of one task stand together as it is learned, an `episode`; 0: all rows
    are mixed.
    """

    name: str
    train: Sequence[E]
    dev: Sequence[E] = ()
    test: Sequence[E] = ()
    metric: str = "exact_match"
    labels: tuple[str, ...] = ()
    category: str = ""
    task_names: tuple[str, ...] = ()
    episode_size: int = 0

    def get_split(self, name: str) -> Sequence[E]:
        """The examples of `train`, `dev` or `test`; raises DataError if there are none."""
        rows: Sequence[E] = getattr(self, name)
        if not rows:
            there = [s for s in ("train", "dev", "test") if getattr(self, s)]
            raise DataError(
                f"task {self.name!r} has no {name} rows (it has "
                f"{', '.join(there) or 'none at all'}); score another split "
                f"(score.split={there[-1] if there else 'dev'}) or add the file"
            )
        return rows


@dataclass(frozen=True)
class Stream:
    """An ordered sequence of tasks to be learned.

    `tasks` are scored, the matrix's columns; `stages` are learned in this order, one masked-SFT
    stage each. They are the same tasks unless the arrangement says otherwise: `joint` and
    `episodes` have one stage of all training data, `cumulative` stages that grow. `pretraining` is
    what a model built from scratch for this stream may see before row 0.
    """

    name: str
    order: str
    tasks: tuple[Task[Example], ...]
    stages: tuple[Task[Example], ...]
    pretraining: tuple[Example, ...] = ()

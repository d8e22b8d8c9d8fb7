"""Define examples, tasks and streams: plain frozen values, as text and as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from continual.errors import DataError


@dataclass(frozen=True, slots=True)
class Constraint:
    """Name one requirement on an answer: a check by its id in CHECKS, and its keyword arguments."""

    id: str
    kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Message:
    """Hold one turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """Hold one row as text: a prompt and its accepted answers; the first answer is trained on.

    A row with `messages` has no instruction; its `outputs` holds the last assistant turn. `task` is
    the name of its own task, also inside a mixture; `location` is its file and line, for messages.
    Some metrics need more than `outputs`: `constraints` are checked by programs, `requirements` by
    a judge, and `level` names how the instruction is composed.
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
    def user_turns(self) -> list[str]:
        """Return the text of each user turn; without messages it is the instruction alone."""
        if not self.messages:
            return [self.instruction]
        return [m.content for m in self.messages if m.role == "user"]

    @property
    def user_request(self) -> str:
        """Return the instruction, or the last user turn of a conversation."""
        return self.instruction or next(reversed(self.user_turns), "")

    @property
    def user_request_with_input(self) -> str:
        """Return the user's request, and the input on the next lines if there is one."""
        return f"{self.user_request}\n{self.input}" if self.input else self.user_request

    @property
    def prompt_messages(self) -> tuple[Message, ...]:
        """Return the turns before the last response; without messages one user turn."""
        if self.messages:
            return self.messages[:-1]
        return (Message("user", self.user_request_with_input),)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Hold one example as token ids (T,), with a mask (T,) of the response tokens to learn.

    `task_index` is the index of its task among the stream's tasks; `text` is the text that was
    tokenized, for inspection.
    """

    id: str
    task_index: int
    ids: tuple[int, ...]
    response_mask: tuple[bool, ...]
    text: str = ""


E = TypeVar("E", Example, Encoded)


@dataclass(frozen=True)
class Task(Generic[E]):
    """Hold one instruction dataset: `train` is learned, `dev` or `test` is scored by `metric`.

    Once encoded, `task_names` names the stream's tasks in the order of the task indices. In a
    mixture, `episode_size` rows of one task are learned in a row; 0 mixes all rows.
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
        """Return the examples of `train`, `dev` or `test`; raises DataError if there are none."""
        rows: Sequence[E] = getattr(self, name)
        if not rows:
            available = [s for s in ("train", "dev", "test") if getattr(self, s)]
            raise DataError(
                f"task {self.name!r} has no {name} rows (it has "
                f"{', '.join(available) or 'none at all'}); score another split "
                f"(score.split={available[-1] if available else 'dev'}) or add the file"
            )
        return rows


@dataclass(frozen=True)
class Stream:
    """Hold an ordered sequence of tasks to learn.

    `tasks` are scored: they are the columns of the matrix. `stages` are learned in this order, one
    stage of masked supervised fine-tuning each. Usually both are the same tasks; the arrangements
    `joint` and `episodes` have one stage with all training data, and `cumulative` has stages that
    grow. A model built from scratch for this stream may be pre-trained on `pretraining` first.
    """

    name: str
    order: str
    tasks: tuple[Task[Example], ...]
    stages: tuple[Task[Example], ...]
    pretraining: tuple[Example, ...] = ()

"""Robustness: the spread of the score over wordings of one instruction."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from omegaconf import OmegaConf

from continual.config.instantiate import construct
from continual.data.types import Example, Message, Task
from continual.errors import ConfigError, ContinualError, DataError, gathered, unknown
from continual.evaluation.probes.base import (
    Entry,
    Found,
    Look,
    Probe,
    Setting,
    at_least,
    known_mean,
)
from continual.evaluation.probes.changes import CHANGES
from continual.evaluation.scoring import Test

AS_IT_IS = "as it is"
ROWS = "rows"
MOST = 8  # phrasings taken from a task's train rows, the commonest
SOURCE = (
    "Mizrahi et al. 2024 (scores over instruction paraphrases), Sclar et al. 2024 (spread over "
    "formats), Sun et al. 2023 (deviation over phrasings)"
)


@dataclass(kw_only=True)
class Wordings(Probe):
    """The same examples under several wordings of their instructions: mean, worst, and standard
    deviation of the score.

    Wordings of a task are its examples as they are; `given` ones, of people; and `changes` of words
    or format, seeded by example. Given are with "rows" the instructions that the task's train rows
    repeat, for a stream whose instructions stand for one another, and with the name of a file
    beside TASK/test.jsonl that file's rows, which ask the same as the scored ones in the same
    order. A change that changes nothing is no wording of the task. Every wording is scored on the
    same examples, those that fit under all. The deviation is that of a sample (n - 1); all figures
    are means over tasks.
    """

    given: Sequence[str] = ()
    changes: Sequence[str] = tuple(CHANGES)
    limit: int | None = 50
    seed: int = 0
    tests: dict[str, dict[str, Test]] = field(
        init=False, repr=False, default_factory=dict
    )  # by task and wording
    left_out: int = field(init=False, default=0)

    def ready(self, setting: Setting) -> None:
        """Word each task's prompts; raises ConfigError for an unknown change, or where nothing is
        left to compare.
        """
        at_least("wordings", 1, limit=self.limit)
        if strange := [
            unknown("change in probe.wordings.changes", str(c), CHANGES)
            for c in self.changes
            if c not in CHANGES
        ]:
            raise ConfigError(gathered(strange))
        files = {name: _other(setting, name) for name in self.given if name != ROWS}
        for i, task in enumerate(setting.stream.tasks):
            rows = list(setting.rows(task, self.limit))
            worded = {AS_IT_IS: rows}
            if ROWS in self.given:
                worded |= {
                    f"given: {text}": [_said(e, text) for e in rows] for text in _repeated(task)
                }
            worded |= {
                f"given: {name}": _aligned(task, name, rows, setting.rows(tasks[i], self.limit))
                for name, tasks in files.items()
            }
            worded |= {
                name: changed
                for name in self.changes
                if (changed := self._changed(name, rows)) != rows
            }
            self._add(setting, task, worded)
        if all(len(tests) < 2 for tests in self.tests.values()):
            raise ConfigError(
                "probe=[wordings] has a single wording of each task; name what changes them in "
                "probe.wordings.changes, or where others are in probe.wordings.given"
            )

    def _changed(self, name: str, rows: Sequence[Example]) -> list[Example]:
        """The rows with their instructions changed."""
        return [
            _said(e, CHANGES[name](_instruction(e), random.Random(f"{self.seed}/{name}/{e.id}")))
            for e in rows
        ]

    def _add(
        self, setting: Setting, task: Task[Example], worded: Mapping[str, Sequence[Example]]
    ) -> None:
        """The task's wordings, encoded, of the examples that fit under all of them."""
        encoder = setting.apart()
        skipping = replace(encoder, on_unusable="skip")
        tests, fit = {}, {e.id for e in worded[AS_IT_IS]}
        for name, rows in worded.items():
            try:
                tests[name] = setting.test(task, rows, encoder if name == AS_IT_IS else skipping)
            except DataError as error:
                raise DataError(
                    f"wording {name!r}: {error}; or leave it out of probe.wordings"
                ) from error
            fit &= {e.id for e in tests[name].examples}
        if not fit:
            raise DataError(
                f"task {task.name!r}: no example fits under all of "
                f"{', '.join(map(repr, worded))}; raise data.max_length, or leave the longest "
                "out of probe.wordings.changes"
            )
        self.left_out += len(tests[AS_IT_IS].examples) - len(fit)
        self.tests[task.name] = {
            name: test.of([i for i, e in enumerate(test.examples) if e.id in fit])
            for name, test in tests.items()
        }

    @property
    def entries(self) -> Mapping[str, Entry]:
        """The scores, and their spread."""
        some = f"{self.limit or 'all'} examples a task" + (
            f", {self.left_out} in all left out that do not fit under every wording"
            if self.left_out
            else ""
        )
        return {
            "wordings": Entry(
                f"score over wordings of the same instruction, mean over tasks ({some})", SOURCE
            ),
            "wordings spread": Entry(
                "standard deviation (n - 1) of a task's score over its wordings, the one as "
                "it is among them, mean over tasks",
                SOURCE,
                "lower",
            ),
        }

    def measure(self, look: Look) -> Found:
        """Score each task under each wording."""
        scores = {
            task: {name: look.score(test) for name, test in tests.items()}
            for task, tests in self.tests.items()
        }
        given = {
            task: [v for name, v in told.items() if _is_given(name)]
            for task, told in scores.items()
        }
        changed = {
            task: [v for name, v in told.items() if name in CHANGES]
            for task, told in scores.items()
        }
        own = {task: told[AS_IT_IS] for task, told in scores.items()}
        means: dict[str, float | None] = {
            AS_IT_IS: known_mean(own.values()),
            "mean": known_mean(known_mean(told.values()) for told in scores.values()),
            "worst": known_mean(min(told.values()) for told in scores.values()),
        }
        if self.given:
            means["given"] = known_mean(map(known_mean, given.values()))
        means |= {
            name: known_mean(told.get(name) for told in scores.values())
            for name in self.changes
            if any(name in told for told in scores.values())
        }
        spread = {
            "all": known_mean(_deviation([*told.values()]) for told in scores.values()),
            **{
                label: known_mean(_deviation([own[task], *told]) for task, told in part.items())
                for label, part in (("given", given), ("changed", changed))
                if any(part.values())
            },
        }
        return {
            "wordings": means,
            "wordings spread": {
                **spread,
                **{t: _deviation([*told.values()]) for t, told in scores.items()},
            },
        }


def _is_given(name: str) -> bool:
    return name.startswith("given: ")


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _instruction(e: Example) -> str:
    """What is changed: the instruction, or of a conversation the last that the user says."""
    return e.messages[-2].content if e.messages else e.instruction


def _said(e: Example, text: str) -> Example:
    """The example with this instruction."""
    if not e.messages:
        return replace(e, instruction=text)
    return replace(e, messages=(*e.messages[:-2], Message("user", text), e.messages[-1]))


def _repeated(task: Task[Example]) -> list[str]:
    """The instructions that several train rows have, the commonest first."""
    told = Counter(e.instruction for e in task.train if e.input)
    return [text for text, n in told.most_common(MOST) if n > 1]


def _other(setting: Setting, name: str) -> Sequence[Task[Example]]:
    """The run's stream with the rows of another file as those that are scored."""
    split, section = (
        setting.config.score.split,
        OmegaConf.to_container(setting.config.stream, resolve=True),
    )
    assert isinstance(section, dict)
    files = {**(section.get("files") or {}), split: name}
    try:
        tasks: Sequence[Task[Example]] = construct(
            OmegaConf.create({**section, "files": files}), "stream"
        ).tasks
    except ContinualError as error:
        raise type(error)(
            f"probe.wordings.given=[{name}]: {error}; expected rows, or a file that each task of a "
            f"stream=folder has beside its {split}.jsonl, named without .jsonl"
        ) from error
    return tasks


def _aligned(
    task: Task[Example], name: str, rows: Sequence[Example], others: Sequence[Example]
) -> list[Example]:
    """The other file's rows under the ids of those whose wording they are."""
    if len(rows) != len(others):
        raise DataError(
            f"probe.wordings.given=[{name}]: task {task.name!r} has {len(others)} rows there and "
            f"{len(rows)} that are scored; expected the same examples, in the same order"
        )
    return [replace(other, id=e.id) for e, other in zip(rows, others, strict=True)]

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
    Probe,
    ProbeEntry,
    ProbeResult,
    RunSetup,
    StageContext,
    check_minimum,
    mean_or_none,
)
from continual.evaluation.probes.changes import CHANGES
from continual.evaluation.scoring import EvalSet

ORIGINAL = "as it is"
FROM_TRAIN_ROWS = "rows"
MAX_PHRASINGS = 8  # the most common phrasings of a task's train rows
SOURCE = (
    "Mizrahi et al. 2024 (scores over instruction paraphrases), Sclar et al. 2024 (spread over "
    "formats), Sun et al. 2023 (deviation over phrasings)"
)


@dataclass(kw_only=True)
class Wordings(Probe):
    """Mean, worst and standard deviation of the score over wordings of the same instructions.

    A task's wordings are its examples as they are; `paraphrases` by people; and `changes` of words
    or format, seeded by example. In `paraphrases`, "rows" takes the instructions that the task's
    train rows repeat, for a stream whose instructions are interchangeable. The name of a file
    beside TASK/test.jsonl takes that file's rows, which must ask the same as the scored ones in the
    same order. A change without effect is not a wording of the task. Every wording is scored on the
    same examples, those that fit in all wordings. The deviation is that of a sample (n - 1); all
    values are means over tasks.
    """

    paraphrases: Sequence[str] = ()
    changes: Sequence[str] = tuple(CHANGES)
    max_examples: int | None = 50
    seed: int = 0
    eval_sets: dict[str, dict[str, EvalSet]] = field(
        init=False, repr=False, default_factory=dict
    )  # by task and wording
    num_skipped: int = field(init=False, default=0)

    def prepare(self, setup: RunSetup) -> None:
        """Encode the wordings; raise ConfigError for an unknown change or a single wording."""
        check_minimum("wordings", 1, max_examples=self.max_examples)
        if strange := [
            unknown("change in probe.wordings.changes", str(c), CHANGES)
            for c in self.changes
            if c not in CHANGES
        ]:
            raise ConfigError(gathered(strange))
        files = {
            name: _load_file_tasks(setup, name)
            for name in self.paraphrases
            if name != FROM_TRAIN_ROWS
        }
        for i, task in enumerate(setup.stream.tasks):
            rows = list(setup.scored_rows(task, self.max_examples))
            worded = {ORIGINAL: rows}
            if FROM_TRAIN_ROWS in self.paraphrases:
                worded |= {
                    f"given: {text}": [_with_instruction(e, text) for e in rows]
                    for text in _repeated_instructions(task)
                }
            worded |= {
                f"given: {name}": _align_ids(
                    task, name, rows, setup.scored_rows(tasks[i], self.max_examples)
                )
                for name, tasks in files.items()
            }
            worded |= {
                name: changed
                for name in self.changes
                if (changed := self._apply_change(name, rows)) != rows
            }
            self._add_eval_sets(setup, task, worded)
        if all(len(tests) < 2 for tests in self.eval_sets.values()):
            raise ConfigError(
                "probe=[wordings] has a single wording of each task; name what changes them in "
                "probe.wordings.changes, or where others are in probe.wordings.paraphrases"
            )

    def _apply_change(self, name: str, rows: Sequence[Example]) -> list[Example]:
        """Return the rows with changed instructions."""
        return [
            _with_instruction(
                e, CHANGES[name](e.user_request, random.Random(f"{self.seed}/{name}/{e.id}"))
            )
            for e in rows
        ]

    def _add_eval_sets(
        self,
        setting: RunSetup,
        task: Task[Example],
        rows_by_wording: Mapping[str, Sequence[Example]],
    ) -> None:
        """Encode a task's wordings of the examples that fit in all of them."""
        encoder = setting.encoder
        skipping = replace(encoder, on_unusable="skip")
        tests, fit = {}, {e.id for e in rows_by_wording[ORIGINAL]}
        for name, rows in rows_by_wording.items():
            try:
                tests[name] = setting.make_eval_set(
                    task, rows, encoder if name == ORIGINAL else skipping
                )
            except DataError as error:
                raise DataError(
                    f"wording {name!r}: {error}; or leave it out of probe.wordings"
                ) from error
            fit &= {e.id for e in tests[name].examples}
        if not fit:
            raise DataError(
                f"task {task.name!r}: no example fits under all of "
                f"{', '.join(map(repr, rows_by_wording))}; raise data.max_length, or leave the longest "
                "out of probe.wordings.changes"
            )
        self.num_skipped += len(tests[ORIGINAL].examples) - len(fit)
        self.eval_sets[task.name] = {
            name: test.select([i for i, e in enumerate(test.examples) if e.id in fit])
            for name, test in tests.items()
        }

    @property
    def entries(self) -> Mapping[str, ProbeEntry]:
        """Describe the scores and their spread."""
        some = f"{self.max_examples or 'all'} examples a task" + (
            f", {self.num_skipped} in all left out that do not fit under every wording"
            if self.num_skipped
            else ""
        )
        return {
            "wordings": ProbeEntry(
                f"score over wordings of the same instruction, mean over tasks ({some})", SOURCE
            ),
            "wordings spread": ProbeEntry(
                "standard deviation (n - 1) of a task's score over its wordings, the one as "
                "it is among them, mean over tasks",
                SOURCE,
                "lower",
            ),
        }

    def measure(self, context: StageContext) -> ProbeResult:
        """Score each task under each wording."""
        scores = {
            task: {name: context.mean_score(test) for name, test in tests.items()}
            for task, tests in self.eval_sets.items()
        }
        given = {
            task: [v for name, v in told.items() if _is_paraphrase(name)]
            for task, told in scores.items()
        }
        changed = {
            task: [v for name, v in told.items() if name in CHANGES]
            for task, told in scores.items()
        }
        own = {task: told[ORIGINAL] for task, told in scores.items()}
        means: dict[str, float | None] = {
            ORIGINAL: mean_or_none(own.values()),
            "mean": mean_or_none(mean_or_none(told.values()) for told in scores.values()),
            "worst": mean_or_none(min(told.values()) for told in scores.values()),
        }
        if self.paraphrases:
            means["given"] = mean_or_none(map(mean_or_none, given.values()))
        means |= {
            name: mean_or_none(told.get(name) for told in scores.values())
            for name in self.changes
            if any(name in told for told in scores.values())
        }
        spread = {
            "all": mean_or_none(_standard_deviation([*told.values()]) for told in scores.values()),
            **{
                label: mean_or_none(
                    _standard_deviation([own[task], *told]) for task, told in part.items()
                )
                for label, part in (("given", given), ("changed", changed))
                if any(part.values())
            },
        }
        return {
            "wordings": means,
            "wordings spread": {
                **spread,
                **{t: _standard_deviation([*told.values()]) for t, told in scores.items()},
            },
        }


def _is_paraphrase(name: str) -> bool:
    return name.startswith("given: ")


def _standard_deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _with_instruction(e: Example, text: str) -> Example:
    """Return the example with another instruction."""
    if not e.messages:
        return replace(e, instruction=text)
    return replace(e, messages=(*e.messages[:-2], Message("user", text), e.messages[-1]))


def _repeated_instructions(task: Task[Example]) -> list[str]:
    """Return the instructions that several train rows have, the most common first."""
    told = Counter(e.instruction for e in task.train if e.input)
    return [text for text, n in told.most_common(MAX_PHRASINGS) if n > 1]


def _load_file_tasks(setting: RunSetup, name: str) -> Sequence[Task[Example]]:
    """Load the run's stream with another file as the scored split."""
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
            f"probe.wordings.paraphrases=[{name}]: {error}; expected rows, or a file that each "
            f"task of a stream=folder has beside its {split}.jsonl, named without .jsonl"
        ) from error
    return tasks


def _align_ids(
    task: Task[Example], name: str, rows: Sequence[Example], others: Sequence[Example]
) -> list[Example]:
    """Give the other file's rows the ids of the scored rows."""
    if len(rows) != len(others):
        raise DataError(
            f"probe.wordings.paraphrases=[{name}]: task {task.name!r} has {len(others)} rows there "
            f"and {len(rows)} that are scored; expected the same examples, in the same order"
        )
    return [replace(other, id=e.id) for e, other in zip(rows, others, strict=True)]

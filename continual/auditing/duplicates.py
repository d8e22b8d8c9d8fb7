"""Rows that stand twice: texts are compared by hash, white space and case aside.

A prompt is instruction and input together, or all messages but the last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b

from continual.data.types import Example, Stream

PRETRAINING = "pre-training"
TRAINING_SPLITS = ("train", PRETRAINING)


@dataclass(frozen=True, slots=True)
class HashedRow:
    """An example of a split, and what it is compared by: hashes of its prompt, its input alone and
    its answers.
    """

    example: Example
    split: str
    prompt: bytes
    input: bytes  # empty where there is none
    answers: frozenset[bytes]  # those that are not blank

    @property
    def task_split(self) -> tuple[str, str]:
        """Its task and split."""
        return self.example.task, self.split


RowMatch = tuple[
    HashedRow, HashedRow, bool
]  # a row, another one of the same key, and whether one of that key has its answers too


def hash_rows(stream: Stream) -> list[HashedRow]:
    """Every row once, in however many stages it is learned: pre-training, training, then each
    task's dev and test.
    """
    parts: list[tuple[str, Iterable[Example]]] = [
        (PRETRAINING, stream.pretraining),
        *(("train", found) for found in train_rows_by_task(stream).values()),
        *(("dev", t.dev) for t in stream.tasks),
        *(("test", t.test) for t in stream.tasks),
    ]
    instruction = cache(_fold_text)  # one stands in many rows
    return [_hash_row(e, split, instruction) for split, examples in parts for e in examples]


def train_rows_by_task(stream: Stream) -> dict[str, list[Example]]:
    """What the stages learn, by the rows' own task: each row once."""
    found: dict[str, list[Example]] = {task.name: [] for task in stream.tasks}
    for example in {id(e): e for stage in stream.stages for e in stage.train}.values():
        found.setdefault(example.task, []).append(example)
    return found


def _hash_row(e: Example, split: str, instruction: Callable[[str], str]) -> HashedRow:
    own = _fold_text(e.input)
    asked = " ".join(
        [_fold_text(m.content) for m in e.messages[:-1]] or [instruction(e.instruction), own]
    )
    answers = frozenset(_hash_text(told) for o in e.outputs if (told := _fold_text(o)))
    return HashedRow(e, split, _hash_text(asked.strip()), _hash_text(own) if own else b"", answers)


def _fold_text(text: str) -> str:
    """The text without what is not compared."""
    return " ".join(text.casefold().split())


def _hash_text(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def find_matches(rows: Sequence[HashedRow]) -> dict[str, list[RowMatch]]:
    """By kind of repetition, the rows that it concerns."""
    known = [row for row in rows if row.split in TRAINING_SPLITS]
    asked = [row for row in rows if row.split != PRETRAINING]
    dev, test = ([row for row in rows if row.split == split] for split in ("dev", "test"))
    leaked = [*find_in_sources([*test, *dev], known, lambda r: r.prompt)]
    out = {id(row) for row, _, _ in leaked}
    inputs = find_in_sources(
        [row for row in (*test, *dev) if row.input and id(row) not in out], known, lambda r: r.input
    )
    return {
        "leaked": leaked,
        "input leaked": [*inputs],
        "seen in dev": [*find_in_sources(test, dev, lambda r: r.prompt)],
        "conflicting": [*find_conflicts(asked)],
        "empty": [(row, row, True) for row in rows if lacks_answer(row)],
        "repeated": [*find_repeats(asked, lambda r: (r.split, r.prompt))],
    }


def find_repeats(
    rows: Iterable[HashedRow], key: Callable[[HashedRow], Hashable]
) -> Iterator[RowMatch]:
    """Each row whose key an earlier one has, with the first of those."""
    first: dict[Hashable, HashedRow] = {}
    answers: set[Hashable] = set()
    for row in rows:
        if (before := first.setdefault(k := key(row), row)) is not row:
            yield row, before, (k, row.answers) in answers
        answers.add((k, row.answers))


def find_in_sources(
    rows: Iterable[HashedRow], sources: Iterable[HashedRow], key: Callable[[HashedRow], Hashable]
) -> Iterator[RowMatch]:
    """Each row whose key one of the sources has, with the first of those."""
    first: dict[Hashable, HashedRow] = {}
    answers: set[Hashable] = set()
    for row in sources:
        first.setdefault(k := key(row), row)
        answers.add((k, row.answers))
    return (
        (row, first[k], (k, row.answers) in answers) for row in rows if (k := key(row)) in first
    )


def find_conflicts(rows: Sequence[HashedRow]) -> Iterator[RowMatch]:
    """Each row to whose prompt no answer is right in all rows that ask it, with one of those that
    has another.
    """
    common: dict[bytes, frozenset[bytes]] = {}
    sides: dict[bytes, list[HashedRow]] = defaultdict(
        list
    )  # the first row of each prompt, and the first that differs
    told = [row for row in rows if row.answers]
    for row in told:
        common[row.prompt] = common.get(row.prompt, row.answers) & row.answers
        two = sides[row.prompt]
        if not two or (len(two) == 1 and two[0].answers != row.answers):
            two.append(row)
    for row in told:
        if not common[row.prompt]:
            one, other = sides[row.prompt]
            yield row, other if one.answers == row.answers else one, False


def lacks_answer(row: HashedRow) -> bool:
    """Whether there is nothing to learn from it (its first output is blank), or no answer to it can
    be right.

    An answer to a row with constraints is right where it keeps to them.
    """
    asked = row.example.constraints and row.split not in TRAINING_SPLITS
    return not (row.answers or asked) or (
        row.split in TRAINING_SPLITS and not row.example.outputs[0].strip()
    )

"""Find rows that occur twice; texts are compared by hash, without case and white space.

A prompt is the instruction and input together, or all messages but the last.
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
    """An example of a split, with hashes of its prompt, of its input alone, and of its answers."""

    example: Example
    split: str
    prompt: bytes
    input: bytes  # empty if there is no input
    answers: frozenset[bytes]  # without blank answers

    @property
    def task_split(self) -> tuple[str, str]:
        """Return the task and the split."""
        return self.example.task, self.split


# A row, another row with the same key, and whether any row with that key has the same answers.
RowMatch = tuple[HashedRow, HashedRow, bool]


def hash_rows(stream: Stream) -> list[HashedRow]:
    """Hash every row once: pre-training, training of all stages, then dev and test by task."""
    parts: list[tuple[str, Iterable[Example]]] = [
        (PRETRAINING, stream.pretraining),
        *(("train", rows) for rows in train_rows_by_task(stream).values()),
        *(("dev", t.dev) for t in stream.tasks),
        *(("test", t.test) for t in stream.tasks),
    ]
    fold_instruction = cache(_fold_text)  # many rows share an instruction
    return [_hash_row(e, split, fold_instruction) for split, examples in parts for e in examples]


def train_rows_by_task(stream: Stream) -> dict[str, list[Example]]:
    """Return the rows that the stages train on by the rows' task, each row once."""
    rows: dict[str, list[Example]] = {task.name: [] for task in stream.tasks}
    distinct = {id(e): e for stage in stream.stages for e in stage.train}
    for example in distinct.values():
        rows.setdefault(example.task, []).append(example)
    return rows


def _hash_row(e: Example, split: str, fold_instruction: Callable[[str], str]) -> HashedRow:
    input = _fold_text(e.input)
    parts = [_fold_text(m.content) for m in e.messages[:-1]]
    prompt = " ".join(parts or [fold_instruction(e.instruction), input]).strip()
    answers = [_fold_text(output) for output in e.outputs]
    return HashedRow(
        e,
        split,
        _hash_text(prompt),
        _hash_text(input) if input else b"",
        frozenset(_hash_text(answer) for answer in answers if answer),
    )


def _fold_text(text: str) -> str:
    """Fold case and join white space."""
    return " ".join(text.casefold().split())


def _hash_text(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def find_matches(rows: Sequence[HashedRow]) -> dict[str, list[RowMatch]]:
    """Return the matched rows by kind of finding."""
    train = [row for row in rows if row.split in TRAINING_SPLITS]
    dev = [row for row in rows if row.split == "dev"]
    test = [row for row in rows if row.split == "test"]
    without_pretraining = [row for row in rows if row.split != PRETRAINING]

    leaked = list(find_in_sources([*test, *dev], train, lambda row: row.prompt))
    leaked_ids = {id(row) for row, _, _ in leaked}
    with_input = [row for row in (*test, *dev) if row.input and id(row) not in leaked_ids]
    return {
        "leaked": leaked,
        "input leaked": list(find_in_sources(with_input, train, lambda row: row.input)),
        "seen in dev": list(find_in_sources(test, dev, lambda row: row.prompt)),
        "conflicting": list(find_conflicts(without_pretraining)),
        "empty": [(row, row, True) for row in rows if lacks_answer(row)],
        "repeated": list(find_repeats(without_pretraining, lambda row: (row.split, row.prompt))),
    }


def find_repeats(
    rows: Iterable[HashedRow], key: Callable[[HashedRow], Hashable]
) -> Iterator[RowMatch]:
    """Yield each row whose key an earlier row has, with the first such row."""
    first_by_key: dict[Hashable, HashedRow] = {}
    seen: set[Hashable] = set()
    for row in rows:
        row_key = key(row)
        first = first_by_key.setdefault(row_key, row)
        if first is not row:
            yield row, first, (row_key, row.answers) in seen
        seen.add((row_key, row.answers))


def find_in_sources(
    rows: Iterable[HashedRow], sources: Iterable[HashedRow], key: Callable[[HashedRow], Hashable]
) -> Iterator[RowMatch]:
    """Yield each row whose key a source has, with the first such source."""
    first_by_key: dict[Hashable, HashedRow] = {}
    seen: set[Hashable] = set()
    for row in sources:
        first_by_key.setdefault(key(row), row)
        seen.add((key(row), row.answers))
    for row in rows:
        row_key = key(row)
        if row_key in first_by_key:
            yield row, first_by_key[row_key], (row_key, row.answers) in seen


def find_conflicts(rows: Sequence[HashedRow]) -> Iterator[RowMatch]:
    """Yield rows whose prompt has no answer accepted by all rows with it, and one that differs."""
    common_answers: dict[bytes, frozenset[bytes]] = {}
    # The first row of each prompt, and the first row with other answers.
    sides: dict[bytes, list[HashedRow]] = defaultdict(list)
    answered = [row for row in rows if row.answers]
    for row in answered:
        common_answers[row.prompt] = common_answers.get(row.prompt, row.answers) & row.answers
        side = sides[row.prompt]
        if not side or (len(side) == 1 and side[0].answers != row.answers):
            side.append(row)
    for row in answered:
        if not common_answers[row.prompt]:
            first, other = sides[row.prompt]
            yield row, other if first.answers == row.answers else first, False


def lacks_answer(row: HashedRow) -> bool:
    """Return True if a row has nothing to train on, or no answer to it can be right.

    A training row needs a first output that is not blank. A scored row needs an answer, or
    constraints that an answer can satisfy.
    """
    if row.split in TRAINING_SPLITS:
        return not row.answers or not row.example.outputs[0].strip()
    return not row.answers and not row.example.constraints

"""One row of data, in any of the forms that instruction data comes in, to one Example.

    {"instruction", "input" (may be left out), "output" or "outputs"}
    {"prompt", "input" (may be left out), "response", "completion" or "answer"}
    {"messages": [{"role", "content"}, ...]}

A row that fits several is read by the last of them in the order prompt, instruction, messages. A
null stands for a column left out. Beside any of them may stand what measures of an answer ask for:

    {"constraints": [{"id", "kwargs"}, ...], "requirements": [text, ...], "level": text}

Other columns are metadata and stay unread, but one that looks like a misspelt column is refused.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from continual.data.types import Example, Message
from continual.errors import DataError, brief, gathered, listed
from continual.evaluation import constraints
from continual.io import untrusted

# What marks a form, and the columns that may hold its answer, best first.
ROW_FORMS: dict[str, tuple[str, ...]] = {
    "messages": (),
    "instruction": ("output", "outputs"),
    "prompt": ("response", "completion", "answer"),
}
MAX_LEVEL_LENGTH = 60
MAX_PROBLEMS = 1000  # problems of one file, after which it is not read on
EXPECTED_COLUMNS = "'instruction' and 'output', 'prompt' and 'response', or 'messages'"


def parse_row(row: Mapping[str, Any], *, task: str, id: str, where: str) -> Example:
    """The Example of one row; `where` is its file and line. An empty answer passes: the template
    refuses or skips it.

    Raises DataError with all that is wrong with the row, a line each.
    """
    filled = {name: value for name, value in row.items() if value is not None}
    form = next((mark for mark in ROW_FORMS if mark in filled), None)
    if form is None:
        columns = listed([brief(name) for name in row])
        hint = "; ".join(
            f"rename {found!r} to {meant!r}"
            for found, meant in find_misspellings(filled, list(ROW_FORMS))
        )
        raise DataError(
            f"{where}: found the columns {columns}, expected {EXPECTED_COLUMNS}; "
            f"{hint or 'rename the columns'}"
        )
    problems: list[str] = []
    if form == "messages":
        messages = _parse_messages(filled["messages"], problems)
        example = Example(
            id, task, "", "", tuple(m.content for m in messages[-1:]), messages, where
        )
    else:
        outputs = _parse_outputs(filled, form, problems)
        example = Example(
            id,
            task,
            _parse_instruction(filled, form, problems),
            _parse_input(filled, problems),
            outputs,
            (),
            where,
        )
        known = ["input", *(ROW_FORMS[form] if not outputs else ())]
        problems += [
            f"found the column {found!r}, expected {meant!r}; rename it"
            for found, meant in find_misspellings(filled, known)
        ]
    asked = _parse_scoring_fields(filled, problems)
    if problems:
        raise DataError("\n".join(f"{where}: {problem}" for problem in problems))
    return replace(example, **asked) if asked else example


def load_jsonl(path: Path, task: str) -> list[Example]:
    """The rows of a JSON-lines file (UTF-8), one Example a line; lines of white space hold no row.

    A row without an "id" gets TASK/SPLIT/N, N from 0, where SPLIT is the file's name. Raises
    DataError with everything that is wrong in the file, by line.
    """
    examples: list[Example] = []
    problems: list[str] = []
    lines: dict[str, int] = {}  # the line where each id was first seen
    for n, (number, line) in enumerate(untrusted.iter_lines(path)):
        where = f"{path}:{number}"
        try:
            row = _parse_object(line, where)
            id = _row_id(row, f"{task}/{path.stem}/{n}", where)
            if (first := lines.setdefault(id, number)) != number:
                raise DataError(
                    f"{where}: found the id {brief(id)} again, expected each once (it is on line "
                    f"{first}); give the row its own, or none"
                )
            examples.append(parse_row(row, task=task, id=id, where=where))
        except DataError as error:
            problems += str(error).split("\n")
        if len(problems) >= MAX_PROBLEMS:
            raise DataError(f"{gathered(problems)}\nReading stopped at line {number}.")
    if problems:
        raise DataError(gathered(problems))
    return examples


def find_misspellings(found: Iterable[str], known: Sequence[str]) -> list[tuple[str, str]]:
    """The names found that look like one of the known names which is not there: [(found, meant)]."""
    found = list(found)
    absent = [name for name in known if name not in found]
    pairs = [
        (name, difflib.get_close_matches(name.lower(), absent, n=1, cutoff=0.8))
        for name in found
        if name not in known and len(name) <= 2 * max(map(len, known))
    ]
    return [(name, close[0]) for name, close in pairs if close]


def _parse_object(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object of one line."""
    row: Any = untrusted.parse_json(line, where, line=True)
    if not isinstance(row, dict):
        raise DataError(
            f'{where}: found {_json_type(row)}, expected a JSON object; write {{"instruction": ...}}'
        )
    return row


def _row_id(row: Mapping[str, Any], default: str, where: str) -> str:
    """The row's id; an integer is as good a name as a text."""
    id = row.get("id")
    if id is None:
        return default
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise DataError(
            f"{where}: found {_json_type(id)} as 'id', expected text; quote it, or leave it out"
        )
    return str(id)


def _parse_instruction(row: Mapping[str, Any], name: str, problems: list[str]) -> str:
    """The instruction: text, and not empty."""
    value = row[name]
    if not isinstance(value, str):
        problems.append(f"found {_json_type(value)} as {name!r}, expected text; quote it")
    elif not value.strip():
        problems.append(
            f"found an empty {name!r}, expected what is asked; write it, or move 'input' there"
        )
    return str(value)


def _parse_input(row: Mapping[str, Any], problems: list[str]) -> str:
    """The input: text, empty if there is none."""
    value = row.get("input", "")
    if not isinstance(value, str):
        problems.append(
            f"found {_json_type(value)} as 'input', expected text; quote it, or write \"\" for none"
        )
    return str(value)


def _parse_outputs(row: Mapping[str, Any], form: str, problems: list[str]) -> tuple[str, ...]:
    """The accepted answers of a row, one at least."""
    names = [name for name in ROW_FORMS[form] if name in row]
    expected = " or ".join(map(repr, ROW_FORMS[form]))
    if not names:
        problems.append(
            f"found no answer beside {form!r} (columns {listed([brief(n) for n in row])}), "
            f"expected {expected}; add it, or rename the column that holds it"
        )
        return ()
    if len(names) > 1:
        problems.append(
            f"found {' and '.join(map(repr, names))}, expected one of them; remove the others"
        )
    value = row[names[0]]
    answers = value if isinstance(value, list) else [value]
    if not answers:
        problems.append(
            f"found an empty list as {names[0]!r}, expected at least one answer; add it or drop "
            "the row"
        )
    if wrong := next(
        (_json_type(answer) for answer in answers if not isinstance(answer, str)), None
    ):
        inside = " in the list" if isinstance(value, list) else ""
        problems.append(
            f"found {wrong}{inside} as {names[0]!r}, expected text or a list of texts; quote it"
        )
    return tuple(map(str, answers))


def _parse_scoring_fields(row: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """What the row says of how its answer is to be measured, by the fields of an Example.

    A column of another kind under one of these names (text as constraints, numbers with a point as
    levels) is metadata.
    """
    found: dict[str, Any] = {}
    if isinstance(told := row.get("constraints"), list | dict) and told:
        found["constraints"] = constraints.parse_constraints(told, problems)
    if isinstance(told := row.get("requirements"), list) and told:
        found["requirements"] = tuple(map(str, told))
        if wrong := next(
            (_json_type(t) for t in told if not isinstance(t, str) or not t.strip()), None
        ):
            problems.append(
                f"found {wrong} in the list 'requirements', expected texts that are not blank; "
                "quote or remove it"
            )
    if (
        isinstance(told := row.get("level"), str | int)
        and not isinstance(told, bool)
        and str(told).strip()
    ):
        found["level"] = str(told)
        if len(found["level"]) > MAX_LEVEL_LENGTH or untrusted.CONTROL.search(found["level"]):
            problems.append(
                f"found {brief(told)} as 'level', expected a short name on one line; shorten it, "
                "or leave it out"
            )
    return found


def _parse_messages(turns: Any, problems: list[str]) -> tuple[Message, ...]:
    """The turns: perhaps a system message, then user and assistant by turns, the assistant last."""
    if not isinstance(turns, list) or not turns:
        kind = "an empty list" if turns == [] else _json_type(turns)
        problems.append(
            f"found {kind} as 'messages', expected a list of turns; "
            'write [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]'
        )
        return ()
    messages = []
    for n, turn in enumerate(turns, 1):
        if (
            isinstance(turn, dict)
            and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str)
        ):
            messages.append(Message(turn["role"], turn["content"]))
        else:
            fields = (
                [f"{k}: {_json_type(v)}" for k, v in turn.items()] if isinstance(turn, dict) else []
            )
            found = f"{{{listed(fields, 5)}}}" if isinstance(turn, dict) else _json_type(turn)
            problems.append(
                f"found {found} as turn {n} of 'messages', expected {{role: text, content: text}}; "
                "rename or quote its fields"
            )
    if len(messages) == len(turns):
        _check_roles([message.role for message in messages], problems)
    return tuple(messages)


def _check_roles(roles: Sequence[str], problems: list[str]) -> None:
    """Note the first turn that is out of place."""
    first = 1 if roles[0] == "system" else 0
    for n, role in enumerate(roles[first:]):
        if role != (expected := ("user", "assistant")[n % 2]):
            problems.append(
                f"found the role {brief(role)} in turn {first + n + 1} of 'messages', expected "
                f"{expected!r}; let user and assistant take turns, after at most one system message"
            )
            return
    if roles[-1] != "assistant":
        problems.append(
            f"found {brief(roles[-1])} as the last role of 'messages', expected 'assistant', the "
            "answer to be learned; add it, or drop the last turn"
        )


def _json_type(value: Any) -> str:
    """What a value is, in JSON's words, for messages."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float):
        return f"the number {brief(value)}"
    names: dict[type, str] = {str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")

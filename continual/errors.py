"""What can be wrong with what a user gave. A message says what was found, what was expected, and
the fix.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class ContinualError(Exception):
    """The root of every error that the user can fix; the command line prints its message and exits
    with 2.
    """


class DataError(ContinualError, ValueError):
    """A row, file or split does not hold what a stream needs; the message names file and line."""


class ConfigError(ContinualError, ValueError):
    """A key, name or combination of settings that does not exist or cannot work."""


class MissingError(ContinualError, FileNotFoundError):
    """A file or folder that was named is not there."""


class TrainingError(ContinualError, ArithmeticError):
    """A stage cannot go on, such as a loss that is not finite."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not among the `known` ones, nearest first."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    return f"unknown {kind} {brief(name)}{hint} Known: {listed(names)}."


def brief(value: object, most: int = 200) -> str:
    """A value as it is written in Python, cut where it is too long for a message."""
    told = repr(value[: most + 1] if isinstance(value, str) else value)
    return (
        told
        if len(told) <= most + 2
        else f"{told[:most]}...{told[0] if isinstance(value, str) else ''}"
    )


def listed(names: Sequence[str], most: int = 50) -> str:
    """Names side by side, at most so many of them and a count of the rest."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest or "none"


KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str,), "text"),
    "bool": ((bool,), "true or false"),
    "Sequence": ((list, tuple), "a list, such as [a,b]"),
    "tuple": ((list, tuple), "a list, such as [a,b]"),
    "Mapping": ((dict,), "a mapping, such as {a: b}"),
}


def mistyped(annotation: object, value: object) -> str:
    """What the annotation wants in place of `value`; empty where it fits, or where KINDS does not
    know the type.
    """
    wanted = str(getattr(annotation, "__name__", annotation)).split(" | ")
    kinds = [KINDS.get(kind.partition("[")[0]) for kind in wanted if kind != "None"]
    if (value is None and "None" in wanted) or not kinds or None in kinds:
        return ""
    known = [kind for kind in kinds if kind]
    fits = any(
        isinstance(value, types) and (bool in types or not isinstance(value, bool))
        for types, _ in known
    )
    return "" if fits else " or ".join(words for _, words in known)


def not_finite(ids: Sequence[str]) -> str:
    """The message for an importance of weights that is not finite, for these examples."""
    return (
        f"how much the weights matter to the examples {listed(ids)} is not finite; lower "
        "train.lr, set train.max_grad_norm, train in fp32, or fix these rows. After steps that "
        "train.on_nonfinite=skip has skipped, the rows that were the reason are left out"
    )


def gathered(problems: Sequence[str], shown: int = 20) -> str:
    """All offenders of one kind in one message, a line each, at most `shown` of them and a count of
    the rest.
    """
    rest = len(problems) - shown
    return "\n".join([*problems[:shown], *([f"... and {rest} more"] if rest > 0 else [])])

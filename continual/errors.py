"""Errors that a user can fix. A message says what was found, what was expected, and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class ContinualError(Exception):
    """Root of every error that a user can fix; the command line prints it and exits with 2."""


class DataError(ContinualError, ValueError):
    """Report a row, file or split that cannot be used; the message names file and line."""


class ConfigError(ContinualError, ValueError):
    """Report a key, name or combination of settings that does not exist or cannot work."""


class MissingError(ContinualError, FileNotFoundError):
    """Report a file or folder that does not exist."""


class TrainingError(ContinualError, ArithmeticError):
    """Report a stage that cannot continue, for example after a loss that is not finite."""


class Problems:
    """Collect messages about what is wrong, and raise all of them as one error.

    A user then fixes everything at once instead of one problem a run.
    """

    def __init__(self, messages: Iterable[str] = ()) -> None:
        """Begin with these messages."""
        self.messages = list(messages)

    def __bool__(self) -> bool:
        """True if there is a problem."""
        return bool(self.messages)

    def add(self, *messages: str) -> None:
        """Add messages; empty ones are left out."""
        self.messages += [message for message in messages if message]

    def require(self, condition: bool, message: str) -> None:
        """Add the message unless the condition holds."""
        if not condition:
            self.messages.append(message)

    def raise_if_any(self, error: type[ContinualError] = ConfigError) -> None:
        """Raise `error` with all messages, one per line, if there are any."""
        if self.messages:
            raise error(gathered(self.messages))


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the message for a name that is not among `known`, with the closest names first."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    return f"unknown {kind} {brief(name)}{hint} Known: {listed(names)}."


def brief(value: object, max_length: int = 200) -> str:
    """Return the `repr` of a value, cut after `max_length` characters."""
    text = repr(value[: max_length + 1] if isinstance(value, str) else value)
    if len(text) <= max_length + 2:
        return text
    closing_quote = text[0] if isinstance(value, str) else ""
    return f"{text[:max_length]}...{closing_quote}"


def listed(names: Sequence[str], max_names: int = 50) -> str:
    """Join names with commas: at most `max_names` of them, then the number of the rest."""
    rest = f" and {len(names) - max_names} more" if len(names) > max_names else ""
    return ", ".join(names[:max_names]) + rest or "none"


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
    """Return the words for the type that an annotation expects in place of `value`.

    Empty if the value has that type, or if KINDS does not know the type.
    """
    names = str(getattr(annotation, "__name__", annotation)).split(" | ")
    kinds = [KINDS.get(name.partition("[")[0]) for name in names if name != "None"]
    if (value is None and "None" in names) or not kinds or None in kinds:
        return ""

    known = [kind for kind in kinds if kind]
    fits = any(
        isinstance(value, types) and (bool in types or not isinstance(value, bool))
        for types, _ in known
    )
    return "" if fits else " or ".join(words for _, words in known)


def not_finite(ids: Sequence[str]) -> str:
    """Return the message for a weight importance (Fisher) that is not finite on these examples."""
    return (
        f"the importance of the weights for the examples {listed(ids)} is not finite; lower "
        "train.lr, set train.max_grad_norm, train in fp32, or fix these rows. With "
        "train.on_nonfinite=skip, the rows that caused skipped steps are left out"
    )


def gathered(problems: Sequence[str], max_lines: int = 20) -> str:
    """Join problems, one per line: at most `max_lines`, then the number of the rest."""
    lines = list(problems[:max_lines])
    if len(problems) > max_lines:
        lines.append(f"... and {len(problems) - max_lines} more")
    return "\n".join(lines)

"""The page of the commands, from the texts that `--help` prints."""

from __future__ import annotations

from continual.cli.help import HELP, VERB_HELP

# Commands that take configuration keys, and the page that lists these keys.
KEYS_PAGE = {
    "run": "keys/run.md",
    "compare": "keys/compare.md",
    "adapt": "keys/adapt.md",
    "plan": "keys/plan.md",
    "audit": "keys/audit.md",
}


def page() -> str:
    """Return the Markdown page."""
    parts = [
        "# Commands",
        "Every command answers `--help` with the text below. `continual --help` prints:",
        _block(HELP),
    ]
    for verb, text in VERB_HELP.items():
        parts += _section(verb, text)
    return "\n\n".join(parts) + "\n"


def _section(verb: str, text: str) -> list[str]:
    usage, _, rest = text.partition("\n\n")
    command, _, purpose = usage.partition(": ")
    purpose = purpose[:1].upper() + purpose[1:].rstrip(".")
    lines = [f"## continual {verb}", f"`{command}`", f"{purpose}.", _block(rest)]
    if verb in KEYS_PAGE:
        lines.append(f"All keys: [configuration of `{verb}`]({KEYS_PAGE[verb]}).")
    return lines


def _block(text: str) -> str:
    return f"```text\n{text}\n```"

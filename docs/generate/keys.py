"""The pages of the configuration keys, from the YAML files of `conf/` and their comments."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CONF = Path(__file__).parents[2] / "conf"

# Commands: their file, the title of the page.
COMMANDS = ("run", "compare", "adapt", "plan", "audit")
# Groups: folder of `conf/` -> title of the page, how a command chooses a configuration.
GROUPS = {
    "stream": ("Streams", "`stream=NAME` chooses one; `stream.KEY=VALUE` sets a key of it."),
    "strategy": (
        "Strategies",
        "`strategy=NAME` chooses one, `strategy=[A,B]` composes several; "
        "`strategy.NAME.KEY=VALUE` sets a key.",
    ),
    "model": ("Models", "`model=NAME` chooses one; `model.KEY=VALUE` sets a key of it."),
    "train": ("Training", ""),
    "score": ("Scoring", ""),
    "probe": ("Probes", "`probe=[A,B]` chooses them; `probe.NAME.KEY=VALUE` sets a key."),
}
# Groups whose files are shown as they are: sets of values for keys that have their own pages.
VERBATIM = {"experiment": "Experiments", "hydra/launcher": "Launchers"}
# A comment above a group of keys in this form is an example to show as code: it is indented.
INDENTED = "  "
KEY_LINE = re.compile(r"(?P<indent> *)(?P<list>- )?(?P<key>/?[\w@./]+):(?: +(?P<value>.*))?$")
ROOT_PACKAGE = "# @package _global_"


@dataclass(frozen=True)
class Key:
    """A key: its dotted path, its default as text ("" for a section), its comment's lines."""

    path: str
    default: str
    comment: tuple[str, ...]


def pages() -> dict[str, str]:
    """Return the Markdown pages by their path below `reference/keys/`."""
    found = {f"{name}.md": command_page(name) for name in COMMANDS}
    found |= {f"{name}.md": group_page(name) for name in GROUPS}
    found |= {
        f"{name.rpartition('/')[2]}.md": verbatim_page(name, title)
        for name, title in VERBATIM.items()
    }
    return found


def command_page(name: str) -> str:
    """Return the page of a command: its own keys, and for `run` those that all commands share."""
    parts = [f"# Keys of `{name}`", *_document(CONF / f"{name}.yaml", "")]
    if name == "run":
        parts += _document(CONF / "common.yaml", "")
        parts.append(
            "The keys of the chosen configurations follow in pages of their own: "
            + ", ".join(f"[`{group}.*`]({group}.md)" for group in GROUPS)
            + "."
        )
    else:
        parts.append("Besides these it takes the [keys of `run`](run.md).")
    return "\n\n".join(parts) + "\n"


def group_page(group: str) -> str:
    """Return the page of a group of configurations, a heading for each."""
    title, usage = GROUPS[group]
    parts = [f"# {title}", usage]
    paths = sorted((CONF / group).glob("*.yaml"))
    for path in paths:
        if len(paths) > 1:
            parts.append(f"## {path.stem}")
        parts += _document(path, f"{group}.")
    return "\n\n".join(parts) + "\n"


def verbatim_page(group: str, title: str) -> str:
    """Return the page of a group whose files set keys of other groups: the files themselves."""
    parts = [f"# {title}", f"`{group}=NAME` adds one to a command."]
    for path in sorted((CONF / group).glob("*.yaml")):
        parts += [f"## {path.stem}", f"```yaml\n{path.read_text('utf-8').strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _document(path: Path, prefix: str) -> Iterator[str]:
    """Yield a file's opening comment as text, then its keys as one definition list."""
    opening, found = read(path, prefix)
    yield from _comment(opening)
    entries = "\n\n".join(_entry(key) for key in found if not key.path.startswith("hydra."))
    if entries:
        yield entries


def read(path: Path, prefix: str) -> tuple[tuple[str, ...], list[Key]]:
    """Return the opening comment of a configuration file, and its keys.

    `prefix` stands before each key, unless the file says that its keys are those of the root.
    """
    lines = path.read_text("utf-8").splitlines()
    if lines[0].strip() == ROOT_PACKAGE:
        prefix = ""
        lines = lines[1:]
    count = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    opening = tuple(line[1:].removeprefix(" ") for line in lines[:count])
    return opening, keys(lines[count:], prefix)


def keys(lines: Sequence[str], prefix: str = "") -> list[Key]:
    """Return the keys of a commented YAML file in its order, sections with a comment included.

    A key without a comment of its own has that of the key above it. The list `defaults` gives the
    chosen configuration of each group; `_target_` names code and is left out.
    """
    found: list[Key] = []
    comment: list[str] = []
    last: tuple[str, ...] = ()
    parents: list[tuple[int, str]] = []  # (indent, name) of the sections around a line
    for line in lines:
        text = line.strip()
        if text.startswith("#"):
            comment.append(text[1:].removeprefix(" "))
            continue
        match = KEY_LINE.match(line)
        if match is None:
            comment = []
            continue
        parents = [p for p in parents if p[0] < len(match["indent"])]
        key = match["key"]
        value = _without_comment(match["value"] or "")
        in_defaults = bool(parents) and parents[-1][1] == "defaults"
        last = tuple(comment) or (() if in_defaults or value in ("", "${seed}") else last)
        if not value:
            parents.append((len(match["indent"]), key))
        names = [name for _, name in parents if name != "defaults"] + ([key] if value else [])
        path = prefix + ".".join(names)
        if "@" in key:  # a group that fills a section of this file, such as /stream@general.stream
            group, _, section = key.removeprefix("/").partition("@")
            path = f"{group}@{prefix}{section}"
        if (
            key not in ("_target_", "defaults")
            and (value or comment)
            and not (in_defaults and not comment and key.startswith("override"))
        ):
            found.append(Key(path, value, _meaning(path, value, last)))
        comment = []
    return found


def _without_comment(value: str) -> str:
    return re.split(r"\s+#", value)[0].strip()


def _meaning(path: str, value: str, comment: tuple[str, ...]) -> tuple[str, ...]:
    if comment:
        return comment
    if value == "${seed}":
        return ("The run's seed, unless another one is given.",)
    if path in GROUPS:
        return ("The configuration of this group; its page lists the choices.",)
    return ("As for run, with another default.",)


def _entry(key: Key) -> str:
    """Return a key as an entry of a definition list."""
    required = key.default == "???"
    default = " (required)" if required else f" = `{key.default}`" if key.default else ""
    body = "\n\n".join(_comment(key.comment))
    indented = "\n".join(f"    {line}" if line else "" for line in body.splitlines())
    return f"`{key.path}`{default}\n:   {indented.lstrip()}"


def _comment(lines: Sequence[str]) -> Iterator[str]:
    """Yield a comment's paragraphs; indented lines become a block of code."""
    text = [line for line in lines if not line.startswith(INDENTED)]
    code = [line for line in lines if line.startswith(INDENTED)]
    if text:
        yield escape(" ".join(text).strip())
    if code:
        yield "```yaml\n" + "\n".join(line.removeprefix(INDENTED) for line in code) + "\n```"


def escape(text: str) -> str:
    """Return plain text as Markdown that shows the same characters; code in backticks stays."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([\\*_\[\]<>])", r"\\\1", p) for p in parts)


def all_keys() -> Mapping[str, list[Key]]:
    """Return the keys of every file of the groups and commands, by the file's path in `conf/`."""
    files = [CONF / f"{name}.yaml" for name in (*COMMANDS, "common")]
    files += [path for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
    found = {}
    for path in files:
        group = path.parent.name
        prefix = f"{group}." if group in GROUPS else ""
        found[str(path.relative_to(CONF))] = read(path, prefix)[1]
    return found

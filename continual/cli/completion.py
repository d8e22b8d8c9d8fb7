"""Complete commands, keys and choices in bash, zsh and fish.

`continual completion SHELL` prints a script for the shell, which asks `continual completion words
LINE` at each Tab. Configurations are composed for this; neither torch nor a strategy is imported.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

from continual.config.catalogue import GROUPS, list_choices
from continual.config.overrides import SHORT_IN, compose_config
from continual.config.run_config import flatten_keys
from continual.errors import ConfigError, MissingError, unknown

# Bash ends a word at = and : as well, so the script cuts the candidates behind the last of them.
BASH = r"""_continual() {
  local line="${COMP_LINE:0:COMP_POINT}" word candidate
  word="${line##*[[:space:]]}"
  COMPREPLY=()
  while IFS= read -r candidate; do
    COMPREPLY+=("${candidate#"${word%"${word##*[=:]}"}"}")
  done < <(continual completion words "$line" 2>/dev/null)
}
complete -o nospace -o default -F _continual continual"""
ZSH = r"""_continual() {
  local -a candidates
  candidates=(${(f)"$(continual completion words "$LBUFFER" 2>/dev/null)"})
  if (( $#candidates )); then compadd -U -Q -S '' -- $candidates; else _files; fi
}
compdef _continual continual"""
FISH = r"""function _continual
  set -l candidates (continual completion words (commandline -cp) 2>/dev/null)
  if test -n "$candidates"
    printf '%s\n' $candidates
  else
    __fish_complete_path (commandline -ct)
  end
end
complete -c continual -f -a '(_continual)'"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}

GROUP_NAMES = (*GROUPS.values(), "experiment")
LIST_GROUPS = ("strategy", "probe")  # groups of which several can be chosen


def completion(words: Sequence[str], verbs: Sequence[str], configured: Sequence[str]) -> None:
    """Print a shell's script, or the candidates for the end of a line: `words LINE`.

    `configured` are the verbs that take configuration keys. Raises MissingError without a shell's
    name, ConfigError for an unknown one.
    """
    if not words:
        raise MissingError(f"continual completion needs a shell: {', '.join(SCRIPTS)}")
    if words[0] == "words":
        for candidate in complete_line(" ".join(words[1:]), verbs, configured):
            print(candidate)
    elif words[0] in SCRIPTS:
        print(SCRIPTS[words[0]])
    else:
        raise ConfigError(unknown("completion", words[0], SCRIPTS))


def complete_line(line: str, verbs: Sequence[str], configured: Sequence[str]) -> list[str]:
    """List what the last word of a line that calls continual can be; empty where files can."""
    command = re.split(r"[;&|]", line)[-1]
    words = command.split() + [""] * command.endswith((" ", "\t"))
    while words and PurePath(words.pop(0)).name != "continual":
        pass

    if not words:
        return []
    *before, word = (w.strip("'\"") for w in words)
    if not before:
        candidates = [*verbs, "--help", "--version"]
    elif word.startswith("-"):
        candidates = ["--help", "--cfg"] if before[0] in configured else ["--help"]
    elif before[0] in configured:
        key, sign, value = word.partition("=")
        candidates = _values(key, value) if sign else _keys(word, before[0], before[1:])
    else:
        fixed = {"list": [*GROUPS, "json=true"], "completion": [*SCRIPTS]}
        candidates = fixed.get(before[0], [])
    return [c for c in candidates if c.startswith(word)]


def _values(key: str, value: str) -> list[str]:
    """List the choices of a group, behind those that the value has before its last comma."""
    if key not in GROUP_NAMES:
        return []
    chosen = value[: len(value) - len(re.split(r"[\[,]", value)[-1])]
    return [f"{key}={chosen}{choice.name}" for choice in list_choices(key)]


def _keys(word: str, verb: str, overrides: Sequence[str]) -> list[str]:
    """List the keys that begin with the word, each up to its next dot."""
    keys = [*GROUP_NAMES, *SHORT_IN.get(verb, {}), *_composed_keys(verb, overrides)]
    candidates = set()
    for key in keys:
        if key.startswith(word):
            part, dot, _ = key[len(word) :].partition(".")
            candidates.add(f"{word}{part}{dot or '='}")
    return sorted(candidates)


def _composed_keys(verb: str, overrides: Sequence[str]) -> list[str]:
    """List the keys of a verb's configuration with the groups that the overrides choose.

    Strategies that `compare` runs one by one are composed here, to have the keys of each.
    """
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    choices = []
    for key, _, value in (override.partition("=") for override in overrides):
        if key in LIST_GROUPS:
            value = "[" + value.replace("[", "").replace("]", "") + "]"
        if key in GROUP_NAMES:
            choices.append(f"{key}={value}")

    with initialize_config_module("conf", version_base=None):
        try:
            config = compose_config(verb, choices, compose)
        except (ConfigError, HydraException):  # one is half typed: the keys of the defaults
            config = compose(verb)
    keys = flatten_keys(OmegaConf.to_container(config))
    return [key for key in keys if not key.startswith("_") and "._" not in key]

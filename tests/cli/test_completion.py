"""Completion in a shell: the candidates, the scripts, and what they load."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from continual.cli.completion import SCRIPTS, complete_line
from continual.cli.main import CONFIGURED_VERBS, VERBS


def complete(line):
    return complete_line(line, list(VERBS), CONFIGURED_VERBS)


@pytest.mark.parametrize(
    ("line", "candidates"),
    [
        ("continual re", ["report"]),
        ("cd runs && OMP_NUM_THREADS=1 ~/bin/continual  co", ["compare", "completion"]),
        ("continual --v", ["--version"]),
        ("continual run --c", ["--cfg"]),
        ("continual list str", ["strategies", "streams"]),
        ("continual completion z", ["zsh"]),
        ("continual run strategy=rep", ["strategy=replay", "strategy=reptile"]),
        ("continual run strategy=[ewc,rep", ["strategy=[ewc,replay", "strategy=[ewc,reptile"]),
        ("continual run 'strategy=[ewc,der", ["strategy=[ewc,der"]),
        ("continual compare strategy=naive,sd", ["strategy=naive,sdft"]),
        ("continual run stream=", ["stream=folder", "stream=hub", "stream=skills"]),
        ("continual compare experiment=tu", ["experiment=tune"]),
        ("continual run train.l", ["train.log_every_steps=", "train.lr="]),
        ("continual run strategy=ewc strat", ["strategy.", "strategy="]),
        ("continual run stream=folder stream.pa", ["stream.path="]),
        ("continual adapt tas", ["task="]),
        ("continual run strategy=[replay,ew strategy.", []),
        ("continual run 'strategy=[ewc,si]' strategy.ewc.st", ["strategy.ewc.strength="]),
        ("continual compare strategy=naive,[ewc,si] strategy.ewc.st", ["strategy.ewc.strength="]),
        ("continual run model._", []),
        ("continual run out=ru", []),
        ("continual export runs/", []),
        ("continual nothing st", []),
        ("python -m pytest st", []),
    ],
)
def test_the_last_word_is_completed(line, candidates):
    assert complete(line) == candidates


def test_after_a_space_everything_is_offered():
    assert complete("continual ") == [*VERBS, "--help", "--version"]
    assert {"stream=", "strategy=", "train.", "out="} <= set(complete("continual run "))


def test_a_shell_that_is_unknown_or_missing_is_refused(cli_error):
    assert "bash" in cli_error("completion", "bsh")
    assert "bash, zsh, fish" in cli_error("completion")


def test_completing_loads_nothing_heavy():
    code = (
        "import sys; from continual.cli.main import main; "
        "main(['completion', 'words', 'continual run strategy=ewc strategy.ewc.st']); "
        "print({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.splitlines() == ["strategy.ewc.strength=", "set()"]


# How each shell completes a line without a terminal. In zsh two of its own functions only print.
COMPLETE = {
    "bash": 'COMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}; _continual; echo "${{COMPREPLY[@]}}"',
    "fish": 'complete -C "{line}"',
    "zsh": ('compadd() {{ echo ${{@:6}}; }}; _files() {{ echo; }}; LBUFFER="{line}"; _continual'),
}


@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_shell_asks_for_the_candidates(run_cli, shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} on PATH")
    command = tmp_path / "continual"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m continual "$@"\n')
    command.chmod(0o755)

    script = run_cli("completion", shell)[1]
    script = "compdef() { :; }\n" + script if shell == "zsh" else script
    lines = ["continual li", "continual run stream=fo", "continual run train.wa"]
    for line in lines:
        script += "\n" + COMPLETE[shell].format(line=line)
    path = [str(tmp_path), os.environ["PATH"]]
    completed = subprocess.run(
        [shell, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": os.pathsep.join(path), "HOME": str(tmp_path)},
    ).stdout.splitlines()

    # Bash has typed the part before = already.
    expected = ["list", "stream=folder", "train.warmup_ratio="]
    assert completed == (["list", "folder", expected[2]] if shell == "bash" else expected)

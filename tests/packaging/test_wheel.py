"""The wheel as a user has it: built, installed into an empty environment, used in another folder.

Run it with `pytest -m slow tests/packaging`. It needs uv on PATH and PyPI, and takes half a minute
where uv's cache has the packages: those of the environment (5 GB) are then links to the cache.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
USER_ENVIRONMENT = dict(os.environ)  # uv's cache is the user's, not the one that tests begin with
PACKAGES = ("continual", "strategies", "streams", "conf")

# A third party's package, with one strategy as an entry point.
PROJECT = """
[project]
name = "theirs"
version = "1.0"
dependencies = ["continual"]

[project.entry-points."continual.strategies"]
pull = "theirs:Pull"

[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
"""
MODULE = '''
from dataclasses import dataclass

from continual.models.weights import Weights, snapshot, weights
from continual.strategy.interface import Strategy, memory


@dataclass(kw_only=True)
class Pull(Strategy):
    """Pull towards the weights that the stage began with."""

    strength: float = 0.1
    start: Weights = memory(dict)

    def begin(self, model, task):
        self.start = snapshot(model)
        return super().begin(model, task)

    def loss(self, model, batch):
        distance = sum((w - self.start[n]).square().sum() for n, w in weights(model).items())
        return super().loss(model, batch) + self.strength * distance
'''


def run_command(*words, cwd, env=USER_ENVIRONMENT):
    """Run a command and return what it prints; its errors are shown if it fails."""
    words = [str(word) for word in words]
    completed = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    before = sorted(path.name for path in ROOT.iterdir())
    run_command("uv", "build", "-o", folder, ROOT, cwd=folder)
    assert sorted(path.name for path in ROOT.iterdir()) == before
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A function that runs a program of an environment with the wheel and a third party's package.

    It runs in an empty folder, and nothing but that environment is on the path.
    """
    theirs = tmp_path_factory.mktemp("theirs")
    (theirs / "pyproject.toml").write_text(PROJECT)
    (theirs / "theirs.py").write_text(MODULE)
    environment = tmp_path_factory.mktemp("environment") / "venv"
    python = environment / "bin" / "python"
    run_command("uv", "venv", "--python", sys.executable, environment, cwd=theirs)
    # uv reads exclude-newer in this repository's pyproject.toml: the versions that the tests have.
    run_command("uv", "pip", "install", "--python", python, wheel, theirs, cwd=ROOT)

    elsewhere = tmp_path_factory.mktemp("elsewhere")
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env["PATH"] = f"{environment / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin"

    def run_installed(program, *words):
        return run_command(environment / "bin" / program, *words, cwd=elsewhere, env=env)

    yield run_installed
    assert [path.name for path in elsewhere.iterdir()] == ["runs"]
    shutil.rmtree(environment)  # pytest would keep the last three


def test_the_wheel_has_every_file_of_the_packages_and_nothing_else(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    present = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == present
    assert {
        "conf/strategy/replay.yaml",
        "conf/hydra/launcher/slurm.yaml",
        "continual/reports/templates/page.html.j2",
        "strategies/replay.py",
        "streams/skills/stream.py",
    } <= packed


def test_the_packages_are_those_of_the_environment(installed):
    code = f"import {', '.join(PACKAGES)}; print({', '.join(f'{p}.__file__' for p in PACKAGES)})"
    paths = installed("python", "-c", code).split()
    assert all("site-packages" in path and str(ROOT) not in path for path in paths)


def test_the_version_is_the_project_s(wheel, installed):
    assert installed("continual", "--version").split() == wheel.name.split("-")[:2]


def test_list_names_our_strategies_and_a_third_party_s(installed):
    listed = json.loads(installed("continual", "list", "strategies", "json=true"))["strategies"]
    names = {strategy["name"] for strategy in listed}
    assert names == {path.stem for path in ROOT.glob("conf/strategy/*.yaml")} | {"pull"}


def test_compare_runs_them_side_by_side_for_five_steps(installed):
    keys = ("device=cpu", "stream.tasks=[reverse,add]", "model.pretrain.tokens=20000")
    output = installed(
        "continual",
        "compare",
        "strategy=replay,pull",
        "train.steps=5",
        *keys,
        "out=runs/compare",
    )
    assert all(name in output for name in ("replay", "pull"))

    code = (
        "import continual, json, os; "
        "names = sorted(set(continual.load_runs('runs/compare')['strategy'])); "
        "print(json.dumps([names, os.listdir('runs/compare')]))"
    )
    names, made = json.loads(installed("python", "-c", code))
    assert names == ["pull", "replay"]
    assert {"report.html", "curves.png", "comparison.parquet"} <= set(made)

"""What the README and CONTRIBUTING show is what there is, and what they tell to type works."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import strategies as table
from continual.config import catalogue
from continual.testing.check import check_strategy
from tests.support.models import run_in_process

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")


def block(language: str, begins: str) -> str:
    """The code of CONTRIBUTING that begins so."""
    return next(
        found
        for found in re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)
        if begins in found
    )


@pytest.fixture
def first(tmp_path, monkeypatch):
    """The guide's strategy, as a package that looks installed."""
    from hydra.core.config_store import ConfigStore

    (tmp_path / "guide_first.py").write_text(block("python", "class First"))
    info = tmp_path / "guide-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: guide\nVersion: 1.0\n")
    points = (
        block("toml", "continual.strategies").replace('"', "").replace("project.entry-points.", "")
    )
    (info / "entry_points.txt").write_text(points.replace("strategies.first:", "guide_first:"))
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("guide_first").First
    del sys.modules["guide_first"]
    ConfigStore.instance().repo.pop("strategy", None)


def test_the_guide_s_strategy_has_ten_lines():
    code = block("python", "class First").partition("@dataclass")[2].splitlines()
    assert len([line for line in code if line.strip()]) == 10


def test_the_guide_s_strategy_keeps_to_every_rule(first):
    check_strategy(first(), disabled=first(strength=0))


def test_the_guide_s_strategy_runs_by_its_name(first, run_keys, tmp_path):
    words = ("train.epochs=1", "stream.tasks=[first,loud]")
    far, _ = run_in_process(
        tmp_path / "far",
        run_keys,
        *words,
        "strategy=first",
        "strategy.first.strength=1e6",
        "train.lr=1e-4",
    )
    assert far.strategy == "first"
    assert far.scores[0] == far.scores[-1]  # so strong a pull lets nothing move far


def test_the_guide_s_configuration_has_the_constructor_s_keys(first):
    told = yaml.safe_load(block("yaml", "conf/strategy/first.yaml"))["first"]
    assert told == {"_target_": "strategies.first.First", "strength": first().strength}


@pytest.fixture(scope="module")
def shown():
    """The cells of the README's table, by strategy."""
    lines = table.rows((ROOT / "README.md").read_text("utf-8"))
    return {
        name: [cell.strip() for cell in line.strip("| ").split(" | ")]
        for name, line in lines.items()
    }


def test_the_readme_s_table_has_every_strategy(shown):
    """`python -m benchmarks.strategies NAME` adds the row of a new one."""
    assert set(shown) == {c.name for c in catalogue.list_choices("strategy")}


def test_the_readme_s_table_says_what_the_strategies_say(shown):
    for choice in catalogue.list_choices("strategy"):
        cells = dict(zip(table.HEADS, shown[choice.name], strict=True))
        assert (cells["stores"], cells["a step takes"]) == (
            choice.facts["stores"],
            choice.facts["costs"],
        ), choice.name
        assert (cells["in tests"] == "yes") == ("route" in choice.moments), choice.name


def test_what_a_strategy_says_it_stores_is_nothing_exactly_where_it_stores_nothing(shown):
    for name, cells in shown.items():
        assert cells[1].startswith("nothing") == (cells[2] == "0"), name


def test_the_readme_names_every_strategy_in_its_prose():
    prose = (
        (ROOT / "README.md")
        .read_text("utf-8")
        .partition("**Strategies**")[2]
        .partition(table.BEGIN)[0]
    )
    assert {c.name for c in catalogue.list_choices("strategy")} <= set(
        re.findall(r"`(\w+)`", prose)
    )


def test_a_row_is_measured_by_one_command(stream_folder, model_folder, tmp_path):
    keys = (
        "stream=folder",
        f"stream.path={stream_folder}",
        "model=hf",
        f"model.name={model_folder}",
        "train.batch_size=6",
    )
    choice = next(c for c in catalogue.list_choices("strategy") if c.name == "multitask")
    name, stores, size, costs, ratio, *told = table.measured(choice, *keys).strip("| ").split(" | ")
    assert (name, stores, costs) == ("`multitask`", choice.facts["stores"], choice.facts["costs"])
    assert float(size.split()[0]) > 0
    assert float(ratio) > 0
    assert told == ["yes", "of each example", "no"]


def test_rows_that_are_not_measured_again_stay():
    text = f"before {table.BEGIN}\n| `naive` | a |\n| `gone` | b |\n\n{table.END} after"
    found = table.written(text, {**table.rows(text), "l2": "| `l2` | c |"})
    assert table.rows(found) == {"naive": "| `naive` | a |", "l2": "| `l2` | c |"}
    assert found.startswith("before ")
    assert found.endswith(" after")


@pytest.mark.parametrize("module", ["strategies", "leaderboard"])
def test_the_tables_commands_have_help(module):
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert "README" in done.stdout or "leaderboard.md" in done.stdout

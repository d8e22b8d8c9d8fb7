"""Strategies of other packages: found by their entry point, listed and used by name, without being
ours.
"""

import json
import subprocess
import sys

import pytest

from continual.cli.main import compose_config
from continual.config import catalogue
from continual.errors import ConfigError
from continual.results.matrix import Matrix

CODE = '''
"""Made elsewhere."""
from dataclasses import dataclass, field
from typing import ClassVar

from continual.strategy.interface import Strategy, memory
from continual.models.weights import Weights, snapshot, weights
from strategies.replay import Replay


@dataclass(kw_only=True)
class Held(Strategy):
    """A pull to where the stage began (Somebody 2030)."""

    stores: ClassVar[str] = "4 P"
    strength: float = 0.1
    seed: int = 0
    names: list[str] = field(default_factory=list)
    start: Weights = memory(dict)

    def begin(self, model, task):
        self.start = snapshot(model)
        return super().begin(model, task)

    def loss(self, model, batch):
        far = sum((w - self.start[n]).square().sum() for n, w in weights(model).items())
        return super().loss(model, batch) + self.strength * far


@dataclass(kw_only=True)
class HeldReplay(Replay):
    pass


class NoStrategy:
    pass
'''
POINTS = {"held": "their_own_package:Held", "held_replay": "their_own_package:HeldReplay"}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that looks installed, with these entry points."""
    from hydra.core.config_store import ConfigStore

    def install(points=POINTS, code=CODE, name="theirs"):
        info = tmp_path / "site" / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = "".join(f"{name} = {path}\n" for name, path in points.items())
        (info / "entry_points.txt").write_text(f"[continual.strategies]\n{lines}")
        (tmp_path / "site" / "their_own_package.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path / "site")
        return tmp_path / "site"

    yield install
    sys.modules.pop("their_own_package", None)
    for name in ConfigStore.instance().repo.pop("strategy", {}):
        assert name.removesuffix(".yaml") in POINTS


def test_it_is_listed_with_its_source_moments_and_what_it_stores(package, run_cli):
    package()
    _, out, _ = run_cli("list", "strategies", "json=true")
    told = {c["name"]: c for c in json.loads(out)["strategies"]}
    assert told["held"] == {
        "name": "held",
        "source": "A pull to where the stage began (Somebody 2030).",
        "class": "their_own_package.Held",
        "moments": ["begin", "loss"],
        "stores": "4 P",
        "costs": "1",
    }
    assert (
        told["held_replay"]["moments"] == told["replay"]["moments"] == ["begin", "backward", "end"]
    )
    assert told["held_replay"]["stores"] == told["replay"]["stores"] == "E examples"
    assert "their_own_package" not in sys.modules


def test_listing_strategies_from_elsewhere_loads_nothing_heavy(package):
    site = package()
    code = "import sys; from continual.cli.main import main; main(['list']); print(sorted({'torch'} & set(sys.modules)))"
    out = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "\nheld " in out
    assert out.endswith("[]\n")


def test_its_name_is_a_strategy_and_its_defaults_are_the_configuration(package):
    package()
    config = compose_config(
        "run", ["strategy=[replay,held]", "strategy.held.strength=0.5", "seed=7"]
    )
    assert list(config.strategy) == ["replay", "held"]
    assert dict(config.strategy.held) == {
        "_target_": "their_own_package.Held",
        "strength": 0.5,
        "seed": 7,
        "names": [],
    }
    assert compose_config("run", ["strategy=held"]).strategy.held.strength == 0.1


def test_a_run_and_a_comparison_take_it_as_any_other(package, run_cli, run_keys, tmp_path):
    package()
    code, out, err = run_cli(
        "compare",
        *run_keys,
        "train.epochs=1",
        "stream.tasks=[first,loud]",
        "strategy=naive,held",
        f"out={tmp_path / 'it'}",
    )
    assert code == 0, err
    assert "held" in out
    made = {p.parent.name: Matrix.load(p) for p in tmp_path.glob("it/*/matrix.json")}
    assert sorted(m.strategy for m in made.values()) == ["held", "naive"]


def test_a_name_that_is_mistyped_is_told_the_outside_ones_too(package, cli_error):
    package()
    assert "unknown strategy 'hedl'; did you mean 'held'" in cli_error("run", "strategy=hedl")
    assert "did you mean 'strategy.held.strength'" in cli_error(
        "run", "strategy=held", "strategy.held.strenght=1"
    )


@pytest.mark.parametrize(
    ("points", "told"),
    [
        ({"held": "their_own_package:Gone"}, "cannot be imported from there"),
        ({"held": "not_there_at_all:Held"}, "cannot be imported from there"),
        (
            {"held": "their_own_package:NoStrategy"},
            "found NoStrategy, expected a dataclass that inherits from",
        ),
    ],
)
def test_what_cannot_be_had_is_one_clear_error_and_breaks_no_list(package, cli_error, points, told):
    package(points)
    assert told in cli_error("run", "strategy=held")
    assert {c.name for c in catalogue.list_choices("strategy")} > {"held", "naive"}


def test_two_packages_with_one_name_are_refused(package, cli_error):
    package({"held": "their_own_package:Held"})
    package({"held": "their_own_package:HeldReplay"}, name="others")
    with pytest.raises(ConfigError, match="are both called 'held'"):
        catalogue.list_choices("strategy")


def test_ours_keep_their_names(package):
    package({"replay": "their_own_package:Held"})
    assert (
        compose_config("run", ["strategy=replay"]).strategy.replay["_target_"]
        == "strategies.replay.Replay"
    )
    assert [c.target for c in catalogue.list_choices("strategy") if c.name == "replay"] == [
        "strategies.replay.Replay"
    ]

"""Every configuration of every group composes, constructs what it names, and explains its keys."""

import inspect
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_object
from omegaconf import OmegaConf

from continual.config.catalogue import FACTS, MOMENTS, list_choices
from continual.errors import ConfigError
from continual.runs import build
from continual.strategy.interface import Strategy
from tests.support import toy

CONF = Path(__file__).parents[2] / "conf"
FILES = sorted(CONF.rglob("*.yaml"))
HYDRA = {"defaults", "hydra", "_target_"}  # Hydra's own, told in its manual
NEEDED = {
    "folder": ["stream.path=x"],
    "hub": ["stream.datasets={a:{path:x}}"],
    "hf": ["model.name=x"],
    "avalanche": ["strategy.avalanche.plugin=RWalkPlugin"],
}


def group(name: str) -> list[str]:
    """The choices of a configuration group; adapters is a part of several."""
    return sorted(p.stem for p in (CONF / name).glob("*.yaml") if p.stem != "adapters")


def composed(verb: str, *overrides: str):
    with initialize_config_module("conf", version_base=None):
        return compose(verb, [*overrides, "out=x"])


@pytest.fixture(autouse=True)
def _hydra_stays_clean():
    yield
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize("name", group("strategy"))
def test_every_strategy_config_makes_its_strategy(name):
    config = toy.compose_run_config(f"strategy=[{name}]", *NEEDED.get(name, []))
    made = build.strategy(config)
    assert isinstance(made, Strategy)
    target = get_object(config.strategy[name]["_target_"])
    assert type(made) is target
    for key, value in config.strategy[name].items():
        if key != "_target_":
            assert getattr(made, key) == value


@pytest.mark.parametrize("name", group("strategy"))
def test_a_strategy_config_has_exactly_the_constructor_s_keys(name):
    """A hyper-parameter that no config shows is one that no one finds."""
    section = toy.compose_run_config(f"strategy=[{name}]").strategy[name]
    known = inspect.signature(get_object(section["_target_"])).parameters
    assert set(section) - {"_target_"} == set(known)


@pytest.mark.parametrize("name", group("probe"))
def test_a_probe_config_has_exactly_the_constructor_s_keys(name):
    section = toy.compose_run_config(
        f"probe=[{name}]", *([f"probe.{name}.stream.path=x"] if name == "general" else [])
    ).probe[name]
    known = inspect.signature(get_object(section["_target_"])).parameters
    assert set(section) - {"_target_"} == set(known)


@pytest.mark.parametrize("name", ["joint", "cumulative"])
def test_an_arrangement_is_the_naive_strategy_on_another_stream(name):
    config = toy.compose_run_config(f"strategy=[{name}]")
    assert type(build.strategy(config)) is Strategy
    assert config.stream.arrangement == name


def test_strategies_are_listed_to_be_composed():
    made = build.strategy(
        toy.compose_run_config(
            "strategy=[replay,ewc]", "strategy.ewc.strength=5", "strategy.replay.share=0.1"
        )
    )
    assert type(made).__name__ == "ReplayEWC"
    assert (made.strength, made.share) == (5, 0.1)


@pytest.mark.parametrize("name", group("stream"))
def test_every_stream_config_names_a_constructor_and_its_keys(name):
    config = composed("run", f"stream={name}", *NEEDED.get(name, []))
    assert not OmegaConf.missing_keys(config)
    section = OmegaConf.to_container(config.stream, resolve=True)
    known = inspect.signature(get_object(section.pop("_target_"))).parameters
    assert set(section) <= set(known)


def test_the_folder_config_makes_its_stream(stream_folder):
    config = composed("run", "stream=folder", f"stream.path={stream_folder}", "stream.order=back")
    assert [t.name for t in build.stream(config).stages] == ["loud", "last", "first"]


def test_the_joint_strategy_arranges_the_stream(stream_folder):
    config = composed("run", "stream=folder", f"stream.path={stream_folder}", "strategy=[joint]")
    made = build.stream(config)
    assert len(made.stages) == 1
    assert len(made.tasks) == 3


@pytest.mark.skipif(
    not (CONF / "stream" / "skills.yaml").exists(), reason="conf/stream/skills.yaml is not there"
)
def test_the_default_config_makes_the_skills_stream():
    made = build.stream(composed("run"))
    assert len(made.tasks) >= 6
    assert all(t.train and t.dev and t.test for t in made.tasks)


@pytest.mark.parametrize("name", group("model"))
def test_every_model_config_names_a_constructor_and_its_keys(name):
    config = composed(
        "run", "stream=folder", "stream.path=x", f"model={name}", *NEEDED.get(name, [])
    )
    section = dict(config.model)
    known = inspect.signature(get_object(section.pop("_target_"))).parameters
    assert set(section) <= set(known)
    assert {"adapter", "adapters"} <= set(section)


def test_the_hf_config_makes_its_model(model_folder, run_keys):
    made = build.model(composed("run", *run_keys), None)
    assert made.layout.tokens_per_microbatch == 4096


@pytest.mark.parametrize("verb", sorted(p.stem for p in CONF.glob("*.yaml") if p.stem != "common"))
def test_every_command_s_config_composes(verb):
    config = composed(verb, "stream=folder", "stream.path=x")
    assert not OmegaConf.missing_keys(config)
    assert build.recipe(config).lr == config.train.lr
    assert type(build.strategy(config)) is Strategy


@pytest.mark.parametrize("name", group("train"))
def test_every_train_config_makes_a_recipe(name):
    config = toy.compose_run_config(f"train={name}")
    keys = {
        *inspect.signature(type(build.recipe(config))).parameters,
        "tokens_per_microbatch",
        "precision",
        "shard",
    }
    assert set(config.train) <= keys


def test_a_key_that_the_constructor_does_not_take_is_refused():
    config = OmegaConf.create(
        {"strategy": {"ewc": {"_target_": "strategies.ewc.EWC", "strenght": 1}}}
    )
    with pytest.raises(
        ConfigError, match=r"unknown key strategy\.ewc 'strenght'; did you mean 'strength'"
    ):
        build.strategy(config)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONF)))
def test_the_first_line_of_a_config_says_what_it_is(path):
    lines = [
        line for line in path.read_text("utf-8").splitlines() if not line.startswith("# @package")
    ]
    assert re.match(r"# .{20,}", lines[0])


def keys_of(path: Path) -> list[tuple[str, bool]]:
    """Every key of a file as a dotted path, and whether a comment or its own block of keys tells
    it.
    """
    found, outer = [], []
    lines = path.read_text("utf-8").splitlines()
    for i, line in enumerate(lines):
        if key := re.match(r"( *)([A-Za-z_]\w*):( .+)?$", line):
            outer = [*outer[: len(key[1]) // 2], key[2]]
            opens_block = (
                not key[3] and i + 1 < len(lines) and lines[i + 1].startswith(key[1] + "  ")
            )
            found.append((".".join(outer), lines[i - 1].strip().startswith("#") or opens_block))
    return found


TOLD = {key.rpartition(".")[2] for path in FILES for key, told in keys_of(path) if told}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONF)))
def test_every_key_has_a_comment_above_it(path):
    """There, or in the file that tells it for all; Hydra's and peft's own keys have manuals of
    their own.
    """
    bare = [
        key
        for key, told in keys_of(path)
        if not told
        and key.rpartition(".")[2] not in TOLD
        and not HYDRA & set(key.split("."))
        and not key.startswith("adapters.")
    ]
    assert not bare


@pytest.mark.parametrize("name", group("strategy"))
def test_the_catalogue_reads_from_source_what_the_imported_class_has(name):
    choice = next(c for c in list_choices("strategy") if c.name == name)
    kind = get_object(choice.target)
    assert dict(choice.facts) == {fact: getattr(kind, fact) for fact in FACTS}
    assert choice.moments == [m for m in MOMENTS if getattr(kind, m) is not getattr(Strategy, m)]

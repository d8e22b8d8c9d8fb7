"""README and the documentation site show what exists, and what they say to type works."""

import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.config_store import ConfigStore

from benchmarks import strategies as table
from benchmarks.families import FAMILIES
from continual.cli.help import VERB_HELP
from continual.cli.main import CONFIGURED_VERBS, compose_config
from continual.config import catalogue
from continual.testing.check import check_strategy
from docs.generate import api, commands, folders, keys
from tests.support.models import run_in_process

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = sorted((ROOT / "docs").rglob("*.md"))
STRATEGIES = (ROOT / "docs" / "strategies.md").read_text("utf-8")


def block(page: str, language: str, part: str) -> str:
    """Return the first code block of a page in this language that contains the text `part`."""
    text = (ROOT / page).read_text("utf-8")
    blocks = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return next(code for code in blocks if part in code)


@pytest.fixture
def load_block(tmp_path, monkeypatch):
    """Return a function that imports a page's code as a module of the given name."""

    def load(page, part, name):
        (tmp_path / f"{name}.py").write_text(block(page, "python", part))
        monkeypatch.syspath_prepend(tmp_path)
        spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def tether(load_block, tmp_path):
    """The guide's strategy, as a package that looks installed."""
    info = tmp_path / "guide-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: guide\nVersion: 1.0\n")
    points = block("docs/write/strategy.md", "toml", "continual.strategies")
    points = points.replace('"', "").replace("project.entry-points.", "")
    points = points.replace("my_strategies.tether:", "my_tether:")
    (info / "entry_points.txt").write_text(points)
    yield load_block("docs/write/strategy.md", "class Tether", "my_tether").Tether
    ConfigStore.instance().repo.pop("strategy", None)


def test_the_guide_s_strategy_has_ten_lines():
    code = block("docs/write/strategy.md", "python", "class Tether")
    code = code.partition("@dataclass")[2].splitlines()
    assert len([line for line in code if line.strip()]) == 10


def test_the_readme_s_strategy_is_the_guide_s():
    guide = block("docs/write/strategy.md", "python", "class Tether").partition("@dataclass")[2]
    assert block("README.md", "python", "class Tether").partition("@dataclass")[2] == guide


def test_the_guide_s_strategy_keeps_to_every_rule(tether):
    check_strategy(tether(), disabled=tether(strength=0))


def test_the_guide_s_strategy_runs_by_its_name(tether, run_keys, tmp_path):
    words = ("train.epochs=1", "stream.tasks=[first,loud]")
    far, _ = run_in_process(
        tmp_path / "far",
        run_keys,
        *words,
        "strategy=tether",
        "strategy.tether.strength=1e6",
        "train.lr=1e-4",
    )
    assert far.strategy == "tether"
    assert far.scores[0] == far.scores[-1]  # so strong a pull lets nothing move far


def test_the_guide_s_configuration_has_the_constructor_s_keys(tether):
    text = block("docs/write/strategy.md", "yaml", "conf/strategy/tether.yaml")
    assert yaml.safe_load(text)["tether"] == {
        "_target_": "strategies.tether.Tether",
        "strength": tether().strength,
    }


def test_the_guide_s_stream_has_two_tasks_and_the_keys_of_its_configuration(load_block):
    module = load_block("docs/write/stream.md", "def parity", "my_parity")
    config = yaml.safe_load(block("docs/write/stream.md", "yaml", "_target_"))
    assert config.pop("_target_") == "streams.parity.parity"
    stream = module.parity(**{**config, "seed": 0, "order": "reverse"})
    assert [task.name for task in stream.stages] == ["large", "even"]
    even = stream.tasks[1]
    assert [(row.input, row.outputs) for row in even.test[:2]] == [("0", ("yes",)), ("5", ("no",))]
    assert len(even.train) == 80


def test_the_guide_s_metric_compares_first_words(load_block):
    module = load_block("docs/write/metric.md", "def first_word", "my_metric")
    metric = module.REFERENCE_METRICS["first_word"]
    assert [metric(answer, "Red car") for answer in ("red", "Red bus", "blue", "")] == [1, 1, 0, 0]
    assert metric("", "") == 0


def test_the_guide_s_probe_runs_by_its_class(load_block, run_keys, tmp_path):
    module = load_block("docs/write/probe.md", "class Blank", "my_blank")
    command = block("docs/write/probe.md", "bash", "+probe.blank")
    word = re.search(r"\S*_target_\S*", command)[0].replace("my_probes.blank", module.__name__)
    run_in_process(tmp_path / "run", run_keys, "train.steps=1", "stream.tasks=[first]", word)
    found = yaml.safe_load((tmp_path / "run" / "probes.json").read_text("utf-8"))["probes"]["blank"]
    assert set(found["series"]) == {"mean", "first"}
    assert all(0 <= share <= 1 for share in found["series"]["mean"])


@pytest.fixture(scope="module")
def shown():
    """The measured numbers of the strategies' page, by strategy."""
    return table.parse_page(STRATEGIES)


def test_the_strategies_page_has_every_strategy(shown):
    """`python -m benchmarks.strategies NAME` adds the row of a new one."""
    assert set(shown) == {choice.name for choice in catalogue.list_choices("strategy")}


def test_every_strategy_is_in_one_family():
    names = [name for family in FAMILIES for name in family.when]
    assert sorted(names) == sorted(choice.name for choice in catalogue.list_choices("strategy"))


def test_the_strategies_page_says_what_the_strategies_say(shown):
    """`python -m benchmarks.strategies --texts` writes it again, with the numbers that it has."""
    assert table.render_page(shown) == STRATEGIES


def test_what_a_strategy_says_it_stores_is_nothing_exactly_where_it_stores_nothing(shown):
    for choice in catalogue.list_choices("strategy"):
        said = choice.facts["stores"].startswith("nothing")
        assert said == (shown[choice.name].size == "0"), choice.name


def test_a_row_is_measured_by_one_command(stream_folder, model_folder, tmp_path):
    words = (
        "stream=folder",
        f"stream.path={stream_folder}",
        "model=hf",
        f"model.name={model_folder}",
        "train.batch_size=6",
    )
    choice = next(c for c in catalogue.list_choices("strategy") if c.name == "multitask")
    found = table.measure_strategy(choice, *words)
    assert float(found.size.split()[0]) > 0
    assert float(found.ratio) > 0
    assert (found.keeps_examples, found.identity) == (True, "of each example")
    name, source, _, stores, costs, needs = (
        table.render_row(choice, "when", found).strip("| ").split(" | ")
    )
    assert (name, source) == ("`multitask`", choice.source)
    assert stores == f"{choice.facts['stores']} ({found.size})"
    assert costs == f"{choice.facts['costs']} ({found.ratio})"
    assert needs == "old examples, each example's task"


def test_rows_that_are_not_measured_again_stay():
    known = {
        "naive": table.Measurement("0", "1.05", False, "no"),
        "gone": table.Measurement("1 B", "1.00", True, "boundaries"),
    }
    added = table.Measurement("6.2 MB", "1.11", False, "boundaries")
    found = table.parse_page(table.render_page({**known, "l2": added}))
    assert found == {"naive": known["naive"], "l2": added}


@pytest.mark.parametrize("module", ["strategies", "leaderboard"])
def test_the_tables_commands_have_help(module):
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert f"{module}.md" in done.stdout


def command_lines():
    """Return the lines of code blocks that run `continual` with a configuration: (page, words)."""
    found = []
    for page in [ROOT / "README.md", *PAGES]:
        for code in re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            for line in code.replace("\\\n", " ").splitlines():
                match = re.match(
                    rf"\s*(?:uv run )?continual ({'|'.join(CONFIGURED_VERBS)})\b", line
                )
                if match and "$" not in line:
                    found.append((page.relative_to(ROOT), match[1], line[match.end() :]))
    return found


@pytest.mark.parametrize(
    ("page", "verb", "words"), command_lines(), ids=lambda value: str(value).strip()
)
def test_the_commands_of_the_pages_have_keys_that_exist(page, verb, words):
    """Of several values the last one is taken; launchers and searches are left out."""
    parts = [word for word in shlex.split(words, comments=True) if "hydra" not in word]
    parts = [last_value(word) for word in parts if word != "experiment=tune"]
    assert compose_config(verb, parts), page


def last_value(word: str) -> str:
    """Return an override with the last of several values that commas separate."""
    key, sign, value = word.partition("=")
    depth = start = 0
    for place, letter in enumerate(value):
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and not depth:
            start = place + 1
    return f"{key}{sign}{value[start:]}"


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda path: path.stem)
def test_dotted_names_of_the_pages_exist(page):
    text = page.read_text("utf-8")
    for name in set(re.findall(r"(?<![\w./-])continual(?:\.\w+)+", text)):
        assert name == "continual.strategies" or exists(name), name  # the entry points' group


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda path: path.stem)
def test_files_that_the_pages_name_exist(page):
    folders_of_code = "benchmarks|conf|continual|docs|examples|tests"
    for name in set(re.findall(rf"`((?:{folders_of_code})/[\w./-]*)`", page.read_text("utf-8"))):
        assert (ROOT / name).exists(), name


def test_the_tables_that_the_metrics_page_names_exist():
    text = (ROOT / "docs/write/metric.md").read_text("utf-8")
    code = "\n".join(path.read_text("utf-8") for path in (ROOT / "continual").rglob("*.py"))
    for name in set(re.findall(r"`([A-Z_]{4,})`", text)):
        assert re.search(rf"^{name}\b", code, re.MULTILINE), name


def exists(name: str) -> bool:
    """Return True for a module, or for a name that a module defines."""
    module, _, attribute = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return exists(module) and hasattr(sys.modules[module], attribute)
    return True


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_of_the_repository_s_pages_lead_to_files(name):
    text = (ROOT / name).read_text("utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_commands_page_has_every_command():
    page = commands.page()
    assert re.findall(r"^## continual (\w+)$", page, re.MULTILINE) == list(VERB_HELP)


def leaves(value, prefix=""):
    """Yield the dotted keys of a nested mapping; an empty mapping is a leaf."""
    for key, part in value.items():
        if isinstance(part, dict) and part:
            yield from leaves(part, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@pytest.mark.parametrize("file", keys.all_keys())
def test_the_key_pages_have_every_key_of_the_configurations(file):
    text = (keys.CONF / file).read_text("utf-8")
    group = file.partition("/")[0]
    prefix = f"{group}." if "/" in file and keys.ROOT_PACKAGE not in text else ""
    expected = [
        key
        for key in leaves(yaml.safe_load(text), prefix)
        if not key.endswith("_target_") and "defaults" not in key.split(".")
    ]
    found = {key.path: key for key in keys.all_keys()[file]}
    assert set(expected) <= set(found)
    assert all(found[key].comment for key in expected)


def test_the_api_pages_have_every_folder_and_module():
    pages = api.pages()
    assert [name.removesuffix(".md") for name in pages] == list(folders.imports())
    text = "\n".join(pages.values())
    for path in (ROOT / "continual").rglob("[!_]*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        assert f"::: {name}\n" in text


def test_the_picture_has_every_folder_above_what_it_imports():
    boxes = folders.layout()
    for folder, others in folders.imports().items():
        assert f">{folder}</text>" in folders.svg()
        assert all(boxes[folder].y < boxes[other].y for other in others), folder


def test_the_picture_s_arrows_imply_all_imports():
    for folder, others in folders.imports().items():
        drawn = set(folders.arrows(folder))
        assert others <= drawn.union(*(folders.reachable(other) for other in drawn))

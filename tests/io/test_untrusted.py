"""Files from anyone: they execute nothing, lead nowhere outside of their folder, and their text
stays text.
"""

from __future__ import annotations

import ast
import builtins
import html.parser
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from continual.config import instantiate, trust
from continual.config.run_config import read_config
from continual.errors import ConfigError, DataError
from continual.io.atomic import task_file_name
from continual.reports import write
from continual.training import checkpoint
from tests.support.fake_run import write_fake_adaptation, write_fake_run
from tests.support.models import run_in_process, write_stream

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    p
    for package in ("continual", "strategies", "streams", "conf", "benchmarks")
    for p in (ROOT / package).rglob("*.py")
)

# Nothing that turns bytes into code or objects

FORBIDDEN = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "jsonpickle",
}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.load_all",
    "np.load",
    "numpy.load",
    "hydra.utils.instantiate",
    "instantiate",
    "pd.read_pickle",
    "torch.jit.load",
    "torch.hub.load",
    "torch.package.PackageImporter",
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_no_module_can_turn_a_file_into_code(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        named = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else ([node.module or ""] if isinstance(node, ast.ImportFrom) else [])
        )
        assert not FORBIDDEN & {name.partition(".")[0] for name in named}, f"{path}:{node.lineno}"
        if isinstance(node, ast.Call):
            name, keys = (
                ast.unparse(node.func),
                {k.arg: ast.unparse(k.value) for k in node.keywords},
            )
            assert name not in CALLS, f"{path}:{node.lineno} calls {name}"
            assert name != "torch.load" or keys.get("weights_only") == "True", (
                f"{path}:{node.lineno}"
            )
            assert keys.get("trust_remote_code", "trust_remote_code") in (
                "trust_remote_code",
                "False",
            )
            assert keys.get("shell", "False") == "False", f"{path}:{node.lineno}"


def test_constructors_are_looked_up_by_name_where_the_registry_is_and_in_packages_that_are_installed():
    found = [
        p.name
        for p in SOURCES
        if p.parent.name != "benchmarks"
        and re.search(
            r"get_object|get_class|get_method|import_module|hydra\.utils", p.read_text("utf-8")
        )
    ]
    assert sorted(found) == [
        "avalanche.py",
        "avalanche.py",
        "build.py",
        "instantiate.py",
        "plugins.py",
        "validate.py",
    ]


WATCHED = (
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
)
seen: list[str] | None = None


def watch(event, args):
    """CPython tells its audit hooks of every object that a pickle asks for, whoever reads it, and
    of every process.
    """
    if (
        seen is not None and event in WATCHED and args[0] != "fc-list"
    ):  # matplotlib asks the system for its fonts
        seen.append(f"{event}{args}")


@pytest.fixture
def nothing_unpickled(monkeypatch):
    """Unpickling fails: pickle's own functions, torch.load without weights_only, whatever else asks
    for a class.
    """
    global seen

    def refuse(*args, **kwargs):
        raise AssertionError("something is unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler", "_load", "_loads"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(os, "system", refuse)
    if not getattr(builtins, "continual_watched", False):
        sys.addaudithook(
            watch
        )  # it stays until the process ends, and does nothing outside of these tests
        builtins.continual_watched = True
    seen = []
    yield
    told, seen = seen, None
    assert told == []


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft's own
def test_a_resume_an_adaptation_and_a_report_unpickle_nothing_and_start_no_process(
    run_cli, run_keys, tmp_path, nothing_unpickled
):
    words = (
        *run_keys,
        "strategy=[replay,ewc]",
        "train.epochs=1",
        "checkpoint.every_steps=1",
        "model.adapter=lora",
    )
    out = tmp_path / "run"
    run_in_process(out, words, "stream.tasks=[first,last]")
    (out / "finished").unlink()
    shutil.rmtree(out / "checkpoints/stage-02")
    _, said = run_in_process(out, words, "stream.tasks=[first,last]")
    assert f"resuming {out} from stage-0" in said
    code, _, err = run_cli(
        "adapt",
        *words,
        "stream.tasks=[loud]",
        f"adapt.init_from={out}",
        "adapt.steps=1",
        f"out={tmp_path / 'new'}",
    )
    assert code == 0, err
    assert run_cli("report", out)[0] == 0
    assert run_cli("report", tmp_path / "new")[0] == 0


# Nothing is built or looked up but what is ours


@pytest.fixture
def theirs(tmp_path):
    """The configuration of a run folder, to be spoiled; and the one that takes it over."""
    path = tmp_path / "theirs/config.yaml"
    path.parent.mkdir()
    good = {
        "model": {
            "_target_": "continual.models.loading.load_pretrained",
            "name": "x",
            "adapters": {"lora": {"r": 8}},
        },
        "data": {"max_length": 9},
        "stream": {"_target_": "streams.folder.load_folder", "path": "x"},
    }

    def take_over(**change):
        path.write_text(OmegaConf.to_yaml(OmegaConf.merge(good, change)))
        config = OmegaConf.create(
            {
                "model": {"_target_": "continual.training.scratch.load_or_build_llama"},
                "data": {"max_length": 5},
            }
        )
        trust.inherit_model_and_data(config, path)
        return config

    return take_over


def test_the_model_and_data_keys_of_a_run_are_taken_over(theirs):
    config = theirs()
    assert (config.model.name, config.data.max_length) == ("x", 9)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "continual.io.atomic.write_atomically",
        "continual.cli.main.main",
        "builtins.eval",
        "streams.folder.load_folder",
        "continual.models.model.Model",
        "continual",
        "",
        "1",
    ],
)
def test_only_the_constructors_of_the_registry_are_built_from_a_run_folder(theirs, target):
    with pytest.raises(
        ConfigError,
        match=r"asks for model._target_=.* not one of continual's \(continual.models.loading.load_pretrained, "
        r"continual.training.scratch.load_or_build_llama\); only those are built",
    ):
        theirs(model={"_target_": target})


def test_the_stream_that_a_model_was_made_for_is_of_the_registry_too(theirs):
    with pytest.raises(ConfigError, match=r"asks for stream._target_='os.system'"):
        theirs(
            model={
                "_target_": "continual.training.scratch.load_or_build_llama",
                "stream": {"_target_": "os.system", "command": "id"},
            }
        )
    with pytest.raises(ConfigError, match=r"asks for stream._target_='os.system'"):
        theirs(stream={"_target_": "os.system"})


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"adapters": {"lora": {"_target_": "os.system"}}}},
        {"model": {"more": [{"_target_": "os.system"}]}},
        {"stream": {"datasets": {"a": {"_target_": "os.system"}}}},
    ],
)
def test_nothing_is_built_within_the_keys(theirs, change):
    with pytest.raises(
        ConfigError, match=r"asks for a _target_ within (model|stream), where nothing"
    ):
        theirs(**change)


def test_the_registry_is_what_the_configurations_name():
    assert instantiate.allowed_targets("model") - instantiate.allowed_targets("stream") == {
        "continual.models.loading.load_pretrained",
        "continual.training.scratch.load_or_build_llama",
    }
    assert instantiate.allowed_targets("stream") == {
        "streams.folder.load_folder",
        "streams.hub.load_hub",
        "streams.skills.stream.generate_skills",
    }


def test_a_models_own_code_is_not_run_because_a_run_folder_asks_for_it(theirs):
    with pytest.raises(
        ConfigError,
        match="asks to run code that the model 'x' brings along; if you trust its source",
    ):
        theirs(model={"trust_remote_code": True})


@pytest.mark.parametrize(
    "text",
    [
        "a: ${oc.env:HOME}",
        "${oc.env:HOME}: 1",
        "a: {b: [1, '${now:%Y}']}",
        "a: ${b}\nb: 1",
        "a: x${oc.decode:'1'}y",
    ],
)
def test_nothing_that_a_run_folder_asks_for_is_looked_up(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(
        DataError, match=r"config.yaml: found \$\{...\} in .*, expected plain values"
    ):
        read_config(tmp_path / "config.yaml")


# No path leads out


def test_a_link_in_a_stream_folder_may_lead_to_another_place_in_it_only(
    run_cli, run_keys, tmp_path
):
    outside = tmp_path / "secret.jsonl"
    outside.write_text('{"instruction": "a secret", "output": "of someone"}\n')
    stream = write_stream(tmp_path / "stream")
    words = (
        *run_keys,
        f"stream.path={stream}",
        "stream.tasks=[first]",
        "train.epochs=1",
        f"out={tmp_path / 'run'}",
    )
    (stream / "first/dev.jsonl").unlink()
    (stream / "first/dev.jsonl").symlink_to(outside)
    code, _, err = run_cli("run", *words)
    assert (code, "secret" in err) == (2, False)
    assert (
        f"{stream / 'first/dev.jsonl'} is a link that leads out of {stream}; put the file itself "
        "there" in err
    )
    (stream / "first/dev.jsonl").unlink()
    (stream / "first/dev.jsonl").symlink_to("../last/dev.jsonl")
    code, _, err = run_cli("run", *words)
    assert code == 0, err


@pytest.mark.parametrize(
    "name", [".lock", "events.jsonl", "matrix.json", "predictions", "checkpoints/stage-01", "x/y"]
)
def test_a_run_folder_with_a_link_that_leads_out_is_neither_read_nor_written(
    run_cli, run_keys, tmp_path, name
):
    target, out = tmp_path / "target", tmp_path / "run"
    target.write_text("mine")
    write_fake_run(out)
    (out / name).parent.mkdir(exist_ok=True)
    shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(target)
    for words in (
        ("run", *run_keys, f"out={out}"),
        ("adapt", *run_keys, f"out={out}"),
        ("report", out),
        ("adapt", *run_keys, f"adapt.init_from={out}", f"out={tmp_path / 'new'}"),
    ):
        code, _, err = run_cli(*words)
        assert code == 2
        assert (
            f"{out / name} is a link to {target}, outside of {out}; put the file itself there, "
            "or remove it" in err
        )
    assert target.read_text() == "mine"


def test_links_that_go_in_a_circle_are_refused(run_cli, tmp_path):
    out = write_fake_run(tmp_path / "run")
    (out / "a").symlink_to(out / "b")
    (out / "b").symlink_to(out / "a")
    code, _, err = run_cli("report", out)
    assert (code, "is a link to" in err) == (2, True)


@pytest.mark.parametrize(
    "task", ["../../x", "/etc/passwd", "..", ".", "a/../../b", "a\\b", "~", "x\n", "C:", "é" * 20]
)
def test_a_task_of_any_name_has_its_predictions_in_the_folder(task, tmp_path):
    path = tmp_path / f"{task_file_name(task)}.jsonl"
    assert path.resolve().parent == tmp_path.resolve()
    path.write_text("")


def test_a_task_whose_name_is_too_long_for_a_file_is_refused_before_anything_is_learned(
    cli_error, run_keys, tmp_path
):
    stream = write_stream(tmp_path / "stream")
    (stream / "stream.json").write_text(json.dumps({"tasks": [{"name": "é" * 120, "dir": "last"}]}))
    told = cli_error("run", *run_keys, f"stream.path={stream}", f"out={tmp_path / 'run'}")
    assert "expected at most 200 bytes: files are named after it; shorten it" in told


def test_a_file_of_a_checkpoint_may_be_no_link(tmp_path):
    (tmp_path / "elsewhere").write_text("{}")
    (tmp_path / "stage-01").mkdir()
    (tmp_path / "stage-01/memory.json").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "stage-01/manifest.json").write_text('{"memory.json": {}}')
    assert (
        checkpoint.find_damage(tmp_path / "stage-01")
        == "'memory.json' is not a file of this checkpoint"
    )


# Text stays text

EVIL = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "</pre></style></title></svg><svg onload=document.title='owned'>'\"&lt;{{7*7}}{% raw %}"
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report of each kind in which every name, prompt, answer, value and key is a script."""
    root = tmp_path_factory.mktemp("pages")
    tasks = tuple(f"{name}<script>document.title='owned'</script>" for name in ("a", "b"))
    for seed, name in ((0, "naive"), (1, "ewc")):
        out = write_fake_run(
            root / f"comparison/{name}<script>",
            name + EVIL,
            seed,
            tasks=tasks,
            wrong_text=EVIL,
            notes=True,
            order=EVIL,
            settings={EVIL: EVIL, "lr": seed},
        )
        told = json.loads((out / "matrix.json").read_text())
        told.update(stream=EVIL, metrics=dict.fromkeys(tasks, EVIL), cost={EVIL: 1.0})
        (out / "matrix.json").write_text(json.dumps(told))
        steps = {
            "event": "step",
            "stage": 1,
            "task": EVIL,
            "step": 5,
            "loss": 1.0,
            "notes": {f"{EVIL}/{EVIL}": 0.5},
        }
        with (out / "events.jsonl").open("a") as file:
            file.write(
                f"{json.dumps(steps)}\n{json.dumps({'event': 'stage', 'stage': 1, 'task': EVIL})}\n"
            )
    new = write_fake_adaptation(root / "new", start=f"runs/{EVIL}")
    told = json.loads((new / "curve.json").read_text())
    (new / "curve.json").write_text(json.dumps({**told, "task": EVIL, "metric": EVIL}))
    (new / "config.yaml").write_text(json.dumps({EVIL: EVIL}))
    runs = sorted((root / "comparison").iterdir())
    write.write_report(root / "comparison")
    write.write_report(new)
    return {
        "run": runs[0] / "report.html",
        "comparison": root / "comparison/report.html",
        "adapt": new / "report.html",
    }


class Tags(html.parser.HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


KNOWN = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "main",
    "header",
    "section",
    "p",
    "h1",
    "h2",
    "h3",
    "span",
    "div",
    "b",
    "i",
    "em",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "figure",
    "figcaption",
    "details",
    "summary",
    "pre",
    "dl",
    "dt",
    "dd",
    "a",
    "ul",
    "li",
    "form",
    "label",
    "input",
    "button",
    "select",
    "output",
    "noscript",
    "footer",
}


@pytest.mark.parametrize("kind", ["run", "comparison", "adapt"])
def test_no_text_becomes_a_tag_or_an_attribute(pages, kind):
    page = pages[kind].read_text("utf-8")
    found = Tags(page).tags
    scripts = [attrs for tag, attrs in found if tag == "script"]
    assert [attrs.get("type") for attrs in scripts] == [
        "application/json",
        "application/gzip",
        None,
    ]  # the last runs
    assert next(attrs["content"] for tag, attrs in found if "http-equiv" in attrs).startswith(
        "default-src 'none';"
    )
    assert {tag for tag, _ in found} - {"script"} <= KNOWN
    for _, attrs in found:
        assert not [
            key for key in attrs if key.startswith("on") or key in ("src", "srcdoc", "xlink:href")
        ]
        assert not str(attrs.get("href", "")).lower().startswith(("javascript:", "data:", "http"))
    assert "49" not in page or "{{7*7}}" in page
    assert "&lt;script&gt;document.title=" in page


BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")
@pytest.mark.parametrize("kind", ["run", "comparison", "adapt"])
def test_no_text_runs_in_a_browser(pages, kind, tmp_path):
    assert dump(pages[kind], tmp_path).count("<title>owned") == 0


@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")
def test_a_script_that_is_not_escaped_would_be_seen_to_run(tmp_path):
    (tmp_path / "page.html").write_text(f"<title>x</title>{EVIL}")
    assert "<title>owned" in dump(tmp_path / "page.html", tmp_path)


def dump(page, scratch):
    """The document as the browser has it after its scripts have run."""
    words = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={scratch / 'user'}",
    ]
    told = subprocess.run(
        [BROWSER, *words, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=300
    )
    assert "<title>" in told.stdout, told.stderr
    return told.stdout


def test_a_terminal_is_told_nothing_that_it_obeys(run_cli, tmp_path):
    out = write_fake_run(tmp_path / "run")
    told = json.loads((out / "matrix.json").read_text())
    for change in (
        {"tasks": ["\x1b[2J", *told["tasks"][1:]]},
        {"stream": "\x1b]0;owned\x07"},
        {"strategy": "\x9b2J"},
    ):
        (out / "matrix.json").write_text(json.dumps({**told, **change}))
        code, shown, err = run_cli("report", out)
        assert code == 2
        assert not re.search(r"[\x07\x1b\x9b]\[?(2J|\]0)", shown + err)


@pytest.mark.parametrize("scored", [True, False])
def test_why_a_run_failed_and_the_command_that_finishes_it_are_text_whatever_they_hold(
    run_cli, tmp_path, scored
):
    if scored:
        write_fake_run(tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/failed.txt").write_bytes(b"why \xff \x1b[2J")
    plans = [{"words": ["seed=\x1b[2J"], "cells": ["good", "bad"]}]
    (tmp_path / "cells.json").write_text(json.dumps({"schema": 1, "commands": plans}))
    code, shown, err = run_cli("report", tmp_path)
    assert code == (0 if scored else 2)
    assert "bad: failed: why \ufffd \\x1b[2J" in shown + err
    assert "\x1b[2J" not in shown + err
    _, shown, err = run_cli("watch", tmp_path, "once=true")
    assert "\x1b[2J" not in shown + err
    (tmp_path / "cells.json").write_text(
        json.dumps({"schema": 1, "commands": [{"words": [], "cells": ["\x1b[2J"]}]})
    )
    code, shown, err = run_cli("report", tmp_path)
    assert (code, "names \\x1b[2J, which are no folders in it" in err) == (2, True)

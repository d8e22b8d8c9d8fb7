"""A comparison's runs spread by Hydra's launchers, and what it says of those that are not finished."""

import importlib.util
import json
import os
import shlex
import shutil

import pytest
import yaml

from continual.errors import DataError
from continual.reports import audits
from continual.results import comparison
from continual.results.matrix import Matrix
from continual.runs.compare import LAUNCHER_PACKAGES
from continual.runs.lock import run_folder_lock
from continual.training import scratch
from tests.support import subprocesses
from tests.support.models import TASKS, run_in_process, write_stream

SMALL = ("train.epochs=1", "stream.tasks=[first,loud]")


def installed(launcher: str) -> bool:
    try:
        return (
            importlib.util.find_spec(f"hydra_plugins.hydra_{LAUNCHER_PACKAGES[launcher]}_launcher")
            is not None
        )
    except ModuleNotFoundError:
        return False


def needs(launcher: str):
    return pytest.mark.skipif(
        not installed(launcher),
        reason=f"hydra-{LAUNCHER_PACKAGES[launcher]}-launcher is not installed",
    )


def names(out) -> set[str]:
    return {p.parent.name for p in out.glob("*/finished")}


# Launchers


@needs("joblib")
def test_runs_side_by_side_end_as_one_run_alone_does_and_a_failed_one_leaves_them_whole(
    run_cli, run_keys, tmp_path
):
    words = (
        *run_keys,
        *SMALL,
        "strategy=naive,replay",
        "stream.order=given,nope",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
    )
    code, out, err = run_cli("compare", *words, f"out={tmp_path / 'it'}")
    assert code == 2
    assert (
        "2 of the runs failed; fix what they say, and give the command again:\n  continual "
        "compare " in err
    )
    assert err.count("failed: unknown stream.order 'nope'") == 2
    assert names(tmp_path / "it") == {
        f"seed=0_strategy={s}_stream.order=given" for s in ("naive", "replay")
    }
    alone, _ = run_in_process(
        tmp_path / "alone", run_keys, *SMALL, "stream.order=given", "strategy=replay"
    )
    beside = tmp_path / "it" / "seed=0_strategy=replay_stream.order=given"
    assert Matrix.load(beside / "matrix.json").scores == alone.scores
    for task in ("first", "loud"):
        told = f"predictions/stage-02/{task}.jsonl"
        assert (beside / told).read_bytes() == (tmp_path / "alone" / told).read_bytes()
    assert "replay" in out


def test_a_setting_of_one_strategy_is_for_the_runs_that_have_it(run_cli, run_keys, tmp_path):
    code, _, err = run_cli(
        "compare",
        *run_keys,
        *SMALL,
        "strategy=naive,replay,[replay,l2]",
        "strategy.replay.share=0.5",
        f"out={tmp_path / 'it'}",
    )
    assert code == 0, err
    kept = [yaml.safe_load(p.read_text())["strategy"] for p in tmp_path.glob("it/*/config.yaml")]
    assert {tuple(told): told.get("replay", {}).get("share") for told in kept} == {
        ("naive",): None,
        ("replay",): 0.5,
        ("replay", "l2"): 0.5,
    }
    assert names(tmp_path / "it") == {
        f"seed=0_strategy={s}" for s in ("naive", "replay", "[replay,l2]")
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["strategy.replay.shar=0.5"],
            "unknown key 'strategy.replay.shar'; did you mean 'strategy.replay.share'",
        ),
        (["strategy.replay.share=2"], "share"),
        (["strategy.ewc.strength=2"], "unknown strategy of this comparison 'ewc'"),
        (
            ["strategy_defaults={replay:{share:0.5}}"],
            "unknown key 'strategy_defaults.replay'",
        ),
    ],
)
def test_a_wrong_setting_of_one_strategy_is_refused_before_any_run(
    cli_error, run_keys, tmp_path, words, said
):
    assert said in cli_error(
        "compare", *run_keys, *SMALL, "strategy=naive,replay", *words, f"out={tmp_path / 'it'}"
    )
    assert not (tmp_path / "it").exists() or not names(tmp_path / "it")


def test_a_comparison_has_one_folder(cli_error, run_cli, run_keys, tmp_path):
    folder = tmp_path / "a,b"
    assert "a comparison has one folder" in cli_error(
        "compare", *run_keys, *SMALL, "strategy=naive", f"out={folder}"
    )
    assert not list(tmp_path.glob("a*"))
    code, _, err = run_cli("compare", *run_keys, *SMALL, "strategy=naive", f"out='{folder}'")
    assert code == 0, err
    assert names(folder) == {"seed=0_strategy=naive"}


@needs("submitit_local")
def test_submitits_local_executor_does_the_runs(run_cli, run_keys, tmp_path):
    code, _, err = run_cli(
        "compare",
        *run_keys,
        *SMALL,
        "strategy=naive",
        "hydra/launcher=submitit_local",
        f"out={tmp_path / 'it'}",
    )
    assert code == 0, err
    assert names(tmp_path / "it") == {"seed=0_strategy=naive"}


@pytest.mark.parametrize("launcher", ["slurm", "ray_cluster"])
def test_the_configurations_of_clusters_compose(launcher):
    if not installed(launcher):
        pytest.skip(f"hydra-{LAUNCHER_PACKAGES[launcher]}-launcher is not installed")
    from hydra import compose, initialize_config_module

    with initialize_config_module("conf", version_base=None):
        config = compose(
            "compare", [f"hydra/launcher={launcher}", "out=x"], return_hydra_config=True
        ).hydra.launcher
    assert LAUNCHER_PACKAGES[launcher] in config._target_
    if launcher == "slurm":
        assert config.max_num_timeout > 0
    else:
        assert config.ray.remote.num_cpus > 0


@pytest.mark.parametrize("launcher", sorted(LAUNCHER_PACKAGES))
def test_a_launcher_that_is_not_installed_is_named(cli_error, monkeypatch, launcher):
    monkeypatch.setattr("continual.runs.compare.find_spec", lambda _: None)
    told = cli_error("compare", f"hydra/launcher={launcher}")
    package = f"hydra-{LAUNCHER_PACKAGES[launcher]}-launcher"
    assert (
        told.split()
        == (
            f"hydra/launcher={launcher} needs {package}, which is not installed: "
            f"pip install {package}"
        ).split()
    )


# What is not finished


@pytest.fixture(scope="module")
def half(run_keys, tmp_path_factory):
    """A comparison of which one run failed."""
    from continual.cli.main import main

    out = tmp_path_factory.mktemp("half") / "it"
    with pytest.raises(SystemExit):
        main(
            [
                "compare",
                *run_keys,
                *SMALL,
                "strategy=naive",
                "stream.order=given,nope",
                f"out={out}",
            ]
        )
    return out


def test_a_report_on_a_comparison_says_what_is_missing_and_the_command_that_finishes_it(
    run_cli, run_keys, half
):
    _, out, _ = run_cli("report", half)
    words = shlex.join(
        ["continual", "compare", *run_keys, *SMALL, "strategy=naive", "stream.order=given,nope"]
    )
    assert (
        "1 of 2 runs are not finished:\n  seed=0_strategy=naive_stream.order=nope: failed: "
        "unknown str" in out
    )
    assert f"This finishes them:\n  {words} out={half}" in out
    assert "1 of 2 runs are not finished:" in (half / "report.html").read_text()


def test_the_command_it_tells_finishes_it(run_cli, run_keys, half, tmp_path, stream_folder):
    stream = tmp_path / "stream"
    shutil.copytree(stream_folder, stream)
    index = json.loads((stream / "stream.json").read_text())
    (stream / "stream.json").write_text(json.dumps({**index, "orders": {}}))
    out = tmp_path / "it"
    words = [
        *run_keys,
        *SMALL,
        "strategy=naive",
        f"stream.path={stream}",
        "stream.order=null,back",
        f"out={out}",
    ]
    code, _, _ = run_cli("compare", *words)
    assert code == 2
    (stream / "stream.json").write_text(json.dumps(index))
    told = comparison.describe_unfinished(out)[0]
    code, _, err = run_cli(*shlex.split(told.splitlines()[-1])[1:])
    assert code == 0, err
    assert err.count("is finished") == 1
    assert comparison.describe_unfinished(out) == []
    assert len(names(out)) == 2


def test_a_run_that_raises_what_nobody_foresaw_leaves_the_others_whole(
    run_cli, run_keys, tmp_path, monkeypatch
):
    import continual.runs.run

    real = continual.runs.run.run

    def breaks(config, console):
        if config.seed == 0:
            raise RuntimeError("a bug")
        return real(config, console)

    monkeypatch.setattr(continual.runs.run, "run", breaks)
    code, _, err = run_cli(
        "compare", *run_keys, *SMALL, "strategy=naive", "seed=0,1", f"out={tmp_path / 'it'}"
    )
    assert code == 2
    assert "seed=0_strategy=naive: failed: RuntimeError: a bug" in err
    assert names(tmp_path / "it") == {"seed=1_strategy=naive"}


def test_a_signal_ends_the_comparison_and_no_further_run_begins(
    run_cli, run_keys, tmp_path, monkeypatch
):
    import continual.runs.run
    from continual.runs.signals import RunInterrupted

    def stopped(config, console):
        raise RunInterrupted("stopped after step 3", 15)

    with monkeypatch.context() as patch:
        patch.setattr(continual.runs.run, "run", stopped)
        code, _, err = run_cli(
            "compare", *run_keys, *SMALL, "strategy=naive", "seed=0,1", f"out={tmp_path / 'it'}"
        )
    assert code == 143
    assert not (tmp_path / "it/seed=1_strategy=naive").exists()
    assert "nothing is lost. Go on with:\n  continual compare " in err
    code, _, _ = run_cli(
        "compare", *run_keys, *SMALL, "strategy=naive", "seed=0,1", f"out={tmp_path / 'it'}"
    )
    assert code == 0


def test_two_comparisons_in_one_folder_at_once_are_refused(cli_error, run_keys, tmp_path):
    with run_folder_lock(tmp_path / "it"):
        told = cli_error("compare", *run_keys, *SMALL, "strategy=naive", f"out={tmp_path / 'it'}")
    assert "is in use by process" in told


def test_a_value_with_a_slash_is_one_folder(run_cli, run_keys, model_folder, tmp_path):
    code, _, err = run_cli(
        "compare",
        *run_keys[:3],
        *run_keys[4:],
        *SMALL,
        f"model.name={model_folder},{model_folder}/",
        "strategy=naive",
        f"out={tmp_path / 'it'}",
    )
    assert code == 0, err
    assert len(names(tmp_path / "it")) == 2
    assert comparison.describe_unfinished(tmp_path / "it") == []


def test_commands_that_later_ones_contain_are_forgotten(tmp_path):
    comparison.record_command(tmp_path, ["seed=0"], ["seed=0"])
    comparison.record_command(tmp_path, ["seed=1"], ["seed=1"])
    comparison.record_command(tmp_path, ["seed=0,2"], ["seed=0", "seed=2"])
    told = "\n".join(comparison.describe_unfinished(tmp_path))
    assert told.count("continual compare") == 2
    assert "seed=0: not started" in told
    assert "seed=1: not started" in told


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"commands": [{"words": 1, "cells": []}]}',
        "\xff",
        '{"commands": [{"words": [], "cells": ["../x"]}]}',
    ],
)
def test_a_damaged_plan_is_one_clear_error(tmp_path, text):
    (tmp_path / comparison.CELLS_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(
        DataError, match=r"cells.json (cannot be read|names ../x, which are no folders)"
    ):
        comparison.describe_unfinished(tmp_path)


# One model for all


def build(folder):
    from streams.folder import load_folder as stream

    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    scratch.load_or_build_llama(
        stream=stream(path=str(folder / "stream"), seed=0),
        hidden_size=16,
        layers=1,
        heads=2,
        context_length=64,
        vocab_size=300,
        pretrain={"tokens": 0},
        device="cpu",
    )


def test_processes_that_need_the_same_scratch_model_build_it_once(tmp_path):
    write_stream(tmp_path / "stream", TASKS[:1])
    both = [subprocesses.Subprocess(tmp_path / f"said-{i}", build, tmp_path) for i in range(2)]
    assert [process.wait()[0] for process in both] == [0, 0]
    kept = [p for p in (tmp_path / "cache/continual/models").iterdir() if p.suffix != ".lock"]
    assert len(kept) == 1
    assert (kept[0] / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["cells.json", "it/audit.json"])
def test_a_file_that_is_nested_without_end_is_one_clear_error(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("[" * 300_000)
    with pytest.raises(DataError, match=name):
        audits.load_audit(path.parent) if "audit" in name else comparison.find_pending_runs(
            tmp_path
        )

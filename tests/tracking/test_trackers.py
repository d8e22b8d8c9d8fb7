"""A run's figures in other people's trackers, each without a network; and a run that does not
depend on them.
"""

import json
import shutil
import sqlite3
from importlib.util import find_spec

import pytest

from continual.results.matrix import Matrix
from continual.tracking import trackers
from continual.tracking.trackers import TRACKERS, Tracker
from tests.support.models import TASKS, load_json_lines, run_in_process

SHORT = ("train.epochs=1", "stream.tasks=[first,last]")


def needs(package):
    return pytest.mark.skipif(not find_spec(package), reason=f"needs the extra {package}")


class Sink:
    """Keeps what it is told."""

    def __init__(self, out, name, id, settings):
        self.name, self.id, self.settings = name, id, settings
        Sink.told.append(self)
        self.figures, self.closed = [], None

    def log(self, values, step):
        self.figures.append((step, values))

    def close(self, whole):
        self.closed = whole


@pytest.fixture
def sinks(monkeypatch):
    """What a tracker is told, one of these each time that a run begins or goes on."""
    monkeypatch.setattr(Sink, "told", [], raising=False)
    monkeypatch.setitem(TRACKERS, "tensorboard", Sink)
    monkeypatch.setattr(Sink, "package", "json", raising=False)
    return Sink.told


def series(sink, name):
    return [(step, values[name]) for step, values in sink.figures if name in values]


def test_losses_scores_and_summaries_are_told_over_the_steps_of_the_whole_run(
    run_keys, tmp_path, sinks
):
    matrix, _ = run_in_process(tmp_path / "a/b", run_keys, *SHORT, "track=tensorboard")
    (sink,) = sinks
    assert (sink.name, sink.closed) == ("a/b", True)
    assert sink.settings["train.epochs"] == 1
    steps = [e for e in load_json_lines(tmp_path / "a/b/events.jsonl") if e["event"] == "step"]
    assert [x for x, _ in series(sink, "train/loss")] == [1, 2, 3, 4]
    assert [y for _, y in series(sink, "train/loss")] == [e["loss"] for e in steps]
    assert series(sink, "score/first") == [
        (0, matrix.scores[0][0]),
        (2, matrix.scores[1][0]),
        (4, matrix.scores[2][0]),
    ]
    assert series(sink, "summary/forgetting") == [(4, matrix.summary()["forgetting"])]


def test_a_resumed_run_goes_on_in_the_trackers_same_run_and_on_the_same_axis(
    run_keys, tmp_path, sinks
):
    run_in_process(tmp_path, run_keys, *SHORT, "track=tensorboard")
    (tmp_path / "finished").unlink()
    shutil.rmtree(tmp_path / "checkpoints/stage-02")
    run_in_process(tmp_path, run_keys, *SHORT, "track=tensorboard")
    assert sinks[0].id == sinks[1].id
    assert [x for x, _ in series(sinks[1], "train/loss")] == [3, 4]


def test_a_tracker_that_fails_is_left_out_and_the_run_ends_as_it_would_have(
    run_keys, tmp_path, sinks, monkeypatch
):
    plain, _ = run_in_process(tmp_path / "plain", run_keys, *SHORT)
    monkeypatch.setattr(Sink, "log", lambda self, values, step: 1 / 0)
    tracked, said = run_in_process(tmp_path / "tracked", run_keys, *SHORT, "track=tensorboard")
    assert said.count("the tracker failed, and the run goes on without it: division by zero") == 1
    assert tracked.scores == plain.scores


def test_another_tracker_is_no_other_run(run_keys, tmp_path, sinks):
    run_in_process(tmp_path, run_keys, *SHORT)
    (tmp_path / "finished").unlink()
    shutil.rmtree(tmp_path / "checkpoints/stage-02")
    run_in_process(tmp_path, run_keys, *SHORT, "track=tensorboard")
    assert Matrix.load(tmp_path / "matrix.json").is_finished


def test_each_curve_of_an_adaptation_comes_behind_the_one_before(
    run_cli, run_keys, tmp_path, sinks
):
    words = (
        "stream.tasks=[loud]",
        "adapt.steps=4",
        "adapt.eval_steps=[0,2]",
        "adapt.shots=[2,null]",
        "adapt.draws=1",
        "track=tensorboard",
    )
    assert run_cli("adapt", *run_keys, *words, f"out={tmp_path / 'new'}")[0] == 0
    (sink,) = sinks
    assert [x for x, _ in series(sink, "score/loud")] == [0, 2, 4, 4, 6, 8]


def test_what_happens_within_a_stage_is_told_where_it_happens(tmp_path, sinks):
    tracker = Tracker(sink := Sink(tmp_path, "", "", {}), tmp_path)
    tracker({"event": "stage", "stage": 1, "steps": 10})
    tracker({"event": "during", "stage": 2, "step": 3, "scores": {"a": 0.5, "b": 1.0}})
    assert sink.figures == [(13, {"during/a": 0.5, "during/b": 1.0, "during/average": 0.75})]


# What is not there


@pytest.mark.parametrize("kind", TRACKERS)
def test_a_package_that_is_missing_is_told_before_training(
    cli_error, run_keys, tmp_path, monkeypatch, kind
):
    monkeypatch.setattr("continual.tracking.trackers.find_spec", lambda name: None)
    told = cli_error("run", *run_keys, f"track={kind}", f"out={tmp_path / 'run'}")
    assert (
        f"track={kind} needs {TRACKERS[kind].package}, which is not installed; install the extra"
        in told
    )
    assert not (tmp_path / "run/events.jsonl").exists()


def test_an_unknown_tracker_is_refused_with_the_nearest(cli_error, run_keys, tmp_path):
    assert "unknown track 'wandbe'; did you mean 'wandb'" in cli_error(
        "run", *run_keys, "track=wandbe", f"out={tmp_path}"
    )


def test_a_tracker_that_cannot_begin_is_told_before_training(
    run_cli, run_keys, tmp_path, sinks, monkeypatch
):
    def closed(*args):
        raise OSError("no route to host")

    monkeypatch.setattr(Sink, "__init__", closed)
    code, _, err = run_cli("run", *run_keys, *SHORT, "track=tensorboard", f"out={tmp_path}")
    assert code == 2
    assert err.endswith(
        "error: track=tensorboard cannot begin: no route to host; see to its login and address, "
        "or set track=none\n"
    )
    assert not (tmp_path / "checkpoints").exists()


# Each of them, without a network


@needs("tensorboard")
def test_tensorboard_reads_the_run_back(run_keys, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    matrix, _ = run_in_process(tmp_path, run_keys, *SHORT, "track=tensorboard")
    told = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in told.Scalars("train/loss")] == [1, 2, 3, 4]
    assert told.Scalars("score/last")[-1].value == pytest.approx(matrix.scores[2][1])


@needs("wandb")
def test_weights_and_biases_keeps_the_run_offline(run_keys, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run_in_process(tmp_path / "run", run_keys, *SHORT, "track=wandb")
    (kept,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert kept.stem == f"run-{json.loads((tmp_path / 'run/track.json').read_text())['id']}"
    assert b"score/first" in kept.read_bytes()


@needs("mlflow")
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")  # its own
def test_mlflow_has_the_run_in_its_store(run_keys, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    matrix, _ = run_in_process(tmp_path / "run", run_keys, *SHORT, "track=mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (told,) = client.search_runs([client.get_experiment_by_name("continual").experiment_id])
    assert told.data.params["train.epochs"] == "1"
    assert told.info.status == "FINISHED"
    history = client.get_metric_history(told.info.run_id, "score/first")
    assert [(m.step, m.value) for m in history] == [(2 * i, matrix.scores[i][0]) for i in range(3)]


@needs("trackio")
def test_trackio_has_the_run_in_its_folder(run_keys, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "TRACKIO_DIR", str(tmp_path / "trackio")
    )  # which it reads when it is imported
    matrix, said = run_in_process(tmp_path / "run", run_keys, *SHORT, "track=trackio")
    assert "tracker failed" not in said
    with sqlite3.connect(tmp_path / "trackio/continual.db") as kept:
        told = [
            (step, json.loads(values))
            for step, values in kept.execute("select step, metrics from metrics")
        ]
    kept.close()
    assert [(x, v["score/first"]) for x, v in told if "score/first" in v] == [
        (2 * i, matrix.scores[i][0]) for i in range(3)
    ]


def test_names_that_mlflow_does_not_take_are_rewritten():
    assert trackers._mlflow_name("score/a|b é") == "score/a_b é"
    assert len(TASKS) == 3

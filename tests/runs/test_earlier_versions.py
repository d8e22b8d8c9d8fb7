"""Run folders of earlier versions: `tests/data/run_before_rooms` was killed in its second stage,
before modules moved.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import continual
from continual.results.matrix import Matrix
from tests.support.models import load_json_lines

EARLIER = Path(__file__).parents[1] / "data" / "run_before_rooms"

# The command that began the run, in the spelling of that version.
KEYS = (
    "strategy=[replay,ewc]",
    "stream=folder",
    "stream.path=stream",
    "model=scratch",
    "model.hidden=8",
    "model.layers=1",
    "model.heads=2",
    "model.vocabulary=270",
    "model.context=64",
    "data.max_length=64",
    "train.epochs=40",
    "train.lr=0.02",
    "train.batch_size=6",
    "train.schedule=constant",
    "device=cpu",
    "probe=[wordings]",
    "score.during=20",
    "strategy.replay.capacity=6",
    "score.metric=token_f1",
    "data.on_unfit=skip",
)


@pytest.fixture
def earlier(tmp_path, run_cli):
    """A copy of the run and its stream, in the folder in which commands are given."""
    return shutil.copytree(EARLIER, Path.cwd(), dirs_exist_ok=True) / "run"


def test_it_resumes_and_takes_the_same_steps(earlier, run_cli):
    begun = [
        e
        for e in load_json_lines(earlier / "events.jsonl")
        if e["event"] == "step" and e["stage"] == 2
    ]
    rows = Matrix.load(earlier / "matrix.json").scores
    code, _, err = run_cli("run", *KEYS, f"out={earlier.name}")
    assert code == 0, err
    matrix = Matrix.load(earlier / "matrix.json")
    assert matrix.scores[:2] == rows
    assert matrix.stages == ("base", "first", "last")
    again = [
        e
        for e in load_json_lines(earlier / "events.jsonl")
        if e["event"] == "step" and e["stage"] == 2
    ][len(begun) :]
    assert again[0]["step"] == begun[0]["step"]
    assert again[0]["loss"] == pytest.approx(begun[0]["loss"], rel=1e-3)


def test_its_results_load(earlier):
    assert len(continual.load_runs(earlier)) == 2 * 2


def test_it_is_shown(earlier, run_cli):
    code, out, err = run_cli("report", earlier)
    assert code == 0, err
    assert "replay+ewc" in out


def test_its_last_stage_is_exported(earlier, run_cli):
    code, _, err = run_cli("export", earlier, "stage=first", "out=exported")
    assert code == 0, err
    assert Path("exported/model.safetensors").exists()


def test_a_new_task_is_learned_from_its_checkpoint(earlier, run_cli):
    code, _, err = run_cli(
        "adapt",
        f"adapt.start={earlier.name}",
        "stream=folder",
        "stream.path=stream",
        "stream.tasks=[last]",
        "adapt.steps=2",
        "adapt.shots=[4]",
        "device=cpu",
        "out=adapted",
    )
    assert code == 0, err
    assert Path("adapted/curve.json").exists()

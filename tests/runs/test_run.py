"""A whole run: what it leaves on disk, and that it ends the same however often it was killed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from continual.errors import ConfigError, DataError, MissingError
from continual.results.matrix import Matrix
from tests.support.models import (
    TASKS,
    load_json_lines,
    make_rows,
    run_in_process,
    write_rows,
    write_stream,
)

BOTH = (
    "strategy=[replay,ewc]",
    "strategy.ewc.strength=10",
    "strategy.replay.capacity=6",
    "strategy.ewc.num_examples=6",
)


@pytest.fixture(scope="module")
def done(run_keys, tmp_path_factory):
    """A finished run under replay and EWC, with what it said."""
    out = tmp_path_factory.mktemp("runs") / "done"
    matrix, said = run_in_process(out, run_keys, *BOTH)
    return out, matrix, said


@pytest.fixture
def copy(done, tmp_path):
    """The finished run's folder, to be spoiled."""
    return shutil.copytree(done[0], tmp_path / "copy")


# What a run leaves


def test_the_matrix_has_a_base_row_and_scores_future_tasks_after_every_stage(done):
    out, matrix, _ = done
    assert matrix == Matrix.load(out / "matrix.json")
    assert matrix.stages == ("base", *TASKS)
    assert matrix.tasks == TASKS
    assert all(score is not None and 0 <= score <= 1 for row in matrix.scores for score in row)
    assert (matrix.strategy, matrix.seed, matrix.counts) == ("replay+ewc", 0, (4, 4, 4))
    assert matrix.cost["steps"] == 12
    assert matrix.cost["seconds"] > 0


def test_every_answer_is_written_with_its_mark_and_the_marks_average_to_the_score(done):
    out, matrix, _ = done
    for i, row in enumerate(matrix.scores):
        for task, value in zip(TASKS, row, strict=True):
            told = load_json_lines(out / f"predictions/stage-{i:02d}/{task}.jsonl")
            assert [t["id"] for t in told] == [f"{task}/test/{n}" for n in range(4)]
            assert sum(t["score"] for t in told) / 4 == pytest.approx(value)
            assert [t["references"] for t in told] == [
                [r["output"]] for r in make_rows(task, 4, 16)
            ]


def test_the_events_tell_each_step_stage_and_score_in_order(done):
    events = load_json_lines(done[0] / "events.jsonl")
    told = [(e["event"], e["stage"]) for e in events if e["event"] != "step"]
    assert told == [
        ("start", 0),
        ("audit", 0),
        ("score", 0),
        *[(name, n) for n in (1, 2, 3) for name in ("stage", "checkpoint", "score")],
        ("end", 3),
    ]
    steps = [e for e in events if e["event"] == "step"]
    assert [(e["stage"], e["step"]) for e in steps] == [
        (n, i) for n in (1, 2, 3) for i in (1, 2, 3, 4)
    ]
    assert all(e["loss"] > 0 and e["seconds"] > 0 and e["tokens"] > 0 for e in steps)


def test_the_folder_holds_the_whole_configuration_and_a_page_to_look_at(done):
    out, _, _ = done
    config = (out / "config.yaml").read_text()
    assert "capacity: 6" in config
    assert "max_length: 512" in config
    assert "${" not in config, "resolved"
    assert (out / "report.html").stat().st_size > 1000


def test_the_replay_buffer_can_be_read_in_the_checkpoint(done):
    memory = (done[0] / "checkpoints/stage-02/memory.json").read_text()
    assert [memory.count(rf'"text": "Give the {task} word.\n') for task in TASKS] == [3, 3, 0]


def test_what_is_shortened_or_skipped_is_counted_and_shown(run_keys, tmp_path):
    stream = write_stream(tmp_path / "stream", ("first",))
    long = {"instruction": "Say it.", "input": "q" * 300, "output": "q"}
    write_rows(
        stream / "first/train.jsonl",
        [
            *make_rows("first", 6),
            long,
            {"instruction": "Say.", "output": ""},
            {"instruction": "w" * 200, "output": "x"},
        ],
    )
    _, said = run_in_process(
        tmp_path / "run", run_keys, f"stream.path={stream}", "data.on_unusable=skip"
    )
    assert (
        "inputs shortened to fit: 1; examples skipped: 2 (first/train/7, first/train/8 ...)" in said
    )
    (event,) = [e for e in load_json_lines(tmp_path / "run/events.jsonl") if e["event"] == "data"]
    assert (event["skipped"], event["shortened"]) == (2, 1)


def test_shortened_test_prompts_are_counted_too(run_keys, tmp_path):
    stream = write_stream(tmp_path / "stream", ("first",))
    long = {"instruction": "Say it.", "input": "q" * 300, "output": "q"}
    for split in ("train", "test"):
        write_rows(stream / f"first/{split}.jsonl", [*make_rows("first", 4), long])
    _, said = run_in_process(tmp_path / "run", run_keys, f"stream.path={stream}")
    assert "inputs shortened to fit: 2; examples skipped: 0" in said


def test_the_joint_arrangement_has_one_stage_of_all_tasks(run_keys, tmp_path):
    matrix, _ = run_in_process(tmp_path, run_keys, "stream.arrangement=joint", "train.epochs=1")
    assert len(matrix.stages) == 2
    assert matrix.is_finished
    assert matrix.cost["steps"] == 6


def test_a_run_of_another_seed_is_another_run(run_keys, tmp_path):
    a, b, c = (tmp_path / n for n in "abc")
    for out, seed in ((a, 0), (b, 0), (c, 1)):
        run_in_process(out, run_keys, "stream.tasks=[first]", f"seed={seed}")
    first, again, other = (
        load_file(out / "checkpoints/stage-01/weights.safetensors") for out in (a, b, c)
    )
    assert all(torch.equal(w, again[n]) for n, w in first.items())
    assert any(not torch.equal(w, other[n]) for n, w in first.items())


# The same folder again


def test_a_finished_run_says_so_and_changes_nothing(done, run_keys):
    out, matrix, _ = done
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    again, said = run_in_process(out, run_keys, *BOTH)
    assert f"{out} is finished; show it with: continual report {out}" in said
    assert again == matrix
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_another_configuration_in_the_same_folder_is_refused_naming_the_differing_keys(
    done, run_keys
):
    with pytest.raises(ConfigError) as caught:
        run_in_process(done[0], run_keys, *BOTH, "train.lr=0.5", "seed=3")
    told = str(caught.value).split("\n")
    assert "holds a run with another configuration" in told[0]
    assert {line.strip().split(":")[0] for line in told[1:]} == {
        "train.lr",
        "seed",
        "stream.seed",
        "strategy.ewc.seed",
        "strategy.replay.seed",
    }
    assert "  train.lr: 0.003 there, 0.5 now" in told


def test_a_run_that_was_refused_may_be_given_again_put_right(run_keys, tmp_path):
    with pytest.raises(MissingError):
        run_in_process(tmp_path, run_keys, "stream.path=nowhere")
    matrix, _ = run_in_process(tmp_path, run_keys, "stream.tasks=[first]")
    assert matrix.is_finished


def test_a_damaged_configuration_is_named_with_its_mend(copy, run_keys):
    (copy / "finished").unlink()
    (copy / "config.yaml").write_bytes(b"seed: 0\n\xff")
    with pytest.raises(DataError, match=r"config.yaml:2:1: found the byte 0xff, expected UTF-8"):
        run_in_process(copy, run_keys, *BOTH)


def test_a_finished_runs_damaged_matrix_is_named(copy, run_keys):
    (copy / "matrix.json").write_bytes(b"{")
    with pytest.raises(DataError, match=r"copy/matrix.json"):
        run_in_process(copy, run_keys, *BOTH)


def test_out_may_not_be_a_file(run_keys, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="is a file; give a folder"):
        run_in_process(tmp_path / "out", run_keys)


def test_tasks_of_like_names_have_predictions_of_their_own(run_keys, tmp_path):
    stream = write_stream(tmp_path / "stream", ("first",))
    names = ["a b", "a/b", "a_b", ".a", "ä"]
    index = {"tasks": [{"name": name, "dir": "first"} for name in names]}
    (stream / "stream.json").write_text(json.dumps(index))
    run_in_process(tmp_path / "run", run_keys, f"stream.path={stream}", "train.steps=1")
    assert len(list((tmp_path / "run/predictions/stage-01").iterdir())) == len(names)

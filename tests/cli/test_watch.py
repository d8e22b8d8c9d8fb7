"""Following runs by what they write: read on, never again; whatever stands there stays text."""

import io
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from continual.cli.watch import (
    EventTail,
    WatchedRun,
    build_runs_table,
    learned_submatrix,
    refresh_runs,
    watch,
)
from continual.results.matrix import forgetting, mean_or_none
from tests.support.fake_run import make_fake_matrix, write_fake_run
from tests.support.models import run_in_process, write_stream

STEP = {
    "event": "step",
    "time": 1.0,
    "stage": 1,
    "task": "a",
    "step": 1,
    "steps": 10,
    "loss": 2.0,
    "tokens": 50,
    "seconds": 0.5,
    "lr": 0.1,
    "notes": {},
}


def shown(*folders, width=200):
    said = io.StringIO()
    watch(folders, Console(file=said, width=width), once=True)
    return said.getvalue()


def write(path, *events):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(e) + "\n" for e in events))


# Reading on

EVENTS = [{"event": "start", "n": n, "text": "ä" * n} for n in range(5)]
WRITTEN = "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in EVENTS).encode()


@given(st.lists(st.integers(0, len(WRITTEN)), max_size=6))
def test_events_are_read_once_each_wherever_the_file_ends_meanwhile(tmp_path_factory, cuts):
    path = tmp_path_factory.mktemp("tail") / "events.jsonl"
    tail, found = EventTail(path), []
    for end in [*sorted(cuts), len(WRITTEN)]:
        path.write_bytes(WRITTEN[:end])
        found += tail.read_new_events()
    assert found == EVENTS
    assert tail.broken_lines == 0


def test_nothing_is_read_again(tmp_path, monkeypatch):
    path = tmp_path / "events.jsonl"
    path.write_bytes(WRITTEN)
    tail = EventTail(path)
    assert len(list(tail.read_new_events())) == 5
    path.write_bytes(
        b"x" * len(WRITTEN) + b'{"event": "end"}\n'
    )  # of what was read before nothing is looked at
    assert list(tail.read_new_events()) == [{"event": "end"}]


def test_a_file_that_has_become_shorter_is_read_from_its_start(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(WRITTEN)
    tail = EventTail(path)
    list(tail.read_new_events())
    path.write_bytes(b'{"event": "start"}\n')
    assert list(tail.read_new_events()) == [{"event": "start"}]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b'{"event": 3}',
        b'{"event": "step"}',
        b"\xff\xfe",
        b'{"event": "step", "step": "many"}',
    ],
)
def test_a_broken_line_is_counted_and_passed_over(tmp_path, line):
    (tmp_path / "events.jsonl").write_bytes(line + b"\n" + WRITTEN)
    tail = EventTail(tmp_path / "events.jsonl")
    assert list(tail.read_new_events()) == EVENTS
    assert tail.broken_lines == 1


# What is made of it


def test_speed_is_that_of_late_and_what_is_left_follows_from_the_stages_before(tmp_path):
    write(
        tmp_path / "events.jsonl",
        {"event": "start", "stages": ["a", "b", "c"]},
        {"event": "score", "stage": 0, "seconds": 2.0},
        {**STEP, "step": 10, "seconds": 10.0},
        {"event": "stage", "stage": 1, "seconds": 10.0},
        {"event": "score", "stage": 1, "seconds": 4.0},
        {**STEP, "stage": 2, "task": "b", "step": 2, "tokens": 100, "seconds": 4.0},
        {**STEP, "stage": 2, "task": "b", "step": 4, "tokens": 300, "seconds": 6.0},
    )
    told = WatchedRun(tmp_path, "it")
    told.refresh()
    assert told.tokens_per_second == 100
    assert (
        told.seconds_left == (6 / 4 * 6) + 10 + 2 * 3
    )  # this stage's steps, the last stage, two scorings
    assert told.table_row()[1:4] == [
        "2/3 b, quiet for " + told.table_row()[1].partition("quiet for ")[2],
        "4/10",
        "2.000",
    ]


@pytest.mark.parametrize("rows", range(1, 7))
def test_average_and_forgetting_so_far_are_those_of_a_run_that_ends_here(rows):
    whole = make_fake_matrix("naive")
    part = type(whole)(
        **{**whole.__dict__, "stages": whole.stages[: rows + 1], "scores": whole.scores[: rows + 1]}
    )
    now = learned_submatrix(part)
    assert now.tasks == whole.tasks[:rows]
    r = whole.scores
    assert mean_or_none(now.final_scores) == pytest.approx(sum(r[rows][:rows]) / rows)
    falls = [max(r[i][j] for i in range(j + 1, rows)) - r[rows][j] for j in range(rows - 1)]
    assert forgetting(now) == (pytest.approx(sum(falls) / len(falls)) if falls else None)


def test_nothing_is_learned_before_the_first_stage_and_a_joint_run_is_over_at_once():
    assert learned_submatrix(make_fake_matrix(joint=True)).tasks == make_fake_matrix().tasks
    base = make_fake_matrix()
    base = type(base)(**{**base.__dict__, "stages": base.stages[:1], "scores": base.scores[:1]})
    assert learned_submatrix(base) is None


# What is shown


def test_a_real_run_is_followed_to_its_end(run_keys, tmp_path):
    matrix, _ = run_in_process(
        tmp_path / "run", run_keys, "train.epochs=1", "stream.tasks=[first,last]"
    )
    out = shown(tmp_path / "run")
    assert "finished" in out
    assert f"{100 * matrix.summary()['average_performance']:.1f}" in out


def test_a_comparison_shows_its_runs_and_those_that_have_not_begun(tmp_path):
    for name, more in (("a", {}), ("b", {"finished": False})):
        write_fake_run(tmp_path / name, **more)
    (tmp_path / "a/finished").touch()
    (tmp_path / "cells.json").write_text(
        json.dumps({"schema": 1, "commands": [{"words": [], "cells": ["a", "c"]}]})
    )
    rows = {line.split()[0]: line.split()[1] for line in shown(tmp_path).splitlines()[1:]}
    assert rows == {"a": "finished", "b": "3/?", "c": "waiting"}


def test_a_screen_without_room_shows_the_runs_that_do_something_and_counts_the_others(tmp_path):
    for n in range(30):
        write(tmp_path / f"{n:02d}/events.jsonl", STEP)
        (tmp_path / f"{n:02d}/config.yaml").touch()
        if n:
            (tmp_path / f"{n:02d}/finished").touch()
    runs = refresh_runs([tmp_path], {})
    assert (
        build_runs_table(runs, Console(height=40)).row_count
        == build_runs_table(runs).row_count
        == 30
    )
    told = build_runs_table(runs, Console(height=24))
    assert (told.row_count, told.caption) == (1, "29 finished")


def test_a_run_that_stopped_or_failed_says_so(run_cli, run_keys, tmp_path):
    assert (
        run_cli(
            "run", *run_keys, "train.weight_decay=1e30", "train.epochs=4", f"out={tmp_path / 'it'}"
        )[0]
        == 2
    )
    assert "stopped" in shown(tmp_path / "it")
    (tmp_path / "it/failed.txt").write_text("why")
    assert "failed" in shown(tmp_path / "it")


def test_it_ends_when_all_runs_are_over(tmp_path, monkeypatch):
    folder = write_fake_run(tmp_path / "run")
    monkeypatch.setattr(time, "sleep", lambda seconds: (folder / "finished").touch())
    said = io.StringIO()
    watch([folder], Console(file=said, force_terminal=True, width=200))
    assert said.getvalue().index("6/?") < said.getvalue().index("finished")


def test_a_terminal_obeys_nothing_of_it(tmp_path):
    evil = "\x1b[2J\x07[red]x\u202e"
    write(tmp_path / "run/events.jsonl", {**STEP, "task": evil})
    out = shown(tmp_path / "run")
    assert "\x1b" not in out
    assert "\\x1b[2J\\x07[red]x\\u202e" in out


def test_a_hundred_runs_are_looked_at_without_reading_a_line_twice(tmp_path):
    write_stream(tmp_path / "stream")
    for n in range(100):
        write(tmp_path / f"runs/{n:03d}/events.jsonl", *[{**STEP, "step": s} for s in range(1, 20)])
        (tmp_path / f"runs/{n:03d}/config.yaml").touch()
    runs = {}
    assert len(refresh_runs([tmp_path / "runs"], runs)) == 100
    before = {run.tail.path: run.tail.offset for run in runs.values()}
    assert build_runs_table(refresh_runs([tmp_path / "runs"], runs)).row_count == 100
    assert {run.tail.path: run.tail.offset for run in runs.values()} == before


def test_what_cannot_be_watched_is_refused(cli_error, tmp_path):
    assert "there is no such folder" in cli_error("watch", tmp_path / "nowhere")
    assert "continual watch needs a folder" in cli_error("watch")
    assert "unknown key 'onse'; did you mean 'once'" in cli_error("watch", tmp_path, "onse=true")
    assert "every=0: expected a whole number of at least 1" in cli_error(
        "watch", tmp_path, "every=0"
    )

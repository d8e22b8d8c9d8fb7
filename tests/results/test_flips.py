"""Which examples went from right to wrong, where, and which came back: held to a count by brute
force.
"""

import io
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from continual.errors import DataError
from continual.reports import write
from continual.results.flips import Flip, count_flips, find_flips
from continual.results.matrix import Matrix
from continual.results.run_folder import Run
from tests.support.fake_run import write_fake_run

STAGES = ("base", "a", "b", "c")


def told(folder, histories):
    """The run of one task whose examples had these marks, None where one has none, after each of
    the stages.
    """
    matrix = Matrix(
        "s",
        "o",
        "naive",
        0,
        ("a", "b", "c"),
        dict.fromkeys("abc", "token_f1"),
        STAGES,
        ((0.0,) * 3,) * len(STAGES),
    )
    for number, stage in enumerate(STAGES):
        rows = [
            {
                "id": key,
                "prompt": f"{key}?",
                "answer": f"{key} {stage}",
                "references": ["x", "y"],
                "score": marks[number],
            }
            for key, marks in histories.items()
            if marks[number] is not None
        ]
        path = folder / "predictions" / f"stage-{number:02d}" / "a.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Run(folder, matrix)


def expected(histories):
    """Every pair of a right and a wrong mark with none between, and the first right one after it."""
    found = set()
    for key, marks in histories.items():
        for i, first in enumerate(marks):
            for k in range(i + 1, len(marks)):
                if (
                    first is None
                    or marks[k] is None
                    or any(m is not None for m in marks[i + 1 : k])
                ):
                    continue
                if first >= 0.5 > marks[k]:
                    later = [
                        m
                        for m in range(k + 1, len(marks))
                        if marks[m] is not None and marks[m] >= 0.5
                    ]
                    found.add(
                        Flip(
                            "a",
                            str(key),
                            STAGES[i],
                            STAGES[k],
                            f"{key}?",
                            f"{key} {STAGES[i]}",
                            f"{key} {STAGES[k]}",
                            ("x", "y"),
                            STAGES[later[0]] if later else None,
                        )
                    )
    return found


MARKS = st.lists(
    st.sampled_from([0.0, 0.49, 0.5, 1.0, None]), min_size=len(STAGES), max_size=len(STAGES)
)


@settings(max_examples=60)
@given(
    st.dictionaries(
        st.one_of(st.integers(0, 9), st.text("xyz", min_size=1, max_size=2)), MARKS, max_size=6
    )
)
def test_every_fall_of_every_example_is_found_with_its_answers_and_its_return(histories):
    with tempfile.TemporaryDirectory() as folder:
        found = find_flips(told(Path(folder), histories))
    assert len(found) == len(set(found))
    assert set(found) == expected(histories)
    assert [STAGES.index(f.lost_stage) for f in found] == sorted(
        STAGES.index(f.lost_stage) for f in found
    )
    for stage in STAGES:
        both = (
            sum(f.lost_stage == stage for f in found),
            sum(f.regained_stage == stage for f in found),
        )
        assert count_flips(found).get(("a", stage), (0, 0)) == both


def test_what_falls_and_comes_back_changes_the_score_by_as_much(tmp_path):
    run = Run.load(write_fake_run(tmp_path / "run", "naive"))
    found, size = count_flips(find_flips(run)), 20
    for task in run.matrix.tasks:
        right = [
            sum(row.score >= 0.5 for row in run.load_predictions(stage, task))
            for stage in run.matrix.stages
        ]
        known: set = set()
        for number, stage in enumerate(run.matrix.stages):
            now = {row.id for row in run.load_predictions(stage, task) if row.score >= 0.5}
            lost, back = found.get((task, stage), (0, 0))
            if number:
                assert right[number] - right[number - 1] == len(now - known) + back - lost
            known |= now
    assert sum(lost for lost, _ in found.values()) > size


def test_an_example_that_stands_twice_counts_once(tmp_path):
    run = told(tmp_path, {"e": [1.0, 1.0, 0.0, 0.0]})
    path = tmp_path / "predictions/stage-02/a.jsonl"
    path.write_text(path.read_text() * 2)
    assert len(find_flips(run)) == 1


def test_predictions_that_cannot_be_read_are_named(tmp_path):
    run = told(tmp_path, {"e": [1.0, 0.0, 0.0, 0.0]})
    (tmp_path / "predictions/stage-01/a.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"stage-01/a.jsonl:1"):
        find_flips(run)


def shown(folder):
    said = io.StringIO()
    write.print_tables(Console(file=said, width=100), folder)
    return said.getvalue()


def test_the_report_has_them_task_by_stage_and_some_answers(tmp_path):
    run = told(
        tmp_path,
        {"e": [0.0, 1.0, 0.0, 1.0], "f": [0.0, 1.0, 0.0, 0.0], "g\x1b": [1.0, 1.0, 1.0, 0.2]},
    )
    run.matrix.save(tmp_path / "matrix.json")
    said = shown(tmp_path)
    assert (
        "answers lost (−) and regained (+) at each stage; right is a mark of at least 0.5" in said
    )
    line = next(line for line in said.split("regained")[1].splitlines() if line.startswith("a "))
    assert line.split() == ["a", "·", "−2", "−1", "+1"]
    assert "g\\x1b: 'g\\x1b b' after b, 'g\\x1b c' after c" in said
    assert "\x1b" not in said


def test_a_run_that_lost_nothing_says_so(tmp_path):
    run = told(tmp_path, {"e": [0.0, 1.0, 1.0, 1.0]})
    run.matrix.save(tmp_path / "matrix.json")
    assert "none was lost" in shown(tmp_path)

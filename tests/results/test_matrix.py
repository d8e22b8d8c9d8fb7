"""The retained-task matrix: its summaries by hand, by published figures and by property; and its
file.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from continual.errors import DataError, MissingError
from continual.results.matrix import SUMMARIES, Matrix, intransigence, performance_by_stage
from tests.support.matrices import CITB, JOINT, KNOWN, PUBLISHED, THREE, made, matrices, published

# Final figures of O-LoRA's own logs (Wang et al. 2023): exact match after each stage, never
# measured ahead of it.
SEQFT = (
    (0.970132, None, None, None),
    (0.891053, 0.5525, None, None),
    (0.747632, 0.534474, 0.722763, None),
    (0.795263, 0.526711, 0.488421, 0.900263),
)
ICRLORA = (
    (0.987105, None, None, None),
    (0.824737, 0.570132, None, None),
    (0.807763, 0.449474, 0.723816, None),
    (0.795, 0.408158, 0.641447, 0.900132),
)
OLORA = (
    (0.987105, None, None, None),
    (0.985526, 0.577632, None, None),
    (0.974079, 0.574079, 0.719079, None),
    (0.977368, 0.560658, 0.710395, 0.886184),
)


def in_percent(matrix, *names):
    return tuple(round(100 * matrix.summary()[name], 2) for name in names)


def test_summaries_of_a_three_by_three_matrix_are_those_computed_by_hand():
    assert THREE.summary() == pytest.approx(
        {
            "average_performance": (0.5 + 0.4 + 1.0) / 3,
            "average_incremental_performance": (0.8 + (0.9 + 0.7) / 2 + (0.5 + 0.4 + 1.0) / 3) / 3,
            "learning_accuracy": (0.8 + 0.7 + 1.0) / 3,
            "backward_transfer": ((0.5 - 0.8) + (0.4 - 0.7)) / 2,
            "forgetting": ((0.9 - 0.5) + (0.7 - 0.4)) / 2,
            "forward_transfer": ((0.3 - 0.2) + (0.25 - 0.0)) / 2,
        }
    )


def test_intransigence_is_what_the_reference_knows_and_the_tasks_own_stages_missed():
    assert intransigence(THREE, JOINT) == pytest.approx((0.1 + 0.1 + 0.0) / 3)
    assert THREE.summary(JOINT)["intransigence"] == intransigence(THREE, JOINT)
    assert "intransigence" not in THREE.summary()


def test_intransigence_refuses_a_reference_over_other_tasks():
    other = made(((0.9, 0.8),), tasks=("a", "b"), stages=("joint",))
    with pytest.raises(DataError, match="does not score c"):
        intransigence(THREE, other)


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("olora_order1_seqft", SEQFT),
        ("olora_order1_icrlora", ICRLORA),
        ("olora_order1_olora", OLORA),
    ],
)
def test_figures_of_the_o_lora_logs_are_reproduced(name, scores):
    tasks = ("dbpedia", "amazon", "yahoo", "agnews")
    matrix = made(scores, tasks=tasks, stages=tasks)
    told = in_percent(
        matrix, "average_performance", "backward_transfer", "forgetting", "learning_accuracy"
    )
    assert told == KNOWN[name]
    assert matrix.summary()["average_incremental_performance"] is not None
    assert matrix.summary()["forward_transfer"] is None


@pytest.mark.parametrize("name", KNOWN)
def test_published_o_lora_matrices_have_their_known_values(name):
    told = in_percent(
        published(name),
        "average_performance",
        "backward_transfer",
        "forgetting",
        "learning_accuracy",
    )
    assert told == KNOWN[name]


@pytest.mark.parametrize("method", CITB)
def test_published_citb_matrices_have_their_known_mean_and_spread(method):
    if not PUBLISHED.is_dir():
        pytest.skip("the published matrices (../shared/data/published) are not on this machine")
    runs = [Matrix.load(path).summary() for path in PUBLISHED.glob(f"citb_{method}_seed*.json")]
    assert len(runs) == 4
    told = []
    for name in ("average_performance", "backward_transfer"):
        values = [100 * run[name] for run in runs]
        told += [round(statistics.mean(values), 1), round(statistics.stdev(values), 1)]
    assert tuple(told) == CITB[method]


def test_every_published_matrix_reads_though_it_has_no_schema_and_further_keys():
    names = [path.stem for path in PUBLISHED.glob("*.json")]
    matrices = [published(name) for name in names] or [published("any")]
    assert all(matrix.is_finished and matrix.is_sequential for matrix in matrices)
    assert (
        published("olora_order1_seqlora").summary()["learning_accuracy"] is None
    )  # its diagonal has an empty cell


def test_the_stage_of_a_task_is_found_by_name_wherever_its_column_stands():
    swapped = made([(c, a, b) for a, b, c in THREE.scores], tasks=("c", "a", "b"))
    assert swapped.summary() == pytest.approx(THREE.summary())


def test_a_joint_run_has_only_what_its_last_row_tells():
    told = JOINT.summary()
    assert told.pop("average_performance") == pytest.approx(0.9)
    assert set(told.values()) == {None}
    assert JOINT.is_finished
    assert not JOINT.is_sequential


def test_an_unfinished_run_has_no_summary_rather_than_one_over_fewer_tasks():
    half = replace(THREE, stages=THREE.stages[:3], scores=THREE.scores[:3])
    assert not half.is_finished
    assert set(half.summary().values()) == {None}
    assert performance_by_stage(half) == pytest.approx([0.8, 0.8])


def test_a_run_with_only_its_base_row_is_unfinished():
    assert not replace(THREE, stages=("base",), scores=THREE.scores[:1]).is_finished


def test_an_unmeasured_cell_silences_just_the_summaries_that_need_it():
    holed = replace(
        THREE, scores=(THREE.scores[0], (0.8, None, 0.1), *THREE.scores[2:])
    )  # needed by R[1][2] only
    silent = {name for name, value in holed.summary().items() if value is None}
    assert silent == {"forward_transfer"}


def test_one_task_has_no_earlier_ones_to_forget():
    told = made(((0.1,), (0.9,)), tasks=("a",), stages=("base", "a")).summary()
    assert (told["backward_transfer"], told["forgetting"], told["forward_transfer"]) == (
        None,
        None,
        None,
    )
    assert told["learning_accuracy"] == 0.9


def test_with_row_appends_and_leaves_the_old_matrix_alone():
    first = made((), stages=())
    grown = first.with_row("base", [0.1, 0.2, None]).with_row("a", [0.9, 0.2, 0.1])
    assert grown.stages == ("base", "a")
    assert grown.scores == ((0.1, 0.2, None), (0.9, 0.2, 0.1))
    assert first.stages == ()


def test_a_saved_matrix_loads_as_itself_and_leaves_no_temporary_file(tmp_path):
    matrix = replace(THREE, cost={"seconds": 12.5, "tokens": 1000})
    matrix.save(tmp_path / "matrix.json")
    matrix.save(tmp_path / "matrix.json")
    assert Matrix.load(tmp_path / "matrix.json") == matrix
    assert [path.name for path in tmp_path.iterdir()] == ["matrix.json"]
    assert json.loads((tmp_path / "matrix.json").read_text())["summary"] == matrix.summary()


def test_a_save_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch):
    THREE.save(tmp_path / "matrix.json")

    def full(handle):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        replace(THREE, strategy="other").save(tmp_path / "matrix.json")
    assert Matrix.load(tmp_path / "matrix.json") == THREE
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2; this version reads schema 1"),
        ({"scroes": []}, "unknown key 'scroes'"),
        (
            {"scores": [[0.1, 0.2], [0.1, 0.2, 0.3], [0, 0, 0], [0, 0, 0]]},
            "row 0 has 2 scores; expected 3",
        ),
        ({"scores": [[0.1, 0.2, 0.3]]}, "1 rows of scores for 4 stages"),
        (
            {"scores": [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 1.5, 0]]},
            "score 1.5 on 'b' after 'c' is no number in",
        ),
        (
            {"scores": [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, math.nan, 0]]},
            "score nan on 'b' after 'c'",
        ),
        ({"scores": [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, "1", 0]]}, "score '1' on 'b'"),
        ({"scores": "none"}, "scores is a str; expected list"),
        ({"tasks": ["a", "a", "c"]}, "task 'a' stands twice"),
        ({"stages": ["a", "base", "b", "c"]}, "stage 'base' is row 1; it must be the first"),
        ({"metrics": {"a": "m"}}, "task 'b' has no metric"),
        ({"counts": [1, 2]}, "2 counts; expected 3"),
        ({"cost": {"seconds": math.inf}}, "cost 'seconds' is inf"),
    ],
)
def test_a_matrix_that_cannot_be_is_refused_with_what_is_wrong(change, message):
    with pytest.raises(DataError, match=message):
        Matrix.from_dict({**THREE.to_dict(), **change})


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(DataError) as told:
        Matrix.from_dict({"schema": 1, "tasks": ["a"], "colour": "red"})
    assert all(
        key in str(told.value)
        for key in ("stream", "strategy", "metrics", "stages", "scores", "colour")
    )


def test_reading_names_the_file_and_the_line(tmp_path):
    with pytest.raises(MissingError, match="there is no such matrix"):
        Matrix.load(tmp_path / "matrix.json")
    (tmp_path / "matrix.json").write_text('{"schema": 1,\n oops')
    with pytest.raises(DataError, match=r"matrix\.json:2:2: found broken JSON"):
        Matrix.load(tmp_path / "matrix.json")
    (tmp_path / "matrix.json").write_text("[]")
    with pytest.raises(DataError, match=r"matrix\.json: a list, where an object"):
        Matrix.load(tmp_path / "matrix.json")


@given(matrices(holes=True))
def test_any_matrix_survives_json(matrix):
    assert Matrix.from_dict(json.loads(json.dumps(matrix.to_dict(), allow_nan=False))) == matrix


@given(matrices())
def test_forgetting_is_never_below_minus_backward_transfer(matrix):
    told = matrix.summary()
    assert told["forgetting"] >= -told["backward_transfer"] - 1e-12


@given(st.floats(0, 1), st.integers(2, 5))
def test_a_constant_matrix_neither_forgets_nor_transfers(score, size):
    tasks = tuple(f"t{i}" for i in range(size))
    told = made([(score,) * size] * (size + 1), tasks=tasks, stages=("base", *tasks)).summary()
    for name in ("backward_transfer", "forgetting", "forward_transfer"):
        assert told[name] == 0
    for name in ("average_performance", "average_incremental_performance", "learning_accuracy"):
        assert told[name] == pytest.approx(score)


@given(matrices(), st.randoms())
def test_columns_may_stand_in_any_order(matrix, random):
    order = random.sample(range(len(matrix.tasks)), len(matrix.tasks))
    shuffled = replace(
        matrix,
        tasks=tuple(matrix.tasks[i] for i in order),
        scores=tuple(tuple(row[i] for i in order) for row in matrix.scores),
    )
    assert shuffled.summary() == pytest.approx(matrix.summary(), abs=1e-12)


@given(matrices(holes=True, base=False))
def test_without_a_base_row_only_forward_transfer_is_lost(matrix):
    based = replace(
        matrix, stages=("base", *matrix.stages), scores=((0.0,) * len(matrix.tasks), *matrix.scores)
    )
    assert matrix.summary() == {**based.summary(), "forward_transfer": None}
    assert set(matrix.summary()) == set(SUMMARIES)

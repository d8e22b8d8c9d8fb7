"""The results as data: continual.load_runs, comparison.parquet, and the notebook that draws the
README's picture.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import continual
from continual.errors import ConfigError, DataError, MissingError
from continual.reports import write
from continual.results import tables
from continual.results.matrix import Matrix, mean_or_none, performance_by_stage
from continual.results.run_folder import Run, find_runs, group_runs
from tests.support.fake_run import SKILLS, write_fake_adaptation, write_fake_run
from tests.support.models import run_in_process as small_run

ROOT = Path(__file__).parents[2]
KINDS = {
    "text": "str",
    "whole number": "Int64",
    "number": "float64",
    "true or false": "bool",
    "texts": "object",
}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """Two strategies and the joint arm, two seeds each, one of them unfinished and one that has
    scored nothing.
    """
    folder = tmp_path_factory.mktemp("c") / "runs" / "compare"
    for seed in range(2):
        for strategy in ("naive", "replay"):
            write_fake_run(folder / f"{strategy}-{seed}", strategy, seed)
        write_fake_run(
            folder / f"joint-{seed}", "naive", seed, joint=True, settings={"arrangement": "joint"}
        )
    write_fake_run(folder / "maml-0", "maml", finished=False)
    return folder


def test_cells_are_the_scores_of_every_matrix(comparison):
    cells = continual.load_runs(comparison)
    for path in comparison.glob("*/matrix.json"):
        matrix = Matrix.load(path)
        mine = cells[cells.path == str(path.parent)]
        assert (
            tuple(map(tuple, mine.score.to_numpy().reshape(len(matrix.stages), -1)))
            == matrix.scores
        )
        assert tuple(mine.stage.unique()) == matrix.stages
        assert tuple(mine.task.unique()) == matrix.tasks


def test_a_task_s_own_stage_parts_what_is_learned_from_what_is_not(comparison):
    cells = continual.load_runs(comparison / "naive-0")
    own = cells[cells.stage_index == cells.learned]
    assert list(own.stage) == list(own.task) == list(SKILLS)
    assert continual.load_runs(comparison / "joint-0").learned.isna().all()
    assert (
        continual.load_runs(comparison / "maml-0").learned.isna().sum() == 4 * 3
    )  # stages and tasks to come


def test_summaries_are_those_of_the_report_with_intransigence_where_a_joint_run_is_beside(
    comparison,
):
    told = continual.load_runs(comparison, what="summaries")
    one = told[told.run == "replay-1"]
    values = dict(
        zip(one[one.kind == "summary"].name, one[one.kind == "summary"].value, strict=True)
    )
    reference = Matrix.load(comparison / "joint-1" / "matrix.json")
    matrix = Matrix.load(comparison / "replay-1" / "matrix.json")
    assert values == matrix.summary(reference)
    assert (
        dict(zip(one[one.kind == "cost"].name, one[one.kind == "cost"].value, strict=True))
        == matrix.cost
    )
    assert told[(told.run == "maml-0") & (told.kind == "summary")].value.isna().all()


def test_settings_are_the_configuration_s(comparison):
    told = continual.load_runs(comparison / "naive-0", what="settings")
    assert dict(zip(told.key, told.value, strict=True)) == Run.load(comparison / "naive-0").settings


def test_examples_are_the_answers_after_each_stage(comparison):
    told = continual.load_runs(comparison / "naive-1", what="examples")
    run = Run.load(comparison / "naive-1")
    after = told[(told.stage == SKILLS[2]) & (told.task == SKILLS[0])]
    rows = run.load_predictions(SKILLS[2], SKILLS[0])
    assert (set(after.stage_index), list(after.id)) == ({3}, [row.id for row in rows])
    for column in ("prompt", "answer", "score"):
        assert list(after[column]) == [getattr(row, column) for row in rows]
    assert [list(r) for r in after.references] == [list(row.references) for row in rows]


def test_steps_are_those_of_the_log_and_a_resumed_run_s_count_once(comparison, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(comparison / "naive-0", folder)
    log = (folder / "events.jsonl").read_text()
    (folder / "events.jsonl").write_text(log + log)
    told, steps = continual.load_runs(folder, what="steps"), Run.load(folder).events("step")
    assert list(told.loss) == [e["loss"] for e in steps]
    assert list(told.stage) == [e["task"] for e in steps]
    assert len(told) == log.count('"event": "step"')


def test_a_real_run_s_tables_hold_what_it_did(run_keys, tmp_path):
    matrix, _ = small_run(tmp_path / "r", run_keys, "stream.tasks=[first,loud]", "train.epochs=1")
    cells, steps = (continual.load_runs(tmp_path / "r", what=what) for what in ("cells", "steps"))
    assert cells.score.tolist() == [score for row in matrix.scores for score in row]
    assert (set(cells.n), set(cells.metric), set(cells.seed)) == ({4}, {"exact_match"}, {0})
    assert steps.groupby("stage").step.max().to_dict() == {"first": 2, "loud": 2}
    answers = continual.load_runs(tmp_path / "r", what="examples")
    assert answers.groupby(["stage_index", "task"]).score.mean().to_numpy() == pytest.approx(
        cells.score
    )


@pytest.mark.parametrize("what", tables.TABLES)
def test_every_table_has_the_columns_that_the_documentation_lists(what, comparison):
    sections = re.split(r"^## ", (ROOT / "docs" / "data.md").read_text("utf-8"), flags=re.MULTILINE)
    told = [
        row
        for section in sections
        if section.startswith(("In every table", f'what="{what}"'))
        for row in re.findall(r"^\| `(\w+)` \| (.+?) \| (.+) \|$", section, re.MULTILINE)
    ]
    assert told == [
        (name, *says) for name, says in {**tables.RUN_COLUMNS, **tables.TABLES[what][0]}.items()
    ]
    table = continual.load_runs(comparison, what=what)
    assert {name: str(kind) for name, kind in table.dtypes.items()} == {
        name: KINDS[kind] for name, kind, _ in told
    }


def test_runs_come_in_the_order_of_the_report_whatever_the_order_of_the_paths(comparison):
    names = [group.label for group in group_runs(find_runs([comparison])[0])]
    paths = sorted((path.parent for path in comparison.glob("*/matrix.json")), reverse=True)
    assert list(continual.load_runs(comparison).group.unique()) == names
    assert list(continual.load_runs(*paths).group.unique()) == names


def test_a_comparison_writes_its_cells_as_parquet_with_paths_seen_from_there(comparison, tmp_path):
    import pandas

    written = write.write_report(comparison, out=tmp_path / "there" / "report")
    told = pandas.read_parquet(next(path for path in written if path.name == tables.PARQUET_FILE))
    cells = continual.load_runs(comparison)
    assert list(told.score) == list(cells.score)
    assert list(told.columns) == list(cells.columns)
    assert {str((tmp_path / "there" / "report" / path).resolve()) for path in told.path} == set(
        cells.path
    )


def test_its_columns_say_what_they_hold(comparison, tmp_path):
    from pyarrow.parquet import read_schema

    write.write_report(comparison, out=tmp_path)
    schema = read_schema(tmp_path / tables.PARQUET_FILE)
    assert schema.field("learned").metadata == {
        b"says": tables.TABLES["cells"][0]["learned"][1].encode()
    }


# What is refused, and what is told


def test_a_run_that_has_scored_nothing_is_named_by_a_warning(comparison, tmp_path):
    shutil.copytree(comparison, tmp_path / "c")
    (tmp_path / "c" / "maml-1").mkdir()
    (tmp_path / "c" / "maml-1" / "config.yaml").write_text("seed: 1\n")
    with pytest.warns(UserWarning, match="have scored nothing yet: maml-1"):
        told = continual.load_runs(tmp_path / "c")
    assert "maml-1" not in set(told.run)


def test_what_there_is_no_table_of_is_refused(comparison, tmp_path):
    with pytest.raises(ConfigError, match="unknown what 'cell'; did you mean 'cells'"):
        continual.load_runs(comparison, what="cell")
    with pytest.raises(ConfigError, match="needs folders"):
        continual.load_runs()
    with pytest.raises(MissingError, match="there is no such folder"):
        continual.load_runs(tmp_path / "nowhere")
    with pytest.raises(DataError, match="an adapt folder has a curve"):
        continual.load_runs(write_fake_adaptation(tmp_path / "adapt"))


@pytest.mark.parametrize(
    ("what", "file", "old", "new"),
    [
        ("cells", "matrix.json", '"seed": 0', f'"seed": {2**70}'),
        (
            "examples",
            "predictions/stage-01/reverse.jsonl",
            '"references": [',
            '"references": [{"a": 1}, ',
        ),
    ],
)
def test_a_value_that_its_column_cannot_hold_names_the_run(what, file, old, new, tmp_path):
    folder = write_fake_run(tmp_path / "r")
    sound = (folder / file).read_text()
    assert old in sound
    (folder / file).write_text(sound.replace(old, new))
    with pytest.raises(DataError, match=rf"^{folder}: found a value that its column cannot hold"):
        continual.load_runs(folder, what=what)


def test_a_step_that_is_no_whole_number_is_refused_and_not_rounded(tmp_path):
    folder = write_fake_run(tmp_path / "r")
    log = (folder / "events.jsonl").read_text()
    (folder / "events.jsonl").write_text(log.replace('"step": 10,', '"step": 10.5,', 1))
    with pytest.raises(
        DataError, match=r"events\.jsonl: found a step with step 10\.5, expected a whole number"
    ):
        continual.load_runs(folder, what="steps")


def test_a_link_out_of_a_folder_is_not_followed(comparison, tmp_path):
    folder = write_fake_run(tmp_path / "r")
    (folder / "events.jsonl").unlink()
    (folder / "events.jsonl").symlink_to(comparison / "naive-0" / "events.jsonl")
    with pytest.raises(DataError, match="is a link to"):
        continual.load_runs(folder, what="steps")


def test_importing_the_package_loads_none_of_it():
    code = "import sys, continual; continual.load_runs; print({'torch', 'pandas', 'pyarrow', 'yaml'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "set()\n"


# The notebook


@pytest.fixture
def notebook(comparison, monkeypatch):
    """What its names hold after its cells have run one after another, in a folder beside the runs."""
    told = json.loads((ROOT / "examples" / "compare.ipynb").read_text("utf-8"))
    beside = comparison.parents[1] / "examples"
    beside.mkdir(exist_ok=True)
    monkeypatch.chdir(beside)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = {}
    for cell in told["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    yield names
    names["plt"].close(names["figure"])


def test_the_notebook_draws_the_curves_and_bars_of_the_readme_s_picture(notebook, comparison):
    groups = group_runs(find_runs([comparison])[0])
    left, right = notebook["figure"].axes
    lines = {line.get_label(): [y / 100 for y in line.get_ydata()] for line in left.get_lines()}
    for group in groups:
        runs = [performance_by_stage(run.matrix) for run in group.runs]
        told = [mean_or_none(line[i] for line in runs) for i in range(len(runs[0]))]
        expected = [group.mean("average_performance")] * 2 if group.is_joint else told
        assert lines.pop(group.label) == pytest.approx(expected)
    assert not lines
    assert [text.get_text() for text in right.get_yticklabels()] == [
        group.label for group in groups
    ]
    solid, hatched = (
        [bar.get_width() / 100 for bar in bars]
        for bars in right.containers
        if hasattr(bars, "patches")
    )
    for widths, name in ((solid, "average_performance"), (hatched, "forgetting")):
        ends = [group.mean(name) for group in groups]
        assert [w for w, end in zip(widths, ends, strict=True) if end is not None] == pytest.approx(
            [max(end, 0) for end in ends if end is not None]
        )


def test_the_notebook_is_kept_without_outputs():
    told = json.loads((ROOT / "examples" / "compare.ipynb").read_text("utf-8"))
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in told["cells"])

"""continual verify: published matrices give their known figures, and what does not hold is told."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from continual.errors import DataError
from continual.results.matrix import Matrix
from continual.results.published import load_published
from continual.results.variants import VARIANTS
from tests.support.fake_run import write_fake_run
from tests.support.matrices import CITB, KNOWN, PUBLISHED, THREE

SCORES = "stage,a,b,c\nbase,0.1,0.2,0\na,0.8,0.3,0.1\nb,0.9,0.7,0.25\nc,0.5,0.4,1\n"
PERCENT = "stage (percent),a,b,c\nbase,10,20,0\na,80,30,10\nb,90,70,25\nc,50,40,100\n"


@pytest.fixture
def scores(tmp_path):
    """Writes a CSV file of this text."""

    def written(text, name="scores.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return written


def needs_published():
    if not PUBLISHED.is_dir():
        pytest.skip("the published matrices (../shared/data/published) are not on this machine")


def test_published_matrices_are_reproduced_to_the_digits_of_their_papers(run_cli):
    needs_published()
    code, out, err = run_cli("verify", PUBLISHED, "json=true")
    assert (code, err) == (0, "")
    told = {g["strategy"]: g for g in json.loads(out)["groups"]}
    for name, known in KNOWN.items():
        mean = told[name.removeprefix("olora_")]["mean"]
        assert (
            tuple(
                round(100 * mean[key], 2)
                for key in (
                    "average_performance",
                    "backward_transfer",
                    "forgetting",
                    "learning_accuracy",
                )
            )
            == known
        )
    for name, known in CITB.items():
        assert told[name]["n"] == 4
        figures = [
            round(100 * told[name][kind][key], 1)
            for key in ("average_performance", "backward_transfer")
            for kind in ("mean", "spread")
        ]
        assert tuple(figures) == known


def test_published_figures_stand_in_the_tables_under_the_names_of_their_forms(run_cli):
    needs_published()
    code, out, _ = run_cli("verify", PUBLISHED / "olora_long_olora.json")
    assert code == 0
    words = out.split()
    assert all(figure in words for figure in ("72.17", "−0.73", "1.74", "72.86", "0.73"))
    assert all(v.formula in out and v.source in out for v in VARIANTS.values())


def test_a_csv_is_the_matrix_that_its_lines_say(scores):
    (told,) = load_published([scores(SCORES + "counts,10,20,70\n", "ewc_seed3.csv")])
    matrix = told.run.matrix
    assert (matrix.strategy, matrix.seed, matrix.counts) == ("ewc", 3, (10, 20, 70))
    assert (matrix.tasks, matrix.stages, matrix.scores) == (THREE.tasks, THREE.stages, THREE.scores)


def test_an_empty_cell_is_what_was_not_measured(scores):
    (told,) = load_published([scores("stage,a,b\na,0.9,\nb,0.5,0.8\n")])
    assert told.run.matrix.scores == ((0.9, None), (0.5, 0.8))


@pytest.mark.parametrize(
    "text",
    [
        PERCENT,
        PERCENT.replace("stage (percent)", "stage"),
        PERCENT.replace("stage (percent)", "Stage (percent)").replace("\n", "\r\n"),
        "\ufeff" + PERCENT.replace("stage (percent)", '""'),
    ],
)
def test_percent_is_percent_where_it_says_so_or_can_be_nothing_else(scores, run_cli, text):
    path = scores(text)
    (told,) = load_published([path])
    assert told.is_percent
    assert told.run.matrix.summary() == pytest.approx(THREE.summary())
    assert "read as percent" in run_cli("verify", path)[1]


def test_json_has_every_form_its_definition_and_the_mean_over_repetitions(run_cli, scores):
    for seed, last in enumerate((0.5, 0.6)):
        scores(SCORES.replace("c,0.5", f"c,{last}"), f"ewc_seed{seed}.csv")
    code, out, _ = run_cli("verify", scores(SCORES).parent, "json=true")
    told = json.loads(out)
    assert code == 0
    assert told["definitions"].keys() == VARIANTS.keys() == told["matrices"][0]["forms"].keys()
    assert told["matrices"][0]["summary"].keys() == THREE.summary().keys()
    ewc = next(g for g in told["groups"] if g["strategy"] == "ewc")
    assert ewc["n"] == 2
    assert ewc["mean"]["forgetting_first_minus_last"] == pytest.approx(
        ((0.8 - 0.55) + (0.7 - 0.4)) / 2
    )
    low, high = ewc["interval"]["average_performance"]
    assert low < ewc["mean"]["average_performance"] < high


def test_a_run_and_a_comparison_are_read_with_their_runs(run_cli, tmp_path):
    for seed in range(2):
        write_fake_run(tmp_path / "c" / f"ewc-{seed}", "ewc", seed)
    code, out, _ = run_cli("verify", tmp_path / "c")
    assert code == 0
    assert "2 matrices" in out
    assert run_cli("verify", tmp_path / "c" / "ewc-0")[0] == 0


def test_a_stated_summary_that_the_scores_do_not_give_is_told_after_the_tables(run_cli, tmp_path):
    told = {**THREE.to_dict()}
    told["summary"] = {**told["summary"], "forgetting": 0.2, "learning_accuracy": round(2.5 / 3, 4)}
    path = tmp_path / "matrix.json"
    path.write_text(json.dumps(told))
    code, out, err = run_cli("verify", path)
    assert code == 2
    assert "Forgetting" in out
    assert err.count(" states a ") == 1
    assert "states a forgetting of 0.2, and its scores give 0.350000" in err


def test_answers_that_were_marked_otherwise_than_the_matrix_says_are_told(run_cli, tmp_path):
    folder = write_fake_run(tmp_path / "r", "ewc")
    path = folder / "predictions" / "stage-02" / "reverse.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "score": 0.25}) + "\n" for row in rows))
    code, _, err = run_cli("verify", folder)
    assert code == 2
    assert "the 20 answers to 'reverse' after 'third_word' come to 0.250000" in err


def test_an_unfinished_run_is_named_and_in_no_figure(run_cli, tmp_path):
    code, out, _ = run_cli("verify", write_fake_run(tmp_path / "r", finished=False))
    assert code == 0
    assert "unfinished, and in no figure" in out


LINES = {
    "no file": (b"", "scores.csv: found no line, expected a first line of 'stage' and the tasks"),
    "no stages": ("stage,a\n", "found no stage below the first line"),
    "another head": (
        "task,a\na,0.5\n",
        ":1: the first cell is 'task'; expected 'stage', or 'stage (percent)'",
    ),
    "semicolons": ("stage;a\na;0.5\n", ":1: the first cell is 'stage;a'"),
    "a cell too few": (
        "stage,a,b\na,0.5\n",
        ":2: found 2 cells, expected 3, as the first line has",
    ),
    "a cell too many": ("stage,a\na,0.5,0.5\n", ":2: found 3 cells, expected 2"),
    "a word": (
        "stage,a\na,good\n",
        ":2: 'good' is no number; write a score, or leave the cell empty",
    ),
    "not a number": ("stage,a\na,nan\n", ":2: 'nan' is no number"),
    "infinite": ("stage,a\na,1e999\n", ":2: '1e999' is no number"),
    "thousands of digits": (f"stage,a\na,{'9' * 5000}\n", ":2: '999"),
    "a comma in a number": ('stage,a\na,"0,5"\n', ":2: '0,5' is no number"),
    "below 0": ("stage,a\na,-0.5\n", ":2: the score -0.5 is not in [0, 1]; fix it"),
    "above 100": ("stage,a\na,101\n", ":2: the score 101 is not in [0, 100]"),
    "both scales": (
        "stage,a,b\na,0.5,\nb,85,70\n",
        ":3: found the score 85, and 0.5 on line 2; expected all in [0, ",
    ),
    "a stage twice": ("stage,a\na,0.5\na,0.6\n", "stage 'a' stands twice"),
    "a task twice": ("stage,a,a\na,0.5,0.5\n", "task 'a' stands twice"),
    "base in the middle": (
        "stage,a\na,0.5\nbase,0\n",
        "stage 'base' is row 1; it must be the first",
    ),
    "no tasks": ("stage\na\n", "there are no tasks"),
    "counts twice": (
        "stage,a\na,0.5\ncounts,3\ncounts,3\n",
        ":4: a second line of counts; keep one",
    ),
    "half a count": ("stage,a\na,0.5\ncounts,3.5\n", ":3: '3.5' is no number of test examples"),
    "an endless count": (f"stage,a\na,0.5\ncounts,{'9' * 5000}\n", ":3: '999"),
    "Latin-1": (b"stage,caf\xe9\n", ":1:10: found the byte 0xe9, expected UTF-8"),
    "a control character": (
        "stage,a\x1b[2J\na,0.5\n",
        ":1: a control character in 'a\\x1b[2J'; remove it",
    ),
    "an open quote": ('stage,"a\na,0.5\n', "found broken CSV"),
    "a NUL byte": ("stage,a\na,0\x00\n", ":2: "),
}


@pytest.mark.parametrize("what", LINES)
def test_a_bad_csv_is_refused_with_its_file_and_line(cli_error, scores, what):
    text, message = LINES[what]
    told = cli_error("verify", scores(text))
    assert "scores.csv" in told
    assert message in told
    assert len(told) < 2000


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=60)
    | st.lists(
        st.sampled_from(
            [
                "stage",
                "stage (percent)",
                "base",
                "counts",
                "a",
                "b",
                ",",
                ",",
                ",",
                "\n",
                "\n",
                "0.5",
                "1e9",
                "-",
                "70",
                '"',
                "\r",
                "\0",
                "é",
                " ",
            ]
        ),
        max_size=30,
    ).map(lambda parts: "".join(parts).encode())
)
def test_any_bytes_are_a_matrix_or_refused(tmp_path, content):
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with suppress(DataError):
        (told,) = load_published([path])
        assert Matrix.from_dict(told.run.matrix.to_dict()) == told.run.matrix


def test_all_bad_files_of_a_folder_are_told_at_once(cli_error, scores):
    scores("stage,a\na,x\n", "one.csv")
    scores("[]", "two.json")
    told = cli_error("verify", scores(SCORES).parent)
    assert "one.csv:2" in told
    assert "two.json: a list, where an object" in told


def test_what_is_no_matrix_is_refused_with_what_to_give(cli_error, scores, tmp_path):
    assert "needs a matrix.json, a .csv of scores" in cli_error("verify")
    assert "there is no such file or folder" in cli_error("verify", tmp_path / "none")
    assert "found a .txt file, expected a matrix.json" in cli_error(
        "verify", scores("x", "notes.txt")
    )
    (tmp_path / "empty").mkdir()
    assert "no matrix in it" in cli_error("verify", tmp_path / "empty")


def test_a_link_out_of_a_folder_is_not_followed(cli_error, scores, tmp_path):
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "scores.csv").symlink_to(scores(SCORES))
    assert "is a link to" in cli_error("verify", tmp_path / "given")


def test_names_out_of_files_cannot_command_the_terminal(run_cli, tmp_path):
    bare = {**json.loads(json.dumps(THREE.to_dict())), "summary": {"\x1b[2J": 1}}
    (tmp_path / "matrix.json").write_text(json.dumps(bare))
    code, out, _ = run_cli("verify", tmp_path / "matrix.json")
    assert code == 0
    assert "\x1b[2J" not in out
    assert Matrix.load(tmp_path / "matrix.json") == THREE

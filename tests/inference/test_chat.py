"""Talking to a run's model, line by line, as it was after any of its stages."""

import io
import json
import shutil
import sys

import pytest

from continual.io.terminal import escape_control
from tests.support.models import load_json_lines, run_in_process

SHORT = ("stream.tasks=[first,last]", "score.max_new_tokens=6", "train.lr=0.01", "train.epochs=10")


@pytest.fixture(scope="module")
def done(run_keys, tmp_path_factory):
    """A finished run over two tasks."""
    out = tmp_path_factory.mktemp("runs") / "done"
    run_in_process(out, run_keys, *SHORT)
    return out


@pytest.fixture
def say(run_cli, monkeypatch):
    """What `continual chat` prints for these lines of a pipe, each as it stands there."""

    def typed(path, *told, words=("max_new_tokens=6", "device=cpu")):
        monkeypatch.setenv("COLUMNS", "300")
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in told)))
        code, out, err = run_cli("chat", path, *words)
        assert code == 0, err
        return out.splitlines()

    return typed


def first_answer(path, number, task):
    """The last line that is shown of it."""
    told = load_json_lines(path / f"predictions/stage-{number:02d}/{task}.jsonl")[0]["answer"]
    return escape_control(told).splitlines()[-1] if told else "(an empty answer)"


def test_a_prompt_from_a_pipe_is_answered(say, done):
    out = say(done, "Give the first word.")
    assert out[0].startswith(f"{done}, after stage last. Type a prompt")
    assert out[1] == "> Give the first word."
    assert len(out) == 3


@pytest.mark.parametrize(("stage", "number"), [("base", 0), ("1", 1), ("last", 2), ("first", 1)])
def test_a_tasks_instruction_stands_before_what_is_typed_and_each_stage_answers_as_it_did(
    say, done, stage, number
):
    asked = load_json_lines(done / "predictions/stage-00/first.jsonl")[0]["prompt"]
    instruction, words = asked.splitlines()
    out = say(done, "/task first", f"/stage {stage}", words)
    assert instruction in out
    assert out[-1] == first_answer(done, number, "first")


def test_an_example_is_a_test_row_with_what_would_be_right(say, done):
    out = say(done, "/task last", "/example")
    row = load_json_lines(done / "predictions/stage-02/last.jsonl")[0]
    assert out[-2:] == [first_answer(done, 2, "last"), f"right would be: {row['references'][0]}"]


def test_compare_asks_the_last_prompt_of_several_stages_side_by_side_and_goes_back(say, done):
    out = say(done, "/task first", "/example", "/compare base last", "/stages")
    table = "\n".join(out[out.index("> /compare base last") :])
    assert "base" in table
    assert all(
        first_answer(done, n, "first").removeprefix("(an empty answer)") in table for n in (0, 2)
    )
    assert out[-1].startswith("*  2 last  average ")


def test_compare_of_all_stages_has_a_row_for_each(say, run_keys, tmp_path):
    run_in_process(tmp_path, run_keys, "score.max_new_tokens=6", "train.epochs=1")
    out = "\n".join(say(tmp_path, "/task loud", "/example", "/compare"))
    rows = out[out.index("after stage", out.index("/compare")) :]
    assert [name for name in ("base", "first", "last", "loud") if name in rows] == [
        "base",
        "first",
        "last",
        "loud",
    ]


def test_tasks_and_stages_tell_what_they_scored(say, done):
    matrix = json.loads((done / "matrix.json").read_text())
    out = say(done, "/task first", "/tasks", "/stages")
    assert out[out.index("> /tasks") + 1] == f"* first  {100 * matrix['scores'][2][0]:.1f}"
    averages = [f"{50 * sum(row):.1f}" for row in matrix["scores"]]
    assert [line.lstrip("* ").split() for line in out[-3:]] == [
        [str(n), name, "average", averages[n]] for n, name in enumerate(["base", "first", "last"])
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/stag 1", "unknown command '/stag'; did you mean '/stage'"),
        ("/stage frist", "unknown stage 'frist'; did you mean 'first'"),
        ("/task lost", "unknown task 'lost'; did you mean 'last'"),
        ("/example", "/example needs a task"),
        ("/compare", "there is none yet; type one"),
        ("word " * 200, "the prompt: takes "),
    ],
)
def test_what_is_wrong_with_a_line_is_said_and_the_next_is_read(say, done, line, expected):
    out = say(done, line, "/stages")
    assert expected in " ".join(out)
    assert out[-3].split()[:2] == ["0", "base"]


def test_help_names_every_command(say, done):
    out = "\n".join(say(done, "/help"))
    assert all(
        word in out
        for word in ("/stages", "/stage NAME", "/task NAME", "/example", "/compare [NAME ...]")
    )


def test_quit_ends_it(say, done):
    assert len(say(done, "/quit", "/stages")) == 2


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft's own
@pytest.mark.parametrize("strategy", ["per_task", "router", "gain_lora"])
def test_a_strategy_that_chooses_weights_chooses_them_here_too(say, run_keys, tmp_path, strategy):
    rank = ("strategy.gain_lora.rank=2",) if strategy == "gain_lora" else ()
    run_in_process(tmp_path, run_keys, *SHORT, f"strategy={strategy}", *rank, "model.adapter=lora")
    out = say(tmp_path, "red blue", "/task first", "/example")
    assert ("has other weights for each task, and none is named" in " ".join(out)) == (
        strategy == "per_task"
    )
    assert out[-2] == first_answer(tmp_path, 2, "first")


def test_an_adapted_model_answers_as_it_did_when_it_was_scored(say, run_cli, run_keys, tmp_path):
    words = (
        "stream.tasks=[loud]",
        "adapt.steps=20",
        "adapt.eval_steps=[]",
        "adapt.shots=[null]",
        "adapt.draws=1",
        "train.lr=0.02",
        f"out={tmp_path / 'new'}",
    )
    assert run_cli("adapt", *run_keys, *words)[0] == 0
    (point,) = json.loads((tmp_path / "new/curve.json").read_text())["points"]
    out = say(tmp_path / "new", "/task loud", *["/example"] * 4, "/stages")
    right = [
        f"right would be: {out[i - 1]}" == line
        for i, line in enumerate(out)
        if line.startswith("right would be")
    ]
    assert sum(right) / 4 == point["score"]
    assert out[-1] == "*  0 adapted"


def test_an_unfinished_run_begins_at_its_newest_stage(say, done, tmp_path):
    copy = shutil.copytree(done, tmp_path / "copy")
    matrix = json.loads((copy / "matrix.json").read_text())
    matrix["stages"].pop()
    matrix["scores"].pop()
    (copy / "matrix.json").write_text(json.dumps(matrix))
    assert "after stage first." in say(copy, "/quit")[0]


def test_a_stream_that_is_gone_leaves_whole_prompts(say, done, run_keys, tmp_path):
    copy = shutil.copytree(done, tmp_path / "copy")
    config = (copy / "config.yaml").read_text()
    old = next(k for k in run_keys if k.startswith("stream.path=")).partition("=")[2]
    (copy / "config.yaml").write_text(config.replace(old, str(tmp_path / "gone")))
    out = say(copy, "/task first", "Give the first word.")
    assert "found no folder" in " ".join(out)
    assert len(out[-1]) > 0


def test_an_answer_cannot_command_the_terminal(say, done, monkeypatch):
    monkeypatch.setattr(
        "continual.inference.chat.generate_answers",
        lambda *args: ["\x1b[2J\x07 [red]gone[/red] \u202e"],
    )
    assert say(done, "hello")[-1] == "\\x1b[2J\\x07 [red]gone[/red] \\u202e"


def test_a_folder_that_is_no_run_is_refused(cli_error, tmp_path):
    assert "there is no such folder" in cli_error("chat", tmp_path / "nowhere")
    assert "expected the folder of one run, found 2" in cli_error("chat", tmp_path, tmp_path)

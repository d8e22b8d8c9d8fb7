"""What a user may get wrong in data or folders: each ends in one clear message that says where,
what and the fix.
"""

import json
import shutil

import pytest

from tests.support.models import (
    TASKS,
    make_rows,
    run_in_process,
    stream_text,
    train_byte_bpe,
    write_model,
    write_rows,
    write_stream,
)

GOOD = json.dumps(make_rows("first", 1)[0])


@pytest.fixture
def stream(tmp_path):
    """A stream folder of one's own, to be spoiled."""
    return write_stream(tmp_path / "stream")


@pytest.fixture
def said(cli_error, run_keys, tmp_path, stream):
    """What a run over the spoiled stream is refused with."""
    return lambda *words: cli_error(
        "run", *run_keys, f"stream.path={stream}", *words, f"out={tmp_path / 'run'}"
    )


# Rows


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"instruction": "Say it.", "output": ', "found broken JSON"),
        (
            '{"instruction": "Say it."}',
            "found no answer beside 'instruction' (columns 'instruction'), expected 'output'",
        ),
        (
            '{"question": "Say it.", "output": "x"}',
            "found the columns 'question', 'output', expected 'instruction'",
        ),
        (
            '{"instruction": "Say it.", "inputs": "x", "output": "x"}',
            "found the column 'inputs', expected 'input'",
        ),
        ('{"instruction": "Say it.", "output": ""}', "the response is empty"),
        (
            '{"instruction": "Say it.", "output": "%s"}' % ("z" * 300),
            "tokens, and the limit is 128; raise",
        ),
        (
            '{"instruction": "%s", "output": "z"}' % ("Say it. " * 300),
            "tokens, and the limit is 128; raise",
        ),
        ('["Say it."]', "found a list, expected a JSON object"),
    ],
    ids=[
        "broken JSON",
        "no output",
        "unknown column",
        "misspelt column",
        "empty output",
        "long output",
        "long prompt",
        "no object",
    ],
)
def test_a_bad_row_is_named_by_file_and_line(said, stream, line, told):
    file = stream / "last/train.jsonl"
    file.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    message = said()
    assert message.startswith(f"{file}:2:")
    assert told in message
    assert len(message.split("\n")) == 1


def test_every_bad_row_of_a_file_is_told_at_once(said, stream):
    file = stream / "first/train.jsonl"
    file.write_text(f'{GOOD}\n{{\n{GOOD}\n{{"instruction": "x"}}\n')
    one, other = said().split("\n")
    assert one.startswith(f"{file}:2:")
    assert other.startswith(f"{file}:4:")


def test_the_rows_that_cannot_be_learned_are_told_for_all_stages_at_once_and_before_any(
    said, stream, tmp_path
):
    for task in TASKS:
        write_rows(
            stream / task / "train.jsonl",
            [*make_rows(task, 4), {"instruction": "Say it.", "output": " "}],
        )
    told = said().split("\n")
    assert [line.partition(": ")[0] for line in told] == [
        f"{stream / task / 'train.jsonl'}:5" for task in TASKS
    ]
    assert not (tmp_path / "run/matrix.json").exists()


def test_a_run_refused_for_its_rows_may_be_given_again_with_more_room_or_skipping(
    said, run_cli, run_keys, stream, tmp_path
):
    write_rows(
        stream / "first/train.jsonl",
        [*make_rows("first", 4), {"instruction": "Say it.", "output": " "}],
    )
    said()
    code, _, err = run_cli(
        "run",
        *run_keys,
        f"stream.path={stream}",
        "data.on_unusable=skip",
        f"out={tmp_path / 'run'}",
    )
    assert code == 0, err


def test_a_test_prompt_longer_than_the_models_context_is_named_before_any_training(
    said, stream, tmp_path
):
    write_rows(
        stream / "loud/test.jsonl",
        [*make_rows("loud", 2), {"instruction": "Say it. " * 300, "output": "x"}],
    )
    message = said()
    assert message.startswith(f"{stream / 'loud/test.jsonl'}:3: takes")
    assert "the limit is" in message
    assert not (tmp_path / "run/checkpoints").exists()


def test_all_bad_rows_may_be_skipped(run_cli, run_keys, stream, tmp_path):
    write_rows(
        stream / "loud/train.jsonl",
        [
            *make_rows("loud", 6),
            {"instruction": "Say it. " * 300, "output": "x"},
            {"instruction": "Say it.", "output": " "},
        ],
    )
    code, _, err = run_cli(
        "run",
        *run_keys,
        f"stream.path={stream}",
        "data.on_unusable=skip",
        f"out={tmp_path / 'run'}",
    )
    assert code == 0
    assert "examples skipped: 2 (loud/train/6, loud/train/7 ...)" in err


# Tasks and folders


def test_early_stopping_without_dev_rows_is_refused_before_anything_is_scored(
    run_cli, run_keys, stream, tmp_path
):
    (stream / "last/dev.jsonl").unlink()
    code, _, err = run_cli(
        "run", *run_keys, f"stream.path={stream}", "train.patience=1", f"out={tmp_path / 'run'}"
    )
    assert (
        code,
        "train.patience=1 stops by the loss on dev rows, and there are none of last; add" in err,
    ) == (2, True)
    assert not (tmp_path / "run/matrix.json").exists()


def test_an_empty_task_is_refused(said, stream):
    (stream / "last/train.jsonl").write_text("")
    assert "'last'" in said()


def test_a_task_without_the_scored_split_is_refused(said, stream):
    (stream / "last/test.jsonl").unlink()
    assert (
        "task 'last' has no test rows (it has train, dev); score another split (score.split=dev)"
        in said()
    )


def test_a_missing_stream_folder_is_refused(said, stream):
    shutil.rmtree(stream)
    assert said().startswith(f"found no folder {stream}")


def test_a_missing_task_folder_is_refused(said, stream):
    shutil.rmtree(stream / "last")
    assert f"found no folder {stream / 'last'} for task 'last'" in said()


def test_a_folder_without_stream_json_is_refused(said, stream):
    (stream / "stream.json").unlink()
    assert (
        f"found no {stream / 'stream.json'}, expected the file that names the stream's tasks"
        in said()
    )


def test_a_broken_stream_json_is_named_with_its_line(said, stream):
    (stream / "stream.json").write_text('{"tasks": [\n{"name": }]}')
    assert said().startswith(f"{stream / 'stream.json'}:2:")


def test_an_unknown_metric_of_a_task_names_the_nearest(said, stream):
    index = {"tasks": [{"name": t, "metric": "exact_mach"} for t in TASKS]}
    (stream / "stream.json").write_text(json.dumps(index))
    assert "unknown metric 'exact_mach'; did you mean 'exact_match'" in said()


# Models


def test_a_tokenizer_without_end_of_sequence_or_padding_is_no_error(run_keys, tmp_path):
    bare = write_model(
        tmp_path / "model", tokenizer=train_byte_bpe(stream_text(), eos=None, pad=None)
    )
    matrix, _ = run_in_process(
        tmp_path / "run", run_keys, f"model.name={bare}", "stream.tasks=[first]"
    )
    assert matrix.is_finished


def test_a_folder_that_holds_no_model_is_refused(said, tmp_path):
    (tmp_path / "empty").mkdir()
    message = said(f"model.name={tmp_path / 'empty'}")
    assert message.startswith(f"model.name={tmp_path / 'empty'} could not be loaded")
    assert "Give a local folder with config.json" in message


def test_a_checkpoint_of_another_model_is_refused(cli_error, run_keys, tmp_path):
    run_in_process(tmp_path / "run", run_keys, "stream.tasks=[first]")
    other = write_model(tmp_path / "other", "gpt2")
    config = tmp_path / "run/config.yaml"
    name = next(k for k in run_keys if k.startswith("model.name")).partition("=")[2]
    config.write_text(config.read_text().replace(name, str(other)))
    start = ("stream.tasks=[last]", f"adapt.init_from={tmp_path / 'run'}")
    message = cli_error("adapt", *run_keys, *start, f"out={tmp_path / 'new'}")
    assert "its weights belong to another model or adapter" in message


# Run folders


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("matrix.json", "matrix.json:1:3: found broken JSON"),
        ("config.yaml", "config.yaml cannot be read"),
    ],
)
def test_a_damaged_file_of_a_run_folder_is_named(cli_error, run_keys, tmp_path, file, told):
    run_in_process(tmp_path / "run", run_keys, "stream.tasks=[first]")
    (tmp_path / "run" / file).write_text("{ [")
    assert told in cli_error("run", *run_keys, "stream.tasks=[first]", f"out={tmp_path / 'run'}")


def test_a_report_of_a_damaged_matrix_names_it(cli_error, run_keys, tmp_path):
    run_in_process(tmp_path / "run", run_keys, "stream.tasks=[first]")
    (tmp_path / "run/matrix.json").write_text('{"schema": 1}')
    assert cli_error("report", tmp_path / "run").startswith(f"{tmp_path / 'run/matrix.json'}:")


def test_a_damaged_configuration_to_adapt_from_is_named(cli_error, run_keys, tmp_path):
    run_in_process(tmp_path / "run", run_keys, "stream.tasks=[first]")
    (tmp_path / "run/config.yaml").write_text("{ [")
    start = ("stream.tasks=[last]", f"adapt.init_from={tmp_path / 'run'}")
    message = cli_error("adapt", *run_keys, *start, f"out={tmp_path / 'new'}")
    assert f"{tmp_path / 'run/config.yaml'} cannot be read" in message

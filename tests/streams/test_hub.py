"""Datasets as streams: local parquet, csv and json files, offline."""

import json
from pathlib import Path

import pytest

datasets = pytest.importorskip("datasets")

from continual.errors import ConfigError, DataError, MissingError  # noqa: E402
from streams.hub import load_hub  # noqa: E402

ROWS = [{"text": f"word {i}", "label": i % 3} for i in range(10)]
MAPPED = {"instruction_text": "Which class?", "columns": {"input": "text", "output": "label"}}
NAMES = ["low", "mid", "high"]


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    """No network, and a cache of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def parquet(path: Path, rows=ROWS, names=None) -> dict:
    """The entry of a parquet file; `names` makes its label a ClassLabel."""
    data = datasets.Dataset.from_list(rows)
    if names:
        data = data.cast_column("label", datasets.ClassLabel(names=names))
    data.to_parquet(str(path))
    return {"path": "parquet", "data_files": str(path), "splits": {"train": "train"}}


def jsonl(path: Path, rows) -> dict:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return {"path": "json", "data_files": str(path), "splits": {"train": "train"}}


def one(entry, **settings):
    """The one task of an entry."""
    return load_hub(datasets={"t": entry}, seed=0, **settings).tasks[0]


def fault(entry, kind=ConfigError) -> str:
    with pytest.raises(kind) as caught:
        load_hub(datasets={"t": entry}, seed=0)
    return str(caught.value)


def test_class_numbers_of_a_parquet_file_become_the_names_of_its_classes(tmp_path):
    task = one(
        {
            **parquet(tmp_path / "a.parquet", names=NAMES),
            **MAPPED,
            "metric": "token_f1",
            "category": "topic",
        }
    )
    first = task.train[1]
    assert (first.instruction, first.input, first.outputs) == ("Which class?", "word 1", ("mid",))
    assert (first.id, first.location) == ("t/train/1", f"{tmp_path / 'a.parquet'} [train] row 1")
    assert (task.labels, task.metric, task.category) == (
        ("low", "mid", "high"),
        "token_f1",
        "topic",
    )


def test_class_names_may_be_given(tmp_path):
    task = one({**parquet(tmp_path / "a.parquet"), **MAPPED, "labels": ["no", "yes", "maybe"]})
    assert [row.outputs[0] for row in task.train[:3]] == ["no", "yes", "maybe"]
    assert task.labels == ("no", "yes", "maybe")


def test_a_csv_file_is_read_by_splits_that_are_slices_of_it(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("q,a\n" + "".join(f"ask {i},say {i}\n" for i in range(10)))
    task = one(
        {
            "path": "csv",
            "data_files": str(file),
            "splits": {"train": "train[:80%]", "dev": "train[80%:]"},
            "columns": {"instruction": "q", "output": "a"},
        }
    )
    assert [row.outputs[0] for row in task.train] == [f"say {i}" for i in range(8)]
    assert [(row.instruction, row.id) for row in task.dev] == [
        ("ask 8", "t/dev/0"),
        ("ask 9", "t/dev/1"),
    ]


def test_files_by_split_need_no_splits(tmp_path):
    files = {
        split: jsonl(tmp_path / f"{split}.jsonl", [{"instruction": "Say.", "output": split}])[
            "data_files"
        ]
        for split in ("train", "dev", "test")
    }
    task = one({"path": "json", "data_files": files})
    assert [getattr(task, split)[0].outputs for split in files] == [("train",), ("dev",), ("test",)]
    assert task.dev[0].location == f"{files['dev']} [dev] row 0"


def test_rows_without_a_mapping_are_read_in_every_form_of_a_stream_folder(tmp_path):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    stream = load_hub(
        seed=0,
        datasets={
            "lists": jsonl(
                tmp_path / "a.jsonl", [{"instruction": "Say.", "output": ["a", "b"], "year": 1999}]
            ),
            "prompts": jsonl(tmp_path / "b.jsonl", [{"prompt": "Say.", "completion": "a"}]),
            "chats": jsonl(tmp_path / "c.jsonl", [{"messages": chat}]),
            "classes": parquet(
                tmp_path / "d.parquet", [{"instruction": "Class?", "label": 1}], names=NAMES
            )
            | {"columns": {"instruction": "instruction", "output": "label"}},
        },
    )
    assert [task.train[0].outputs for task in stream.tasks] == [
        ("a", "b"),
        ("a",),
        ("Hello",),
        ("mid",),
    ]
    assert [message.role for message in stream.tasks[2].train[0].messages] == ["user", "assistant"]


def test_nested_columns_are_named_by_their_path(tmp_path):
    rows = [{"q": "Who?", "answers": {"text": ["Ada", "Lovelace"], "start": [1, 2]}}]
    entry = {
        **jsonl(tmp_path / "a.jsonl", rows),
        "columns": {"instruction": "q", "output": "answers.text"},
    }
    assert one(entry).train[0].outputs == ("Ada", "Lovelace")


def test_a_template_writes_several_columns_into_one_field(tmp_path):
    rows = [{"p": "It rains.", "h": "It is {wet}.", "n": 2, "label": 0}]
    entry = {
        **parquet(tmp_path / "a.parquet", rows, names=NAMES),
        "columns": {"instruction": "{{pick}} {label}", "input": "{p}\n{h} ({n})", "output": "{n}"},
    }
    row = one(entry).train[0]
    assert (row.instruction, row.input, row.outputs) == (
        "{pick} low",
        "It rains.\nIt is {wet}. (2)",
        ("2",),
    )


def test_order_tasks_limit_and_arrangement_mean_what_they_mean_elsewhere(tmp_path):
    entries = {
        name: {**parquet(tmp_path / f"{name}.parquet", names=NAMES), **MAPPED} for name in "abc"
    }
    stream = load_hub(
        datasets=entries,
        orders={"back": ["c", "b", "a"]},
        seed=0,
        tasks=["a", "c"],
        order="back",
        max_train_rows=2,
        arrangement="cumulative",
        name="mine",
    )
    assert (stream.name, stream.order) == ("mine", "back")
    assert [(stage.name, len(stage.train)) for stage in stream.stages] == [("c", 2), ("a", 4)]


def test_only_the_tasks_asked_for_are_loaded(tmp_path):
    entries = {
        "good": {**parquet(tmp_path / "a.parquet", names=NAMES), **MAPPED},
        "gone": {
            "path": "csv",
            "data_files": str(tmp_path / "gone.csv"),
            "splits": {"train": "train"},
        },
    }
    assert len(load_hub(datasets=entries, seed=0, tasks=["good"]).tasks) == 1
    with pytest.raises(
        MissingError, match=r"stream.datasets.gone: .*gone.csv \[train\]: found no data, expected"
    ):
        load_hub(datasets=entries, seed=0)


def test_a_dataset_that_cannot_be_reached_is_told():
    text = fault({"path": "nobody/nothing", "splits": {"train": "train"}}, MissingError)
    assert "stream.datasets.t: nobody/nothing [train]: found no data" in text
    assert "fix path, name or data_files, or go online" in text


def test_an_unknown_split_of_the_dataset_is_told_with_those_it_has(tmp_path):
    text = fault({**parquet(tmp_path / "a.parquet"), **MAPPED, "splits": {"train": "training"}})
    assert "[training]: found settings that do not fit the data" in text
    assert "['train']" in text


def test_a_file_in_another_format_is_told(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}\n{"a": \n')
    text = fault(
        {"path": "json", "data_files": str(tmp_path / "a.json"), "splits": {"train": "train"}},
        DataError,
    )
    assert (
        "a.json [train]: found data that cannot be read, expected the format that path names "
        "(JSON parse" in text
    )


@pytest.mark.parametrize(
    "columns", [{"input": "txt", "output": "labl"}, {"input": "{txt}!", "output": "labl"}]
)
def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path, columns):
    text = fault({**parquet(tmp_path / "a.parquet"), **MAPPED, "columns": columns})
    assert "columns.input: unknown column 'txt'; did you mean 'text'? Known: label, text." in text


@pytest.mark.parametrize("template", ["{text", "{text!r}", "{text:>9}", "text}"])
def test_a_broken_template_is_refused(tmp_path, template):
    text = fault(
        {
            **parquet(tmp_path / "a.parquet"),
            **MAPPED,
            "columns": {"input": template, "output": "label"},
        }
    )
    assert f"columns.input: found the template {template!r}" in text
    assert 'expected such as "{column}"; write {{ and }} for braces' in text


def test_numbers_are_not_cast_in_silence(tmp_path):
    text = fault({**parquet(tmp_path / "a.parquet"), **MAPPED}, DataError)
    assert "a.parquet [train] row 0: found the number 0 in column 'label', expected text" in text
    assert 'labels: [...], or write the number itself by the template "{label}"' in text
    assert len(text.split("\n")) == len(ROWS)


def test_a_class_out_of_range_is_refused(tmp_path):
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": -1}]
    text = fault(
        {**parquet(tmp_path / "a.parquet", rows), **MAPPED, "labels": ["no", "yes"]}, DataError
    )
    assert text.count("found class") == 1
    assert "row 1: found class -1 in column 'label', expected 0 to 1 (no, yes); fix labels" in text


def test_nothing_to_write_into_a_template_is_refused(tmp_path):
    rows = [{"text": "a", "label": "x"}, {"text": None, "label": "y"}]
    entry = {
        **jsonl(tmp_path / "a.jsonl", rows),
        **MAPPED,
        "columns": {"input": "{text}!", "output": "label"},
    }
    assert "row 1: found nothing in column 'text', expected text or a number" in fault(
        entry, DataError
    )


def test_a_row_without_an_output_is_refused(tmp_path):
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": None}]
    text = fault({**jsonl(tmp_path / "a.jsonl", rows), **MAPPED}, DataError)
    assert "a.jsonl [train] row 1: found no answer beside 'instruction'" in text


FILE = {"path": "csv", "data_files": "a.csv", "splits": {"train": "train"}}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("a.csv", "found 'a.csv', expected {path: ..."),
        ({**FILE, "colums": {}}, "unknown key 'colums'; did you mean 'columns'"),
        ({**FILE, "trust_remote_code": True}, "unknown key 'trust_remote_code'"),
        ({"splits": {"train": "train"}}, "found no path, expected a Hub id"),
        (
            {"path": "csv", "splits": {"train": "train"}},
            "found no data_files beside path=csv, expected the files",
        ),
        ({"path": "csv", "data_files": "a.csv"}, "found no splits, expected such as"),
        ({**FILE, "splits": {"tran": "train"}}, "unknown split 'tran'; did you mean 'train'"),
        ({**FILE, "splits": "train"}, "found splits 'train', expected {name: text, ...}"),
        (
            {**FILE, "columns": {"input": 3}},
            "found columns {'input': 3}, expected {name: text, ...}",
        ),
        (
            {**FILE, "columns": {"input": "q", "ouput": "a"}},
            "unknown field in columns 'ouput'; did you mean 'output'",
        ),
        (
            {**FILE, "columns": {"instruction": "q"}},
            "found no output in columns, expected the column of the answers",
        ),
        (
            {**FILE, "columns": {"output": "a"}},
            "found neither columns.instruction nor instruction_text",
        ),
        (
            {**FILE, "columns": {"instruction": "q", "output": "a"}, "instruction_text": "x"},
            "found both columns.",
        ),
        ({**FILE, "labels": [0, 1]}, "found labels [0, 1], expected a list of texts; quote them"),
    ],
)
def test_a_wrong_entry_is_refused_before_anything_is_loaded(entry, message):
    assert f"stream.datasets.t: {message}" in fault(entry)


def test_the_faults_of_all_entries_are_told_at_once():
    with pytest.raises(
        ConfigError, match=r"(?s)datasets.a: found no path.*datasets.b: found no path"
    ):
        load_hub(datasets={"a": {}, "b": {}}, seed=0)

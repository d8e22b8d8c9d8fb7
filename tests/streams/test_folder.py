"""Stream folders: what is read, and what is said of each thing that can be wrong with one."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from continual.data.types import Message
from continual.errors import ConfigError, DataError, MissingError
from streams.folder import load_folder
from streams.rows import load_jsonl, parse_row

REAL = Path(__file__).parents[3] / "shared" / "data" / "long15"
ROW = {"instruction": "Say it.", "input": "hello", "output": "HELLO"}


def write(root: Path, rows_of, **index) -> Path:
    """A stream folder: {task: {split: [row, ...]}}."""
    for name, splits in rows_of.items():
        (root / name).mkdir(parents=True)
        for split, rows in splits.items():
            (root / name / f"{split}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows), "utf-8"
            )
    root.mkdir(exist_ok=True)
    (root / "stream.json").write_text(
        json.dumps({"tasks": [{"name": name} for name in rows_of], **index}), "utf-8"
    )
    return root


def lines(path: Path, *texts: str | bytes) -> Path:
    path.write_bytes(b"".join((t if isinstance(t, bytes) else t.encode()) + b"\n" for t in texts))
    return path


def read(row, id="t/0"):
    return parse_row(row, task="t", id=id, where="f.jsonl:3")


def fault(row) -> str:
    with pytest.raises(DataError) as caught:
        read(row)
    assert all(line.startswith("f.jsonl:3: found ") for line in str(caught.value).split("\n"))
    return str(caught.value)


# Rows


def test_an_instruction_row_is_read_whole():
    example = read(ROW)
    assert (example.id, example.task, example.location) == ("t/0", "t", "f.jsonl:3")
    assert (example.instruction, example.input, example.outputs) == ("Say it.", "hello", ("HELLO",))


@pytest.mark.parametrize("extra", [{}, {"input": None}, {"input": ""}])
def test_an_input_may_be_left_out(extra):
    assert read({"instruction": "Say hi.", "output": "hi", **extra}).input == ""


@pytest.mark.parametrize("name", ["output", "outputs"])
def test_several_answers_may_be_accepted(name):
    assert read({"instruction": "Any?", name: ["a", "b"]}).outputs == ("a", "b")


@pytest.mark.parametrize("name", ["response", "completion", "answer"])
def test_a_prompt_row_is_read(name):
    example = read({"prompt": "Say hi.", name: "hi"})
    assert (example.instruction, example.outputs) == ("Say hi.", ("hi",))


def test_a_conversation_is_read_with_its_last_turn_as_output():
    turns = [
        ("system", "Be kind."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Bye"),
        ("assistant", "Ciao"),
    ]
    example = read({"messages": [{"role": role, "content": text} for role, text in turns]})
    assert example.messages == tuple(Message(*turn) for turn in turns)
    assert (example.outputs, example.instruction) == (("Ciao",), "")


def test_other_columns_are_metadata():
    assert read(
        {**ROW, "template": "t1", "example": 82, "answer": "7", "constraints": []}
    ).outputs == ("HELLO",)


@pytest.mark.parametrize("answer", ["", "  \n"])
def test_an_empty_answer_is_left_to_the_template_to_refuse_or_skip(answer):
    assert read({**ROW, "output": answer}).outputs == (answer,)


def test_a_misspelt_instruction_is_named():
    text = fault({"instrution": "x", "output": "y"})
    assert "the columns 'instrution', 'output', expected 'instruction' and 'output'" in text
    assert "rename 'instrution' to 'instruction'" in text


@pytest.mark.parametrize(
    ("found", "meant"), [("inputs", "input"), ("Input", "input"), ("outptu", "output")]
)
def test_a_misspelt_column_beside_the_instruction_is_named(found, meant):
    row = {name: value for name, value in ROW.items() if name != meant}
    assert f"found the column {found!r}, expected {meant!r}; rename it" in fault(
        {**row, found: "x"}
    )


@pytest.mark.parametrize("row", [{"instruction": "x"}, {"instruction": "x", "output": None}])
def test_a_row_without_an_output_is_refused(row):
    text = fault(row)
    assert "found no answer beside 'instruction'" in text
    assert "expected 'output' or 'outputs'; add it" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction": " "}, "found an empty 'instruction', expected what is asked"),
        ({"instruction": 3}, "found the number 3 as 'instruction', expected text; quote it"),
        ({"input": ["x"]}, "found a list as 'input', expected text"),
        (
            {"output": 3.5},
            "found the number 3.5 as 'output', expected text or a list of texts; quote it",
        ),
        ({"output": True}, "found true as 'output', expected text"),
        ({"output": ["x", 4]}, "found the number 4 in the list as 'output', expected text"),
        ({"output": []}, "found an empty list as 'output', expected at least one answer"),
        ({"output": {"a": 1}}, "found an object as 'output', expected text"),
        (
            {"outputs": ["y"]},
            "found 'output' and 'outputs', expected one of them; remove the others",
        ),
    ],
)
def test_a_wrong_value_is_refused_by_name(change, message):
    assert message in fault({**ROW, **change})


def test_all_faults_of_a_row_are_told_at_once():
    assert len(fault({"instruction": 1, "input": 2, "output": 3}).split("\n")) == 3


USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "found an empty list as 'messages', expected a list of turns"),
        ("Hi", "found text as 'messages', expected a list of turns"),
        (
            [{"from": "me", "value": 3}],
            "found {from: text, value: the number 3} as turn 1 of 'messages', expected {role:",
        ),
        (["Hi", ASSISTANT], "found text as turn 1 of 'messages'"),
        (
            [USER, {"role": "assistant", "content": None}],
            "found {role: text, content: null} as turn 2",
        ),
        ([USER], "found 'user' as the last role of 'messages', expected 'assistant'"),
        (
            [{"role": "system", "content": "x"}],
            "found 'system' as the last role of 'messages', expected 'assistant'",
        ),
        ([ASSISTANT], "found the role 'assistant' in turn 1 of 'messages', expected 'user'"),
        (
            [USER, USER, ASSISTANT],
            "found the role 'user' in turn 2 of 'messages', expected 'assistant'",
        ),
        ([USER, {"role": "tool", "content": "x"}, ASSISTANT], "found the role 'tool' in turn 2"),
    ],
)
def test_a_conversation_out_of_form_is_refused(turns, message):
    assert message in fault({"messages": turns})


# Files of rows

TEXTS = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
ROWS = st.fixed_dictionaries(
    {"instruction": TEXTS, "output": st.one_of(st.text(), st.lists(st.text(), min_size=1))},
    optional={"input": st.text(st.characters(codec="utf-8"))},
)


@given(st.lists(ROWS, max_size=5), st.booleans())
def test_rows_written_are_the_rows_read(tmp_path_factory, rows, ascii_only):
    file = tmp_path_factory.mktemp("rows") / "dev.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    file.write_bytes(text.encode())
    examples = load_jsonl(file, "t")
    assert [(e.instruction, e.input) for e in examples] == [
        (r["instruction"], r.get("input", "")) for r in rows
    ]
    assert [e.outputs for e in examples] == [
        tuple(r["output"]) if isinstance(r["output"], list) else (r["output"],) for r in rows
    ]
    assert [e.id for e in examples] == [f"t/dev/{n}" for n in range(len(rows))]


def test_each_row_knows_its_file_and_line_and_blank_lines_count(tmp_path):
    file = lines(
        tmp_path / "train.jsonl", json.dumps(ROW), "", "  ", json.dumps({**ROW, "id": "mine"}), ""
    )
    assert [(e.id, e.location) for e in load_jsonl(file, "t")] == [
        ("t/train/0", f"{file}:1"),
        ("mine", f"{file}:4"),
    ]


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_bytes(
        b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(ROW).encode() for _ in range(2)) + b"\r\n"
    )
    assert len(load_jsonl(file, "t")) == 2


def test_every_bad_line_of_a_file_is_told_at_once_with_its_place(tmp_path):
    file = lines(
        tmp_path / "train.jsonl",
        '{"instruction": "x", "output": }',
        json.dumps(ROW),
        "[1]",
        b'{"instruction": "caf\xe9"}',
        '{"instruction": "x"}',
        '{"instruction": 1, "output": 2}',
    )
    with pytest.raises(DataError) as caught:
        load_jsonl(file, "t")
    told = str(caught.value).split("\n")
    assert [line.removeprefix(f"{file}:").split(" ")[0] for line in told] == [
        "1:32:",
        "3:",
        "4:21:",
        "5:",
        "6:",
        "6:",
    ]
    assert "found broken JSON" in told[0]
    assert "found a list, expected a JSON object" in told[1]
    assert "found the byte 0xe9, expected UTF-8; save the file as UTF-8" in told[2]


def test_an_escape_that_is_no_character_is_refused(tmp_path):
    file = lines(
        tmp_path / "train.jsonl",
        '{"instruction": "x", "output": "\\ud83d\\ude00"}',
        '{"instruction": "x", "output": "\\ud83d"}',
    )
    with pytest.raises(
        DataError,
        match=r"^[^\n]*:2: found half of a surrogate pair .*'.ud83d'.*, expected characters",
    ):
        load_jsonl(file, "t")


def test_an_id_used_twice_is_refused_with_both_lines(tmp_path):
    file = lines(
        tmp_path / "train.jsonl", *(json.dumps({**ROW, "id": id}) for id in ("a", 7, "a", "7"))
    )
    with pytest.raises(
        DataError, match=r"(?s):3: found the id 'a' again.*on line 1.*:4: found the id '7' again"
    ):
        load_jsonl(file, "t")


def test_an_id_that_is_no_name_is_refused(tmp_path):
    with pytest.raises(DataError, match="found a list as 'id', expected text"):
        load_jsonl(lines(tmp_path / "train.jsonl", json.dumps({**ROW, "id": [1]})), "t")


# Folders


def test_a_folder_is_read_with_its_metadata_and_the_splits_it_has(tmp_path):
    write(tmp_path, {"up": {"train": [ROW] * 3, "dev": [ROW]}}, stream="shout")
    tasks = [
        {
            "name": "UP",
            "dir": "up",
            "metric": "rougeL",
            "labels": ["HELLO"],
            "category": "case",
            "source": "us",
        }
    ]
    (tmp_path / "stream.json").write_text(json.dumps({"stream": "shout", "tasks": tasks}))
    stream = load_folder(path=str(tmp_path), seed=0)
    (task,) = stream.tasks
    assert (stream.name, task.name, task.metric, task.labels, task.category) == (
        "shout",
        "UP",
        "rougeL",
        ("HELLO",),
        "case",
    )
    assert [len(task.train), len(task.dev), len(task.test)] == [3, 1, 0]
    assert {row.task for row in task.train} == {"UP"}


def test_metric_and_name_have_defaults(tmp_path):
    stream = load_folder(path=str(write(tmp_path / "mine", {"up": {"train": [ROW]}})), seed=0)
    assert (stream.name, stream.tasks[0].metric) == ("mine", "exact_match")


def test_order_limit_and_arrangement_apply(tmp_path):
    write(
        tmp_path,
        {"a": {"train": [ROW] * 3}, "b": {"train": [ROW] * 3}},
        orders={"back": ["b", "a"]},
    )
    stream = load_folder(
        path=str(tmp_path), seed=0, order="back", max_train_rows=2, arrangement="cumulative"
    )
    assert stream.order == "back"
    assert [(stage.name, len(stage.train)) for stage in stream.stages] == [("b", 2), ("a", 4)]


def test_only_the_tasks_asked_for_are_read(tmp_path):
    write(tmp_path, {"good": {"train": [ROW]}, "bad": {"train": [{}]}}, orders={"one": ["good"]})
    assert [t.name for t in load_folder(path=str(tmp_path), seed=0, order="one").tasks] == ["good"]
    assert [t.name for t in load_folder(path=str(tmp_path), seed=0, tasks=["good"]).tasks] == [
        "good"
    ]
    with pytest.raises(DataError, match=r"bad.train.jsonl:1: found the columns none"):
        load_folder(path=str(tmp_path), seed=0)


def test_a_task_without_train_rows_cannot_be_learned(tmp_path):
    write(tmp_path, {"a": {"train": [ROW]}, "b": {"dev": [ROW]}})
    with pytest.raises(DataError, match=r"no train rows in task 'b'.*stream.tasks=\[a\]"):
        load_folder(path=str(tmp_path), seed=0)


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(
        MissingError, match=r"found no folder .*nowhere .*expected a stream folder; set stream.path"
    ):
        load_folder(path=str(tmp_path / "nowhere"), seed=0)


def test_a_folder_of_streams_names_the_streams_in_it(tmp_path):
    write(tmp_path / "mine", {"a": {"train": [ROW]}})
    with pytest.raises(
        MissingError, match=r"found no .*stream.json, expected.*set stream.path to .*mine"
    ):
        load_folder(path=str(tmp_path), seed=0)


def test_broken_json_in_the_index_is_told_with_its_place(tmp_path):
    lines(tmp_path / "stream.json", "{", '"tasks": [,]}')
    with pytest.raises(
        DataError, match=r"stream.json:2:11: found broken JSON \(.*\), expected one object"
    ):
        load_folder(path=str(tmp_path), seed=0)


def test_an_index_that_is_not_utf8_is_told(tmp_path):
    lines(tmp_path / "stream.json", b'{"stream": "\xe9"}')
    with pytest.raises(DataError, match=r"stream.json:1:13: found the byte 0xe9, expected UTF-8"):
        load_folder(path=str(tmp_path), seed=0)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "found no object, expected"),
        ({}, "found no list of tasks, expected"),
        ({"tasks": []}, "found no list of tasks, expected"),
        ({"tasks": ["a"]}, "found no name in task 1, expected"),
        ({"tasks": [{"dir": "a"}]}, "found no name in task 1, expected"),
        (
            {"tasks": [{"name": "a"}, {"name": "a"}]},
            "found 2 tasks named 'a', expected each name once",
        ),
        ({"tasks": [{"name": "a", "metric": 1}]}, "found 1 as 'metric' of task 'a', expected text"),
        (
            {"tasks": [{"name": "a", "metrics": "rougeL"}]},
            "found the key 'metrics' in task 'a', expected 'metric'; rename",
        ),
        (
            {"tasks": [{"name": "a", "labels": [1]}]},
            r"found \[1\] as 'labels' of task 'a', expected null or a list",
        ),
        (
            {"tasks": [{"name": "a"}], "orders": {"o": ["aa"]}},
            "order 'o': unknown task 'aa'; did you mean 'a'",
        ),
        ({"tasks": [{"name": "a"}], "orders": ["a"]}, 'found "orders" in another form, expected'),
        (
            {"tasks": [{"name": "a"}], "orders": {"random": ["a"]}},
            "found an order named 'random', expected another name",
        ),
        ({"tasks": [{"name": "a"}], "stream": 1}, "found the stream's name 1, expected text"),
    ],
)
def test_a_wrong_index_is_refused_by_what_is_wrong(tmp_path, index, message):
    (tmp_path / "stream.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=f"stream.json: {message}"):
        load_folder(path=str(tmp_path), seed=0)


def test_all_faults_of_an_index_are_told_at_once(tmp_path):
    (tmp_path / "stream.json").write_text(
        json.dumps({"tasks": [{}, {"name": "a"}], "orders": {"o": ["x", "y"]}})
    )
    with pytest.raises(DataError, match=r"(?s)no name in task 1.*'x'.*'y'"):
        load_folder(path=str(tmp_path), seed=0)


def test_an_unknown_order_or_task_is_refused_with_the_nearest(tmp_path):
    write(tmp_path, {"agnews": {"train": [ROW]}}, orders={"order1": ["agnews"]})
    with pytest.raises(ConfigError, match=r"unknown stream.order 'ordr1'; did you mean 'order1'"):
        load_folder(path=str(tmp_path), seed=0, order="ordr1")
    with pytest.raises(
        ConfigError, match=r"unknown task in stream.tasks 'agnew'; did you mean 'agnews'"
    ):
        load_folder(path=str(tmp_path), seed=0, tasks=["agnew"])


def test_all_missing_task_folders_are_told_at_once(tmp_path):
    write(
        tmp_path,
        {"a": {"train": [ROW]}},
        tasks=[{"name": "a"}, {"name": "b"}, {"name": "c", "dir": "cc"}],
    )
    with pytest.raises(
        MissingError, match=r"(?s)for task 'b'.*\(folders there: a\).*cc for task 'c'"
    ):
        load_folder(path=str(tmp_path), seed=0)


def test_a_task_folder_without_rows_is_told(tmp_path):
    write(tmp_path, {"a": {}})
    with pytest.raises(
        MissingError, match=r"found none of train.jsonl, dev.jsonl, test.jsonl in .*a, expected"
    ):
        load_folder(path=str(tmp_path), seed=0)


@pytest.mark.parametrize("way", ["..", "absolute", "link"])
def test_a_task_may_not_lie_outside_the_folder(tmp_path, way):
    outside = write(tmp_path / "outside", {"a": {"train": [ROW]}}) / "a"
    root = tmp_path / "stream"
    place = {"..": "../outside/a", "absolute": str(outside), "link": "a"}[way]
    write(root, {}, tasks=[{"name": "a", "dir": place}])
    (root / "a").symlink_to(outside)
    with pytest.raises(
        DataError,
        match=r"stream.json: found dir '.*' of task 'a', expected a folder inside .*; move",
    ):
        load_folder(path=str(root), seed=0)


# Real data


@pytest.mark.skipif(
    not REAL.is_dir(), reason="the real long15 stream is not there: ../shared/data/long15"
)
@pytest.mark.parametrize(
    ("order", "names"),
    [
        ("order1", ["dbpedia", "amazon", "yahoo", "agnews"]),
        ("order3", ["yahoo", "amazon", "agnews", "dbpedia"]),
    ],
)
def test_the_published_orders_of_long15_are_read(order, names):
    stream = load_folder(path=str(REAL), seed=0, order=order)
    assert [task.name for task in stream.stages] == names
    assert {(len(task.train), len(task.dev)) for task in stream.tasks} == {(1000, 200)}
    dbpedia = stream.tasks[names.index("dbpedia")]
    assert len(dbpedia.labels) == 14
    assert {row.outputs[0] for row in dbpedia.train} <= set(dbpedia.labels)

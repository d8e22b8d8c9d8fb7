"""A corpus of bad files, each with what is said of it: where it is, what was found or expected, and
the fix.

Beside it, wrong keys are in test_cli, entries of Hub datasets in test_hub, and what only a whole
run shows in test_bad_input and test_resume.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from continual.cli import main
from continual.errors import ContinualError
from continual.models import loading
from continual.strategy.interface import Strategy
from continual.training import checkpoint, stage_state
from streams.folder import load_folder
from tests.support import toy
from tests.support.fake_run import write_fake_adaptation, write_fake_run
from tests.support.models import write_model

GOOD = json.dumps({"instruction": "Say it.", "input": "red", "output": "red"})
DEEP, DIGITS = "[" * 100_000, "9" * 5000


def exact(whole: str | bytes) -> bytes:
    return whole.encode() if isinstance(whole, str) else whole


@pytest.fixture
def told(capsys):
    """What the command line says of an error: exit code 2, one message, no traceback."""

    def told(work, *args):
        with pytest.raises(ContinualError) as caught:
            work(*args)
        with pytest.raises(SystemExit) as end:
            main.exit_with_error(caught.value)
        out, err = capsys.readouterr()
        assert (end.value.code, out) == (2, "")
        assert "Traceback" not in err
        assert len(err) < 10_000, "no one reads so much"
        return err.removeprefix("error: ")

    return told


# Rows: the second line of a file

ROWS = {
    "cut off": (
        '{"instruction": "Say it.", "output": ',
        ":2:38: found broken JSON (Expecting value)",
    ),
    "single quotes": ("{'instruction': 'x'}", ":2:2: found broken JSON (Expecting property name"),
    "two objects": (
        GOOD + GOOD,
        "found broken JSON (Extra data), expected one complete object per line; fix or remove",
    ),
    "trailing comma": ('{"instruction": "x", "output": "y",}', "found broken JSON"),
    "a CSV line": ("Say it.,red,red", ":2:1: found broken JSON"),
    "a list": ('["Say it."]', ":2: found a list, expected a JSON object"),
    "text": ('"Say it."', ":2: found text, expected a JSON object"),
    "null": ("null", ":2: found null, expected a JSON object"),
    "a number": ("3", ":2: found the number 3, expected a JSON object"),
    "not a number": ("NaN", ":2: found the number nan, expected a JSON object"),
    "too large a number": ("1e999999", ":2: found the number inf, expected a JSON object"),
    "thousands of digits": (
        f'{{"instruction": {DIGITS}}}',
        ":2: found a number of thousands of digits",
    ),
    "nested too deep": (
        DEEP,
        ":2: found hundreds of nested brackets, expected one complete object per line",
    ),
    "nested too deep, closed": (
        '{"a":' * 50_000 + "1" + "}" * 50_000,
        ":2: found hundreds of nested brackets",
    ),
    "Latin-1": (
        b'{"instruction": "caf\xe9", "output": "x"}',
        ":2:21: found the byte 0xe9, expected UTF-8; save",
    ),
    "UTF-16": (GOOD.encode("utf-16"), ":2:1: found the byte 0xff, expected UTF-8"),
    "a NUL byte": (
        b'{"instruction": "\x00"}',
        ":2:18: found broken JSON (Invalid control character at)",
    ),
    "half a surrogate pair": (
        '{"instruction": "\\ud800", "output": "x"}',
        ":2: found half of a surrogate pair",
    ),
    "half a pair as a key": (
        '{"\\udfff": 1}',
        ":2: found half of a surrogate pair ('\\udfff'), expected characters",
    ),
    "a key twice": (
        '{"instruction": "x", "instruction": "y", "output": "z"}',
        ":2: found the key 'instruction' twice in one object, expected each once; remove one",
    ),
    "no instruction": (
        '{"question": "x", "output": "y"}',
        ":2: found the columns 'question', 'output', expected",
    ),
    "no columns": ("{}", ":2: found the columns none, expected"),
    "a thousand columns": (
        json.dumps(dict.fromkeys(map(str, range(9999)), 1)),
        " and 9949 more, expected",
    ),
    "an endless column": ('{"%s": 1}' % ("x" * 10**6), "xxx...', expected 'instruction'"),
    "misspelt instruction": (
        '{"instrution": "x", "output": "y"}',
        "rename 'instrution' to 'instruction'",
    ),
    "no output": ('{"instruction": "x"}', ":2: found no answer beside 'instruction'"),
    "misspelt output": (
        '{"instruction": "x", "outptu": "y"}',
        "found the column 'outptu', expected 'output'; rename",
    ),
    "two outputs": (
        '{"instruction": "x", "output": "y", "outputs": ["z"]}',
        "expected one of them; remove",
    ),
    "an instruction of blanks": (
        '{"instruction": " ", "output": "y"}',
        ":2: found an empty 'instruction'",
    ),
    "an instruction that is a number": (
        '{"instruction": 7, "output": "y"}',
        "found the number 7 as 'instruction'",
    ),
    "an input that is a list": (
        '{"instruction": "x", "input": [], "output": "y"}',
        "found a list as 'input'",
    ),
    "an output that is true": (
        '{"instruction": "x", "output": true}',
        "found true as 'output', expected text or a",
    ),
    "an output of infinite size": (
        '{"instruction": "x", "output": 1e999}',
        "found the number inf as 'output'",
    ),
    "no accepted answer": (
        '{"instruction": "x", "output": []}',
        "found an empty list as 'output', expected at least",
    ),
    "messages that are text": (
        '{"messages": "Hi"}',
        ":2: found text as 'messages', expected a list of turns",
    ),
    "no last answer": (
        '{"messages": [{"role": "user", "content": "x"}]}',
        "expected 'assistant', the answer to be",
    ),
    "an unknown role": (
        '{"messages": [{"role": "\\u001b[31m", "content": "x"}]}',
        r"found the role '\x1b[31m' in turn 1",
    ),
    "an id that is a list": (
        '{"id": [], "instruction": "x", "output": "y"}',
        "found a list as 'id', expected text",
    ),
}


@pytest.fixture
def stream(tmp_path):
    (tmp_path / "s/a").mkdir(parents=True)
    (tmp_path / "s/a/train.jsonl").write_text(f"{GOOD}\n")
    (tmp_path / "s/stream.json").write_text('{"tasks": [{"name": "a"}]}')
    return tmp_path / "s"


def read(stream):
    return load_folder(path=str(stream), seed=0)


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row(told, stream, name):
    line, expected = ROWS[name]
    file = stream / "a/train.jsonl"
    file.write_bytes(exact(GOOD) + b"\n" + exact(line) + b"\n" + exact(GOOD) + b"\n")
    message = told(read, stream)
    assert message.startswith(f"{file}:2:")
    assert expected in message


def test_a_file_of_bad_rows_is_not_read_to_its_end(told, stream):
    (stream / "a/train.jsonl").write_text("x\n" * 100_000)
    message = told(read, stream)
    assert message.count("found broken JSON") == 20
    assert message.endswith("... and 980 more\nReading stopped at line 1000.\n")


def test_a_line_without_an_end_is_not_held(told, stream, monkeypatch):
    monkeypatch.setattr("continual.io.untrusted.LONGEST", 2**20)
    (stream / "a/train.jsonl").write_text(f"{GOOD}\n" + "x" * 2**21)
    message = told(read, stream)
    assert (
        "train.jsonl:2: found a line of more than 1 MiB, expected one JSON object per line; split it"
        in message
    )


# stream.json

INDEX = {
    "nothing": (
        "",
        ":1:1: found broken JSON (Expecting value), expected one object; fix it there",
    ),
    "cut off": ('{"tasks": [\n{"name": }]}', ":2:10: found broken JSON"),
    "a list": ("[]", 'found no object, expected {"tasks": [...]'),
    "nested too deep": (
        DEEP,
        ": found hundreds of nested brackets, expected one object",
    ),
    "thousands of digits": (f'{{"tasks": {DIGITS}}}', ": found a number of thousands of digits"),
    "Latin-1": (
        b'{"stream":\n "\xe9"}',
        ":2:3: found the byte 0xe9, expected UTF-8; save the file as UTF-8",
    ),
    "a key twice": ('{"tasks": [], "tasks": []}', ": found the key 'tasks' twice in one object"),
    "no tasks": ("{}", ": found no list of tasks, expected"),
    "tasks by name": ('{"tasks": {"a": {}}}', ": found no list of tasks, expected"),
    "a task without a name": ('{"tasks": [{"dir": "a"}]}', ": found no name in task 1, expected"),
    "a name that is a number": ('{"tasks": [{"name": 1}]}', ": found no name in task 1, expected"),
    "a name twice": (
        '{"tasks": [{"name": "a"}, {"name": "a"}]}',
        ": found 2 tasks named 'a', expected each name once",
    ),
    "a name that a terminal obeys": (
        '{"tasks": [{"name": "\\u001b[2J"}]}',
        r"found a control character in the name of "
        r"task '\x1b[2J', expected letters",
    ),
    "a NUL in a name": (
        '{"tasks": [{"name": "a\\u0000"}]}',
        "found a control character in the name of task 'a\\x00'",
    ),
    "half a pair in a name": ('{"tasks": [{"name": "\\ud800"}]}', "found half of a surrogate pair"),
    "a metric that is a number": (
        '{"tasks": [{"name": "a", "metric": 1}]}',
        "found 1 as 'metric' of task 'a'",
    ),
    "a misspelt key": (
        '{"tasks": [{"name": "a", "metrics": "x"}]}',
        "found the key 'metrics' in task 'a', expected",
    ),
    "labels that are numbers": (
        '{"tasks": [{"name": "a", "labels": [0, 1]}]}',
        "found [0, 1] as 'labels' of task 'a'",
    ),
    "an order that is a list": (
        '{"tasks": [{"name": "a"}], "orders": ["a"]}',
        'found "orders" in another form',
    ),
    "an order of unknown tasks": (
        '{"tasks": [{"name": "agnews"}], "orders": {"o": ["agnew", 3, []]}}',
        "order 'o': unknown task 'agnew'; did you mean 'agnews'",
    ),
    "an order named random": (
        '{"tasks": [{"name": "a"}], "orders": {"random": ["a"]}}',
        "expected another name",
    ),
    "orders of thousands of unknown tasks": (
        json.dumps(
            {
                "tasks": [{"name": f"t{i}"} for i in range(999)],
                "orders": {"o": [f"u{i}" for i in range(9999)]},
            }
        ),
        "... and 9979 more",
    ),
    "a folder above": (
        '{"tasks": [{"name": "a", "dir": "../s2"}]}',
        "found dir '../s2' of task 'a', expected a folder",
    ),
    "a folder from the root": (
        '{"tasks": [{"name": "a", "dir": "/etc"}]}',
        "found dir '/etc' of task 'a', expected a",
    ),
    "a name that leads out": (
        '{"tasks": [{"name": "../../x"}]}',
        "found dir '../../x' of task '../../x', expected",
    ),
    "a NUL in a folder": (
        '{"tasks": [{"name": "a", "dir": "a\\u0000"}]}',
        "of task 'a', expected a folder inside",
    ),
    "a folder no system can name": (
        json.dumps({"tasks": [{"name": "a", "dir": "x" * 5000}]}),
        "xxx...' of task 'a'",
    ),
}


@pytest.mark.parametrize("name", INDEX)
def test_a_bad_stream_json(told, stream, name):
    whole, expected = INDEX[name]
    (stream / "stream.json").write_bytes(exact(whole))
    message = told(read, stream)
    assert message.startswith(f"{stream / 'stream.json'}:")
    assert expected in message


# Run folders, as a report reads them

MATRIX = json.loads(
    json.dumps(
        {
            "schema": 1,
            "stream": "s",
            "order": "o",
            "strategy": "naive",
            "seed": 0,
            "tasks": ["a", "b"],
            "metrics": {"a": "exact_match", "b": "exact_match"},
            "stages": ["base"],
            "scores": [[0.0, 0.5]],
        }
    )
)


def matrix(**change):
    return json.dumps({**MATRIX, **change})


RUN = {
    "matrix: nothing": ("matrix.json", "", ":1:1: found broken JSON"),
    "matrix: cut off": ("matrix.json", matrix()[:50], ": found broken JSON"),
    "matrix: a list": (
        "matrix.json",
        "[]",
        ": a list, where an object with stream, strategy, tasks",
    ),
    "matrix: nested too deep": ("matrix.json", DEEP, ": found hundreds of nested brackets"),
    "matrix: a key twice": (
        "matrix.json",
        '{"schema": 1, "schema": 1}',
        ": found the key 'schema' twice",
    ),
    "matrix: a later schema": (
        "matrix.json",
        matrix(schema=9),
        "schema 9; this version reads schema 1",
    ),
    "matrix: an unknown key": (
        "matrix.json",
        matrix(colour="red"),
        "unknown key 'colour'; schema 1 has stream,",
    ),
    "matrix: all that is absent": (
        "matrix.json",
        '{"schema": 1}',
        "no 'stream'\nno 'strategy'\nno 'tasks'\nno 'metrics'",
    ),
    "matrix: no tasks": ("matrix.json", matrix(tasks=[], scores=[[]]), "there are no tasks"),
    "matrix: no stages": (
        "matrix.json",
        matrix(stages=[], scores=[]),
        ": no stage has been scored; start the run again",
    ),
    "matrix: a task twice": (
        "matrix.json",
        matrix(tasks=["a", "a"]),
        "task 'a' stands twice; names must differ",
    ),
    "matrix: a number as task": (
        "matrix.json",
        matrix(tasks=["a", 3]),
        "tasks holds 3; expected names",
    ),
    "matrix: a metric too few": (
        "matrix.json",
        matrix(metrics={"a": "x"}),
        "task 'b' has no metric; add it",
    ),
    "matrix: a metric of no name": (
        "matrix.json",
        matrix(metrics={"a": 1, "b": "x"}),
        "the metric 1 is no name",
    ),
    "matrix: a short row": (
        "matrix.json",
        matrix(scores=[[0.5]]),
        "row 0 has 1 scores; expected 2, one a task",
    ),
    "matrix: a score of 50": (
        "matrix.json",
        matrix(scores=[[0, 50]]),
        "the score 50 on 'b' after 'base' is no number in",
    ),
    "matrix: a score of NaN": (
        "matrix.json",
        matrix(scores=[[0, float("nan")]]),
        "the score nan on 'b' after 'base'",
    ),
    "matrix: a score as text": (
        "matrix.json",
        matrix(scores=[[0, "1"]]),
        "the score '1' on 'b' after 'base' is no",
    ),
    "matrix: a negative count": (
        "matrix.json",
        matrix(counts=[1, -1]),
        "the count -1 is no number of examples",
    ),
    "matrix: an infinite cost": (
        "matrix.json",
        matrix(cost={"seconds": float("inf")}),
        "the cost 'seconds' is inf",
    ),
    "matrix: a cost of 400 digits": (
        "matrix.json",
        matrix(cost={"seconds": 10**400}),
        "the cost 'seconds' is 1000",
    ),
    "config: broken": ("config.yaml", "{ [", " cannot be read: found "),
    "config: a list": (
        "config.yaml",
        "- a\n- b\n",
        " cannot be read: it does not hold a mapping of keys",
    ),
    "config: nested too deep": (
        "config.yaml",
        DEEP,
        " cannot be read: found hundreds of nested brackets",
    ),
    "config: Latin-1": (
        "config.yaml",
        b"a: caf\xe9\n",
        ":1:7: found the byte 0xe9, expected UTF-8",
    ),
    "config: a control character": (
        "config.yaml",
        b"a: \x07\n",
        " cannot be read: unacceptable character",
    ),
    "config: a tag that would run": (
        "config.yaml",
        "a: 1\nb: !!python/object/apply:os.system [id]\n",
        " cannot be read: found an anchor, alias or tag on line 2",
    ),
    "config: lines that unfold": (
        "config.yaml",
        "a: &a [x, x]\nb: &b [*a, *a]\n",
        "found an anchor, alias or tag on line 1",
    ),
    "config: a key twice": (
        "config.yaml",
        "a: 1\nb: 2\na: 3\n",
        " cannot be read: found a key that occurs twice",
    ),
    "config: no such day": (
        "config.yaml",
        "a: 2026-99-99\n",
        " cannot be read: month must be in 1..12",
    ),
    "config: thousands of digits": (
        "config.yaml",
        f"a: {DIGITS}\n",
        " cannot be read: Exceeds the limit",
    ),
    "predictions: cut off": (
        "predictions/stage-06/reverse.jsonl",
        '{"id": "a", "sco',
        ":1:13: found broken JSON",
    ),
    "predictions: no score": (
        "predictions/stage-06/reverse.jsonl",
        '{"id": "a"}',
        ":1: found no prediction, expected an id and a",
    ),
    "predictions: a score of NaN": (
        "predictions/stage-06/reverse.jsonl",
        '{"id": "a", "score": NaN}',
        ":1: found no prediction",
    ),
    "predictions: an id that is a list": (
        "predictions/stage-06/reverse.jsonl",
        '{"id": [], "score": 1}',
        ":1: found no predic",
    ),
    "predictions: half a pair": (
        "predictions/stage-06/reverse.jsonl",
        '{"id": "a", "score": 1, "answer": "\\ud800"}',
        ":1: found half of a surrogate pair",
    ),
    "predictions: references of a number": (
        "predictions/stage-06/reverse.jsonl",
        '{"id":"a","score":1,"references":1}',
        "a list of references\nRemove the file, or score the run again.",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_fake_run(tmp_path_factory.mktemp("runs") / "naive-0")


@pytest.mark.parametrize("name", RUN)
def test_a_bad_file_of_a_run(told, whole, tmp_path, name, refused_report):
    file, content, expected = RUN[name]
    out = shutil.copytree(whole, tmp_path / "run")
    (out / file).write_bytes(exact(content))
    message = refused_report(out)
    assert message.startswith(f"{out / file}")
    assert expected in message


@pytest.fixture
def refused_report(told):
    """What is said where a report reads all of a run: its page, and the keys that a comparison
    groups it by.
    """
    from continual.reports import write
    from continual.results.run_folder import Run

    def read(out):
        write._write_run(Run.load(out), out / "page")
        assert Run.load(out).settings

    return lambda out: told(read, out)


CURVE = {
    "cut off": ('{"schema": 1', "curve.json:1:13: found broken JSON"),
    "a later schema": ('{"schema": 2}', "schema 2; this version reads schema 1"),
    "a list": ("[]", "no curve of schema 1"),
    "no points": (
        '{"schema": 1, "task": "a", "metric": "m", "start": "base"}',
        "KeyError('points')",
    ),
    "a task that is a list": (
        '{"schema": 1, "task": [], "metric": "m", "start": "base"}',
        "task should be text",
    ),
    "a score of 2": (
        '{"schema": 1, "task": "a", "metric": "m", "start": "base", "points": [{"shots": 1, '
        '"step": 0, "score": 2}]}',
        "these are no shots, step and score in [0, 1]: [(1, 0, 2)]",
    ),
    "infinite shots": (
        '{"schema": 1, "task": "a", "metric": "m", "start": "base", "points": [{"shots": 1e999, '
        '"step": 0, "score": 1}]}',
        "these are no shots, step and score in [0, 1]: [(inf, 0, 1)]",
    ),
}


@pytest.mark.parametrize("name", CURVE)
def test_a_bad_curve(told, tmp_path, name):
    from continual.reports import write

    content, expected = CURVE[name]
    out = write_fake_adaptation(tmp_path / "new")
    (out / "curve.json").write_text(content)
    message = told(write.write_report, out)
    assert message.startswith(f"{out / 'curve.json'}:")
    assert expected in message


# Checkpoints whose manifest is right for what they hold, and what they hold is not


def sign(at: Path) -> None:
    """Make the manifest anew."""
    (at / "manifest.json").unlink(missing_ok=True)
    told = {
        p.name: {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in at.iterdir()
    }
    (at / "manifest.json").write_text(json.dumps(told))


CHECKPOINT = {
    "manifest: cut off": ("manifest.json", '{"a": ', "manifest.json is missing or damaged"),
    "manifest: nested too deep": ("manifest.json", DEEP, "manifest.json is missing or damaged"),
    "manifest: a list": ("manifest.json", "[]", "manifest.json is missing or damaged"),
    "manifest: nothing": (
        "manifest.json",
        "{}",
        "matrix.json, memory.json, memory.safetensors, weights.safetensors missing",
    ),
    "manifest: a name that leads out": (
        "manifest.json",
        '{"../../../etc/passwd": {}}',
        "'../../../etc/passwd' is not a file of this checkpoint",
    ),
    "manifest: a name from the root": (
        "manifest.json",
        '{"/etc/passwd": {}}',
        "'/etc/passwd' is not a file of this",
    ),
    "weights: nothing": ("weights.safetensors", "", "weights.safetensors is damaged"),
    "weights: cut off": (
        "weights.safetensors",
        b"\x10\x00\x00\x00\x00\x00\x00\x00{}",
        "weights.safetensors is damaged",
    ),
    "weights: a head of terabytes": (
        "weights.safetensors",
        b"\xff" * 8 + b"{}",
        "weights.safetensors is damaged",
    ),
    "weights: a pickle": (
        "weights.safetensors",
        b"\x80\x04\x95cos\nsystem\n(S'id'\ntR.",
        "weights.safetensors is damaged",
    ),
    "weights: of another model": (
        "weights.safetensors",
        b"\x02\x00\x00\x00\x00\x00\x00\x00{}",
        "its weights belong to another model or adapter",
    ),
    "memory: cut off": ("memory.json", "{", "memory.json does not fit this strategy"),
    "memory: nested too deep": ("memory.json", DEEP, "memory.json does not fit this strategy"),
    "memory: a class of elsewhere": (
        "memory.json",
        '{"value": "os.system", "fields": {}}',
        "KeyError('os.system')",
    ),
    "memory: a tensor that is not there": ("memory.json", '{"tensor": "x"}', "KeyError('x')"),
    "memory: a random state of text": (
        "memory.json",
        '{"random": [3, ["x"], null]}',
        "does not fit this strategy",
    ),
    "memory: a random state too large": (
        "memory.json",
        json.dumps({"random": [3, [10**30] * 625, None]}),
        "does not fit",
    ),
    "memory: an example of no response": (
        "memory.json",
        '{"example": {"id": "e", "task": 0, "text": "x", "ids": "1 2", "response": "00"}}',
        "the ids, response or task of the example 'e' cannot be",
    ),
    "memory: an example of negative ids": (
        "memory.json",
        '{"example": {"id": "e", "task": 0, "text": "x", "ids": "-1 2", "response": "01"}}',
        "the example 'e' has ids that are not among the model's 64",
    ),
    "memory: an example of ids beyond the vocabulary": (
        "memory.json",
        '{"example": {"id": "e", "task": 0, "text": "x", "ids": "1 64", "response": "01"}}',
        "the example 'e' has ids that are not among the model's 64",
    ),
    "memory: another buffer": (
        "memory.json",
        '{"value": "ReplayBuffer", "fields": {"capacity": "all"}}',
        "does not fit",
    ),
    "matrix: cut off": ("matrix.json", "{", "matrix.json:1:2: found broken JSON"),
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return checkpoint.save(
        tmp_path_factory.mktemp("k") / "stage-01", toy.make_model(), Strategy(), toy.empty_matrix()
    )


@pytest.mark.parametrize("name", CHECKPOINT)
def test_a_bad_checkpoint(told, kept, tmp_path, name):
    file, content, expected = CHECKPOINT[name]
    at = shutil.copytree(kept, tmp_path / "stage-01")
    (at / file).write_bytes(exact(content))
    if file != "manifest.json":
        sign(at)
    message = told(checkpoint.load, at, toy.make_model(), Strategy())
    assert message.startswith(f"{at}")
    assert expected in message


@pytest.mark.parametrize(
    "change",
    [
        {"step": "x"},
        {"step": -1},
        {"tokens": None},
        {"optimizer": {}},
        {"random": {}},
        {"schedule": 3},
        {"budget": float("inf")},
    ],
)
def test_a_bad_progress(told, change):
    import torch

    net = toy.make_model()
    optimizer = torch.optim.AdamW(net.net.parameters())
    at = stage_state.StageState(
        net, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), None
    )
    assert "the stage's progress does not fit it" in told(
        at.load_state_dict, {**at.state_dict(), **change}
    )


# Model folders


def spoiled(file, content):
    return lambda at: (at / file).write_bytes(exact(content))


MODEL = {
    "no config.json": (lambda at: (at / "config.json").unlink(), "could not be loaded"),
    "config.json: cut off": (spoiled("config.json", "{"), "could not be loaded"),
    "config.json: nested too deep": (spoiled("config.json", DEEP), "could not be loaded"),
    "config.json: a list": (spoiled("config.json", "[]"), "could not be loaded"),
    "config.json: an unknown model": (
        spoiled("config.json", '{"model_type": "nothing"}'),
        "could not be loaded",
    ),
    "config.json: numbers as text": (
        spoiled("config.json", '{"model_type": "llama", "hidden_size": "x"}'),
        "could not be",
    ),
    "config.json: another size": (
        spoiled("config.json", '{"model_type": "llama", "hidden_size": 8}'),
        "could not be",
    ),
    "config.json: code of its own": (
        spoiled("config.json", '{"auto_map": {"AutoConfig": "evil.Config"}}'),
        "could not be",
    ),
    "no weights": (lambda at: (at / "model.safetensors").unlink(), "could not be loaded"),
    "weights as a pickle": (
        lambda at: (at / "model.safetensors").rename(at / "pytorch_model.bin"),
        "could not be loaded",
    ),
    "weights cut off": (
        lambda at: (at / "model.safetensors").write_bytes(
            (at / "model.safetensors").read_bytes()[:999]
        ),
        "could not be loaded",
    ),
    "weights of nothing": (
        spoiled("model.safetensors", b"\x02\x00\x00\x00\x00\x00\x00\x00{}"),
        "could not be loaded",
    ),
    "tokenizer.json: cut off": (spoiled("tokenizer.json", "{"), "could not be loaded"),
    "tokenizer.json: nothing in it": (spoiled("tokenizer.json", "{}"), "could not be loaded"),
}


@pytest.mark.parametrize("name", MODEL)
def test_a_bad_model_folder(told, model_folder, tmp_path, name):
    spoil, expected = MODEL[name]
    at = shutil.copytree(model_folder, tmp_path / "model")
    spoil(at)
    message = told(lambda: loading.load_pretrained(name=str(at), device="cpu"))
    assert f"error: model.name={at}" in f"error: {message}"
    assert expected in message
    assert "Give a local folder with config.json, tokenizer and safetensors weights" in message


def test_weights_that_lack_some_are_not_filled_at_random(told, tmp_path):
    from safetensors.torch import load_file, save_file

    at = write_model(tmp_path / "model")
    weights = load_file(at / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, at / "model.safetensors", {"format": "pt"})
    message = told(lambda: loading.load_pretrained(name=str(at), device="cpu"))
    assert (
        "its weights lack model.layers.1.mlp.up_proj.weight, which would be initialised at random"
        in message
    )


def test_the_corpus_is_as_large_as_promised():
    assert sum(map(len, (ROWS, INDEX, RUN, CURVE, CHECKPOINT, MODEL))) >= 60

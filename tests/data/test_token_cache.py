"""The rows' ids beside the run: made once, read again, and never the wrong ones."""

import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from continual.data.template import Encoder, index_tasks
from continual.data.token_cache import _hash_tensors, load_or_tokenize
from continual.data.types import Message, Stream, Task
from continual.errors import DataError
from tests.support.models import (
    CHATML_TEMPLATE,
    TASKS,
    load_json_lines,
    make_example,
    make_rows,
    run_in_process,
    stream_text,
    train_byte_bpe,
    write_rows,
    write_stream,
)

PLAIN = train_byte_bpe(stream_text())
CHAT = train_byte_bpe(stream_text(), eos="<|im_end|>", chat_template=CHATML_TEMPLATE)
ROWS = (
    make_example("Do it.", "a b", id="a"),
    make_example("Do it.", "q" * 60, id="b"),
    make_example("Größe?", "", "rød", id="c"),
    make_example("x" * 90, id="d"),
    make_example(output=" ", id="e"),
    make_example("", messages=(Message("user", "Hi"), Message("assistant", "red")), id="f"),
)
FIT = tuple(e for e in ROWS if e.id not in "de")


def stream(*found):
    """Two tasks whose last stage holds both."""
    a, b = (Task(name, tuple(replace(e, task=name) for e in found)) for name in ("t", "u"))
    return Stream("s", "o", (a, b), (a, Task("both", (*a.train, *b.train))))


def same(encoder, given_stream, path):
    """What is read at `path`, after it was seen to be what this encoder makes of the stream,
    counted alike.
    """
    told = load_or_tokenize(path, encoder, given_stream, include_dev=False)
    indices = index_tasks(given_stream)
    for stage in given_stream.stages:
        task, encodings = told.encode_stage(stage)
        assert task == encoder.encode_task(stage, indices)
        expected = encoder.encode_examples(stage.train, indices)
        assert [replace(x, reason="") for x in encodings] == [
            replace(x, reason="") for x in expected
        ]
    return told


# The same ids


@pytest.mark.parametrize(
    "encoder",
    [
        Encoder(PLAIN, max_tokens=40, on_unusable="skip"),
        Encoder(CHAT, "chat", 80, on_unusable="skip"),
        Encoder(
            train_byte_bpe(stream_text(), append_eos=True),
            "alpaca",
            60,
            seq2seq=True,
            on_unusable="skip",
        ),
    ],
    ids=["plain", "chat", "encoder-decoder"],
)
def test_what_is_read_is_what_was_tokenised_and_counts_the_same(encoder, tmp_path, capsys):
    for _ in range(2):
        same(encoder, stream(*ROWS), tmp_path / "tokens.safetensors")
    assert capsys.readouterr().err == ""


def test_some_rows_are_from_all_over_the_stream_and_not_counted(tmp_path):
    encoder = Encoder(PLAIN, max_tokens=40, on_unusable="skip")
    told = same(encoder, stream(*ROWS), tmp_path / "tokens.safetensors")
    assert [e.id for e in told.sample_rows(2)] == ["a", "a"]
    assert [e.id for e in told.sample_rows(99)] == ["a", "b", "c", "f"] * 2


def test_a_row_is_tokenised_once_however_many_stages_hold_it(run_keys, tmp_path, monkeypatch):
    calls, train = [], Encoder.encode_example
    monkeypatch.setattr(
        Encoder, "encode_example", lambda self, e, i: calls.append(e.id) or train(self, e, i)
    )
    run_in_process(tmp_path, run_keys, "stream.arrangement=cumulative", "train.steps=1")
    assert sorted(calls) == sorted(f"{task}/train/{i}" for task in TASKS for i in range(12))


def test_a_resumed_run_tokenises_nothing_and_counts_as_before(run_keys, tmp_path, monkeypatch):
    long = {"instruction": "Say it.", "input": "q" * 300, "output": "q"}
    folder = write_stream(tmp_path / "stream", TASKS[:2])
    for task in TASKS[:2]:
        write_rows(
            folder / task / "train.jsonl",
            [*make_rows(task, 6), long, {"instruction": "Say.", "output": ""}],
        )
    told = (*run_keys, f"stream.path={folder}", "data.on_unusable=skip")
    out = tmp_path / "run"
    whole, _ = run_in_process(out, told)
    (out / "finished").unlink()
    shutil.rmtree(out / "checkpoints/stage-02")
    monkeypatch.setattr(
        Encoder, "encode_example", lambda *_: pytest.fail("a row was tokenised again")
    )
    again, said = run_in_process(out, told)
    assert again.scores == whole.scores
    assert "inputs shortened to fit: 1; examples skipped: 1 (last/train/7 ...)" in said
    counts = [
        (e["stage"], e["skipped"], e["shortened"])
        for e in load_json_lines(out / "events.jsonl")
        if e["event"] == "data"
    ]
    assert counts == [(1, 1, 1), (2, 1, 1), (2, 1, 1)]


# Never the wrong ones

CHANGES = {
    "a row": lambda e, s: (
        e,
        stream(
            *FIT[:-1],
            replace(FIT[-1], messages=(Message("user", "Ho"), Message("assistant", "red"))),
        ),
    ),
    "an input": lambda e, s: (e, stream(replace(FIT[0], input="a c"), *FIT[1:])),
    "the order": lambda e, s: (e, stream(*FIT[::-1])),
    "a row more": lambda e, s: (e, stream(*FIT, make_example("More.", id="g"))),
    "max_tokens": lambda e, s: (replace(e, max_tokens=41), s),
    "template": lambda e, s: (replace(e, template="inst"), s),
    "on_unusable": lambda e, s: (replace(e, on_unusable="skip"), s),
    "seq2seq": lambda e, s: (replace(e, seq2seq=True), s),
    "tokenizer": lambda e, s: (replace(e, tokenizer=train_byte_bpe(stream_text(), size=300)), s),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_what_the_ids_depend_on_makes_them_anew(change, tmp_path, capsys):
    path, encoder = tmp_path / "tokens.safetensors", Encoder(PLAIN, max_tokens=40)
    same(encoder, stream(*FIT), path)
    same(*CHANGES[change](encoder, stream(*FIT)), path)
    assert f"{path} is of other rows, or of another tokenizer" in capsys.readouterr().err


@given(st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_file_that_lost_its_end_or_has_a_wrong_byte_is_made_anew(tmp_path, data):
    path, encoder = tmp_path / "tokens.safetensors", Encoder(PLAIN, max_tokens=40)
    same(encoder, stream(*FIT), path)
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    path.write_bytes(
        whole[:at]
        if cut
        else whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    )
    same(encoder, stream(*FIT), path)


def spoilt(name, at, value):
    def spoil(parts):
        parts[name].view(-1)[at] = value
        return parts

    return spoil


FORGED = {
    "an id below the vocabulary": spoilt("ids", 3, -1),
    "an id above the vocabulary": spoilt("ids", 3, len(PLAIN)),
    "a row without tokens": spoilt("rows", 0, 0),
    "a negative length": spoilt("rows", 0, -5),
    "a length above the limit": spoilt("rows", 0, 1000),
    "a text longer than all": spoilt("rows", 1, 10**6),
    "rows that do not add up": spoilt("rows", 0, 1),
    "nothing to learn": lambda p: {**p, "response": torch.zeros_like(p["response"])},
    "a row less": lambda p: {**p, "rows": p["rows"][:-1].clone()},
    "ids of another kind": lambda p: {**p, "ids": p["ids"].float()},
    "bfloat16": lambda p: {**p, "text": p["text"].bfloat16()},
    "a square": lambda p: {**p, "text": p["text"][None].clone()},
    "a tensor missing": lambda p: {n: t for n, t in p.items() if n != "response"},
    "no ids": lambda p: {**p, "ids": p["ids"][:0].clone()},
}


@pytest.mark.parametrize("how", FORGED)
def test_numbers_that_cannot_be_rows_are_not_believed_whatever_their_hash(how, tmp_path, capsys):
    path, encoder = tmp_path / "tokens.safetensors", Encoder(PLAIN, max_tokens=40)
    same(encoder, stream(*FIT), path)
    with safe_open(path, framework="pt") as file:
        key, parts = (
            file.metadata()["key"],
            {n: file.get_tensor(n).clone() for n in list(file.keys())},
        )
    parts = FORGED[how](parts)
    hashed = "" if how == "bfloat16" else _hash_tensors(parts)
    save_file(parts, path, {"key": key, "digest": hashed})
    same(encoder, stream(*FIT), path)
    assert f"{path} is damaged; the rows are tokenized again" in capsys.readouterr().err


# What cannot be learned


def test_all_unfit_rows_of_all_stages_are_named_together(tmp_path):
    with pytest.raises(DataError) as caught:
        load_or_tokenize(
            tmp_path / "tokens", Encoder(PLAIN, max_tokens=40), stream(*ROWS), include_dev=False
        )
    assert len(str(caught.value).split("\n")) == 4
    assert not (tmp_path / "tokens").exists()


def test_every_task_of_which_nothing_is_left_is_refused_before_the_first_is_learned(
    run_keys, tmp_path
):
    folder = write_stream(tmp_path / "stream")
    for task in TASKS[1:]:
        write_rows(folder / task / "train.jsonl", [{"instruction": "Say.", "output": ""}])
    with pytest.raises(DataError) as caught:
        run_in_process(tmp_path / "run", run_keys, f"stream.path={folder}", "data.on_unusable=skip")
    assert [line.split(" has no train rows left")[0] for line in str(caught.value).split("\n")] == [
        "task 'last'",
        "task 'loud'",
    ]
    assert not (tmp_path / "run/events.jsonl").exists()

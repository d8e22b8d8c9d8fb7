"""The audit: what is amiss in a stream's rows is counted, shown at a run's start and alone, and
changes nothing.
"""

import io
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from continual.auditing.audit import audit_stream, majority_baseline
from continual.auditing.lengths import count_row_tokens, measure_lengths
from continual.cli import main
from continual.data.template import Encoder
from continual.data.types import Example, Message, Stream, Task
from continual.errors import ConfigError, DataError, MissingError
from continual.reports import audits, write
from continual.results.prediction import Prediction
from continual.runs import run as engine
from continual.runs.audit_step import run_audit
from tests.support.models import (
    TASKS,
    load_json_lines,
    make_rows,
    run_in_process,
    stream_text,
    train_byte_bpe,
    write_model,
    write_rows,
    write_stream,
)
from tests.support.pages import EVIL, page


def row(asked="Say red.", input="", answers=("red",), id="a", task="t"):
    answers = (answers,) if isinstance(answers, str) else answers
    return Example(id, task, asked, input, tuple(answers), location=f"{task}.jsonl:{id}")


def task(name="t", train=(), dev=(), test=(), **more):
    """Rows get their task's name and an id that says where they stand."""

    def own(split, found):
        ids = [f"{name}/{split}/{i}" for i in range(len(found))]
        return tuple(
            replace(e, task=name, id=id, location=f"{name}/{split}.jsonl:{id[-1]}")
            for e, id in zip(found, ids, strict=True)
        )

    return Task(name, own("train", train), own("dev", dev), own("test", test), **more)


def stream(*tasks, stages=None, pretraining=()):
    return Stream("s", "o", tasks, stages or tasks, tuple(pretraining))


def found(told, kind):
    """Of each finding of that kind its task, how many rows, its words and its example."""
    return [(f.task, f.count, f.says, f.example) for f in told.findings if f.kind == kind]


# One finding after another


def test_rows_of_one_split_that_ask_the_same_are_repeated():
    a = task(
        train=[
            row("Say  RED.\n"),
            row("say red."),
            row("Say red.", answers="blue"),
            row("Say gold."),
        ]
    )
    ((name, count, says, example),) = found(audit_stream(stream(a)), "repeated")
    assert (name, count) == ("t", 2)
    assert says == "2 of 4 train rows repeat the prompt of an earlier one, 1 with the same answers"
    assert example == "t/train/1 (t/train.jsonl:1) and t/train/0 (t/train.jsonl:0)"


def test_instruction_and_input_are_one_prompt_however_they_are_parted():
    a = task(train=[row("Say red.", "Now.")], test=[row("Say red. Now.")])
    assert audit_stream(stream(a)).tasks["t"]["leaked"] == 1


def test_a_test_row_in_another_tasks_training_rows_is_leaked():
    a, b = (
        task("t", test=[row(), row("Say gold.")]),
        task("u", train=[row(answers="RED ")], test=[row("x")]),
    )
    told = audit_stream(stream(a, b))
    assert found(told, "leaked") == [
        (
            "t",
            1,
            "1 of 2 test prompts stand in training rows, 1 with the same answers",
            "t/test/0 (t/test.jsonl:0) and u/train/0 (u/train.jsonl:0)",
        )
    ]
    assert [told.tasks[name]["leaked"] for name in "tu"] == [1, 0]


def test_rows_that_only_pretraining_saw_are_training_rows_too():
    told = audit_stream(stream(task(test=[row()]), pretraining=[row(task="basic", id="b")]))
    assert found(told, "leaked")[0][1] == 1


def test_a_dev_row_in_the_training_rows_and_a_test_row_in_the_dev_rows_are_told_apart():
    told = audit_stream(
        stream(task(train=[row("A")], dev=[row("A"), row("B")], test=[row("B"), row("C")]))
    )
    assert [f[2] for f in found(told, "leaked")] == [
        "1 of 2 dev prompts stand in training rows, 1 with the same answers"
    ]
    assert [f[2] for f in found(told, "seen in dev")] == ["1 of 2 test prompts stand in dev rows"]


def test_a_test_input_that_is_trained_on_under_another_instruction_is_told():
    told = audit_stream(
        stream(
            task(
                train=[row("Solve.", "2 + 2")],
                test=[row("Solve and explain.", "2 + 2"), row("Go.")],
            )
        )
    )
    assert not found(told, "leaked")
    assert [f[2] for f in found(told, "input leaked")] == [
        "1 of 2 test inputs stand in training rows under another instruction"
    ]


def test_conflicting_answers_to_one_prompt_are_counted_wherever_they_stand():
    a = task(
        train=[row("A", answers="red"), row("B", answers="x")],
        test=[row("A", answers=("blue", "green"))],
    )
    told = audit_stream(stream(a, task("u", train=[row("B", answers=("y", "x"))])))
    assert [(f[1], f[3]) for f in found(told, "conflicting")] == [
        (1, "t/train/0 (t/train.jsonl:0) and t/test/0 (t/test.jsonl:0)"),
        (1, "t/test/0 (t/test.jsonl:0) and t/train/0 (t/train.jsonl:0)"),
    ]


def test_answers_of_which_one_is_right_for_all_rows_do_not_conflict():
    assert not found(
        audit_stream(stream(task(train=[row(answers="red"), row(answers=("blue", "Red"))]))),
        "conflicting",
    )


def test_empty_answers_are_counted_by_split():
    a = task(
        train=[row("A", answers=(" ", "red")), row("B")],
        test=[row("C", answers=(" ", "red")), row("D", answers="")],
    )
    told = audit_stream(stream(a))
    assert [(f[2], f[3]) for f in found(told, "empty")] == [
        ("1 of 2 train rows have an empty answer", "t/train/0 (t/train.jsonl:0)"),
        ("1 of 2 test rows have an empty answer", "t/test/1 (t/test.jsonl:1)"),
    ]
    assert told.tasks["t"]["empty"] == 2


def test_a_task_without_rows_to_score_is_told():
    told = audit_stream(stream(task(train=[row()], dev=[row("B")])))
    assert found(told, "unscored") == [("t", 0, "there are no test rows to score", "")]
    assert not found(audit_stream(stream(task(train=[row()], dev=[row("B")])), "dev"), "unscored")


def test_messages_are_compared_by_all_but_the_last():
    talk = (Message("user", "Say red."), Message("assistant", "red"))
    chat = Example("m", "t", "", outputs=("red",), messages=talk)
    assert audit_stream(stream(task(train=[chat], test=[row()]))).tasks["t"]["leaked"] == 1


def test_rows_that_several_stages_learn_are_no_repetition():
    a, b = task("t", train=[row("A")]), task("u", train=[row("B")])
    both = Task("u", (*a.train, *b.train))
    told = audit_stream(stream(a, b, stages=(a, both)))
    assert not found(told, "repeated")
    assert [told.tasks[name]["train"] for name in "tu"] == [1, 1]


def test_a_clean_stream_has_no_finding():
    assert (
        audit_stream(stream(task(train=[row("A")], dev=[row("B")], test=[row("C")]))).findings == ()
    )


def test_a_split_that_is_none_is_refused():
    with pytest.raises(ConfigError, match=r"unknown score\.split 'tset'; did you mean 'test'"):
        audit_stream(stream(task(train=[row()])), "tset")


# The majority's score


def answered(*answers):
    return [row(f"q{i}", answers=a) for i, a in enumerate(answers)]


def test_the_majority_of_training_and_that_of_the_split_are_scored():
    told = majority_baseline(
        task(labels=("yes", "no")),
        answered("Yes", "yes.", "no"),
        answered("no", "no", "yes", "no"),
        "exact_match",
    )
    assert told == {
        "classes": 2,
        "answer": "yes",
        "share": 2 / 3,
        "score": 0.25,
        "own_answer": "no",
        "own_score": 0.75,
    }


def test_a_task_of_few_answers_needs_no_labels_and_one_of_many_has_no_majority():
    many = [str(i) for i in range(30)]
    assert (
        majority_baseline(task(), answered(*["a", "b"] * 10), answered("a"), "exact_match")[
            "classes"
        ]
        == 2
    )
    assert majority_baseline(task(), answered(*many * 10), answered("1"), "exact_match") is None
    assert majority_baseline(task(), answered("a", "b"), answered("a"), "exact_match") is None, (
        "each answer but once"
    )


def test_the_majority_gets_its_score_by_the_metric():
    told = majority_baseline(
        task(labels=("a b", "c")), answered("a b"), answered("a c"), "token_f1"
    )
    assert told["score"] == 0.5
    assert (
        majority_baseline(task(labels=("a",)), answered("a"), answered("a"), "perplexity")["score"]
        is None
    )


@pytest.mark.parametrize(
    ("answers", "one_sided"),
    [
        ("aab", True),
        ("aabb", False),
        ("aaabb", False),
        ("aaaabcde", True),
        ("aaaabbccde", True),
        ("abcde", False),
    ],
)
def test_one_answer_of_two_thirds_or_twice_its_part_is_an_imbalance(answers, one_sided):
    a = task(train=answered(*answers), test=answered("a"), labels=tuple(set(answers)))
    told = found(audit_stream(stream(a)), "imbalance")
    assert bool(told) == one_sided
    if one_sided:
        assert "giving it to all test rows scores 100.0" in told[0][2]


def test_what_the_base_scores_above_the_majority_says_whether_it_solves_a_task():
    a = task(
        "a", train=answered(*"ccc", "d"), test=answered(*"ccc", "d"), labels=("c", "d")
    )  # the majority gets 0.75
    told = audit_stream(stream(a, task("b", train=[row()], test=[row("x")]))).to_dict()
    assert [
        line.split(":")[0] for line in audits.solved_task_lines(told, {"a": 0.92, "b": 0.92})
    ] == ["b"]
    assert [
        line.split(":")[0] for line in audits.solved_task_lines(told, {"a": 0.98, "b": 0.88})
    ] == ["a"]
    assert audits.solved_task_lines(told, {"a": None}) == []


# Lengths in tokens


def measured(train, test=(), limit=40, room=None, **more):
    from continual.evaluation.scoring import prepare_eval_set

    encoder = Encoder(train_byte_bpe(stream_text()), max_tokens=limit, on_unusable="skip", **more)
    made = task(train=train, test=test)
    asked = prepare_eval_set(made, encoder, "test", 0, max_new_tokens=room) if test else None
    told = measure_lengths(
        encoder, made.train, count_row_tokens(encoder, made.train), made.test, asked, room
    )
    return encoder, made, told


def test_whole_lengths_are_told_and_what_becomes_of_the_rows_that_are_too_long():
    encoder, made, told = measured(
        [row(), row(input="q" * 60), row("w" * 90), row("x", answers=" ")]
    )
    whole = replace(encoder, max_tokens=10_000)
    assert told.tokens == sorted(
        len(whole.encode_example(e, 0).require().ids) for e in made.train[:3]
    )
    assert told.summarize() == {
        "median": told.tokens[1],
        "p95": told.tokens[2],
        "longest": told.tokens[2],
        "left out": 2,
        "shortened": 1,
    }
    assert [e.id for e in told.train_by_kind["shortened"]] == ["t/train/1"]
    assert [e.id for e in told.train_by_kind["left out"]] == ["t/train/2", "t/train/3"]


def test_shortened_prompts_and_answers_longer_than_max_new_tokens_are_found():
    _, _, told = measured(
        [row()],
        [row(), row(input="q" * 60), row(answers=("q" * 20, "red")), row(answers="q" * 20)],
        room=8,
    )
    assert {kind: [e.id for e in some] for kind, some in told.scored_by_kind.items()} == {
        "left out": [],
        "too long": ["t/test/3"],
        "shortened": ["t/test/1"],
    }


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_the_quantiles_are_the_nearest_ranks(tokens):
    from continual.auditing.lengths import Lengths

    told = Lengths(sorted(tokens), {}, {}).summarize()
    for key, share in (("median", 50), ("p95", 95), ("longest", 100)):
        least = min(n for n in tokens if 100 * sum(m <= n for m in tokens) >= share * len(tokens))
        assert told[key] == least


# Against brute force

TEXTS = st.sampled_from(["a", "A", " b", "b", "a b", "A  b", "c", "", "ß", "SS"])
EXAMPLES = st.lists(
    st.builds(lambda i, x, o: (i, x, tuple(o)), TEXTS, TEXTS, st.lists(TEXTS, max_size=3)),
    max_size=7,
)


@settings(deadline=None)
@given(st.lists(st.tuples(EXAMPLES, EXAMPLES, EXAMPLES), min_size=1, max_size=3))
def test_the_counts_are_those_of_comparing_every_row_with_every_other(parts):
    tasks = [
        task(f"t{i}", *([row(*r) for r in split] for split in splits))
        for i, splits in enumerate(parts)
    ]
    told = audit_stream(stream(*tasks)).tasks
    every = [
        (s, n, e)
        for s in ("train", "dev", "test")
        for n, t in enumerate(tasks)
        for e in getattr(t, s)
    ]

    def plain(text):
        return " ".join(text.casefold().split())

    def answers(e):
        return {plain(o) for o in e.outputs} - {""}

    def same(one, other):
        return plain(f"{one.instruction} {one.input}") == plain(
            f"{other.instruction} {other.input}"
        )

    for number, t in enumerate(tasks):
        own = [(i, s, e) for i, (s, n, e) in enumerate(every) if n == number]
        assert told[t.name]["repeated"] == sum(
            any(split == s and same(e, other) for split, _, other in every[:i]) for i, s, e in own
        )
        assert told[t.name]["leaked"] == sum(
            s != "train" and any(split == "train" and same(e, other) for split, _, other in every)
            for _, s, e in own
        )
        assert told[t.name]["input leaked"] == sum(
            s != "train"
            and bool(plain(e.input))
            and any(
                split == "train" and plain(other.input) == plain(e.input)
                for split, _, other in every
            )
            and not any(split == "train" and same(e, other) for split, _, other in every)
            for _, s, e in own
        )
        assert told[t.name]["seen in dev"] == sum(
            s == "test" and any(split == "dev" and same(e, other) for split, _, other in every)
            for _, s, e in own
        )
        assert told[t.name]["conflicting"] == sum(
            bool(answers(e))
            and not set.intersection(
                *(answers(other) for *_, other in every if same(e, other) and answers(other))
            )
            for _, _, e in own
        )
        assert told[t.name]["empty"] == sum(
            not answers(e) or (s == "train" and not e.outputs[0].strip()) for _, s, e in own
        )


# Alone, and at a run's start


@pytest.fixture
def leaky(tmp_path):
    """The small stream, a test row of which is trained on."""
    folder = write_stream(tmp_path / "stream")
    write_rows(folder / "first/train.jsonl", [*make_rows("first", 12), *make_rows("first", 1, 16)])
    return folder


def test_the_command_says_what_it_finds_and_writes_nothing(run_cli, leaky, tmp_path):
    code, out, err = run_cli("audit", "stream=folder", f"stream.path={leaky}")
    assert (code, err) == (0, "")
    assert (
        "first: 1 of 4 test prompts stand in training rows, 1 with the same answers, such as "
        f"first/test/0 ({leaky}/first/test.jsonl:1) and first/train/12 "
        f"({leaky}/first/train.jsonl:13)"
    ) in out
    assert [line.split()[:4] for line in out.splitlines() if line.startswith(TASKS)][:3] == [
        ["first", "13", "4", "4"],
        ["last", "12", "4", "4"],
        ["loud", "12", "4", "4"],
    ]
    assert "Tokens are counted where model= is given" in " ".join(out.split())
    assert list((tmp_path / "here").iterdir()) == []


def test_a_clean_stream_is_said_to_be_clean(run_cli, stream_folder):
    assert (
        "no problems found" in run_cli("audit", "stream=folder", f"stream.path={stream_folder}")[1]
    )


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_tokens_are_counted_for_a_named_model_without_its_weights(
    leaky, tmp_path, kind, monkeypatch
):
    folder = write_model(tmp_path / "model", kind)
    (folder / "model.safetensors").unlink()
    keys = [
        "stream=folder",
        f"stream.path={leaky}",
        "model=hf",
        f"model.name={folder}",
        "data.max_length=20",
    ]
    told = run_audit(cli_config(*keys), Console(file=io.StringIO()))
    assert told.fits == {"limit": 20, "max_length": 20, "context": 128 if kind == "llama" else None}
    assert told.tasks["first"]["tokens"]["longest"] > 0


def cli_config(*keys):
    return main.compose_config("audit", list(keys))


def test_a_model_from_scratch_is_not_built_to_count_its_tokens(leaky, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    told = run_audit(
        cli_config(
            "stream=folder", f"stream.path={leaky}", "model=scratch", "model.vocab_size=300"
        ),
        Console(file=io.StringIO()),
    )
    assert told.tasks["loud"]["tokens"]["median"] > 0
    assert not (tmp_path / "cache").exists()


def test_a_run_audits_once_and_shows_it_in_the_terminal_the_log_and_the_page(
    run_keys, leaky, tmp_path
):
    more = (f"stream.path={leaky}", "train.epochs=1")
    _, said = run_in_process(tmp_path / "run", run_keys, *more)
    assert "first: 1 of 4 test prompts stand in training rows" in said
    (event,) = [e for e in load_json_lines(tmp_path / "run/events.jsonl") if e["event"] == "audit"]
    told = json.loads((tmp_path / "run/audit.json").read_text())
    assert event["findings"] == told["findings"]
    assert told["findings"][0]["kind"] == "leaked"
    assert "1 of 4 test prompts stand in training rows" in page(tmp_path / "run").text
    (tmp_path / "run/finished").unlink()
    _, again = run_in_process(tmp_path / "run", run_keys, *more)
    assert "stage 3/3" in again
    assert "stand in training rows" not in again
    assert sum(e["event"] == "audit" for e in load_json_lines(tmp_path / "run/events.jsonl")) == 1


def test_the_audit_is_shown_before_the_weights_are_read_and_kept_once_the_run_begins(
    run_keys, leaky, tmp_path
):
    folder = write_model(tmp_path / "model")
    weights = folder / "model.safetensors"
    aside, said = weights.rename(tmp_path / "weights"), io.StringIO()
    told = (
        *run_keys,
        f"stream.path={leaky}",
        f"model.name={folder}",
        "train.epochs=1",
        f"out={tmp_path / 'run'}",
    )
    with pytest.raises(MissingError, match="could not be loaded"):
        engine.run(main.compose_config("run", list(told)), Console(file=said, width=400))
    assert "first: 1 of 4 test prompts stand in training rows" in said.getvalue()
    assert not any((tmp_path / "run" / name).exists() for name in ("audit.json", "events.jsonl"))
    aside.rename(weights)
    run_in_process(tmp_path / "run", told)
    assert (tmp_path / "run/audit.json").exists()


def test_what_is_wrong_with_the_rows_is_told_before_the_weights_are_read(run_keys, leaky, tmp_path):
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    write_rows(leaky / "loud/train.jsonl", [{"instruction": "Say it.", "output": " "}])
    with pytest.raises(DataError, match="the response is empty"):
        run_in_process(tmp_path / "run", run_keys, f"stream.path={leaky}", f"model.name={folder}")


def test_runs_of_one_comparison_say_the_same_audit_once(run_keys, leaky, tmp_path):
    more = (f"stream.path={leaky}", "train.epochs=1", "stream.tasks=[first]")
    assert "stand in training rows" in run_in_process(tmp_path / "a", run_keys, *more)[1]
    said = run_in_process(tmp_path / "b", run_keys, *more, "seed=1")[1]
    assert "audit of stream: as above, 1 findings" in said
    assert "stand in training rows" not in said


def test_an_audit_agrees_with_what_the_run_counts(run_keys, tmp_path):
    folder = write_stream(tmp_path / "stream", ("first",))
    long = {"instruction": "Say it.", "input": "q" * 300, "output": "q"}
    unfit = {"instruction": "w" * 200, "output": "x"}
    for split in ("train", "test"):
        write_rows(
            folder / f"first/{split}.jsonl",
            [*make_rows("first", 4, len(split)), long, unfit, {**long, "id": "b"}],
        )
    more = (f"stream.path={folder}", "data.on_unusable=skip", "train.epochs=1")
    _, said = run_in_process(tmp_path / "run", run_keys, *more)
    assert "inputs shortened to fit: 4; examples skipped: 2" in said
    told = json.loads((tmp_path / "run/audit.json").read_text())
    assert told["tasks"]["first"]["tokens"]["shortened"] == 2
    counts = {(f["kind"], f["says"].split()[3]): f["count"] for f in told["findings"]}
    assert {k: n for k, n in counts.items() if k[0] in ("left out", "shortened")} == {
        (kind, split): n
        for split in ("train", "test")
        for kind, n in (("left out", 1), ("shortened", 2))
    }
    assert (
        json.loads(
            json.dumps(
                run_audit(cli_config(*run_keys, *more), Console(file=io.StringIO())).to_dict()
            )
        )
        == told
    )


def test_a_task_that_the_base_solves_is_told_once_it_is_scored(run_keys, tmp_path, monkeypatch):
    from continual.runs import run as module

    def score(model, test, batch_size, turns):
        return 1.0, [Prediction(e.id, {"score": 1.0}, answer="") for e in test.examples]

    monkeypatch.setattr(module, "score_task", score)
    _, said = run_in_process(tmp_path / "run", run_keys, "stream.tasks=[loud]", "train.epochs=1")
    assert (
        said.count("loud: the base already solves it, with 100.0; there is little left to learn")
        == 1
    )
    assert "the base already solves it" in page(tmp_path / "run").text


def test_a_pages_audit_shows_every_text_as_text(run_keys, tmp_path):
    folder = write_stream(tmp_path / "stream", ("first",))
    write_rows(
        folder / "first/train.jsonl",
        [{"id": f"{EVIL}{i}", "instruction": "x", "output": "y"} for i in "ab"],
    )
    run_in_process(tmp_path / "run", run_keys, f"stream.path={folder}", "train.epochs=1")
    assert EVIL in page(tmp_path / "run").text


@pytest.mark.parametrize("damage", ["{", "[]", '{"schema": 2}', '{"schema": 1, "tasks": {"a": 3}}'])
def test_a_damaged_audit_is_named_by_the_report(run_keys, tmp_path, damage):
    run_in_process(tmp_path / "run", run_keys, "stream.tasks=[first]", "train.epochs=1")
    (tmp_path / "run/audit.json").write_text(damage)
    with pytest.raises(
        DataError, match=r"audit\.json.*(found broken JSON|no audit of schema 1 .*remove it)"
    ):
        write.write_report(tmp_path / "run")

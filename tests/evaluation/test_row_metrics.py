"""What an instruction asks for in its own words, and the metrics that mark an answer by it."""

import io
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from continual.auditing.audit import audit_stream
from continual.data.template import Encoder
from continual.data.types import Constraint, Message, Stream, Task
from continual.errors import ConfigError, DataError
from continual.evaluation.constraints import CHECKS
from continual.evaluation.fidelity import find_elements, score_fidelity
from continual.evaluation.instruction_parser import (
    COMPOSITION_LEVELS,
    composition_level,
    find_demands,
)
from continual.evaluation.row_metrics import ROW_METRICS
from continual.evaluation.scoring import prepare_eval_set, score_answer, score_task
from continual.reports import measures
from continual.results.prediction import Prediction
from continual.results.run_folder import Run
from tests.support.models import (
    load_json_lines,
    make_example,
    make_rows,
    make_text_model,
    run_in_process,
    stream_text,
    train_byte_bpe,
    write_rows,
)

COMMA, QUOTE = Constraint("punctuation:no_comma"), Constraint("startend:quotation")


# What is asked for


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("Say it in at least 100 words.", [("number_words", "at least", 100)]),
        ("Use no more than 20 words.", [("number_words", "less than", 21)]),
        ("Write a 200+ word poem.", [("number_words", "at least", 200)]),
        ("Say it in 50 words or fewer.", [("number_words", "less than", 51)]),
        (
            "Write two sentences.",
            [("number_sentences", "at least", 2), ("number_sentences", "less than", 3)],
        ),
        (
            "A one-sentence summary, please.",
            [("number_sentences", "at least", 1), ("number_sentences", "less than", 2)],
        ),
        (
            "Fewer than 3 sentences (1 sentence or 2 sentences).",
            [("number_sentences", "less than", 3)],
        ),
        ("Give exactly 3 bullet points.", [("number_bullet_lists", 3)]),
        ("Write 4 paragraphs, set apart by ***.", [("number_paragraphs", 4)]),
        ("Do not use any commas.", [("no_comma",)]),
        ("Refrain from commas", [("no_comma",)]),
        ("Answer in all lowercase letters.", [("english_lowercase",)]),
        ("Write in ALL CAPS.", [("english_capital",)]),
        (
            "Use at least 5 words in all capital letters.",
            [("capital_word_frequency", "at least", 5)],
        ),
        ("Wrap the output in JSON format.", [("json_format",)]),
        ("Put your whole answer in double quotation marks.", [("quotation",)]),
        ("It must have a title in double angular brackets.", [("title",)]),
        ("Add a postscript starting with P.P.S", [("postscript", "P.P.S")]),
        ("Include the keywords talented and tianjin.", [("existence", ["talented", "tianjin"])]),
        ("Include the words \"a b\", 'c' in it", [("existence", ["a b", "c"])]),
        (
            "Do not use the words perfume, fresh, or good.",
            [("forbidden_words", ["perfume", "fresh", "good"])],
        ),
        ("Avoid the word 'step'.", [("forbidden_words", ["step"])]),
        ("Let the word knot appear at least 2 times.", [("frequency", "knot", "at least", 2)]),
        ('The letter "n" appears less than 7 times.', [("letter_frequency", "n", "less than", 7)]),
        ('End the story with "The end."', [("end_checker", "The end.")]),
        ("Translate it into French.", [("response_language", "fr")]),
        ("It must have 4 sections marked with SECTION X.", [("multiple_sections", "SECTION", 4)]),
        ("At least 6 placeholders, such as [name].", [("number_placeholders", 6)]),
        ("Highlight at least 2 sections, as *this*", [("number_highlighted_sections", 2)]),
        ("Give two answers, separated by 6 asterisk symbols.", [("two_responses",)]),
        ("Give the first word.", []),
        ("Say it in 3-4 sentences.", []),
        ("Use one lowercase letter.", []),
        ("What is 3 plus 4?", []),
        ("Say words like these in any order.", []),
    ],
)
def test_checkable_demands_are_found_by_an_instruction_s_own_words(instruction, expected):
    found = [c for d in find_demands(instruction) for c in d.constraints]
    assert [c.id.partition(":")[2] for c in found] == [name for name, *_ in expected]
    for c, (_, *told) in zip(found, expected, strict=True):
        assert all(value in c.kwargs.values() for value in told)


@given(
    st.lists(
        st.sampled_from(
            [
                "at least",
                "3",
                "words",
                "no",
                "commas",
                "JSON",
                "the",
                "word",
                "letter",
                "'a'",
                ".",
                "include",
                "not",
                "sentences",
                "times",
                "highlight",
                "in",
                "French",
                "***",
            ]
        )
    )
)
def test_what_is_found_can_be_checked_and_no_passage_is_counted_twice(words):
    found = find_demands(" ".join(words))
    for d in found:
        for c in d.constraints:
            assert CHECKS[c.id]("Some answer", **c.kwargs) in (True, False)
    spans = sorted((d.start, d.end) for d in found)
    assert all(a[1] <= b[0] for a, b in pairwise(spans))


# Level


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("Write a poem.", 0),
        ("Give the first and the third word.", 0),
        ("Tell me if it is positive.", 0),
        ("Speak as if you were a king.", 0),
        ("More than two then.", 2),
        ("If it is long, shorten it.", 1),
        ("If it is long, then shorten it.", 1),
        ("Say yes unless it is blue, otherwise no.", 1),
        ("Sort them, then say the first.", 2),
        ("First, sort them. After that, count.", 2),
        ("1. Sort.\n2. Count.", 2),
        ("If it is long, shorten it, and then say it twice, then stop.", 2),
    ],
)
def test_the_level_of_an_instruction_is_told_by_its_own_words(instruction, expected):
    assert composition_level(instruction) == COMPOSITION_LEVELS[expected]


def test_a_row_s_own_level_goes_before_and_a_conversation_s_is_that_of_its_last_question():
    turns = (
        Message("user", "Sort them, then stop."),
        Message("assistant", "1 2"),
        Message("user", "Why?"),
        Message("assistant", "So."),
    )
    asked = [
        make_example(level="hard"),
        make_example("", messages=turns),
        make_example("Say it, then stop."),
    ]
    encoder = Encoder(train_byte_bpe(stream_text()), max_tokens=120)
    _, predictions = score_task(
        make_text_model(),
        prepare_eval_set(Task("t", (), (), tuple(asked)), encoder, "test", 0, max_new_tokens=2),
        8,
    )
    assert [p.level for p in predictions] == ["hard", "single step", "multi-step"]


# Fidelity


@pytest.mark.parametrize(
    ("instruction", "found"),
    [
        ("Write about 1,500 cats and two dogs.", {"number: 1,500", "number: two"}),
        ("Explain \"well done\" and 'so be it'.", {"quote: well done", "quote: so be it"}),
        ("Tell Hannah of New York that Bob left.", {"name: Hannah", "name: New York", "name: Bob"}),
        ("Do NOT shout. Paris is meant.", set()),
        ("Is Paris in France?", {"name: Paris", "name: France"}),
        ("Answer yes or no.", {"form: yes or no"}),
        ("As a numbered list", {"form: numbered list"}),
        ("Give it in at least 30 words to Ann.", {"form: at least 30 words", "name: Ann"}),
        ("Write a haiku, a haiku.", {"form: haiku"}),
        ("Say it.", set()),
    ],
)
def test_the_concrete_elements_of_an_instruction_are_its_numbers_quotes_names_and_forms(
    instruction, found
):
    assert {f"{e.kind}: {e.text}" for e in find_elements(instruction)} == found


@pytest.mark.parametrize(
    ("instruction", "answer", "lost"),
    [
        ("Write about 1,500 cats.", "There were 1500 cats.", []),
        ("Write about 3.5 cats.", "3.50 cats", []),
        ("Write about 1,500 cats.", "There were 15000 cats.", ["number: 1,500"]),
        ("Name 3 cats.", "three: A, B, C", []),
        ("Name three cats.", "- A\n- B\n- C", []),
        ("Name three cats.", "A, B, and C", []),
        ("Name three cats.", "A\n\nB\nC", []),
        ("Name three cats.", "- A\n- B", ["number: three"]),
        ("Say 'so  be it'.", "SO BE IT!", []),
        ("Say 'so be it'.", "so be item", ["quote: so be it"]),
        ("Write to Hannah in Rome.", "Dear HANNAH", ["name: Rome"]),
        ("Answer yes or no.", "No, it is not.", []),
        ("Answer yes or no.", "Not at all.", ["form: yes or no"]),
        ("Use no commas, Bob.", "a, b", ["form: no commas", "name: Bob"]),
        ("Write a haiku.", "a\nb\n\nc", []),
        ("Give it as a table.", "|a|\n|b|", []),
    ],
)
def test_fidelity_is_the_share_of_them_that_the_answer_keeps(instruction, answer, lost):
    count = len(find_elements(instruction))
    assert score_fidelity(answer, instruction) == (pytest.approx(1 - len(lost) / count), lost)


def test_where_nothing_can_be_lost_any_answer_but_a_blank_one_is_faithful():
    assert score_fidelity("red", "Say it.") == (1, [])
    assert score_fidelity(" ", "Say it.") == (0, [])
    assert score_fidelity("", "Tell Ann.") == (0, ["name: Ann"])


# Relevance without a judge


def test_relevance_without_a_judge_is_the_share_of_the_checkable_requirements_that_are_met():
    row = make_example("Use no commas and put it in double quotation marks.")
    assert [
        score_answer("relevance_checked", a, row)["score"]
        for a in ('"so"', '"so, so"', "so, so", "")
    ] == [1, 0.5, 0, 0]
    carried = make_example("Say it.", constraints=(COMMA,))
    assert [score_answer("relevance_checked", a, carried)["score"] for a in ("so", "so, so")] == [
        1,
        0,
    ]
    assert [
        score_answer("relevance_checked", a, make_example("Say it."))["score"] for a in ("so", "")
    ] == [
        1,
        0,
    ]


# As columns of the matrix


def ready(metric, *asked, **more):
    encoder = Encoder(train_byte_bpe(stream_text()), max_tokens=120)
    return prepare_eval_set(
        Task("t", (), (), asked, metric), encoder, "test", 0, **{"max_new_tokens": 4, **more}
    )


@pytest.mark.parametrize("metric", ROW_METRICS)
def test_a_measure_marks_the_answers_of_a_model_and_says_what_the_mark_is_made_of(metric):
    test = ready(
        metric, make_example("Use no commas.", output="", id="a", constraints=(COMMA, QUOTE))
    )
    value, (row,) = score_task(make_text_model(), test, 8)
    assert value == row.score == score_answer(metric, row.answer, test.examples[0])["score"]
    assert {"lost", "met", "strict"} & set(row.result)


def test_rows_that_a_measure_cannot_mark_are_named_by_file_and_line():
    good, bad = make_example(constraints=(COMMA,)), make_example(where="t/dev.jsonl:7")
    with pytest.raises(
        DataError,
        match=r"^t/dev.jsonl:7: found no constraints, expected them for the metric constrai",
    ):
        ready("constraint_check", good, bad)


@pytest.mark.parametrize("metric", ["fidelity", "relevance_checked"])
def test_a_task_without_any_row_to_measure_is_refused(metric):
    assert (
        len(ready(metric, make_example("Say it."), make_example("Use no commas.", id="b")).examples)
        == 2
    )
    with pytest.raises(
        DataError,
        match=r"^task 't': found no .* in any of its 1 rows, expected them for the metric",
    ):
        ready(metric, make_example("Say it."))


def test_without_references_the_length_of_an_answer_must_be_given():
    with pytest.raises(
        ConfigError,
        match=r"task 't': found no reference, expected one .*score.max_new_tokens",
    ):
        ready(
            "constraint_check", make_example(output="", constraints=(COMMA,)), max_new_tokens=None
        )


def test_an_empty_output_beside_constraints_is_no_finding_of_the_audit():
    asked, bare = (
        make_example("Say a.", output="", constraints=(COMMA,)),
        make_example("Say b.", output="", id="b"),
    )
    for row, kinds in ((asked, []), (bare, ["empty"])):
        task = Task("t", (make_example("Do it."),), (), (row,))
        assert [f.kind for f in audit_stream(Stream("s", "o", (task,), (task,))).findings] == kinds


# A run


@pytest.fixture(scope="module")
def ran(tmp_path_factory, model_folder):
    """A run over a task with references, and one with constraints and levels, of which one row is
    the task's own.
    """
    root = tmp_path_factory.mktemp("measured")
    asked = [
        {
            "instruction": "Say it without commas.",
            "output": "",
            "level": name,
            "constraints": [
                {"id": "punctuation:no_comma"},
                {"id": "startend:quotation", "kwargs": {}},
            ],
        }
        for name in ("own", "multi-step")
    ]
    for task, test in (("first", make_rows("first", 4, 16)), ("asked", [*asked, asked[1]])):
        write_rows(root / task / "train.jsonl", make_rows("first", 6))
        write_rows(root / task / "test.jsonl", test)
    (root / "stream.json").write_text(
        json.dumps({"tasks": [{"name": "first"}, {"name": "asked", "metric": "constraint_share"}]})
    )
    keys = (
        "stream=folder",
        f"stream.path={root}",
        "model=hf",
        f"model.name={model_folder}",
        "device=cpu",
        "train.steps=25",
        "train.lr=0.01",
        "score.max_new_tokens=3",
    )
    matrix, _ = run_in_process(root / "run", keys)
    return root / "run", keys, matrix


def test_a_run_has_constraints_as_a_column_beside_references(ran):
    out, _, matrix = ran
    assert dict(matrix.metrics) == {"first": "exact_match", "asked": "constraint_share"}
    told = load_json_lines(out / "predictions/stage-02/asked.jsonl")
    assert [p["level"] for p in told] == ["own", "multi-step", "multi-step"]
    assert matrix.scores[2][1] == pytest.approx(sum(sum(p["strict"]) / 2 for p in told) / 3)
    assert matrix.scores[2][1] > 0


def test_its_scores_by_level_and_its_adherence_are_told_by_stage_in_the_form_of_probes(ran):
    out, _, matrix = ran
    told = measures.probes_from_predictions(Run.load(out))
    assert set(told) == {"complexity", "direct adherence"}
    assert set(told["complexity"]["series"]) == {"asked: multi-step (n = 2)", "asked: own (n = 1)"}
    assert set(told["direct adherence"]["series"]) == {
        f"asked: {by}, {how} (n = {n})"
        for by, n in (("prompt", 3), ("instruction", 6))
        for how in ("strict", "loose")
    }
    for probe in told.values():
        assert {"says", "source", "better", "series"} == set(probe)
        assert all(len(series) == len(matrix.stages) for series in probe["series"].values())
    levels = told["complexity"]["series"]
    total = [(2 * many + one) / 3 for many, one in zip(*levels.values(), strict=True)]
    assert total == pytest.approx([row[1] for row in matrix.scores])


def test_they_are_shown_after_the_run_with_how_many_rows_they_are_of(ran):
    said = io.StringIO()
    measures.print_measures(Console(file=said, width=120), Run.load(ran[0]))
    told = said.getvalue()
    assert "score in percent by level of the instruction, after asked (n in brackets)" in told
    assert "constraints kept to, in percent" in told
    assert "(2)" in told
    assert "first" not in told, "its rows are all of one level"


def test_predictions_of_one_level_or_none_show_nothing(ran, tmp_path):
    assert measures.mean_scores_by_level([Prediction("a", {"score": 1.0})]) == {}
    assert measures.mean_scores_by_level(
        [
            Prediction("a", {"score": 1.0}, level="b\nc"),
            Prediction("b", {"score": 0.0}, level="conditional"),
            Prediction("c", {"score": 1.0}, level="conditional"),
        ]
    ) == {"conditional": (0.5, 2), "b c": (1.0, 1)}
    assert (
        measures._constraint_accuracies(
            [Prediction("a", {"score": 1.0, "strict": "yes", "loose": [1]})]
        )
        == {}
    )


def test_a_metric_for_rows_without_what_it_marks_is_refused_before_training(
    ran, cli_error, tmp_path
):
    said = cli_error("run", *ran[1], "score.metric=constraint_check", f"out={tmp_path / 'no'}")
    assert (
        "first/test.jsonl:1: found no constraints, expected them for the metric constraint_check"
        in said
    )
    assert not (tmp_path / "no" / "matrix.json").exists()

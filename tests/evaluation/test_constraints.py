"""Checkable constraints: each by answers that keep to it and answers that do not, and how rows
carry them.
"""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from continual.data.types import Constraint
from continual.errors import DataError
from continual.evaluation.constraints import (
    CHECKS,
    LANGUAGE_CODES,
    detect_language,
    satisfies,
    satisfies_loosely,
)
from continual.evaluation.row_metrics import ROW_METRICS, ifeval_accuracies
from continual.evaluation.text_normalization import split_sentences
from streams.rows import load_jsonl, parse_row
from tests.support.models import make_example

REAL = Path(__file__).parents[3] / "shared" / "data" / "ifeval" / "ifeval" / "dev.jsonl"

# id: kwargs, answers that keep to it, answers that do not
CASES = {
    "keywords:existence": (
        {"keywords": ["talented", "Tianjin"]},
        ["A TALENTED crew from tianjin", "untalentedtianjin"],
        ["A talented crew", ""],
    ),
    "keywords:frequency": (
        {"keyword": "flesh", "frequency": 2, "relation": "at least"},
        ["Flesh and flesh", "fleshflesh"],
        ["flesh", "fles h flesh"],
    ),
    "keywords:forbidden_words": (
        {"forbidden_words": ["parody", "use"]},
        ["A spoof, used twice", "because"],
        ["A Parody.", "No use!", "use-case"],
    ),
    "keywords:letter_frequency": (
        {"letter": "c", "let_frequency": 2, "let_relation": "less than"},
        ["a cat", "dog"],
        ["a Cat can", "cc"],
    ),
    "language:response_language": (
        {"language": "de"},
        ["Der Hund schläft heute in der Küche unter dem großen Tisch."],
        ["The dog sleeps in the kitchen under the big table today.", "123 456"],
    ),
    "length_constraints:number_words": (
        {"num_words": 3, "relation": "less than"},
        ["two words", "one"],
        ["one two three", "isn't it"],
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 2, "relation": "at least"},
        ["One. Two.", "Really? Yes", "Eins! Zwei! Drei!"],
        ["One, two", "Mr. Smith met J. Doe at 3.15 p.m. today."],
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na\n***\nb\n***", "a *** b"],
        ["a", "a\n***\n***\nb", "a\n***\nb\n***\nc"],
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"first_word": "firms", "num_paragraphs": 2, "nth_paragraph": 2},
        ["a\n\nFirms, too", "a\n\n\n\n'firms' b"],
        ["Firms\n\na", "firms", "a\n\nfirms\n\nc", "a\n\nfirmsandmore"],
    ),
    "detectable_content:number_placeholders": (
        {"num_placeholders": 2},
        ["[name] at [place]", "[a][b][c]"],
        ["[name", "[name] at (place)"],
    ),
    "detectable_content:postscript": (
        {"postscript_marker": "P.S."},
        ["Bye\nP.S. one", "p. s. one", "Bye P.S.one"],
        ["Bye", "PS one", "the app.s are"],
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2},
        ["* a\n* b", "Two:\n- a\n  - b", "* a\n- b"],
        ["* a", "* a\n* b\n* c", "**a**\n**b**"],
    ),
    "detectable_format:constrained_response": (
        {},
        ["My answer is no.", "Well. My answer is maybe. So"],
        ["no", "My answer is perhaps."],
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        ["*a* and *b*", "**a b** and *c*"],
        ["*a*", "** and **", "*a\nb* *c"],
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb", "SECTION1 SECTION2 SECTION3"],
        ["SECTION 1", "SECTION X SECTION Y", "Section 1 Section 2"],
    ),
    "detectable_format:json_format": (
        {},
        ['{"a": 1}', "[1, 2]", '```json\n{"a": 1}\n```', "```\n3\n```"],
        ["{a: 1}", 'So: {"a": 1}', "[" * 100_000],
    ),
    "detectable_format:title": (
        {},
        ["<<On moms>>\nText", "text <<a>>"],
        ["<title>", "<<>>", "<< >>", "<<a\nb>>"],
    ),
    "combination:two_responses": (
        {},
        ["a\n******\nb", "******a******b******"],
        ["a", "a******a", "a******b******c", "a\n***\nb", "a************b"],
    ),
    "combination:repeat_prompt": (
        {"prompt_to_repeat": "Say it. Loudly"},
        ["say it. loudly\nIT", " Say it. Loudly"],
        ["IT\nSay it. Loudly", "Say it"],
    ),
    "startend:end_checker": (
        {"end_phrase": "Peace!"},
        ["Bye. Peace!", '"Bye, peace!" ', "PEACE!"],
        ["Peace", "Peace! Bye"],
    ),
    "startend:quotation": ({}, ['"It is."', ' "a" b "c" '], ["It is.", '"It is.', '"', "'It'"]),
    "change_case:english_capital": (
        {},
        ["THE DOG SLEEPS IN THE KITCHEN UNDER THE BIG TABLE."],
        ["THE DOG SLEEPS IN the KITCHEN.", "DER HUND SCHLÄFT IN DER KÜCHE AM TISCH"],
    ),
    "change_case:english_lowercase": (
        {},
        ["the dog sleeps in the kitchen under the big table, at 7."],
        ["The dog sleeps in the kitchen.", "der hund schläft in der küche am tisch", "12"],
    ),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["NASA and I", "BIG T-SHIRT"],
        ["NASA and Me", "T-SHIRT", "X2 is y2"],
    ),
    "punctuation:no_comma": ({}, ["a; b", "1.5"], ["a, b", ","]),
}
TOLD = {
    "ar": "ذهب الولد إلى المدرسة في الصباح وقرأ كتابا جديدا مع أصدقائه",
    "bn": "ছেলেটি সকালে স্কুলে গিয়ে একটি নতুন বই পড়েছে",
    "de": "Der Junge ging am Morgen in die Schule und las ein neues Buch.",
    "pt": "O menino foi para a escola de manhã e leu um livro novo com os seus amigos.",
    "sw": "Mtoto alikwenda shuleni asubuhi na kusoma kitabu kipya pamoja na rafiki zake.",
    "ta": "சிறுவன் காலையில் பள்ளிக்குச் சென்று ஒரு புதிய புத்தகத்தைப் படித்தான்",
    "ur": "لڑکا صبح اسکول گیا اور اپنے دوستوں کے ساتھ ایک نئی کتاب پڑھی",
    "vi": "Cậu bé đi học vào buổi sáng và đọc một cuốn sách mới cùng bạn bè.",
    "en": "The boy went to school in the morning and read a new book with his friends.",
    "fr": "Le garçon est allé à l'école le matin et a lu un nouveau livre avec ses amis.",
    "hi": "लड़का सुबह स्कूल गया और उसने अपने दोस्तों के साथ एक नई किताब पढ़ी",
}


def test_every_check_has_its_cases():
    assert set(CASES) == set(CHECKS)
    assert len(CHECKS) == 25


@pytest.mark.parametrize("id", CHECKS)
def test_a_check_tells_answers_that_keep_to_it_from_those_that_do_not(id):
    kwargs, right, wrong = CASES[id]
    assert {a: satisfies(a, Constraint(id, kwargs)) for a in right} == dict.fromkeys(right, True)
    assert {a: satisfies(a, Constraint(id, kwargs)) for a in wrong} == dict.fromkeys(wrong, False)


@pytest.mark.parametrize("id", CHECKS)
def test_a_blank_answer_keeps_to_nothing(id):
    assert not any(
        satisfies(a, Constraint(id, CASES[id][0]))
        or satisfies_loosely(a, Constraint(id, CASES[id][0]))
        for a in ("", " \n")
    )


@pytest.mark.parametrize("code", TOLD)
def test_the_language_of_a_sentence_is_told(code):
    assert detect_language(TOLD[code]) == code
    assert code in LANGUAGE_CODES


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("One", 1),
        ("One. Two? Three! Four", 4),
        ("Wait... what?!", 2),
        ('He said "No." Then left.', 2),
        ("Dr. Smith, e.g. Mr. J. Smith, is here.", 1),
        ("1. Mix it.\n2. Bake it.", 2),
        ("A title\n\nThen text. More.", 3),
        ("Version 3.5 is out. Use it", 2),
        ("***", 0),
        ("今日は雨です。明日は晴れ。", 2),
    ],
)
def test_sentences_are_counted_as_people_count_them(text, count):
    assert len(split_sentences(text)) == count


# Loosely


@pytest.mark.parametrize(
    ("id", "answer"),
    [
        ("detectable_format:json_format", 'Here it is:\n{"a": 1}'),
        ("detectable_format:json_format", '{"a": 1}\nDone!'),
        ("detectable_format:json_format", 'Here:\n{"a": 1}\nDone!'),
        ("startend:quotation", '**"It is."**'),
        ("startend:quotation", 'Sure:\n*"It is."*'),
    ],
)
def test_loosely_the_first_line_the_last_line_and_asterisks_do_not_count(id, answer):
    assert not satisfies(answer, Constraint(id))
    assert satisfies_loosely(answer, Constraint(id))


@given(
    st.sampled_from(sorted(CHECKS)),
    st.lists(st.sampled_from(["a", "B", "*", "\n", '"', " ", "***", "[c]", "1."])),
)
def test_what_is_kept_strictly_is_kept_loosely(id, parts):
    constraint = Constraint(id, CASES[id][0])
    assert satisfies("".join(parts), constraint) <= satisfies_loosely("".join(parts), constraint)


@given(st.lists(st.sampled_from(["one", "Two", "3"]), min_size=1, max_size=20), st.integers(1, 20))
def test_at_least_and_less_than_part_all_answers(told, n):
    counts = [
        satisfies(
            " ".join(told),
            Constraint("length_constraints:number_words", {"num_words": n, "relation": r}),
        )
        for r in ("at least", "less than")
    ]
    assert counts == [len(told) >= n, len(told) < n]


# Metrics

ASKED = (Constraint("punctuation:no_comma"), Constraint("startend:quotation"))


@pytest.mark.parametrize(
    ("answer", "marks"),
    [
        ('"yes"', (1, 1, 1, 1)),
        ('*"yes"*', (0, 1, 0.5, 1)),
        ("yes", (0, 0, 0.5, 0.5)),
        ("yes, no", (0, 0, 0, 0)),
        ("", (0, 0, 0, 0)),
    ],
)
def test_a_row_is_marked_by_all_of_its_constraints_or_their_share_strictly_or_loosely(
    answer, marks
):
    row = make_example(output="", constraints=ASKED)
    names = (
        "constraint_check",
        "constraint_check_loose",
        "constraint_share",
        "constraint_share_loose",
    )
    assert tuple(ROW_METRICS[name].score_answer(answer, row)["score"] for name in names) == marks


def test_the_four_accuracies_are_those_of_ifeval():
    rows = [
        {"strict": [True, True, True], "loose": [True, True, True]},
        {"strict": [False], "loose": [True]},
        {"strict": [False, True], "loose": [False, True]},
    ]
    assert ifeval_accuracies(rows) == pytest.approx(
        {
            "prompt, strict": 1 / 3,
            "prompt, loose": 2 / 3,
            "instruction, strict": 4 / 6,
            "instruction, loose": 5 / 6,
        }
    )


# Rows


def row(*constraints, **more):
    return {"instruction": "Say it.", "output": "", "constraints": list(constraints), **more}


def test_a_row_carries_its_constraints_and_level():
    told = row(
        {"id": "startend:quotation", "kwargs": {}},
        {"id": "punctuation:no_comma"},
        {"id": "keywords:existence", "kwargs": {"keywords": ["a"], "num_words": None}},
        level=3,
    )
    made = parse_row(told, task="t", id="i", where="f:1")
    assert made.constraints == (
        Constraint("startend:quotation"),
        Constraint("punctuation:no_comma"),
        Constraint("keywords:existence", {"keywords": ["a"]}),
    )
    assert made.level == "3"
    assert hash(made) == hash(made)


@pytest.mark.parametrize(
    ("constraint", "said"),
    [
        (
            {"id": "startend:quotes"},
            "constraint 1: unknown id 'startend:quotes'; did you mean 'startend:quotation'",
        ),
        ({"kwargs": {}}, 'as constraint 1, expected {"id": text'),
        ("no_comma", "found 'no_comma' as constraint 1, expected"),
        (
            {"id": "punctuation:no_comma", "kwargs": {"n": 1}},
            "found the keyword 'n', expected none; rename or remove it",
        ),
        (
            {"id": "keywords:existence"},
            "(keywords:existence): found no keywords, expected a list of texts; add it",
        ),
        (
            {"id": "keywords:existence", "kwargs": {"keywords": "a"}},
            "found keywords='a', expected a list of texts; fix",
        ),
        ({"id": "keywords:existence", "kwargs": {"keywords": [" "]}}, "expected a list of texts"),
        (
            {
                "id": "keywords:letter_frequency",
                "kwargs": {"letter": "ab", "let_frequency": 1, "let_relation": "at least"},
            },
            "found letter='ab', expected one character",
        ),
        (
            {
                "id": "keywords:frequency",
                "kwargs": {"keyword": "a", "frequency": True, "relation": ["at least"]},
            },
            "found frequency=True, expected a whole number of at least 1",
        ),
        (
            {
                "id": "length_constraints:number_words",
                "kwargs": {"num_words": 0, "relation": "at most"},
            },
            "found relation='at most', expected 'at least' or 'less than'",
        ),
        (
            {"id": "language:response_language", "kwargs": {"language": "English"}},
            "expected an ISO 639-1 code such as",
        ),
    ],
)
def test_a_constraint_that_cannot_be_checked_is_refused_by_file_and_line(
    tmp_path, constraint, said
):
    path = tmp_path / "dev.jsonl"
    path.write_text(json.dumps(row()) + "\n" + json.dumps(row(constraint)) + "\n")
    with pytest.raises(DataError) as caught:
        load_jsonl(path, "t")
    assert all(line.startswith(f"{path}:2: ") for line in str(caught.value).split("\n"))
    assert said in str(caught.value)


@pytest.mark.parametrize("value", [{"id": "punctuation:no_comma"}, {}, [[]]])
def test_constraints_are_a_list_of_objects(value):
    told = {**row(), "constraints": value}
    if not value:
        assert parse_row(told, task="t", id="i", where="f:1").constraints == ()
    else:
        with pytest.raises(
            DataError, match=r"^f:1: found .* as ('constraints'|constraint 1), expected"
        ):
            parse_row(told, task="t", id="i", where="f:1")


@pytest.mark.parametrize("value", ["no more than 10 lines", 5])
def test_a_column_of_that_name_that_holds_no_list_is_metadata(value):
    assert (
        parse_row({**row(), "constraints": value}, task="t", id="i", where="f:1").constraints == ()
    )


# IFEval itself


def kept(c):
    """An answer that keeps to this constraint."""
    k, of = c.kwargs, c.id.partition(":")[2]
    words = {"at least": "word ", "less than": ""}
    exact = {
        "existence": lambda: " ".join(k["keywords"]),
        "forbidden_words": lambda: "nothing",
        "frequency": lambda: (
            (k["keyword"] + " ") * k["frequency"] if k["relation"] == "at least" else "none"
        ),
        "letter_frequency": lambda: (
            k["letter"] * k["let_frequency"] if k["let_relation"] == "at least" else "-"
        ),
        "response_language": lambda: TOLD[k["language"]],
        "number_words": lambda: "a" + words[k["relation"]] * k["num_words"],
        "number_sentences": lambda: (
            "So it is. " * (k["num_sentences"] if k["relation"] == "at least" else 1)
        ),
        "number_paragraphs": lambda: "\n***\n".join(["a"] * k["num_paragraphs"]),
        "nth_paragraph_first_word": lambda: "\n\n".join([k["first_word"]] * k["num_paragraphs"]),
        "number_placeholders": lambda: "[a]" * k["num_placeholders"],
        "postscript": lambda: k["postscript_marker"],
        "number_bullet_lists": lambda: "* a\n" * k["num_bullets"],
        "number_highlighted_sections": lambda: "*a* " * k["num_highlights"],
        "multiple_sections": lambda: " ".join(
            f"{k['section_spliter']} {i}" for i in range(k["num_sections"])
        ),
        "json_format": lambda: "{}",
        "title": lambda: "<<a>>",
        "two_responses": lambda: "a******b",
        "repeat_prompt": lambda: k["prompt_to_repeat"],
        "end_checker": lambda: f"So: {k['end_phrase']}",
        "constrained_response": lambda: "My answer is yes.",
        "quotation": lambda: '"a"',
        "capital_word_frequency": lambda: (
            "A " * k["capital_frequency"] * ("least" in k["capital_relation"]) + "a"
        ),
        "english_capital": lambda: TOLD["en"].upper(),
        "english_lowercase": lambda: TOLD["en"].lower(),
        "no_comma": lambda: "a",
    }
    return exact[of]()


@pytest.mark.skipif(not REAL.is_file(), reason="the rows of IFEval are not there")
def test_every_row_of_ifeval_is_read_and_each_of_its_constraints_can_be_kept():
    rows = load_jsonl(REAL, "ifeval")
    constraints = [c for e in rows for c in e.constraints]
    assert {c.id for c in constraints} == set(CHECKS)
    assert all(e.constraints for e in rows)
    assert [c for c in constraints if not satisfies(kept(c), c)] == []

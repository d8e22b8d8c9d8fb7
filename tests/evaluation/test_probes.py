"""What is measured beside the matrix, by models whose answers are known."""

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from continual.data.template import Encoder
from continual.data.types import Message, Stream, Task
from continual.errors import ConfigError, DataError
from continual.evaluation.metrics import REFERENCE_METRICS
from continual.evaluation.probes.base import RunSetup, StageContext
from continual.evaluation.probes.changes import CHANGES
from continual.evaluation.probes.general import GeneralAbility
from continual.evaluation.probes.shots import Shots
from continual.evaluation.probes.transfer import Transfer, cluster_tasks
from continual.evaluation.probes.turns import Turns
from continual.evaluation.probes.wordings import Wordings
from continual.results.matrix import Matrix
from continual.results.prediction import Prediction
from streams.skills.stream import generate_skills
from tests.support.models import make_example, stream_text, train_byte_bpe, write_rows, write_stream

PLAIN = train_byte_bpe(stream_text())
EMPTY = Matrix("s", "o", "naive", 0, ("t",), {"t": "exact_match"}, (), ())


def setting(*tasks, limit=512, on_unfit="error", stream=None, **score):
    told = {
        "split": "test",
        "metric": None,
        "max_new_tokens": None,
        "answer_mode": "generate",
        **score,
    }
    config = OmegaConf.create(
        {
            "score": told,
            "stream": stream or {"_target_": "streams.skills.stream.generate_skills", "seed": 0},
        }
    )
    return RunSetup(
        config, Stream("s", "o", tasks, tasks), Encoder(PLAIN, "plain", limit, on_unusable=on_unfit)
    )


def model(says):
    """A model that answers each prompt's text with `says(text)`, and the texts it was asked."""
    asked = []

    def ask(test):
        asked.extend(e.text for e in test.encoded)
        answers = [says(e.text) for e in test.encoded]
        return [
            Prediction(
                e.id,
                {"score": max(REFERENCE_METRICS[test.metric](a, o) for o in e.outputs)},
                answer=a,
            )
            for e, a in zip(test.examples, answers, strict=True)
        ]

    return StageContext(ask, EMPTY), asked


def colours(name="t", train=8, test=4, instruction="Give the colour."):
    """A task whose answer is the word of its input."""
    words = (
        "red",
        "blue",
        "green",
        "gold",
        "grey",
        "pink",
        "teal",
        "plum",
        "sand",
        "rust",
        "jade",
        "lime",
    )
    rows = [make_example(instruction, w, w, id=f"{name}/{w}", task=name) for w in words]
    return Task(name, tuple(rows[:train]), test=tuple(rows[train : train + test]))


def last_line(text):
    return text.strip().splitlines()[-1]


def measured(probe, where, says):
    probe.prepare(where)
    return probe.measure(model(says)[0])


# General ability


@pytest.fixture
def probed(tmp_path):
    """A stream folder of which one task has dev rows alone."""
    write_stream(tmp_path)
    for split in ("train", "test"):
        (tmp_path / "loud" / f"{split}.jsonl").unlink()
    return {
        "_target_": "streams.folder.load_folder",
        "path": str(tmp_path),
        "seed": 0,
        "arrangement": "none",
    }


def test_general_ability_is_the_score_of_each_task_of_a_stream_that_is_not_learned_and_its_drift(
    probed,
):
    general = GeneralAbility(stream=probed)
    general.prepare(setting(colours()))
    knows = general.measure(model(lambda text: last_line(text).split()[0])[0])
    assert knows["general"]["first"] == 1
    assert knows["general"]["mean"] == statistics.mean(
        knows["general"][t] for t in ("first", "last", "loud")
    )
    assert set(knows["general drift"].values()) == {0.0}
    look = model(lambda text: "")[0]
    later = general.measure(StageContext(look.predict, EMPTY, knows))
    assert later["general drift"] == {label: -value for label, value in knows["general"].items()}


def test_a_probe_task_without_the_run_s_split_is_scored_on_the_one_it_has_and_its_table_says_so(
    probed,
):
    general = GeneralAbility(stream=probed, max_examples=3)
    general.prepare(setting(colours()))
    assert "first: 3 test rows, exact_match" in general.entries["general"].description
    assert "loud: 3 dev rows, exact_match" in general.entries["general"].description


def test_what_is_wrong_with_a_probe_s_stream_is_told_as_the_probe_s(probed, tmp_path):
    with pytest.raises(
        ConfigError, match=r"^probe.general.stream: task 'first': unknown metric 'bleu'"
    ):
        GeneralAbility(stream=probed, metric="bleu").prepare(setting(colours()))
    with pytest.raises(FileNotFoundError, match=r"^probe.general.stream: found no folder"):
        GeneralAbility(stream={**probed, "path": str(tmp_path / "none")}).prepare(
            setting(colours())
        )


# In context


def test_demonstrations_are_answered_train_rows_before_the_prompt_and_those_of_k_begin_those_of_more():
    shots = Shots(k=[0, 1, 2], max_examples=1)
    shots.prepare(setting(colours()))
    none, one, two = (shots.eval_sets["t", k][0].encoded[0].text for k in (0, 1, 2))
    assert none == "Give the colour.\nsand\n"
    shown = two.removesuffix(f"\n{none}").split("\nGive")
    assert len(shown) == 2
    assert one == f"{shown[0]}\n{none}"
    for text in (shown[0], f"Give{shown[1]}"):
        _, word, answer = text.splitlines()
        assert word == answer


def test_a_model_that_learns_from_two_demonstrations_scores_from_k_2_on():
    told = measured(
        Shots(k=[0, 1, 2, 3]),
        setting(colours("a"), colours("b")),
        lambda text: last_line(text) if text.count("Give") > 2 else "no",
    )
    assert [told["shots"][f"k={k}"] for k in range(4)] == [0, 0, 1, 1]
    assert told["shots"]["b k=2"] == 1


def test_no_demonstration_asks_what_a_scored_prompt_asks():
    task = colours()
    shots = Shots(k=[3])
    shots.prepare(setting(Task("t", (*task.test[:2], *task.train[:3]), test=task.test)))
    assert not any(
        f"\n{e.input}\n{e.input}" in test.text
        for test in shots.eval_sets["t", 3][0].encoded
        for e in task.test
    )


def test_the_score_is_the_mean_over_draws():
    shots = Shots(k=[0, 1], draws=4)
    shots.prepare(setting(colours()))
    look, asked = model(lambda text: last_line(text) if "red" in text else "")
    told = shots.measure(look)
    assert len(asked) == 4 + 4 * 4
    assert told["shots"]["k=1"] == sum("red" in text for text in asked) / 16


def test_prompts_that_hold_fewer_for_want_of_room_are_counted_and_where_none_holds_k_it_is_not_measured():
    task = colours()
    one = len(Encoder(PLAIN).encode_example(task.train[0], 0).require().ids)
    shots = Shots(k=[0, 1, 2, 6])
    told = measured(shots, setting(task, limit=4 * one), last_line)
    assert told["shots"]["k=0"] == told["shots"]["k=2"] == 1
    assert told["shots"]["k=6"] is None
    assert "4 of 4 at k=6" in shots.entries["shots"].description
    assert "at k=2" not in shots.entries["shots"].description


@pytest.mark.parametrize(
    ("keys", "score", "told"),
    [
        (
            {"k": [-1]},
            {},
            r"probe.shots.k=\[-1\]: found \[-1\], expected whole numbers of at least 0",
        ),
        ({"k": [9]}, {}, "task 't' has 8 train rows that could be shown; lower k"),
        ({"draws": 0}, {}, "probe.shots.draws=0: expected at least 1"),
        ({}, {"metric": "perplexity"}, "perplexity of t gives none"),
    ],
)
def test_demonstrations_that_cannot_be_are_refused(keys, score, told):
    with pytest.raises(ConfigError, match=told):
        Shots(**keys).prepare(setting(colours(), **score))


# Wordings


def test_worst_mean_and_deviation_are_those_of_the_scores_over_wordings():
    told = measured(
        Wordings(changes=["upper", "headed", "lower"]),
        setting(colours()),
        lambda text: last_line(text) if text[0] == "G" else "",
    )
    assert told["wordings"] == {
        "as it is": 1,
        "mean": 0.5,
        "worst": 0,
        "upper": 1,
        "headed": 0,
        "lower": 0,
    }
    deviation = statistics.stdev([1, 1, 0, 0])
    assert told["wordings spread"] == {"all": deviation, "changed": deviation, "t": deviation}


def test_the_spread_of_a_model_that_no_wording_moves_is_zero():
    told = measured(
        Wordings(), setting(colours(instruction="Give the colour that the word names.")), last_line
    )
    assert set(told["wordings"].values()) == {1}
    assert set(told["wordings spread"].values()) == {0}


def test_a_change_that_changes_nothing_is_no_wording():
    wordings = Wordings(changes=["lower", "bare", "upper"])
    wordings.prepare(setting(colours(instruction="give the colour")))
    assert list(wordings.eval_sets["t"]) == ["as it is", "upper"]


def test_given_wordings_of_rows_are_the_instructions_that_train_rows_repeat():
    a, b = colours(), colours(instruction="Which colour ?")
    once = make_example("Name it.", "jade", "jade", id="once")
    told = measured(
        Wordings(paraphrases=["rows"], changes=[]),
        setting(Task("t", (*a.train, *b.train, once), test=a.test)),
        lambda text: last_line(text) if "Which" in text else "",
    )
    assert told["wordings"] == {"as it is": 0, "mean": 1 / 3, "worst": 0, "given": 0.5}
    assert told["wordings spread"]["given"] == statistics.stdev([0, 0, 1])


def test_given_wordings_of_a_file_ask_the_same_in_the_same_order(tmp_path):
    write_stream(tmp_path, ("first",))
    rows = [
        {"instruction": f"What comes before {w} ?", "output": "red"}
        for w in ("blue", "gold", "grey", "pink")
    ]
    write_rows(tmp_path / "first" / "other.jsonl", rows)
    section = {"_target_": "streams.folder.load_folder", "path": str(tmp_path), "seed": 0}
    from streams.folder import load_folder

    where = setting(*load_folder(path=str(tmp_path), seed=0).tasks, stream=section)
    wordings = Wordings(paraphrases=["other"], changes=[])
    wordings.prepare(where)
    other = wordings.eval_sets["first"]["given: other"]
    assert [e.instruction for e in other.examples] == [row["instruction"] for row in rows]
    assert [e.id for e in other.examples] == [
        e.id for e in wordings.eval_sets["first"]["as it is"].examples
    ]
    write_rows(tmp_path / "first" / "other.jsonl", rows[:3])
    with pytest.raises(DataError, match="has 3 rows there and 4 that are scored"):
        Wordings(paraphrases=["other"]).prepare(where)
    with pytest.raises(
        ConfigError, match=r"paraphrases=\[\.\./x\]: stream.files.test=\.\./x: expected the name"
    ):
        Wordings(paraphrases=["../x"]).prepare(where)


def test_a_file_of_wordings_needs_a_stream_of_files():
    with pytest.raises(
        ConfigError, match=r"probe.wordings.paraphrases=\[other\]: .*expected rows, or a file"
    ):
        Wordings(paraphrases=["other"]).prepare(setting(colours()))


def test_every_wording_is_scored_on_the_examples_that_fit_under_all():
    task = colours()
    long = make_example(
        "Give the colour. " + "It is a word of the list. " * 3, "jade", "jade", id="long"
    )
    wordings = Wordings(changes=["upper"])
    fits = len(Encoder(PLAIN).encode_example(long, 0).require().ids)
    assert fits < len(
        Encoder(PLAIN)
        .encode_example(make_example(long.instruction.upper(), "jade", "jade"), 0)
        .require()
        .ids
    )
    wordings.prepare(setting(Task("t", task.train, test=(*task.test, long)), limit=fits + 8))
    assert [len(test.examples) for test in wordings.eval_sets["t"].values()] == [4, 4]
    assert "1 in all left out" in wordings.entries["wordings"].description


def test_an_unknown_change_and_a_single_wording_are_refused():
    with pytest.raises(
        ConfigError, match=r"unknown change in probe.wordings.changes 'uper'; did you mean 'upper'"
    ):
        Wordings(changes=["uper"]).prepare(setting(colours()))
    with pytest.raises(ConfigError, match="a single wording of each task"):
        Wordings(changes=[]).prepare(setting(colours()))


@given(
    st.sampled_from(sorted(CHANGES)),
    st.text("abcXYZ .,?", min_size=1, max_size=60).map(str.strip).filter(bool),
    st.integers(0, 99),
)
def test_a_change_keeps_the_letters_and_is_the_same_for_the_same_seed(name, text, seed):
    changed = CHANGES[name](text, random.Random(seed))
    assert changed == CHANGES[name](text, random.Random(seed))
    letters = sorted(c for c in changed.casefold() if c.isalpha())
    kept = sorted(c for c in text.casefold() if c.isalpha())
    assert letters == kept or (
        name in ("polite", "headed") and changed.endswith(text) and len(letters) > len(kept)
    )


# Turns


def chat(*turns, id="c", task="t"):
    messages = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns))
    return make_example("", output=turns[-1], messages=messages, id=id, task=task)


TALK = Task(
    "t",
    (chat("Hi", "Hello"),),
    test=(
        chat("Say red.", "red", "Say it again.", "red", id="a"),
        chat("Say blue.", "blue", "Say it again.", "blue", id="b"),
        chat("Say gold.", "gold", id="single"),
    ),
)


def first_word(text):
    """It answers by the first line that it sees."""
    return text.splitlines()[0].removeprefix("Say ").removesuffix(".")


def test_a_model_that_remembers_completes_uses_context_and_agrees_with_itself():
    turns = Turns()
    told = measured(turns, setting(TALK), first_word)
    assert told["turns"] == {
        "first turn": 1,
        "later turns": 1,
        "completed": 1,
        "context": 1,
        "consistent": 1,
    }
    assert "t: 2 conversations" in turns.entries["turns"].description


def test_a_model_that_forgets_the_turns_before_uses_no_context():
    told = measured(
        Turns(), setting(TALK), lambda text: last_line(text).removeprefix("Say ").removesuffix(".")
    )
    assert told["turns"] == {
        "first turn": 1,
        "later turns": 0,
        "completed": 0,
        "context": 0,
        "consistent": 1,
    }


def test_turns_answered_alone_as_well_need_no_context():
    talk = Task("t", (), test=(chat("Say red.", "red", "Say blue.", "blue"),))
    told = measured(
        Turns(), setting(talk), lambda text: last_line(text).removeprefix("Say ").removesuffix(".")
    )
    assert told["turns"]["completed"] == 1
    assert told["turns"]["context"] is None


def test_each_turn_is_asked_behind_the_model_s_own_answers_and_the_first_question_again_at_the_end():
    turns = Turns(max_examples=1)
    turns.prepare(setting(TALK))
    look, asked = model(lambda text: f"answer {text.count('Say')}")
    told = turns.measure(look)
    assert asked == [
        "Say red.\n",
        "Say red.\nanswer 1\nSay it again.\n",
        "Say it again.\n",
        "Say red.\nanswer 1\nSay it again.\nanswer 2\nSay red.\n",
    ]
    assert told["turns"]["consistent"] == 0  # "answer 3" is not "answer 1"


def test_an_empty_answer_completes_nothing_and_agrees_with_nothing():
    told = measured(Turns(), setting(TALK), lambda text: "")
    assert told["turns"] == {
        "first turn": 0,
        "later turns": 0,
        "completed": 0,
        "context": 0,
        "consistent": 0,
    }


def test_conversations_without_room_for_the_question_again_are_refused_or_left_out_and_counted():
    long = chat(f"Say {'red ' * 20}.", "red", "Say it again.", "red", id="long")
    talk = Task("t", (), test=(*TALK.test, long))
    with pytest.raises(
        DataError, match="1 conversations leave no room for their first question asked again"
    ):
        Turns().prepare(setting(talk, limit=60))
    turns = Turns()
    turns.prepare(setting(talk, limit=60, on_unfit="skip"))
    assert "t: 2 conversations; 1 left out" in turns.entries["turns"].description


def test_a_turn_that_the_model_s_own_answers_leave_no_room_for_is_unanswered():
    turns = Turns(max_examples=1)
    turns.prepare(setting(TALK, limit=60))
    look, asked = model(lambda text: "red " * 60)
    assert turns.measure(look)["turns"]["later turns"] == 0
    assert asked == ["Say red.\n", "Say it again.\n"]


def test_a_stream_without_conversations_of_several_turns_is_refused():
    with pytest.raises(ConfigError, match="in which the user speaks twice or more"):
        Turns().prepare(setting(colours()))
    with pytest.raises(ConfigError, match=r"probe.turns.pass_score=2: expected a mark above 0"):
        Turns(pass_score=2).prepare(setting(TALK))


# Transfer


def test_tasks_cluster_by_the_words_of_their_instructions():
    tasks = {
        t.name: t
        for t in generate_skills(
            seed=0, order="long", train_size=40, dev_size=1, test_size=1, pretraining_size=0
        ).tasks
    }
    chosen = [
        tasks[n] for n in ("count_animals", "reverse", "count_fruits", "first_and_third", "third")
    ]
    assert cluster_tasks(chosen, 0.3) == [
        ["count_animals", "count_fruits"],
        ["reverse"],
        ["first_and_third", "third"],
    ]
    assert cluster_tasks(chosen, 1.0) == [[t.name] for t in chosen]
    assert cluster_tasks(chosen, 0.0) == [[t.name for t in chosen]]


def test_transfer_is_the_step_of_the_matrix_within_and_across_clusters():
    a, b, c = colours("a"), colours("b"), colours("c", instruction="Add both numbers up .")
    transfer = Transfer()
    transfer.prepare(setting(a, b, c))
    rows = ((0.1, 0.1, 0.1), (0.9, 0.4, 0.2), (0.8, 0.9, 0.2), (0.3, 0.5, 1.0))
    tasks = ("a", "b", "c")

    def after(n):
        made = Matrix(
            "s",
            "o",
            "naive",
            0,
            tasks,
            dict.fromkeys(tasks, "exact_match"),
            ("base", *tasks)[:n],
            rows[:n],
        )
        return transfer.measure(StageContext(model(str)[0].predict, made))

    assert set(after(1)["transfer"].values()) == {None}
    told = [after(n)["transfer"] for n in (2, 3, 4)]
    assert told[0]["not learned, same cluster"] == pytest.approx(0.3)
    assert told[0]["not learned, other clusters"] == pytest.approx(0.1)
    assert told[1]["learned, same cluster"] == pytest.approx(-0.1)
    assert told[1]["not learned, other clusters"] == pytest.approx(0.0)
    assert told[2]["learned, other clusters"] == pytest.approx((-0.5 - 0.4) / 2)
    assert told[2]["learned, same cluster"] is None
    overall = after(4)["transfer overall"]
    assert overall["learned, same cluster"] == pytest.approx(-0.1)
    assert overall["not learned, other clusters"] == pytest.approx(0.05)


def test_a_stage_of_all_tasks_tells_nothing_of_one_task_s_transfer():
    transfer = Transfer()
    transfer.prepare(setting(colours("a"), colours("b")))
    joint = Matrix(
        "s",
        "o",
        "joint",
        0,
        ("a", "b"),
        dict.fromkeys("ab", "exact_match"),
        ("base", "joint"),
        ((0.1, 0.1), (0.9, 0.9)),
    )
    assert set(
        transfer.measure(StageContext(model(str)[0].predict, joint))["transfer"].values()
    ) == {None}

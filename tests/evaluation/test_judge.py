"""A judge: another model that grades how an answer meets each requirement."""

import json

import pytest
import torch

from continual.data.template import Encoder
from continual.data.types import Example, Task
from continual.errors import ConfigError, DataError
from continual.evaluation.judge import RUBRIC, Judge, get_requirements, parse_grade
from continual.evaluation.scoring import prepare_eval_set, score_task
from continual.models.loading import assemble
from continual.strategy.interface import Strategy
from continual.training.recipe import Recipe
from continual.training.stage import train_stage
from tests.support.models import (
    load_json_lines,
    make_example,
    make_network,
    make_rows,
    run_in_process,
    train_byte_bpe,
    write_model,
    write_rows,
)

ROW = make_example("Say red. Say blue.", id="r")
ANSWERS = ("red", "blue", "red blue")
TOKENIZER = train_byte_bpe([RUBRIC, "Say red. Say blue."] * 3, size=600)
SHORT = "{instruction}: {answer}: {requirement}"  # what so small a judge learns in a second


def asked(answer, requirement, instruction="Say red. Say blue."):
    return SHORT.format(instruction=instruction, answer=answer, requirement=requirement)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A local folder of a judge that knows these prompts by heart: 5 where the answer has the word,
    else 2.
    """
    net = assemble(make_network("llama", len(TOKENIZER), context=400), TOKENIZER, device="cpu")
    known = [
        Example(f"{a}/{word}", "t", asked(a, f"Say {word}."), outputs=("5" if word in a else "2",))
        for a in ANSWERS
        for word in ("red", "blue")
    ]
    train_stage(
        net,
        Encoder(TOKENIZER, max_tokens=400).encode_task(Task("t", known), {"t": 0}),
        Strategy(),
        Recipe(lr=0.01, steps=120, batch_size=6, warmup_ratio=0.1),
        seed=0,
        log_event=lambda e: None,
    )
    folder = tmp_path_factory.mktemp("judge")
    net.net.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dull(tmp_path_factory):
    """A judge that says nothing at all, as all of its tokens are alike and the first ends the
    answer.
    """
    folder = write_model(tmp_path_factory.mktemp("dull"), tokenizer=TOKENIZER, context=400)
    net = assemble(make_network("llama", len(TOKENIZER), context=400), TOKENIZER, device="cpu").net
    torch.nn.init.zeros_(net.lm_head.weight)
    net.save_pretrained(folder)
    return folder


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr("continual.evaluation.judge.RUBRIC", SHORT)


def judged(judge, *answers):
    return judge([ROW] * len(answers), answers)


def test_each_requirement_is_graded_by_itself_and_the_mark_is_the_mean_of_the_grades(taught, short):
    told = judged(Judge(str(taught), grade_mode="generate", device="cpu"), *ANSWERS)
    assert [t["grades"] for t in told] == [[5, 2], [2, 5], [5, 5]]
    assert [t["score"] for t in told] == [
        pytest.approx(x) for x in ((1 + 0.25) / 2, (0.25 + 1) / 2, 1)
    ]


def test_by_likelihood_the_grade_is_the_expected_one(taught, short):
    judge = Judge(str(taught), device="cpu")
    told = judged(judge, "red", "red blue")
    assert [t["grades"] for t in told] == [
        [pytest.approx(5, abs=0.5), pytest.approx(2, abs=0.5)],
        [pytest.approx(5, abs=0.5)] * 2,
    ]
    prompt, _ = judge.encode_grading_prompt(ROW, "red", "Say red.")
    shares = []
    for n in "12345":  # as five rows of their own
        whole = judge.encoder.encode_example(
            make_example(asked("red", "Say red."), output=n), 0
        ).require()
        logits = judge.model.net(torch.tensor([whole.ids])).logits[0, :-1].log_softmax(-1)
        said = range(len(prompt.ids), len(whole.ids))
        shares.append(sum(logits[i - 1, whole.ids[i]].item() for i in said))
    expected = sum(
        g * p for g, p in enumerate(torch.tensor(shares).double().softmax(0).tolist(), 1)
    )
    assert told[0]["grades"][0] == pytest.approx(expected, abs=1e-3)


def test_a_judge_grades_alike_whatever_is_graded_beside_it(taught, short):
    judge = Judge(str(taught), device="cpu", batch_size=2)
    together = judged(judge, *ANSWERS)
    alone = [judged(judge, a)[0] for a in ANSWERS]
    assert [t["score"] for t in together] == pytest.approx([t["score"] for t in alone], abs=1e-5)


def test_a_blank_answer_meets_nothing_and_no_judge_is_asked():
    assert judged(Judge("no/such"), "", " \n") == [{"grades": [], "cut": False, "score": 0.0}] * 2


def test_grades_that_cannot_be_read_count_as_0_and_are_told(dull, capsys):
    encoder = Encoder(TOKENIZER, max_tokens=120)
    test = prepare_eval_set(
        Task("t", (), (), (ROW,), "relevance_judged"),
        encoder,
        "test",
        0,
        max_new_tokens=4,
        judge=Judge(str(dull), grade_mode="generate", device="cpu"),
    )
    value, (row,) = score_task(
        assemble(make_network("llama", len(TOKENIZER)), TOKENIZER, device="cpu"), test, 8
    )
    assert (value, row.result["grades"]) == (0, [None, None])
    assert capsys.readouterr().err.endswith(
        "t: 2 of 2 grades of the judge could not be read and count as 0\n"
    )


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("4", 4),
        (" 5.\n", 5),
        ("1", 1),
        ("", None),
        ("6", None),
        ("0", None),
        ("44", None),
        ("4/5", None),
        ("4 or 5", None),
        ("Grade: 4", None),
        ("four", None),
        ("4.5", None),
    ],
)
def test_a_grade_is_one_digit_from_1_to_5_and_nothing_beside_it(said, read):
    assert parse_grade(said) == read


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (ROW, ["Say red.", "Say blue."]),
        (make_example("Say it"), ["Say it"]),
        (make_example("???"), ["???"]),
        (
            make_example("Say it.", requirements=("Is it red?", "Is it short?")),
            ["Is it red?", "Is it short?"],
        ),
    ],
)
def test_requirements_are_the_row_s_own_or_else_the_sentences_of_its_instruction(row, found):
    assert get_requirements(row) == found


def test_a_long_answer_is_cut_for_the_judge_and_told(dull, capsys):
    judge = Judge(str(dull), device="cpu", max_length=200)
    prompt, cut = judge.encode_grading_prompt(ROW, "red " * 500, "Say red.")
    assert cut
    assert len(prompt.ids) <= 192
    assert "Answer: red red" in prompt.text
    assert prompt.text.endswith("from 1 to 5:\n")
    assert [t["cut"] for t in judged(judge, "red " * 500, "red")] == [True, False]


def test_an_instruction_too_long_for_the_judge_is_refused_by_file_and_line(dull):
    row = make_example("Say it. " * 100, where="t/dev.jsonl:3")
    with pytest.raises(
        DataError, match=r"^t/dev.jsonl:3: the judge's prompt takes \d+ tokens without the answer"
    ):
        Judge(str(dull), device="cpu", max_length=150)([row], ["red"])


def test_loading_a_judge_draws_nothing_from_the_run_s_random_numbers(dull):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    judged(Judge(str(dull), device="cpu"), "red")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("grade_mode=guess", "unknown score.judge.grade_mode 'guess'"),
        ("dtype=fp8", "unknown score.judge.dtype 'fp8'"),
        ("template=plane", "unknown score.judge.template 'plane'; did you mean 'plain'"),
        ("max_length=0", "score.judge.max_length=0: expected a whole number"),
        ("batch_size=null", "score.judge.batch_size=None: expected a whole number"),
    ],
)
def test_a_judge_that_cannot_be_is_refused_before_training(
    run_keys, cli_error, tmp_path, key, said
):
    assert said in cli_error(
        "run", *run_keys, "score.judge.name=x", f"score.judge.{key}", f"out={tmp_path / 'no'}"
    )


def test_without_a_judge_the_metric_is_refused(run_keys, cli_error, tmp_path):
    said = cli_error("run", *run_keys, "score.metric=relevance_judged", f"out={tmp_path / 'no'}")
    assert (
        "found no judge, expected a model that grades for the metric relevance_judged; name one by"
        in said
    )


def test_a_run_is_judged_and_resumes_to_the_same_matrix(taught, tmp_path, model_folder):
    root = tmp_path / "stream"
    asked = [{**r, "requirements": ["Is it a word?"]} for r in make_rows("first", 3)]
    for split in ("train", "test"):
        write_rows(root / "first" / f"{split}.jsonl", asked)
    (root / "stream.json").write_text(
        json.dumps({"tasks": [{"name": "first", "metric": "relevance_judged"}]})
    )
    keys = (
        "stream=folder",
        f"stream.path={root}",
        "model=hf",
        f"model.name={model_folder}",
        "device=cpu",
        "train.steps=25",
        "train.lr=0.01",
        f"score.judge.name={taught}",
        "score.max_new_tokens=3",
    )
    whole, _ = run_in_process(tmp_path / "run", keys)
    told = load_json_lines(tmp_path / "run/predictions/stage-01/first.jsonl")
    assert whole.scores[1][0] == pytest.approx(sum(t["score"] for t in told) / 3)
    assert [len(t["grades"]) for t in told] == [1, 1, 1]
    (tmp_path / "run/finished").unlink()
    for path in (tmp_path / "run/predictions").rglob("*.jsonl"):
        path.unlink()
    again, _ = run_in_process(tmp_path / "run", keys)
    assert again.scores == whole.scores


def test_the_tokenizer_s_own_template_needs_one(dull):
    with pytest.raises(ConfigError, match="needs a tokenizer with a chat template"):
        judged(Judge(str(dull), template="chat", device="cpu"), "red")

"""How answers are made and marked."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from continual.data.template import Encoder
from continual.data.types import Message, Task
from continual.errors import ConfigError, DataError
from continual.evaluation.metrics import REFERENCE_METRICS, exact_match, rouge_l, token_f1
from continual.evaluation.scoring import prepare_eval_set, score_task
from continual.evaluation.text_normalization import normalize_text
from continual.models.generation import generate_answers
from continual.models.loading import assemble
from continual.models.loss import nll
from continual.strategy.interface import Strategy
from continual.training.recipe import Recipe
from continual.training.stage import train_stage
from tests.support.models import make_example, make_text_model, stream_text, train_byte_bpe

SAID = ["red", "blue green", "blue green gold pink", "grey grey red", "plum", "teal red gold"]
ROWS = [
    make_example(f"Say {'it ' * (5 * i % 7 + 1)}{i}.", output=o, id=f"r{i}")
    for i, o in enumerate(SAID)
]


def ready(net, rows=ROWS, metric="exact_match", seq2seq=False, **more):
    encoder = Encoder(net.tokenizer, max_tokens=120, seq2seq=seq2seq)
    return prepare_eval_set(Task("t", (), (), tuple(rows), metric), encoder, "test", 0, **more)


@pytest.fixture(scope="module", params=["llama", "t5"])
def taught(request):
    """A model that has learned ROWS by heart."""
    net = make_text_model(request.param)
    encoder = Encoder(net.tokenizer, seq2seq=request.param == "t5")
    train_stage(
        net,
        encoder.encode_task(Task("t", ROWS), {"t": 0}),
        Strategy(),
        Recipe(lr=0.02, steps=150, warmup_ratio=0.1),
        seed=0,
        log_event=lambda e: None,
    )
    return net


# Marks


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("red", "red"),
        ("Red", "red"),
        ("red", "RED"),
        (" red\n", "red"),
        ("red.", "red"),
        ("red", "red."),
        ("red  blue", "red blue"),
        ("ﬁne", "fine"),
        ("STRASSE", "straße"),
        (".", "."),
        ("7", "７"),
    ],
)
def test_exact_match_compares_both_sides_normalised(said, right):
    assert exact_match(said, right) == 1


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("", "red"),
        ("", ""),
        ("  ", ""),
        (" \n", " "),
        ("red blue", "red"),
        ("rd", "red"),
        ("red,", "red"),
        (".", "red."),
    ],
)
def test_another_or_an_empty_answer_is_no_match(said, right):
    assert exact_match(said, right) == 0


@given(st.text())
def test_normalising_twice_is_normalising_once(text):
    assert normalize_text(normalize_text(text)) == normalize_text(text)


@pytest.mark.parametrize(
    ("said", "right", "expected"),
    [
        ("red blue", "red blue", 1),
        ("red", "red blue", 2 * 1 * 0.5 / 1.5),
        ("Red, blue!", "blue red", 1),
        ("red red", "red", 2 * 0.5 * 1 / 1.5),
        ("green", "red", 0),
        ("", "red", 0),
        ("", "", 0),
    ],
)
def test_token_f1_is_the_harmonic_mean_of_precision_and_recall_over_words(said, right, expected):
    assert token_f1(said, right) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("said", "right", "expected"),
    [
        ("a b c d", "a b c d", 1),
        ("b a", "a b", 0.5),
        ("a x b y c", "a b c", 2 * (3 / 5) / (3 / 5 + 1)),
        ("", "a", 0),
        ("the cats sleep", "the cat sleeps", 1),
    ],
)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence_of_stems(said, right, expected):
    assert rouge_l(said, right) == pytest.approx(expected)


ASCII = st.text(st.characters(max_codepoint=127), max_size=12)
WORDS = st.lists(
    st.sampled_from(["red", "running", "runs", "Gold", "x-ray", "isn't", "a_b", "."]) | ASCII,
    max_size=6,
)


@given(WORDS, WORDS)
def test_rouge_l_of_ascii_is_that_of_the_rouge_score_package(a, b):
    from rouge_score.rouge_scorer import RougeScorer

    said, right = " ".join(a), " ".join(b)
    assert (
        rouge_l(said, right)
        == RougeScorer(["rougeL"], use_stemmer=True).score(right, said)["rougeL"].fmeasure
    )


@pytest.mark.parametrize(
    ("said", "right", "expected"),
    [
        ("反对", "反对", 1),
        ("我反对。", "反对", 2 * (2 / 3) / (2 / 3 + 1)),
        ("支持", "反对", 0),
        ("Привет, мир!", "привет мир", 1),
        ("Привет", "Привет мир", 2 * 0.5 / 1.5),
        ("नमस्ते", "नमस्ते", 1),
        ("कि", "का", 0),
        ("größer als", "größer als", 1),
        ("größer", "groß", 0),
        ("e\u0301te\u0301", "été", 1),
        ("ไม่", "ไม่", 1),
        ("running 很 fast", "runs 很 fast", 1),
    ],
)
def test_rouge_l_counts_words_of_any_script(said, right, expected):
    assert rouge_l(said, right) == pytest.approx(expected)


@pytest.mark.parametrize("metric", REFERENCE_METRICS)
def test_every_metric_is_between_0_and_1_at_its_ends(metric):
    assert REFERENCE_METRICS[metric]("red blue", "red blue") == 1
    assert (
        REFERENCE_METRICS[metric]("", "red blue")
        == REFERENCE_METRICS[metric]("gold", "red blue")
        == 0
    )


# Answers


def test_a_taught_model_answers_and_stops_at_the_end_of_sequence(taught):
    test = ready(taught, seq2seq=taught.layout.seq2seq, max_new_tokens=50)
    forwards = []
    hook = taught.net.get_output_embeddings().register_forward_hook(lambda *_: forwards.append(1))
    value, rows = score_task(taught, test, batch_size=8)
    hook.remove()
    assert [r.answer for r in rows] == SAID, "what follows the end of sequence would show"
    assert value == 1
    assert len(forwards) < 20


def test_by_default_an_answer_may_be_as_long_as_the_longest_reference_and_its_end(taught):
    test = ready(taught, seq2seq=taught.layout.seq2seq)
    assert test.max_new_tokens == max(len(taught.tokenizer(o)["input_ids"]) for o in SAID) + (
        not taught.layout.seq2seq
    )
    assert score_task(taught, test, 8)[0] == 1


@pytest.mark.parametrize("template", ["plain", "human_assistant"])
def test_the_room_is_counted_as_the_template_writes_the_answer(template):
    tokenizer = train_byte_bpe(
        [" uncommon"] * 9, size=300
    )  # one token after a space, several without
    row = make_example(output="uncommon")
    encoder = Encoder(tokenizer, template)
    test = prepare_eval_set(Task("t", (), (), (row,)), encoder, "test", 0)
    assert test.max_new_tokens == sum(encoder.encode_example(row, 0).require().response_mask)


def test_the_rows_keep_their_order_and_their_marks(taught):
    wrong = replace(ROWS[2], outputs=("something else",))
    test = ready(taught, [*ROWS[:2], wrong, *ROWS[3:]], seq2seq=taught.layout.seq2seq)
    value, rows = score_task(taught, test, batch_size=2)
    assert [r.id for r in rows] == [e.id for e in ROWS]
    assert [r.score for r in rows] == [1, 1, 0, 1, 1, 1]
    assert value == pytest.approx(5 / 6)
    assert rows[2].references == ("something else",)
    assert rows[0].prompt == "Say it 0.\n"


def test_of_several_accepted_answers_the_best_counts(taught):
    rows = [replace(e, outputs=("nonsense", e.outputs[0])) for e in ROWS]
    assert score_task(taught, ready(taught, rows, seq2seq=taught.layout.seq2seq), 8)[0] == 1


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "opt", "t5"])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_answers_in_batches_are_those_of_plain_greedy_decoding(kind, batch_size):
    net = make_text_model(kind, dtype=torch.float64)
    with torch.no_grad():  # large weights: varied answers, some of which end early
        for w in net.net.parameters():
            w.mul_(3)
    test = ready(net, seq2seq=kind == "t5")
    alone = [by_hand(net, e.ids, 12) for e in test.encoded]
    assert generate_answers(net, test.encoded, 12, batch_size) == alone
    assert len(set(alone)) > 1


@torch.no_grad()
def by_hand(net, ids, n):
    """Greedy decoding with no cache, no padding and no library."""
    said = [net.layout.decoder_start_token_id] if net.layout.seq2seq else []
    start = len(said)
    while len(said) < n + start and net.tokenizer.eos_token_id not in said[start:]:
        inputs = (
            {"input_ids": torch.tensor([ids]), "decoder_input_ids": torch.tensor([said])}
            if start
            else {"input_ids": torch.tensor([[*ids, *said]])}
        )
        said.append(int(net.net(**inputs, use_cache=False).logits[0, -1].argmax()))
    return net.tokenizer.decode(said, skip_special_tokens=True).strip()


def test_a_models_own_generation_settings_do_not_change_its_answers():
    net = make_text_model()
    test = ready(net)
    plain = generate_answers(net, test.encoded, 12, 8)
    for key, value in {
        "repetition_penalty": 5.0,
        "do_sample": True,
        "num_beams": 3,
        "min_new_tokens": 12,
    }.items():
        setattr(net.net.generation_config, key, value)
    again = assemble(net.net, net.tokenizer, device="cpu")
    assert generate_answers(again, test.encoded, 12, 8) == plain


def test_an_empty_answer_is_wrong_and_stays_in_the_denominator():
    net = make_text_model()
    with torch.no_grad():  # the end of sequence is the best token everywhere
        net.net.lm_head.weight.zero_()
        net.net.lm_head.register_forward_hook(
            lambda m, args, out: out.index_fill(-1, torch.tensor(0), 1.0)
        )
    value, rows = score_task(net, ready(net), 8)
    assert [r.answer for r in rows] == [""] * 6
    assert value == 0
    assert len(rows) == 6


def test_a_conversation_is_scored_on_its_last_turn():
    turns = (
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("user", "Name one."),
        Message("assistant", "red"),
    )
    _, (row,) = score_task(
        make_text_model(),
        ready(make_text_model(), [make_example("", output="red", messages=turns)]),
        8,
    )
    assert row.references == ("red",)
    assert row.prompt.endswith("Name one.\n")


# Likelihood

LABELS = ("very bad", "very sad", "very odd", "most odd", "most bad")


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_by_likelihood_the_answer_is_the_label_that_scores_best_alone(kind):
    net = make_text_model(kind, dtype=torch.float64)
    with torch.no_grad():
        for w in net.net.parameters():
            w.mul_(3)  # labels that differ by example
    encoder = Encoder(net.tokenizer, max_tokens=120, seq2seq=kind == "t5")
    rows = [
        make_example(f"Say {'it ' * (7 * i % 5)}{i}.", output="very sad", id=f"r{i}")
        for i in range(12)
    ]
    test = prepare_eval_set(
        Task("t", (), (), tuple(rows), labels=LABELS), encoder, "test", 0, answer_mode="likelihood"
    )
    best = []
    for row in rows:
        alone = [
            encoder.encode_example(replace(row, outputs=(label,)), 0).require() for label in LABELS
        ]
        each = [nll(net, net.batch([e])).item() * sum(e.response_mask) for e in alone]
        best.append(LABELS[each.index(min(each))])
    value, predictions = score_task(net, test, batch_size=4)
    assert [p.answer for p in predictions] == best
    assert value == best.count("very sad") / 12
    assert len(set(best)) > 1


def test_a_task_without_labels_cannot_be_answered_by_likelihood():
    with pytest.raises(
        ConfigError, match=r"task 't' has no labels, .* or set score.answer_mode=generate"
    ):
        ready(make_text_model(), answer_mode="likelihood")


def test_an_unknown_way_to_answer_names_the_nearest():
    with pytest.raises(
        ConfigError, match=r"unknown score.answer_mode 'likelyhood'; did you mean 'likelihood'"
    ):
        ready(make_text_model(), answer_mode="likelyhood")


# Perplexity


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_perplexity_is_that_of_the_reference_whatever_is_trained_on(kind, weight):
    net = make_text_model(kind)
    test = ready(net, metric="perplexity", seq2seq=kind == "t5")
    expected = [nll(net, net.batch([e])).item() for e in test.encoded]
    if kind == "llama":
        net.layout = replace(net.layout, instruction_weight=weight)
    value, rows = score_task(net, test, 8)
    assert [r.result["perplexity"] for r in rows] == pytest.approx(
        [math.exp(x) for x in expected], rel=1e-4
    )
    assert value == pytest.approx(sum(math.exp(-x) for x in expected) / 6, rel=1e-4)


# What cannot be scored


def test_an_unknown_metric_names_the_task_and_the_nearest():
    with pytest.raises(
        ConfigError, match=r"task 't': unknown metric 'rogueL'; did you mean 'rougeL'"
    ):
        ready(make_text_model(), metric="rogueL")


def test_a_split_that_is_not_there_says_which_is():
    with pytest.raises(
        DataError, match=r"task 't' has no dev rows \(it has test\); .*score.split=test"
    ):
        prepare_eval_set(
            Task("t", (), (), tuple(ROWS)), Encoder(make_text_model().tokenizer), "dev", 0
        )


def test_a_prompt_longer_than_the_context_is_refused_by_file_and_line():
    encoder = Encoder(train_byte_bpe(stream_text()), max_tokens=40)
    rows = [
        ROWS[0],
        make_example("Say it. " * 40, where="t/test.jsonl:2"),
        make_example("x" * 90, where="t/test.jsonl:3"),
    ]
    with pytest.raises(
        DataError,
        match=r"(?s)^t/test.jsonl:2: takes .*score.max_new_tokens.*\nt/test.jsonl:3: takes",
    ):
        prepare_eval_set(Task("t", (), (), tuple(rows)), encoder, "test", 0)


@pytest.mark.parametrize(
    ("more", "whence"),
    [({}, "the longest of its test references"), ({"max_new_tokens": 120}, "score.max_new_tokens")],
)
def test_an_answer_that_leaves_no_room_for_a_prompt_is_refused_once_a_task(more, whence):
    long = [make_example("Say it.", output="a b " * 100, id=str(i)) for i in range(3)]
    with pytest.raises(
        ConfigError,
        match=rf"task 't': an answer may take \d+ tokens \({whence}\), which leaves none",
    ):
        ready(make_text_model(), long, **more)


def test_a_task_of_which_no_test_row_fits_is_refused_even_when_skipping():
    encoder = Encoder(train_byte_bpe(stream_text()), max_tokens=10, on_unusable="skip")
    with pytest.raises(DataError, match="task 't' has no test rows left to score"):
        prepare_eval_set(Task("t", (), (), (make_example("x" * 90),)), encoder, "test", 0)


def test_a_limit_scores_the_first_rows():
    assert [e.id for e in ready(make_text_model(), max_examples=2).encoded] == ["r0", "r1"]

"""From text to token ids: what each template writes, which tokens are learned, and what gives way
for lack of room.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from continual.data.template import Encoder, index_tasks
from continual.data.types import Message, Stream, Task
from continual.errors import ConfigError, DataError
from tests.support.models import (
    CHATML_TEMPLATE,
    THINKING_TEMPLATE,
    make_example,
    stream_text,
    train_byte_bpe,
)

PLAIN = train_byte_bpe(stream_text())
CHAT = train_byte_bpe(stream_text(), eos="<|im_end|>", chat_template=CHATML_TEMPLATE)
THINKER = train_byte_bpe(stream_text(), eos="<|im_end|>", chat_template=THINKING_TEMPLATE)
# Its merges cross every boundary: "\nred", ":\nred", "] red" and the like are one token each.
GREEDY = train_byte_bpe(
    [f"Say it{gap}red blue" for gap in ("\n", ":\n", " ", "] ", ": ", ":", "]")] * 9,
    split_words=False,
)
TALK = make_example(
    "",
    messages=(
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("user", "Name a colour."),
        Message("assistant", "red"),
    ),
)


def learned(e, tokenizer):
    """The runs of response tokens as text, end-of-sequence tokens shown."""
    found, run = [], []
    for token, response in [*zip(e.ids, e.response_mask, strict=True), (None, False)]:
        if response:
            run.append(token)
        elif run:
            found.append(tokenizer.decode(run))
            run = []
    return found


def response_ids(e):
    return [t for t, r in zip(e.ids, e.response_mask, strict=True) if r]


# Templates


@pytest.mark.parametrize(
    ("name", "bare", "full", "response"),
    [
        ("plain", "Do it.\n", "Do it.\na b\n", "red"),
        (
            "alpaca",
            "### Instruction:\nDo it.\n\n### Response:\n",
            "### Instruction:\nDo it.\n\n### Input:\na b\n\n### Response:\n",
            "red",
        ),
        (
            "human_assistant",
            "### Human: Do it.\n### Assistant:",
            "### Human: Do it.\na b\n### Assistant:",
            " red",
        ),
        ("inst", "[INST] Do it. [/INST]", "[INST] Do it.\na b [/INST]", " red"),
    ],
)
def test_a_template_writes_what_its_name_says(name, bare, full, response):
    encoder = Encoder(PLAIN, name)
    for e, prompt in ((make_example("Do it."), bare), (make_example("Do it.", "a b"), full)):
        made = encoder.encode_example(e, 0).require()
        assert PLAIN.decode(made.ids) == f"{prompt}{response}<eos>"
        assert learned(made, PLAIN) == [f"{response}<eos>"]
        asked = encoder.encode_prompt(e, 0, 5).require()
        assert PLAIN.decode(asked.ids) == prompt
        assert not any(asked.response_mask)


def test_chat_is_the_tokenizers_own_template_and_its_end_of_turn_is_learned_once():
    made = Encoder(CHAT, "chat").encode_example(make_example("Do it.", "a b"), 0).require()
    assert (
        CHAT.decode(made.ids)
        == "<|im_start|>user\nDo it.\na b<|im_end|>\n<|im_start|>assistant\nred<|im_end|>"
    )
    assert learned(made, CHAT) == ["red<|im_end|>"]


def test_chat_asks_for_an_answer_with_the_templates_generation_prompt():
    asked = Encoder(CHAT, "chat").encode_prompt(make_example("Do it."), 0, 5).require()
    assert CHAT.decode(asked.ids) == "<|im_start|>user\nDo it.<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("output", ["red", "think", "<", "\nred", "red "])
def test_what_a_chat_template_writes_before_any_answer_is_asked_and_not_learned(output):
    encoder, e = Encoder(THINKER, "chat"), make_example("Do it.", output=output)
    made, asked = encoder.encode_example(e, 0).require(), encoder.encode_prompt(e, 0, 5).require()
    prompt = "<|im_start|>user\nDo it.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert THINKER.decode(asked.ids) == prompt
    assert made.ids[: len(asked.ids)] == asked.ids
    assert learned(made, THINKER) == [f"{output.lstrip()}<|im_end|>"]


def test_an_answer_that_holds_its_own_thoughts_is_learned_with_them():
    told = "<think>\nHm.\n</think>\n\nred"
    made = Encoder(THINKER, "chat").encode_example(make_example("Do it.", output=told), 0).require()
    assert learned(made, THINKER) == [f"{told}<|im_end|>"]


def test_a_space_that_a_chat_template_writes_before_an_answer_is_its_first_word_s():
    spaced = train_byte_bpe(
        stream_text(),
        eos="<|im_end|>",
        chat_template="{% for m in messages %}{% if m.role == 'user' %}"
        "[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}",
    )
    assert learned(
        Encoder(spaced, "chat").encode_example(make_example("Do it."), 0).require(), spaced
    ) == [" red<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "tokenizer", "turns"),
    [
        ("plain", PLAIN, ["Hello<eos>", "red<eos>"]),
        ("alpaca", PLAIN, ["Hello<eos>", "red<eos>"]),
        ("human_assistant", PLAIN, [" Hello<eos>", " red<eos>"]),
        ("inst", PLAIN, [" Hello<eos>", " red<eos>"]),
        ("chat", CHAT, ["Hello<|im_end|>", "red<|im_end|>"]),
    ],
)
def test_a_conversation_trains_on_every_assistant_turn_and_nothing_else(name, tokenizer, turns):
    assert learned(Encoder(tokenizer, name).encode_example(TALK, 0).require(), tokenizer) == turns


def test_a_conversation_is_asked_up_to_its_last_assistant_turn():
    text = CHAT.decode(Encoder(CHAT, "chat").encode_prompt(TALK, 0, 5).require().ids)
    assert "Hello<|im_end|>" in text
    assert text.endswith("Name a colour.<|im_end|>\n<|im_start|>assistant\n")


def test_braces_in_a_row_are_text():
    text = PLAIN.decode(
        Encoder(PLAIN, "alpaca")
        .encode_example(make_example("Write {input} and {x}.", "{}"), 0)
        .require()
        .ids
    )
    assert "Write {input} and {x}." in text
    assert "### Input:\n{}" in text


def test_an_unknown_template_names_the_nearest():
    with pytest.raises(
        ConfigError, match=r"unknown data.template 'alpacca'; did you mean 'alpaca'\?"
    ):
        Encoder(PLAIN, "alpacca")


def test_chat_without_a_chat_template_is_refused():
    with pytest.raises(
        ConfigError, match="needs a tokenizer with a chat template, and this one has none"
    ):
        Encoder(PLAIN, "chat")


def test_a_chat_template_that_rewrites_earlier_turns_is_refused():
    shouting = CHATML_TEMPLATE.replace(
        "{{ m.content }}", "{{ m.content if loop.last else m.content | upper }}"
    )
    with pytest.raises(ConfigError, match="rewrites earlier turns"):
        Encoder(train_byte_bpe(chat_template=shouting, eos="<|im_end|>"), "chat").encode_example(
            TALK, 0
        ).require()


# The boundary


def test_the_merging_tokenizer_does_merge_across_the_boundary():
    apart = GREEDY("Say it\n")["input_ids"] + GREEDY("red blue")["input_ids"]
    assert GREEDY("Say it\nred blue")["input_ids"] != apart


@pytest.mark.parametrize("name", ["plain", "alpaca", "human_assistant", "inst"])
def test_the_boundary_is_exact_where_merges_would_shift_it(name):
    encoder, row = Encoder(GREEDY, name), make_example("Say it", output="red blue")
    made, asked = (
        encoder.encode_example(row, 0).require(),
        encoder.encode_prompt(row, 0, 9).require(),
    )
    lead = " " if name in ("human_assistant", "inst") else ""
    assert response_ids(made) == [*GREEDY(lead + "red blue")["input_ids"], GREEDY.eos_token_id]
    assert made.ids[: len(asked.ids)] == asked.ids, (
        "what is asked at test time is what was seen in training"
    )


@given(st.text(min_size=1).filter(str.strip), st.text(), st.text(min_size=1).filter(str.strip))
@settings(max_examples=40, deadline=None)
def test_the_response_is_tokenised_as_if_alone_for_any_text(instruction, given_input, output):
    encoder = Encoder(GREEDY, "plain", max_tokens=10_000)
    made = encoder.encode_example(make_example(instruction, given_input, output), 0).require()
    assert response_ids(made) == [*GREEDY(output)["input_ids"], GREEDY.eos_token_id]
    assert made.response_mask == tuple(sorted(made.response_mask))


def test_a_tokenizers_own_beginning_of_text_stands_first_and_is_not_learned():
    tokenizer = train_byte_bpe(stream_text(), bos="<s>", append_eos=True)
    made = Encoder(tokenizer, "plain").encode_example(make_example("Do it."), 0).require()
    assert tokenizer.decode(made.ids) == "<s>Do it.\nred<eos>"
    assert learned(made, tokenizer) == ["red<eos>"]


BEGUN = "{{ bos_token }}" + CHATML_TEMPLATE


def conversation(e):
    told = e.messages or (Message("user", e.instruction), Message("assistant", e.outputs[0]))
    return [{"role": m.role, "content": m.content} for m in told]


@pytest.mark.parametrize("written", [BEGUN, CHATML_TEMPLATE], ids=["a BOS", "no BOS"])
@pytest.mark.parametrize("row", [make_example("Do it."), TALK], ids=["one turn", "messages"])
def test_chat_has_the_ids_that_transformers_gives_the_conversation(written, row):
    tokenizer = train_byte_bpe(stream_text(), bos="<s>", eos="<|im_end|>", chat_template=written)
    encoder, told = Encoder(tokenizer, "chat"), conversation(row)
    whole = tokenizer.apply_chat_template(told)["input_ids"]
    made, asked = (
        encoder.encode_example(row, 0).require(),
        encoder.encode_prompt(row, 0, 5).require(),
    )
    assert list(made.ids) == whole[: len(made.ids)]
    assert tokenizer.decode(whole[len(made.ids) :]) == "\n", (
        "what stands behind the last end of turn is not learned"
    )
    assert (
        list(asked.ids)
        == tokenizer.apply_chat_template(told[:-1], add_generation_prompt=True)["input_ids"]
    )
    assert (
        made.ids.count(tokenizer.bos_token_id)
        == asked.ids.count(tokenizer.bos_token_id)
        == (written == BEGUN)
    )


def test_demonstrations_are_earlier_turns_as_a_chat_template_writes_them():
    asked = (
        Encoder(THINKER, "chat", demonstrations=(make_example("Do.", output="so"),))
        .encode_prompt(make_example("Do it."), 0, 5)
        .require()
    )
    told = [
        *conversation(make_example("Do.", output="so")),
        *conversation(make_example("Do it."))[:-1],
    ]
    before = THINKER.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
    assert THINKER.decode(asked.ids) == before + "<think>\n\n</think>\n\n"
    assert not any(asked.response_mask)


def test_demonstrations_of_a_chat_begin_once():
    tokenizer = train_byte_bpe(stream_text(), bos="<s>", eos="<|im_end|>", chat_template=BEGUN)
    asked = (
        Encoder(tokenizer, "chat", demonstrations=(make_example("Do.", output="so"),))
        .encode_prompt(make_example("Do it."), 0, 5)
        .require()
    )
    told = [
        *conversation(make_example("Do.", output="so")),
        *conversation(make_example("Do it."))[:-1],
    ]
    assert (
        list(asked.ids)
        == tokenizer.apply_chat_template(told, add_generation_prompt=True)["input_ids"]
    )


def test_an_encoder_decoders_chat_begins_as_its_template_does_and_ends_as_its_tokenizer_does():
    tokenizer = train_byte_bpe(stream_text(), bos="<s>", append_eos=True, chat_template=BEGUN)
    asked = (
        Encoder(tokenizer, "chat", seq2seq=True)
        .encode_prompt(make_example("Do it."), 0, 5)
        .require()
    )
    assert (
        tokenizer.decode(asked.ids)
        == "<s><|im_start|>user\nDo it.<|im_end|>\n<|im_start|>assistant\n<eos>"
    )


def test_an_encoders_text_ends_with_its_end_of_sequence_and_so_does_the_response():
    tokenizer = train_byte_bpe(stream_text(), append_eos=True)
    made = (
        Encoder(tokenizer, "plain", seq2seq=True)
        .encode_example(make_example("Do it."), 0)
        .require()
    )
    assert tokenizer.decode(made.ids) == "Do it.\n<eos>red<eos>"
    assert learned(made, tokenizer) == ["red<eos>"]


def test_an_encoder_decoder_model_refuses_several_assistant_turns_by_row():
    with pytest.raises(
        DataError, match=r"t/train.jsonl:1: several assistant turns, .* split the row"
    ):
        Encoder(PLAIN, seq2seq=True).encode_example(TALK, 0).require()


# Truncation


@given(
    st.integers(1, 60), st.integers(0, 200), st.integers(1, 40), st.integers(8, 120), st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_instruction_and_response_are_kept_whole_or_refused(ask, given_input, out, limit, seq2seq):
    encoder = Encoder(PLAIN, "plain", limit, seq2seq)
    e = make_example("x" * ask, "ab " * given_input, "z" * out)
    fewest = (
        len(PLAIN(f"{e.instruction}\n")["input_ids"]) + len(PLAIN(e.outputs[0])["input_ids"]) + 1
    )
    if fewest > limit:
        with pytest.raises(DataError, match=rf"the limit is {limit}"):
            encoder.encode_example(e, 0).require()
        return
    encoding = encoder.encode_example(e, 0)
    made = encoding.require()
    assert len(made.ids) <= limit
    assert PLAIN.decode(made.ids).startswith(e.instruction + "\n")
    assert response_ids(made) == [*PLAIN(e.outputs[0])["input_ids"], PLAIN.eos_token_id]
    assert encoding.shortened == (
        len(Encoder(PLAIN, max_tokens=10_000, seq2seq=seq2seq).encode_example(e, 0).require().ids)
        > limit
    )


def test_the_input_is_shortened_from_its_end_as_little_as_needed():
    whole = Encoder(PLAIN).encode_example(make_example("Do it.", "q" * 40), 0).require()
    made = (
        Encoder(PLAIN, max_tokens=len(whole.ids) - 7)
        .encode_example(make_example("Do it.", "q" * 40), 0)
        .require()
    )
    assert made.text == "Do it.\n" + "q" * 33 + "\nred"


def test_a_prompt_leaves_room_for_its_answer():
    encoder = Encoder(PLAIN, max_tokens=30)
    assert len(encoder.encode_prompt(make_example("Do it.", "q" * 40), 0, 12).require().ids) == 18


# Demonstrations


@given(st.sampled_from(["plain", "alpaca", "human_assistant", "inst", "chat"]), st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_demonstrations_stand_before_the_prompt_as_earlier_turns_of_a_conversation_would(name, k):
    tokenizer = CHAT if name == "chat" else PLAIN
    shown = [make_example(f"Do {i}.", output=f"so {i}") for i in range(k)]
    turns = [
        Message(role, text)
        for e in (*shown, make_example("Do it."))
        for role, text in (("user", e.instruction), ("assistant", e.outputs[0]))
    ]
    asked = (
        Encoder(tokenizer, name, demonstrations=tuple(shown))
        .encode_prompt(make_example("Do it."), 0, 5)
        .require()
    )
    talk = (
        Encoder(tokenizer, name)
        .encode_prompt(make_example("", messages=tuple(turns)), 0, 5)
        .require()
    )
    assert (asked.ids, asked.text) == (talk.ids, talk.text)
    assert not any(asked.response_mask)


def test_a_system_message_stands_before_the_demonstrations():
    for tokenizer, name in ((CHAT, "chat"), (PLAIN, "plain")):
        text = (
            Encoder(tokenizer, name, demonstrations=(TALK,))
            .encode_prompt(TALK, 0, 5)
            .require()
            .text
        )
        assert text.count("Hello") == 2
        assert text.count("Be brief.") == (1 if name == "chat" else 2)
        assert text.index("Be brief.") < text.index("Hi")


def test_an_encoder_reads_demonstrations_as_one_text_that_ends_once():
    tokenizer = train_byte_bpe(stream_text(), append_eos=True)
    asked = (
        Encoder(
            tokenizer, "plain", seq2seq=True, demonstrations=(make_example("Do.", output="so"),)
        )
        .encode_prompt(make_example("Do it."), 0, 5)
        .require()
    )
    assert tokenizer.decode(asked.ids) == "Do.\nso\nDo it.\n<eos>"


def test_the_first_demonstrations_give_way_for_lack_of_room_before_the_input_does():
    shown = tuple(make_example("Do.", "q" * 9, f"a{i}") for i in range(3))
    whole = (
        Encoder(PLAIN, demonstrations=shown)
        .encode_prompt(make_example("Do it.", "q" * 40), 0, 5)
        .require()
    )
    encoder = Encoder(PLAIN, max_tokens=len(whole.ids), demonstrations=shown)
    encoding = encoder.encode_prompt(make_example("Do it.", "q" * 40), 0, 5)
    assert encoding.require().text == whole.text.partition("a0\n")[2]
    assert encoding.dropped_demonstrations == 1
    assert not encoding.shortened


# What cannot be learned


def task(*examples):
    return Task("t", examples)


def test_all_rows_that_do_not_fit_or_are_empty_are_named_together_with_file_line_and_mend():
    encoder = Encoder(PLAIN, max_tokens=20)
    rows = [
        make_example(where="t.jsonl:1", output="z" * 30),
        make_example("Do.", where="t.jsonl:2"),
        make_example(where="t.jsonl:3", output=" \n"),
        make_example("y" * 30, where="t.jsonl:4"),
    ]
    with pytest.raises(DataError) as caught:
        encoder.encode_task(task(*rows), {"t": 0})
    told = str(caught.value).split("\n")
    assert [line.split(": ")[0] for line in told] == ["t.jsonl:1", "t.jsonl:3", "t.jsonl:4"]
    assert "raise data.max_length" in told[0]
    assert "the response is empty" in told[1]
    assert all("data.on_unusable=skip" in line for line in told)


def test_a_response_that_does_not_fit_is_refused_whatever_the_input():
    with pytest.raises(
        DataError, match=r"takes \d+ tokens \(\d+ with no input at all\), and the limit is 20"
    ):
        Encoder(PLAIN, max_tokens=20).encode_example(
            make_example(input="q q q", output="z" * 30), 0
        ).require()


def test_a_conversation_that_does_not_fit_is_refused():
    with pytest.raises(DataError, match="the limit is 12"):
        Encoder(PLAIN, max_tokens=12).encode_example(TALK, 0).require()


def test_skip_leaves_them_out_and_counts_them():
    encoder = Encoder(PLAIN, max_tokens=20, on_unusable="skip")
    rows = [
        make_example("Do.", id="a"),
        make_example(output="z" * 30, id="b"),
        make_example(output="", id="c"),
    ]
    assert [e.id for e in encoder.encode_task(task(*rows), {"t": 0}).train] == ["a"]
    encodings = encoder.encode_examples(rows, {"t": 0})
    assert [x.id for x in encodings if x.encoded is None] == ["b", "c"]


def test_a_task_of_which_nothing_is_left_is_refused():
    with pytest.raises(DataError, match="task 't' has no train rows left"):
        Encoder(PLAIN, on_unusable="skip").encode_task(task(make_example(output="")), {"t": 0})


def test_an_unknown_way_to_treat_the_unfit_names_the_known():
    with pytest.raises(ConfigError, match=r"unknown data.on_unusable 'skp'; did you mean 'skip'"):
        Encoder(PLAIN, on_unusable="skp")


def test_each_example_knows_the_column_of_its_task():
    a, b = (Task(n, (make_example(task=n),)) for n in "ab")
    stream = Stream("s", "o", (b, a), (Task("joint", (*a.train, *b.train)),))
    assert [
        e.task_index
        for e in Encoder(PLAIN).encode_task(stream.stages[0], index_tasks(stream)).train
    ] == [1, 0]

"""What a run learned, as a folder of its own: it answers as the run did, and its card says how it
is asked.
"""

import json
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from continual.cli.main import compose_config
from continual.data.template import TEMPLATES, Encoder
from continual.inference.export import export
from continual.inference.model_card import build_chat_template, escape_markdown
from tests.support.models import (
    CHATML_TEMPLATE,
    TASKS,
    THINKING_TEMPLATE,
    load_json_lines,
    make_example,
    run_in_process,
    stream_text,
    train_byte_bpe,
    write_model,
)

pytestmark = [  # both of peft's own
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:Position ids are not supported for parameter efficient tuning"
    ),
]
SHORT = ("stream.tasks=[first,last]", "score.max_new_tokens=6", "train.lr=0.01", "train.epochs=8")


@pytest.fixture(scope="module")
def made(run_keys, tmp_path_factory):
    """A finished run of each of these kinds, made when it is first asked for."""
    runs = {}

    def of(*more):
        if more not in runs:
            runs[more] = tmp_path_factory.mktemp("runs") / "run"
            run_in_process(runs[more], run_keys, *SHORT, *more)
        return runs[more]

    return of


@pytest.fixture
def spoiled(made, tmp_path):
    """A copy of the plain run, to be changed."""
    return shutil.copytree(made(), tmp_path / "copy")


def exported(path, out, **more):
    return export(path, compose_config("run", ["device=cpu"]), out=out, **more)


def card(folder):
    """The card's front matter, and its text."""
    _, head, text = (folder / "README.md").read_text("utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def test_by_default_it_is_the_model_of_the_run_s_end_whatever_its_tasks_are_called(made, tmp_path):
    exported(made("stream.tasks=[last,first]"), tmp_path / "out")
    assert card(tmp_path / "out")[0]["model-index"][0]["name"].endswith("first")


def answers(folder, prompts):
    """Each prompt's answer, by the code that the card gives."""
    code = re.search(r"```python\n(.*?)```", card(folder)[1], re.DOTALL)[1]
    code = code.replace('folder = "."', f"folder = {str(folder)!r}").replace(
        "max_new_tokens=64", "max_new_tokens=6"
    )
    head, asking = code.split('instruction, input = "...", "..."')
    names, said = {}, []
    exec(head, names)  # the card's own words
    for instruction, given_input in prompts:
        names |= {"instruction": instruction, "input": given_input, "print": said.append}
        exec("_ = 0" + asking, names)
    return said


def asked(keys, task):
    folder = next(k for k in keys if k.startswith("stream.path=")).partition("=")[2]
    return [
        (row["instruction"], row["input"])
        for row in load_json_lines(Path(folder) / task / "test.jsonl")
    ]


def told(path, number, task):
    return [
        row["answer"]
        for row in load_json_lines(path / f"predictions/stage-{number:02d}/{task}.jsonl")
    ]


LORA = ("model.adapter=lora",)
VIRTUAL = ("model.adapter=prompt_tuning", "train.lr=0.3")


@pytest.mark.parametrize(
    ("more", "stage", "options"),
    [
        ((), "last", {}),
        ((), "base", {}),
        ((), "1", {}),
        ((), "first", {}),
        (LORA, "last", {}),
        (LORA, "last", {"merge": False}),
        (VIRTUAL, "last", {}),
        (("strategy=progressive_prompts", *VIRTUAL), "last", {"task": "first"}),
        (("strategy=progressive_prompts", *VIRTUAL), "last", {"task": "last"}),
        (("strategy=progressive_prompts", *VIRTUAL), "base", {"task": "last"}),
        (("strategy=per_task", *LORA), "last", {"task": "first"}),
        (("data.template=alpaca",), "last", {}),
    ],
    ids=str,
)
def test_an_exported_model_answers_every_test_prompt_as_the_run_did(
    made, run_keys, tmp_path, more, stage, options
):
    path = made(*more)
    number = {"last": 2, "base": 0, "1": 1, "first": 1}[stage]
    made_folder = exported(path, tmp_path / "out", stage=stage, **options).path
    for task in [options["task"]] if "task" in options else ["first", "last"]:
        assert answers(made_folder, asked(run_keys, task)) == told(path, number, task)


def test_an_encoder_decoder_asked_by_its_tokenizers_own_template_answers_as_the_run_did(
    run_keys, tmp_path
):
    folder = write_model(
        tmp_path / "model",
        "t5",
        train_byte_bpe(stream_text(), append_eos=True, chat_template=CHATML_TEMPLATE),
    )
    run_in_process(
        tmp_path / "run",
        run_keys,
        *SHORT,
        f"model.name={folder}",
        "data.template=chat",
        "stream.tasks=[first]",
    )
    exported(tmp_path / "run", tmp_path / "out")
    assert answers(tmp_path / "out", asked(run_keys, "first")) == told(tmp_path / "run", 1, "first")


def test_an_adapter_is_saved_for_its_base_and_is_far_smaller(made, run_keys, tmp_path):
    exported(made(*LORA), tmp_path / "out", merge=False)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert f"model.name={config['base_model_name_or_path']}" in run_keys
    assert not (tmp_path / "out/model.safetensors").exists()
    assert card(tmp_path / "out")[0]["library_name"] == "peft"


def test_an_adapter_of_a_base_that_only_this_run_has_brings_it_along(run_keys, tmp_path):
    words = (
        "model=scratch",
        "model.hidden_size=32",
        "model.layers=1",
        "model.heads=2",
        "model.context_length=64",
        "model.vocab_size=300",
        "model.adapter=lora",
        *SHORT,
    )
    run_in_process(tmp_path / "run", [k for k in run_keys if not k.startswith("model")], *words)
    exported(tmp_path / "run", tmp_path / "out", merge=False)
    assert answers(tmp_path / "out", asked(run_keys, "first")) == told(tmp_path / "run", 2, "first")
    assert (
        json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"]
        == "base"
    )


def test_the_adapted_model_of_an_adaptation_is_exported(run_cli, made, run_keys, tmp_path):
    words = (
        "stream.tasks=[loud]",
        "adapt.steps=2",
        "adapt.eval_steps=[]",
        f"adapt.init_from={made(*LORA)}",
    )
    assert run_cli("adapt", *run_keys, *words, f"out={tmp_path / 'new'}")[0] == 0
    code, out, err = run_cli("export", tmp_path / "new", "merged=false")
    assert code == 0, err
    assert f"wrote {tmp_path / 'new/export/adapted'}" in out
    theirs, ours = (
        load_file(tmp_path / "new" / f / "adapter_model.safetensors")
        for f in ("model", "export/adapted")
    )
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(w, ours[n]) for n, w in theirs.items())
    assert "exact\\_match in percent on loud" in card(tmp_path / "new/export/adapted")[1]


# The card


def test_the_card_holds_the_matrix_for_people_and_the_stages_scores_for_machines(made, tmp_path):
    exported(made(), tmp_path / "out", stage="first", license="apache-2.0")
    head, text = card(tmp_path / "out")
    assert head["license"] == "apache-2.0"
    assert "continual-learning" in head["tags"]
    (entry,) = head["model-index"]
    assert [r["task"]["name"] for r in entry["results"]] == ["first", "last"]
    matrix = json.loads((made() / "matrix.json").read_text())
    assert [r["metrics"][0]["value"] for r in entry["results"]] == [
        100 * s for s in matrix["scores"][1]
    ]
    assert text.count("\n| ") == 2 + 3
    assert "| first (this model) |" in text


def test_the_hubs_own_reader_takes_the_card(made, tmp_path):
    from huggingface_hub import ModelCard

    exported(made(), tmp_path / "out")
    data = ModelCard.load(tmp_path / "out/README.md").data
    assert [r.metric_type for r in data.eval_results] == ["exact_match"] * 2


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (["CC BY-SA 3.0 (databricks-dolly-15k)"] * 2, "cc-by-sa-3.0"),
        (["MIT", "Apache 2.0"], "other"),
        (["MIT License", "mit"], "mit"),
        ([None, None], None),
        (["none in the repository", None], "other"),
    ],
)
def test_the_licence_is_that_of_the_data_where_the_stream_tells_it(
    made, run_keys, tmp_path, licences, expected
):
    copy = shutil.copytree(made(), tmp_path / "run")
    config = (copy / "config.yaml").read_text()
    old = next(k for k in run_keys if k.startswith("stream.path=")).partition("=")[2]
    index = {
        "tasks": [{"name": t, "licence": lic} for t, lic in zip(TASKS, licences, strict=False)]
    }
    (tmp_path / "stream").mkdir()
    (tmp_path / "stream/stream.json").write_text(json.dumps(index))
    (copy / "config.yaml").write_text(config.replace(old, str(tmp_path / "stream")))
    exported(copy, tmp_path / "out")
    assert card(tmp_path / "out")[0].get("license") == expected


def test_names_out_of_files_stay_text_in_the_card(spoiled, tmp_path):
    evil = "x | [y](http://z) <script> `{{ 1 }}` ---"
    path = spoiled / "matrix.json"
    path.write_text(path.read_text().replace('"stream": "', '"stream": "' + evil))
    exported(spoiled, tmp_path / "out")
    head, text = card(tmp_path / "out")
    assert evil in head["model-index"][0]["name"]
    assert "<script>" not in text.replace("\\<script\\>", "")
    assert "[y](" not in text
    assert escape_markdown("a\nb|c") == "a b\\|c"


TOKENIZERS = [
    train_byte_bpe(stream_text()),
    train_byte_bpe(stream_text(), bos="<s>", eos="</s>", chat_template=CHATML_TEMPLATE),
    train_byte_bpe(stream_text(), append_eos=True, split_words=False),
]


@pytest.mark.parametrize("seq2seq", [False, True])
def test_a_chat_template_that_writes_the_beginning_of_text_is_saved_so_that_it_stands_there_once(
    seq2seq,
):
    tokenizer = train_byte_bpe(
        stream_text(),
        bos="<s>",
        append_eos=seq2seq,
        chat_template="{{ bos_token }}" + CHATML_TEMPLATE,
    )
    encoder = Encoder(tokenizer, "chat", seq2seq=seq2seq)
    told = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Do it."}],
        add_generation_prompt=True,
        chat_template=build_chat_template(encoder),
    )["input_ids"]
    assert tuple(told) == encoder.encode_prompt(make_example("Do it."), 0, 1).require().ids
    assert told.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("seq2seq", [False, True])
@pytest.mark.parametrize("more", [{}, {"enable_thinking": False}], ids=str)
def test_a_chat_template_is_saved_so_that_it_asks_with_all_that_it_writes_before_any_answer(
    seq2seq, more
):
    tokenizer = train_byte_bpe(
        stream_text(), bos="<s>", append_eos=seq2seq, chat_template=THINKING_TEMPLATE
    )
    encoder = Encoder(tokenizer, "chat", seq2seq=seq2seq)
    tokenizer.chat_template, asked = (
        build_chat_template(encoder),
        encoder.encode_prompt(make_example("Do it."), 0, 1).require(),
    )
    turns = [{"role": "user", "content": "Do it."}]
    told = tokenizer.apply_chat_template(turns, add_generation_prompt=True, **more)["input_ids"]
    assert tuple(told) == asked.ids
    assert "</think>" not in tokenizer.apply_chat_template(turns, tokenize=False)


@settings(max_examples=60)
@given(
    st.sampled_from([*TEMPLATES]),
    st.sampled_from(range(3)),
    st.text(min_size=1, max_size=12),
    st.text(max_size=12),
)
def test_the_saved_template_writes_every_prompt_as_the_run_did(
    template, which, instruction, given_input
):
    seq2seq = which == 2
    encoder = Encoder(TOKENIZERS[which], template, max_tokens=500, seq2seq=seq2seq)
    asked = encoder.encode_prompt(make_example(instruction, given_input), 0, 1).require()
    between = "\n\n### Input:\n" if template == "alpaca" else "\n"
    text = instruction + between + given_input if given_input else instruction
    told = TOKENIZERS[which].apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        chat_template=build_chat_template(encoder),
    )["input_ids"]
    assert tuple(told) == asked.ids


# What cannot be exported


def test_a_folder_that_is_there_is_left_alone(cli_error, made, tmp_path):
    (tmp_path / "out").mkdir()
    assert f"{tmp_path / 'out'} is there already; remove it, or give another out=" in cli_error(
        "export", made(), f"out={tmp_path / 'out'}"
    )


@pytest.mark.parametrize(
    ("more", "words", "expected"),
    [
        ((), ["stage=frist"], "unknown stage 'frist'; did you mean 'first'"),
        ((), ["task=lost"], "unknown task 'lost'; did you mean 'last'"),
        ((), ["merged=no"], "merged=no: expected true or false"),
        ((), ["merged=false"], "this one trained the whole model"),
        ((), ["stge=1"], "unknown key 'stge'; did you mean 'stage'"),
        (VIRTUAL, ["merged=true"], "puts virtual tokens before the prompt"),
        (
            ("strategy=per_task", *LORA),
            [],
            "the strategy per_task has other weights for each task, and one model holds "
            "those of one; give task=NAME, of first, last",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_exported_is_refused_with_the_reason(
    cli_error, made, tmp_path, more, words, expected
):
    assert expected in cli_error("export", made(*more), *words, f"out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_a_strategy_that_chooses_by_each_prompt_is_no_one_model(cli_error, spoiled):
    config = spoiled / "config.yaml"
    config.write_text(
        config.read_text().replace(
            "continual.strategy.interface.Strategy", "strategies.router.Router"
        )
    )
    told = cli_error("export", spoiled)
    assert (
        "chooses other weights for each prompt, which no one model holds; talk to it with "
        "continual chat" in told
    )


def test_an_unfinished_run_has_no_last_stage_but_those_that_it_has(cli_error, spoiled, tmp_path):
    matrix = json.loads((spoiled / "matrix.json").read_text())
    matrix["stages"].pop()
    matrix["scores"].pop()
    (spoiled / "matrix.json").write_text(json.dumps(matrix))
    told = cli_error("export", spoiled, f"out={tmp_path / 'out'}")
    assert (
        "is not finished, and has no last stage yet; finish it, or name a stage that it has: "
        "base, first" in told
    )
    assert exported(spoiled, tmp_path / "out", stage="first").path.is_dir()


def test_a_stage_whose_weights_were_not_kept_says_which_are(cli_error, spoiled):
    shutil.rmtree(spoiled / "checkpoints/stage-01")
    told = cli_error("export", spoiled, "stage=first")
    assert "the weights after stage 'first' are not there (checkpoint.keep=N" in told
    assert told.endswith("choose of base, last")


def test_a_full_disk_leaves_nothing_behind(cli_error, made, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(2**20))
    told = cli_error("export", made(), f"out={tmp_path / 'new/out'}")
    assert "MB left; see to the space there, or give another out=" in told
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "continual.models.loading.load_pretrained",
            "os.system",
            "asks for model._target_='os.system', which is not one of continual's",
        ),
        (
            "continual.strategy.interface.Strategy",
            "os.system",
            "asks for strategy.naive._target_='os.system', which is neither",
        ),
        (
            "streams.folder.load_folder",
            "os.system",
            "asks for stream._target_='os.system', which is not one of continual's",
        ),
        ("trust_remote_code: false", "trust_remote_code: true", "asks to run code that the model"),
    ],
)
def test_nothing_is_built_from_a_run_folder_but_our_own(cli_error, spoiled, old, new, expected):
    config = spoiled / "config.yaml"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    assert expected in cli_error("export", spoiled)


def test_a_damaged_checkpoint_is_not_exported(cli_error, spoiled):
    path = spoiled / "checkpoints/stage-02/weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "weights.safetensors is not as it was written" in cli_error("export", spoiled)

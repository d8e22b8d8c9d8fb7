"""Models of many architectures, with and without an adapter; what their tokenizers lack; models
built from scratch.
"""

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from continual.data.template import Encoder
from continual.data.types import Task
from continual.errors import ConfigError, MissingError
from continual.models.generation import generate_answers
from continual.models.loading import assemble, load_pretrained
from continual.models.loss import nll
from continual.models.weights import snapshot, weights
from continual.strategy.interface import Strategy
from continual.training.recipe import Recipe
from continual.training.stage import train_stage
from tests.support.models import (
    make_example,
    make_network,
    make_text_model,
    run_in_process,
    stream_text,
    train_byte_bpe,
    write_model,
)

KINDS = ["llama", "qwen3", "gpt2", "opt", "t5"]
LORA = {"lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A local folder of each kind."""
    return {kind: write_model(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_local_folder_runs_two_stages(folders, kind, adapter, run_keys, tmp_path):
    matrix, _ = run_in_process(
        tmp_path,
        run_keys,
        "stream.tasks=[first,loud]",
        f"model.name={folders[kind]}",
        f"model.adapter={adapter}",
        "train.epochs=1",
    )
    assert matrix.stages == ("base", "first", "loud")
    assert matrix.is_finished
    saved = [load_file(tmp_path / f"checkpoints/stage-0{n}/weights.safetensors") for n in (1, 2)]
    assert all("lora_" in name for name in saved[0]) == (adapter == "lora")
    assert any(not torch.equal(w, saved[1][name]) for name, w in saved[0].items()), (
        "each stage moves the weights"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_lora_starts_at_the_base_model_and_trains_nothing_but_itself(kind):
    base, lora = make_text_model(kind), make_text_model(kind, adapter="lora", adapters=LORA)
    encoder = Encoder(base.tokenizer, seq2seq=kind == "t5")
    task = encoder.encode_task(
        Task("t", tuple(make_example(f"Say {i}.") for i in range(4))), {"t": 0}
    )
    torch.testing.assert_close(nll(base, base.batch(task.train)), nll(lora, lora.batch(task.train)))
    frozen = {n: p.clone() for n, p in lora.net.named_parameters() if not p.requires_grad}
    train_stage(lora, task, Strategy(), Recipe(lr=0.01), seed=0, log_event=lambda e: None)
    assert frozen
    assert all(torch.equal(p, frozen[n]) for n, p in lora.net.named_parameters() if n in frozen)
    assert nll(lora, lora.batch(task.train)) < nll(base, base.batch(task.train))


@pytest.mark.parametrize("kind", ["lora", "ia3", "loha", "lokr", "oft", "prompt_tuning"])
def test_every_configured_adapter_trains(kind, run_keys, tmp_path):
    matrix, _ = run_in_process(
        tmp_path, run_keys, "stream.tasks=[first]", f"model.adapter={kind}", "train.epochs=1"
    )
    assert matrix.is_finished


def test_the_same_seed_draws_the_same_adapter_and_another_seed_another():
    a, b, c = (snapshot(make_text_model(adapter="lora", adapters=LORA, seed=s)) for s in (1, 1, 2))
    assert all(torch.equal(w, b[n]) for n, w in a.items())
    assert any(not torch.equal(w, c[n]) for n, w in a.items())


def test_a_run_with_lora_resumes_to_the_same_weights(run_keys, tmp_path):
    more = ("model.adapter=lora", "model.adapters.lora.lora_dropout=0.1")
    whole, _ = run_in_process(tmp_path / "whole", run_keys, *more)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for stage in ("stage-02", "stage-03"):
        shutil.rmtree(tmp_path / "cut/checkpoints" / stage)
    (tmp_path / "cut/finished").unlink()
    resumed, said = run_in_process(tmp_path / "cut", run_keys, *more)
    assert "cut from stage-01" in said
    assert resumed.scores == whole.scores
    a, b = (
        load_file(tmp_path / f"{n}/checkpoints/stage-03/weights.safetensors")
        for n in ("whole", "cut")
    )
    assert all(torch.equal(w, b[n]) for n, w in a.items())


# Tokenizers


def test_a_tokenizer_without_end_of_sequence_or_padding_gets_both():
    bare = train_byte_bpe(stream_text(), eos=None, pad=None)
    before = len(bare)
    net = assemble(make_network("llama", before), bare, device="cpu")
    assert net.tokenizer.eos_token_id == before
    assert net.layout.pad_token_id == net.tokenizer.pad_token_id is not None
    assert net.net.get_input_embeddings().num_embeddings == before + 1
    assert net.net.get_output_embeddings().out_features == before + 1


def test_a_model_folder_without_those_tokens_learns_to_stop(tmp_path):
    write_model(tmp_path, tokenizer=train_byte_bpe(stream_text(), eos=None, pad=None))
    net = load_pretrained(name=str(tmp_path), device="cpu")
    encoder = Encoder(net.tokenizer)
    rows = tuple(
        make_example(f"Say {'it ' * i}.", output=o)
        for i, o in enumerate(("red", "blue gold", "grey"))
    )
    task = encoder.encode_task(Task("t", rows), {"t": 0})
    train_stage(net, task, Strategy(), Recipe(lr=0.02, steps=80), seed=0, log_event=lambda e: None)
    assert generate_answers(
        net, [encoder.encode_prompt(e, 0, 9).require() for e in rows], 20, 4
    ) == [
        "red",
        "blue gold",
        "grey",
    ]


def test_padding_may_be_the_end_of_sequence():
    tokenizer = train_byte_bpe(stream_text(), pad=None)
    net = assemble(make_network("gpt2", len(tokenizer)), tokenizer, device="cpu")
    assert net.layout.pad_token_id == tokenizer.eos_token_id
    assert net.net.get_input_embeddings().num_embeddings == len(tokenizer)


def test_an_encoder_decoder_without_a_start_token_starts_with_padding():
    net = make_network("t5", 400)
    net.config.decoder_start_token_id = None
    assert (
        assemble(net, train_byte_bpe(stream_text()), device="cpu").layout.decoder_start_token_id
        == 1
    )


def test_the_models_context_bounds_an_example(folders):
    assert [
        load_pretrained(name=str(folders[kind]), device="cpu").context_length for kind in KINDS
    ] == [
        128,
        128,
        128,
        128,
        None,
    ]


# What cannot be loaded


def test_a_folder_that_is_not_there_is_told():
    with pytest.raises(MissingError, match=r"model.name=./nowhere: no such folder"):
        load_pretrained(name="./nowhere")


def test_a_folder_without_a_model_is_told(tmp_path):
    with pytest.raises(
        MissingError, match=r"could not be loaded: .* Give a local folder with config.json"
    ):
        load_pretrained(name=str(tmp_path))


def test_damaged_weights_are_told(tmp_path):
    write_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(MissingError, match="could not be loaded"):
        load_pretrained(name=str(tmp_path))


def test_a_model_folder_without_a_tokenizer_is_told(tmp_path):
    make_network("llama", 300).save_pretrained(tmp_path)
    with pytest.raises(MissingError, match=r"could not be loaded: .* tokenizer"):
        load_pretrained(name=str(tmp_path))


def test_an_unknown_adapter_names_the_nearest(folders):
    with pytest.raises(
        ConfigError, match=r"unknown model.adapter 'lra'; did you mean 'lora'\? Known: lora, none"
    ):
        make_text_model(adapter="lra", adapters=LORA)


@pytest.mark.parametrize("kind", ["prefix_tuning", "p_tuning"])
def test_adapters_that_add_more_than_embeddings_of_virtual_tokens_are_refused(kind):
    with pytest.raises(
        ConfigError, match=f"model.adapter={kind} cannot be used: .*more than embeddings of virtual"
    ):
        make_text_model(adapter=kind, adapters={kind: {"num_virtual_tokens": 4}})


@pytest.mark.parametrize("settings", [{"rank": 8}, {"target_modules": ["nothing"]}, {"r": 0}])
def test_wrong_settings_of_an_adapter_are_told(settings):
    with pytest.raises(
        ConfigError, match=r"model.adapter=lora cannot be used: .*model.adapters.lora"
    ):
        make_text_model(adapter="lora", adapters={"lora": settings})


def test_an_unknown_dtype_names_the_known(folders):
    with pytest.raises(ConfigError, match=r"unknown model.dtype 'fp23'; did you mean 'fp32'"):
        load_pretrained(name=str(folders["llama"]), dtype="fp23")


# Built from scratch

SCRATCH = (
    "model=scratch",
    "model.hidden_size=32",
    "model.layers=1",
    "model.heads=2",
    "model.context_length=96",
    "model.vocab_size=320",
    "model.pretrain.tokens=600",
)


def test_a_model_from_scratch_is_built_once_and_is_the_same_whatever_the_order(
    run_keys, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = [k for k in run_keys if not k.startswith("model")]
    first, _ = run_in_process(tmp_path / "a", made, *SCRATCH, "stream.order=given")
    models = tmp_path / "cache/continual/models"
    (built,) = models.glob("*/")
    stamp = (built / "model.safetensors").stat().st_mtime_ns
    second, _ = run_in_process(tmp_path / "b", made, *SCRATCH, "stream.order=back")
    assert [*models.glob("*/")] == [built]
    assert (built / "model.safetensors").stat().st_mtime_ns == stamp
    assert first.scores[0] == second.scores[0][::-1]
    run_in_process(tmp_path / "c", made, *SCRATCH, "model.weights_seed=1")
    assert len([*models.glob("*/")]) == 2


def test_a_model_from_scratch_reads_rows_by_the_same_tokens_before_it_is_built_and_after(
    run_keys, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    told = [k for k in run_keys if not k.startswith("model")] + [*SCRATCH, "train.epochs=1"]
    run_in_process(tmp_path / "a", told)
    key, digest = kept(tmp_path / "a")
    (tmp_path / "a/finished").unlink()
    run_in_process(tmp_path / "a", told)
    assert "tokenized again" not in capsys.readouterr().err
    assert kept(tmp_path / "a") == (key, digest)
    shutil.rmtree(tmp_path / "cache")
    run_in_process(tmp_path / "b", told)
    assert kept(tmp_path / "b") == (key, digest), "a tokenizer that is trained again is the same"


def kept(out):
    """The hashes of the tokenizer and rows that a run's ids were made of, and of the ids."""
    with safe_open(out / "tokens.safetensors", framework="pt") as file:
        told = file.metadata()
    return told["key"], told["digest"]


def test_a_shape_that_cannot_be_is_refused(run_keys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = [k for k in run_keys if not k.startswith("model")]
    with pytest.raises(
        ConfigError, match=r"model.hidden_size=32 is not a multiple of model.heads=3"
    ):
        run_in_process(tmp_path / "a", made, *SCRATCH, "model.heads=3")


def test_weights_are_the_trainable_parameters():
    net = make_text_model(adapter="lora", adapters=LORA)
    assert all("lora_" in n for n in weights(net))

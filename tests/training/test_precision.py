"""train.precision=auto: what is measured decides, and the run keeps to it."""

import json
import shutil

import pytest
import torch

from continual.errors import ConfigError, DataError
from continual.results.matrix import Matrix
from continual.training import precision
from tests.support import toy
from tests.support.models import run_in_process

AUTO = ("train.precision=auto", "train.steps=2", "stream.tasks=[first,last]")


@pytest.fixture
def clock(monkeypatch):
    """Sets how many times as fast as fp32 bf16 is; the passes are made all the same."""
    seconds = precision.time_training_pass

    def at(ratio):
        def measured(model, rows, *, bf16):
            seconds(model, rows, bf16=bf16)
            return 1 / ratio if bf16 else 1.0

        monkeypatch.setattr(precision, "time_training_pass", measured)

    return at


@pytest.mark.parametrize(
    ("ratio", "chosen"), [(0.5, "fp32"), (1.09, "fp32"), (1.11, "bf16"), (3.0, "bf16")]
)
def test_bf16_is_chosen_where_it_is_clearly_faster(clock, tmp_path, ratio, chosen):
    clock(ratio)
    said, model = [], toy.make_model()
    precision.choose_precision(
        "auto", tmp_path / "precision.json", model, lambda n: toy.make_examples(0, n), said.append
    )
    assert model.bf16 == (chosen == "bf16")
    assert said == [
        f"train.precision=auto: {chosen}; bf16 is {ratio:.2f} times as fast as fp32 here"
    ]
    assert json.loads((tmp_path / "precision.json").read_text()) == {
        "precision": chosen,
        "bf16_speed": ratio,
    }


def test_measuring_leaves_the_model_as_it_was():
    model = toy.make_model()
    before = {n: w.clone() for n, w in model.net.state_dict().items()}
    assert precision.measure_bf16_speedup(model, toy.make_examples(0)) > 0
    assert all(torch.equal(w, before[n]) for n, w in model.net.state_dict().items())
    assert all(p.grad is None for p in model.net.parameters())
    assert not model.bf16
    assert not model.net.training


@pytest.mark.parametrize(("ratio", "name"), [(0.5, "fp32"), (2.0, "bf16")])
def test_a_run_is_the_one_that_asked_for_what_was_chosen(clock, run_keys, tmp_path, ratio, name):
    clock(ratio)
    chosen, said = run_in_process(tmp_path / "auto", run_keys, *AUTO)
    assert (
        said.count(f"train.precision=auto: {name}; bf16 is {ratio:.2f} times as fast as fp32 here")
        == 1
    )
    asked, _ = run_in_process(tmp_path / "asked", run_keys, *AUTO, f"train.precision={name}")
    assert chosen.scores == asked.scores
    one, other = (
        (tmp_path / out / "checkpoints/stage-02/weights.safetensors").read_bytes()
        for out in ("auto", "asked")
    )
    assert one == other


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_a_resumed_run_keeps_the_choice_whatever_would_be_measured_now(
    clock, run_keys, tmp_path, ratio
):
    clock(ratio)
    out = tmp_path / "run"
    run_in_process(out, run_keys, *AUTO)
    weights = (out / "checkpoints/stage-02/weights.safetensors").read_bytes()
    (out / "finished").unlink()
    shutil.rmtree(out / "checkpoints/stage-02")
    clock(1 / ratio)
    _, said = run_in_process(out, run_keys, *AUTO)
    assert f"train.precision=auto: {'bf16' if ratio > 1 else 'fp32'}, as this run began" in said
    assert (out / "checkpoints/stage-02/weights.safetensors").read_bytes() == weights
    assert Matrix.load(out / "matrix.json").is_finished


@pytest.mark.parametrize("content", ["", "{", "[]", '{"precision": "fp8"}', "{}", "\xff"])
def test_a_choice_that_cannot_be_read_is_refused_with_its_mend(tmp_path, content):
    path = tmp_path / "precision.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(
        DataError,
        match=r'does not say in which precision the run began; write {"precision": "fp32"}',
    ):
        precision.choose_precision("auto", path, toy.make_model(), toy.make_examples, print)


def test_what_is_asked_for_by_name_is_not_measured(tmp_path, run_keys):
    _, said = run_in_process(tmp_path, run_keys, "train.steps=1", "stream.tasks=[first]")
    assert "train.precision" not in said
    assert not (tmp_path / "precision.json").exists()


def test_another_name_is_refused_with_the_three(run_keys, tmp_path):
    with pytest.raises(
        ConfigError, match=r"unknown train.precision 'half'.* Known: auto, bf16, fp32"
    ):
        run_in_process(tmp_path, run_keys, "train.precision=half")


def test_few_rows_are_enough_where_each_takes_long(monkeypatch):
    taken = []
    monkeypatch.setattr(
        precision, "time_training_pass", lambda model, rows, bf16: taken.append(len(rows)) or 10.0
    )
    assert precision.measure_bf16_speedup(toy.make_model(), toy.make_examples(0)) == 1.0
    assert set(taken) == {1}

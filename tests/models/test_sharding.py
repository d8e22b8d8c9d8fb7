"""A model in shards over two processes learns what a whole one learns in one."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from continual.runs import build
from continual.strategy.compose import compose
from continual.strategy.interface import Strategy
from tests.support import sharded_runs, subprocesses, toy
from tests.support.all_strategies import train_two_stages
from tests.support.models import load_json_lines, run_in_process

KEYS = (
    "train.shard=true",
    "strategy=replay",
    "strategy.replay.capacity=6",
    "checkpoint.every_steps=2",
    "score.max_examples=3",
    "train.patience=2",
    "score.every_steps=3",
)


@pytest.fixture(scope="module")
def whole(run_keys, tmp_path_factory):
    """What one process, which holds the whole model, comes to: a stage and a run; both can be gone
    on with.
    """
    out = tmp_path_factory.mktemp("whole")
    told = sharded_runs.train_one_stage(save_to=out / "stage")
    said = run_in_process(out / "run", run_keys, *KEYS)[1]
    return out, told, said


@pytest.fixture(scope="module")
def sharded(whole, run_keys, tmp_path_factory):
    """What two processes came to, in the folder they left: the run is one process's from its second
    stage on.
    """
    out = tmp_path_factory.mktemp("sharded")
    shutil.copytree(whole[0] / "stage", out / "whole")
    cut(shutil.copytree(whole[0] / "run", out / "run"), 2)
    told = [
        process.wait()
        for process in subprocesses.start_two_ranks(
            out, sharded_runs.run_all_cases, out, [*run_keys, *KEYS]
        )
    ]
    assert [code for code, _ in told] == [0, 0], "\n".join(said for _, said in told)
    return out


def cut(out: Path, stage: int) -> Path:
    """A run as it was before that stage."""
    (out / "finished").unlink()
    for n in range(stage, 4):
        shutil.rmtree(out / f"checkpoints/stage-{n:02d}")
        shutil.rmtree(out / f"predictions/stage-{n:02d}")
    return out


@pytest.mark.parametrize(
    "i",
    range(len(sharded_runs.SHARDED_CASES)),
    ids=[" ".join(entry) + " lora" * lora for entry, lora in sharded_runs.SHARDED_CASES],
)
def test_in_shards_every_strategy_that_can_learns_what_it_learns_whole(i, sharded):
    entry, lora = sharded_runs.SHARDED_CASES[i]
    told = []
    for rank in (0, 1):
        with safe_open(sharded / f"{i}-{rank}.safetensors", framework="pt") as file:
            told.append(
                (
                    json.loads(file.metadata()["losses"]),
                    {n: file.get_tensor(n) for n in file.keys()},  # noqa: SIM118
                )
            )
    (losses, tensors), (others, copies) = told
    assert losses == others
    assert toy.bitwise_equal(tensors, copies)
    expected, alone = train_two_stages(entry, sharded_runs.add_lora if lora else lambda made: None)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert toy.all_close(tensors, alone, rtol=1e-4, atol=1e-5)


def test_a_stage_kept_in_shards_goes_on_whole_and_the_other_way_round(sharded, whole):
    assert toy.all_close(load_file(sharded / "weights.safetensors"), whole[1], rtol=1e-6, atol=1e-8)
    assert toy.all_close(load_file(sharded / "again.safetensors"), whole[1], rtol=1e-6, atol=1e-8)
    assert toy.all_close(
        sharded_runs.train_one_stage(resume_from=sharded / "sharded"),
        whole[1],
        rtol=1e-6,
        atol=1e-8,
    )


def told(out):
    """All losses, all answers, and what was scored within stages, of a run."""
    losses = {
        (e["stage"], e["step"]): e["loss"]
        for e in load_json_lines(out / "events.jsonl")
        if e["event"] == "step"
    }
    during = {
        (e["stage"], e["step"]): e["scores"]
        for e in load_json_lines(out / "events.jsonl")
        if e["event"] == "during"
    }
    answers = {
        str(p.relative_to(out)): p.read_text()
        for p in sorted((out / "predictions").rglob("*.jsonl"))
    }
    return losses, answers, during


def test_a_run_goes_on_in_shards_and_again_whole_to_the_same_end(
    sharded, whole, run_keys, tmp_path
):
    again = cut(shutil.copytree(sharded / "run", tmp_path / "again"), 3)
    assert f"resuming {again} from stage-02" in run_in_process(again, run_keys, *KEYS)[1]
    losses, *rest = told(whole[0] / "run")
    for out in (sharded / "run", again):
        assert told(out)[0] == pytest.approx(losses, rel=1e-3)
        assert [*told(out)[1:]] == rest


def test_two_processes_adapt_as_one_does(sharded, run_keys, tmp_path):
    sharded_runs.run_verb(
        "adapt", tmp_path / "one", *sharded_runs.to_adapt_keys([*run_keys, *KEYS], "false")
    )
    points = json.loads((tmp_path / "one" / "curve.json").read_text())["points"]
    name = "model/adapter_model.safetensors"
    for shard in ("true", "false"):
        out = sharded / f"adapt-{shard}"
        assert json.loads((out / "curve.json").read_text())["points"] == points
        assert toy.all_close(
            load_file(out / name), load_file(tmp_path / "one" / name), rtol=1e-3, atol=1e-5
        )


# What cannot


def test_a_strategy_that_does_not_say_that_it_can_be_in_shards_cannot_nor_what_has_it_as_a_part():
    class Silent(Strategy):
        pass

    class Says(Strategy):
        shardable = True

    assert [kind().is_shardable() for kind in (Strategy, Silent, Says)] == [True, False, True]
    assert compose(Says(), toy.strategy_from_config("replay")).is_shardable()
    assert not compose(Says(), Silent()).is_shardable()
    assert not toy.strategy_from_config("replay,ewc").is_shardable()


def test_a_strategy_that_works_on_whole_weights_is_refused_before_anything_is_built(
    cli_error, run_keys, tmp_path
):
    can = "cumulative, der, hard_replay, joint, lamol, lwf, multitask, naive, replay"
    for words, name in (
        (("strategy=[replay,ewc]",), "replay+ewc"),
        (("strategy=lwf", "strategy.lwf.teacher=base"), "lwf"),
    ):
        assert cli_error(
            "run", *run_keys, "train.shard=true", *words, f"out={tmp_path / name}"
        ) == (
            f"strategy={name} works on whole weights as it is configured, and with "
            f"train.shard=true no process has them; set train.shard=false, or choose of {can}"
        )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("train.shard=maybe",), "train.shard=maybe: expected true or false"),
        (
            ("train.shard=true", "train.precision=auto"),
            "set train.precision=fp32 or bf16, or train.shard=false",
        ),
        (("train.shard=true", "model.quantize=4bit"), "cannot be had together; choose one of them"),
    ],
)
def test_what_does_not_go_with_shards_is_refused(words, expected, cli_error, run_keys, tmp_path):
    assert expected in cli_error("run", *run_keys, *words, f"out={tmp_path}")


def test_one_process_alone_says_that_it_holds_the_whole_model(run_keys, capsys):
    from continual.cli import main

    config = main.compose_config("run", [*run_keys, "train.shard=true", "out=x"])
    assert not build.model(config, build.stream(config)).sharded
    assert "one process alone holds the whole model" in capsys.readouterr().err

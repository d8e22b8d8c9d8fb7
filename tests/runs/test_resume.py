"""A run that is stopped at any moment, given again, ends as if it had not been."""

import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from continual.errors import ConfigError, ContinualError, DataError, MissingError
from continual.results.matrix import Matrix
from continual.runs import run as engine
from continual.runs.lock import run_folder_lock
from continual.tracking.events import EventLog
from continual.training import checkpoint
from tests.support import subprocesses
from tests.support.models import TASKS, load_json_lines, run_in_process

BOTH = (
    "strategy=[replay,ewc]",
    "strategy.ewc.strength=10",
    "strategy.replay.capacity=6",
    "strategy.ewc.num_examples=6",
    "checkpoint.every_steps=1",
)


@pytest.fixture(scope="module")
def done(run_keys, tmp_path_factory):
    """A finished run under replay and EWC, with a checkpoint after each step of its last stage."""
    out = tmp_path_factory.mktemp("runs") / "done"
    run_in_process(out, run_keys, *BOTH)
    return out


@pytest.fixture
def copy(done, tmp_path):
    """The finished run's folder, to be spoiled."""
    return shutil.copytree(done, tmp_path / "copy")


def rewind(out, stage):
    """The folder as it was after the checkpoint of this stage, before it was scored."""
    (out / "finished").unlink()
    for path in [*(out / "checkpoints").iterdir(), *(out / "predictions").iterdir()]:
        if int(path.name[6:8]) > stage or (
            path.parent.name == "predictions" and int(path.name[6:8]) == stage
        ):
            shutil.rmtree(path)


def assert_same(a, b):
    """Both runs ended alike, bit for bit."""
    assert Matrix.load(a / "matrix.json").scores == Matrix.load(b / "matrix.json").scores
    predictions = sorted(p.relative_to(a) for p in (a / "predictions").rglob("*.jsonl"))
    last = max((a / "checkpoints").glob("stage-??")).relative_to(a)
    assert len(predictions) == (int(last.name[6:]) + 1) * 3
    assert [(a / p).read_bytes() for p in predictions] == [
        (b / p).read_bytes() for p in predictions
    ]
    assert (a / last / "memory.json").read_text() == (b / last / "memory.json").read_text()
    for name in ("weights", "memory"):
        one, other = (load_file(out / last / f"{name}.safetensors") for out in (a, b))
        assert one.keys() == other.keys()
        assert all(torch.equal(w, other[n]) for n, w in one.items())


def spoil(path):
    """Flip a bit in the middle."""
    told = bytearray(path.read_bytes())
    told[len(told) // 2] ^= 1
    path.write_bytes(told)


# After a stage


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_continues_after_its_last_trained_stage_to_the_same_end(done, copy, run_keys, stage):
    rewind(copy, stage)
    _, said = run_in_process(copy, run_keys, *BOTH)
    assert f"resuming {copy} from stage-0{stage}" in said
    assert_same(done, copy)


def test_each_file_of_a_checkpoint_is_looked_through_once(copy, run_keys, monkeypatch):
    rewind(copy, 2)
    told, digest = [], hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, how: told.append(file.name) or digest(file, how)
    )
    run_in_process(copy, run_keys, *BOTH)
    assert told.count(str(copy / "checkpoints/stage-02/weights.safetensors")) == 1


def test_a_task_that_has_its_answers_is_not_asked_again(done, copy, run_keys):
    rewind(copy, 2)
    kept = copy / "predictions/stage-02" / f"{TASKS[0]}.jsonl"
    kept.parent.mkdir()
    shutil.copy(done / kept.relative_to(copy), kept)
    before = kept.stat().st_mtime_ns
    run_in_process(copy, run_keys, *BOTH)
    assert kept.stat().st_mtime_ns == before
    assert_same(done, copy)


def test_answers_that_are_not_whole_are_asked_again(done, copy, run_keys):
    rewind(copy, 3)
    shutil.copytree(done / "predictions/stage-03", copy / "predictions/stage-03")
    half = copy / "predictions/stage-03" / f"{TASKS[1]}.jsonl"
    half.write_bytes(half.read_bytes()[:-9])
    run_in_process(copy, run_keys, *BOTH)
    assert_same(done, copy)


def test_a_half_written_checkpoint_and_a_half_written_event_are_left_behind(done, copy, run_keys):
    rewind(copy, 1)
    (copy / "checkpoints/stage-02.tmp").mkdir()
    (copy / "checkpoints/stage-02.tmp/weights.safetensors").write_bytes(b"half")
    with (copy / "events.jsonl").open("a") as file:
        file.write('{"time": 1, "eve')
    before = len((copy / "events.jsonl").read_text().splitlines())
    run_in_process(copy, run_keys, *BOTH)
    assert_same(done, copy)
    after = (copy / "events.jsonl").read_text().splitlines()
    assert [line for line in after if not line.endswith("}")] == ['{"time": 1, "eve']
    assert json.loads(after[before])["event"] == "start"


# Within a stage

KINDS = {
    "naive": ["strategy=naive"],
    "replay and ewc": list(BOTH[:-1]),
    "maml": ["strategy=maml"],
    "reptile": ["strategy=reptile"],
    "meta-sgd": ["strategy=meta_sgd"],
    "la-maml": ["strategy=la_maml", "train.optimizer=sgd", "train.lr=3"],
    "online ewc": ["strategy=online_ewc", "strategy.online_ewc.num_examples=6"],
    "l2": ["strategy=l2"],
    "learned weights": ["strategy=multitask", "strategy.multitask.weighting=uncertainty"],
    "a-gem": ["strategy=agem", "strategy.agem.sample_size=3"],
    "gem": ["strategy=gem", "strategy.gem.sample_size=2"],
    "ogd": ["strategy=ogd"],
    "mas": ["strategy=mas"],
    "si": ["strategy=si"],
    "progressive prompts": [
        "strategy=progressive_prompts",
        "model.adapter=prompt_tuning",
        "train.lr=0.1",
    ],
    "osf": ["strategy=osf"],
    "rwalk": ["strategy=rwalk", "strategy.rwalk.every_steps=3"],
    "der": ["strategy=der", "strategy.der.capacity=15"],
    "lwf": ["strategy=lwf"],
    "lwf to the base": ["strategy=lwf", "strategy.lwf.teacher=base", "strategy.lwf.top_logits=9"],
    "hard replay": [
        "strategy=hard_replay",
        "strategy.hard_replay.criterion=forgetting",
        "strategy.hard_replay.capacity=9",
    ],
    "inscl": ["strategy=inscl"],
    "lamol": ["strategy=lamol", "strategy.lamol.share=0.5", "train.epochs=20"],
    "average": ["strategy=average", "strategy.average.init_from=own"],
    "ema": ["strategy=ema", "strategy.ema.decay=0.5"],
    "fisher merge": ["strategy=fisher_merge"],
    "task arithmetic": ["strategy=task_arithmetic"],
    "ties": ["strategy=ties"],
    "migu": ["strategy=migu"],
    "sparse": [
        "strategy=sparse",
        "strategy.sparse.protected_fraction=0.1",
        "strategy.sparse.fraction=0.1",
        "train.weight_decay=1",
    ],
    "per task": ["strategy=per_task"],
    "router": ["strategy=router"],
    "o-lora": ["strategy=olora", "strategy.olora.rank=2", "model.adapter=lora"],
    "gain-lora": ["strategy=gain_lora", "strategy.gain_lora.rank=2", "model.adapter=lora"],
    "slao": ["strategy=slao", "model.adapter=lora"],
    "sdft": ["strategy=sdft"],
    "asft": ["strategy=asft"],
    "sgd": ["strategy=naive", "train.optimizer=sgd", "train.lr=0.3"],
    "projected conflicts": ["strategy=multitask", "strategy.multitask.conflicts=project"],
    "projected conflicts of one stage": [
        "strategy=[joint,multitask]",
        "strategy.multitask.conflicts=project",
    ],
    "a plugin": [
        "strategy=avalanche",
        "strategy.avalanche.plugin=RWalkPlugin",
        "+strategy.avalanche.args.delta_t=2",
    ],
    "early stopping": [
        "strategy=replay",
        "train.patience=1",
        "train.epochs=40",
        "train.lr=0.05",
        "checkpoint.every_steps=1",
    ],
    "early stopping of a path": [
        "strategy=[si,der]",
        "strategy.der.capacity=9",
        "train.patience=1",
        "train.epochs=40",
        "train.lr=0.05",
    ],
    "dropped tokens": ["strategy=replay", "loss.prompt_mask_prob=0.3"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_strategy_goes_on_within_a_stage_to_the_same_end(
    kind, run_keys, tmp_path, monkeypatch
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    told = [*run_keys, "checkpoint.every_steps=2", *KINDS[kind]]
    save, stage = checkpoint.save, "stage-01" if "one stage" in kind else "stage-02"

    def leave_a_copy(folder, *more, **named):
        if folder.name == stage:
            shutil.copytree(whole, cut)
        return save(folder, *more, **named)

    monkeypatch.setattr(checkpoint, "save", leave_a_copy)
    run_in_process(whole, told)
    monkeypatch.undo()
    torch.manual_seed(99)
    _, said = run_in_process(cut, told, "score.every_steps=1")  # which may only look
    assert f"resuming {cut} from {stage}-step-" in said
    assert_same(whole, cut)


def test_only_the_newest_checkpoints_within_the_stage_are_kept(done, run_keys, tmp_path):
    assert sorted(p.name for p in (done / "checkpoints").iterdir()) == [
        "stage-01",
        "stage-02",
        "stage-03",
    ]
    run_in_process(tmp_path, run_keys, "checkpoint.keep=1")
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["stage-03"]


def test_how_often_checkpoints_are_written_may_change_when_a_run_goes_on(done, copy, run_keys):
    rewind(copy, 2)
    run_in_process(copy, run_keys, *BOTH[:-1], "checkpoint.every_seconds=0", "checkpoint.keep=2")
    assert_same(done, copy)


# Killed, as a process of its own


def leaves(number: int, when: dict, *words: str) -> None:
    """The command line, which sends itself this signal as soon as it has told an event like this
    one.
    """
    tell = EventLog.__call__

    def tell_and_leave(self, event):
        tell(self, event)
        told = {"stage": self.stage, **event}
        if when.items() <= told.items():
            os.kill(os.getpid(), number)

    EventLog.__call__ = tell_and_leave
    subprocesses.run_command(*words)


@pytest.mark.parametrize(
    "when",
    [
        {"event": "step", "stage": 2, "step": 2},
        {"event": "stage", "stage": 1},
        {"event": "checkpoint", "stage": 3},
    ],
    ids=["within a stage", "at a stage's end", "at a checkpoint"],
)
def test_a_killed_process_given_again_ends_bit_for_bit_as_if_it_had_not_been(
    when, run_keys, done, tmp_path
):
    out = tmp_path / "killed"
    killed = subprocesses.Subprocess(
        tmp_path / "said", leaves, signal.SIGKILL, when, "run", *run_keys, *BOTH, f"out={out}"
    )
    assert killed.wait()[0] == -signal.SIGKILL
    assert not (out / "finished").exists()
    run_in_process(out, run_keys, *BOTH)
    assert_same(done, out)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_keeps_it_and_tells_how_to_go_on(
    number, code, run_keys, done, tmp_path
):
    out, when = tmp_path / "stopped", {"event": "step", "stage": 2, "step": 2}
    stopped = subprocesses.Subprocess(
        tmp_path / "said", leaves, number, when, "run", *run_keys, *BOTH[:-1], f"out={out}"
    )
    ended, said = stopped.wait()
    assert ended == code, said
    assert "nothing is lost. Go on with:\n  continual run " in said
    assert said.rstrip().endswith(f"out={out}")
    assert "Traceback" not in said
    *_, last, end = load_json_lines(out / "events.jsonl")
    assert (last["event"], last["stage"], end["event"]) == ("checkpoint", 2, "stopped")
    run_in_process(out, run_keys, *BOTH)
    assert_same(done, out)


# Faults


@pytest.mark.parametrize(
    "file",
    ["weights.safetensors", "memory.safetensors", "memory.json", "matrix.json", "manifest.json"],
)
def test_a_damaged_checkpoint_is_passed_over_and_said_to_be(done, copy, run_keys, file):
    rewind(copy, 2)
    spoil(copy / "checkpoints/stage-02" / file)
    _, said = run_in_process(copy, run_keys, *BOTH)
    assert "a damaged checkpoint is passed over, and an older one used: " in said
    assert f"resuming {copy} from stage-01" in said
    assert_same(done, copy)


def test_a_checkpoint_with_a_file_missing_is_passed_over(done, copy, run_keys):
    rewind(copy, 1)
    (copy / "checkpoints/stage-01/memory.json").unlink()
    _, said = run_in_process(copy, run_keys, *BOTH)
    assert "stage-01: memory.json is missing" in said
    assert_same(done, copy)


def test_a_pipe_in_a_checkpoint_is_not_waited_for(done, copy, run_keys):
    rewind(copy, 2)
    (copy / "checkpoints/stage-02/manifest.json").unlink()
    os.mkfifo(copy / "checkpoints/stage-02/manifest.json")
    _, said = run_in_process(copy, run_keys, *BOTH)
    assert f"resuming {copy} from stage-01" in said
    assert_same(done, copy)


def test_of_the_checkpoints_within_a_stage_the_newest_whole_one_is_used(
    run_keys, tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoint, "prune", lambda *_: None)
    run_in_process(tmp_path, run_keys, *BOTH)
    within = sorted((tmp_path / "checkpoints").glob("stage-02-step-*"))
    spoil(within[-1] / "progress.json")
    for path in (tmp_path / "checkpoints").glob("stage-0[23]"):
        shutil.rmtree(path)
    found = checkpoint.find_resume_point(tmp_path)
    assert (found.stage_folder.name, found.step_folder) == ("stage-01", within[-2])
    assert found.damage == [f"{within[-1]}: progress.json is not as it was written"]


class Left(Exception):
    """A run was left."""


def leave(out, keys, monkeypatch, stage, step):
    """Begin a run, or go on, and leave it right behind this step, as if it had been killed."""

    class Leaves(engine.StageCallback):
        def __call__(self, now, progress):
            seconds = super().__call__(now, progress)
            if (self.stage_number, now) == (stage, step):
                raise Left
            return seconds

    with monkeypatch.context() as patch:
        patch.setattr(engine, "StageCallback", Leaves)
        with pytest.raises(Left):
            run_in_process(out, keys)


def test_what_is_kept_behind_a_damaged_checkpoint_is_there_for_the_next_time(
    done, copy, run_keys, monkeypatch
):
    rewind(copy, 2)
    spoil(copy / "checkpoints/stage-02/weights.safetensors")
    leave(copy, (*run_keys, *BOTH, "checkpoint.keep=1"), monkeypatch, 2, 3)
    names = ["stage-01", "stage-02-step-00000002", "stage-02-step-00000003"]
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == names
    _, said = run_in_process(copy, run_keys, *BOTH, "checkpoint.keep=1")
    assert f"resuming {copy} from {names[-1]}" in said
    assert_same(done, copy)


def test_what_is_kept_before_damaged_steps_is_there_for_the_next_time(
    run_keys, tmp_path, monkeypatch
):
    leave(tmp_path, (*run_keys, *BOTH), monkeypatch, 2, 3)
    for path in (tmp_path / "checkpoints").glob("stage-02-step-*"):
        spoil(path / "progress.json")
    leave(tmp_path, (*run_keys, *BOTH), monkeypatch, 2, 1)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "stage-01",
        "stage-02-step-00000001",
    ]


@pytest.mark.parametrize(
    ("was", "now", "told"),
    [
        (
            '{"name": "first", "metric": "exact_match"}, ',
            "",
            "tasks: first, last, loud there, last, loud now",
        ),
        (
            '"name": "first"',
            '"dir": "first", "name": "1st"',
            "stages: base, first there, base, 1st now",
        ),
        (
            '"loud", "metric": "exact_match"',
            '"loud", "metric": "token_f1"',
            "metrics: exact_match, exact_match, exact_match there, exact_match, exact_match, "
            "token_f1 now",
        ),
    ],
)
def test_a_run_does_not_go_on_with_other_tasks_than_it_has_scores_of(
    run_keys, stream_folder, tmp_path, monkeypatch, was, now, told
):
    root = shutil.copytree(stream_folder, tmp_path / "stream")
    run_keys = (*run_keys, f"stream.path={root}", *BOTH)
    leave(tmp_path / "out", run_keys, monkeypatch, 2, 1)
    index = root / "stream.json"
    text = index.read_text()
    index.write_text(json.dumps({"tasks": json.loads(text.replace(was, now))["tasks"]}))
    with pytest.raises(
        DataError, match=f"begun with other data; restore them to go on, or .*\n(.*\n)*  {told}"
    ):
        run_in_process(tmp_path / "out", run_keys)
    index.write_text(text)
    assert run_in_process(tmp_path / "out", run_keys)[0].is_finished


def test_a_run_does_not_go_on_with_other_numbers_of_test_rows(
    run_keys, stream_folder, tmp_path, monkeypatch
):
    root = shutil.copytree(stream_folder, tmp_path / "stream")
    run_keys = (*run_keys, f"stream.path={root}", *BOTH)
    leave(tmp_path / "out", run_keys, monkeypatch, 1, 1)
    rows = root / "loud/test.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(True)[1:]))
    with pytest.raises(DataError, match="test examples: 4, 4, 4 there, 4, 4, 3 now"):
        run_in_process(tmp_path / "out", run_keys)


@pytest.mark.parametrize(
    "lost",
    [["config.yaml"], ["config.yaml", "finished"], ["events.jsonl", "matrix.json", "finished"]],
    ids=["finished", "unfinished", "checkpoints alone"],
)
def test_a_folder_does_not_take_another_configuration_because_some_of_its_files_are_gone(
    copy, run_keys, lost
):
    for name in lost:
        (copy / name).unlink()
    with pytest.raises(
        ConfigError, match=r"without its config.yaml, which tells|a run with another configuration"
    ):
        run_in_process(copy, run_keys, *BOTH, "train.lr=0.001")


def test_a_checkpoint_named_for_adapting_must_be_whole(done, copy):
    spoil(copy / "checkpoints/stage-01/weights.safetensors")
    with pytest.raises(
        DataError,
        match=r"stage-01 is not a complete checkpoint: weights.safetensors is not as it was",
    ):
        checkpoint.load(copy / "checkpoints/stage-01", None)
    with pytest.raises(MissingError, match="there is no such checkpoint"):
        checkpoint.load(copy / "checkpoints/stage-77", None)


def test_a_manifest_with_right_sums_for_wrong_content_is_one_clear_error(copy, run_keys):
    rewind(copy, 1)
    folder = copy / "checkpoints/stage-01"
    (folder / "memory.json").write_text('{"dict": [["stages", {"tensor": "none"}]]}')
    told = json.loads((folder / "manifest.json").read_text())
    told["memory.json"] = {
        "bytes": (folder / "memory.json").stat().st_size,
        "sha256": hashlib.sha256((folder / "memory.json").read_bytes()).hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(told))
    with pytest.raises(
        DataError, match=r"memory.json does not fit this strategy \(KeyError\('none'\)\)"
    ):
        run_in_process(copy, run_keys, *BOTH)


def test_a_full_disk_is_seen_before_anything_is_written(run_keys, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
    with pytest.raises(
        ContinualError, match=r"written: it takes 0.\d MB, and the disk has 0.0 MB left"
    ):
        run_in_process(tmp_path, run_keys)
    assert not list((tmp_path / "checkpoints").iterdir())


def limited(most: int, *words: str) -> None:
    """The command line where no file may be larger than this."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, -1))
    subprocesses.run_command(*words)


@pytest.mark.skipif(sys.platform != "linux", reason="file size limits as on Linux")
def test_a_quota_that_ends_in_the_middle_of_a_file_is_one_clear_error_and_nothing_finished_is_lost(
    run_keys, tmp_path
):
    out = tmp_path / "run"
    code, said = subprocesses.Subprocess(
        tmp_path / "said", limited, 60_000, "run", *run_keys, f"out={out}"
    ).wait()
    assert (code, "Traceback" in said) == (2, False)
    assert "error: " in said
    assert len(list((out / "predictions/stage-00").iterdir())) == len(TASKS)
    matrix, _ = run_in_process(out, run_keys)
    assert matrix.is_finished


@pytest.mark.skipif(sys.platform != "linux", reason="a folder that nobody may write in")
def test_a_folder_that_cannot_be_written_is_one_clear_error(cli_error, run_keys):
    assert "check that the folder is writable" in cli_error("run", *run_keys, "out=/proc/continual")


def test_a_second_process_in_the_same_folder_is_refused(run_keys, tmp_path):
    with (
        run_folder_lock(tmp_path),
        pytest.raises(ConfigError, match=r"is in use by process \d+; wait for it, or give another"),
    ):
        run_in_process(tmp_path, run_keys)
    run_in_process(tmp_path, run_keys, "stream.tasks=[first]")


def test_a_clock_that_goes_back_changes_nothing(done, run_keys, tmp_path, monkeypatch):
    ticks = iter(range(2_000_000_000, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(ticks)))
    run_in_process(tmp_path / "back", run_keys, *BOTH)
    assert_same(done, tmp_path / "back")

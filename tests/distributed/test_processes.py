"""Several processes at one run come to what one process comes to."""

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from continual.distributed import processes, work
from continual.packing.batch import Batch, Layout
from continual.packing.layout import common_prefix_length
from tests.support import subprocesses, toy
from tests.support.all_strategies import train_all_strategies, train_two_stages
from tests.support.models import load_json_lines, make_encoded, run_in_process
from tests.support.strategy_table import TABLE

BOTH = (
    "strategy=[replay,ewc]",
    "strategy.ewc.strength=10",
    "strategy.replay.capacity=6",
    "strategy.ewc.num_examples=6",
    "checkpoint.every_steps=1",
    "probe=[shots]",
    "probe.shots.k=[0,1]",
)


@pytest.fixture
def of(monkeypatch):
    """Make this process think that it is one of several, for what needs no other."""

    def pretend(rank, world):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setattr(processes, "_world", world)

    return pretend


# Every strategy


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two processes came to: for each entry of the contract's table, and by rank, losses and
    tensors.
    """
    out = tmp_path_factory.mktemp("together")
    told = [
        process.wait() for process in subprocesses.start_two_ranks(out, train_all_strategies, out)
    ]
    assert [code for code, _ in told] == [0, 0], "\n".join(said for _, said in told)

    def read(i, rank):
        with safe_open(out / f"{i}-{rank}.safetensors", framework="pt") as file:
            return json.loads(file.metadata()["losses"]), {
                n: file.get_tensor(n)
                for n in file.keys()  # noqa: SIM118
            }

    return [[read(i, rank) for rank in (0, 1)] for i in range(len(TABLE))]


@pytest.mark.parametrize("i", range(len(TABLE)), ids=[" ".join(entry) for entry in TABLE])
def test_every_strategy_learns_in_two_processes_what_it_learns_in_one(i, together):
    (losses, tensors), (others, copies) = together[i]
    assert toy.bitwise_equal(tensors, copies), "the two processes came apart"
    assert losses == others
    expected, alone = train_two_stages(TABLE[i])
    assert losses == pytest.approx(expected, rel=1e-5)
    assert toy.all_close(tensors, alone, rtol=1e-4, atol=1e-5)


# A run


def losses(out):
    """The last loss told of each step of each stage: a resumed run may have told of a step twice."""
    return {
        (e["stage"], e["step"]): e["loss"]
        for e in load_json_lines(out / "events.jsonl")
        if e["event"] == "step"
    }


def assert_alike(out, whole):
    assert losses(out) == pytest.approx(losses(whole), rel=1e-3)
    answers = sorted(p.relative_to(whole) for p in (whole / "predictions").rglob("*.jsonl"))
    assert len(answers) == 4 * 3
    assert [(out / p).read_text() for p in answers] == [(whole / p).read_text() for p in answers]
    assert (out / "probes.json").read_text() == (whole / "probes.json").read_text()
    told = [json.loads((o / "matrix.json").read_text()) for o in (out, whole)]
    assert told[0]["scores"] == told[1]["scores"]
    assert [t["cost"]["tokens"] for t in told] == [told[0]["cost"]["tokens"]] * 2


@pytest.fixture(scope="module")
def whole(run_keys, tmp_path_factory):
    """A run of one process."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run_in_process(out, run_keys, *BOTH)
    return out


def launched(*launcher):
    """The exit code and what is said, by a launcher itself."""
    done = subprocess.run(
        [sys.executable, "-m", *launcher],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=subprocesses.TIMEOUT_SECONDS,
    )
    return done.returncode, done.stdout


def torchrun(folder, *words):
    return launched(
        "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "continual", *words
    )


def accelerate(folder, *words):
    """On a CPU too by --multi_gpu: with --cpu it starts one process, and leaves more to MPI."""
    return launched(
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--main_process_port",
        "0",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--module",
        "continual",
        *words,
    )


def forked(folder, *words):
    """The same of processes that are started as the launcher would."""
    told = [
        process.wait()
        for process in subprocesses.start_two_ranks(folder, subprocesses.run_command, *words)
    ]
    return max(code for code, _ in told), "".join(said for _, said in told)


@pytest.mark.parametrize(
    "launch",
    [
        forked,
        pytest.param(torchrun, marks=pytest.mark.slow),
        pytest.param(
            accelerate,
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(
                    not find_spec("accelerate"),
                    reason="needs accelerate, of the extras quantize and bench",
                ),
            ],
        ),
    ],
)
def test_a_run_of_one_process_goes_on_in_two_to_the_same_end(launch, whole, run_keys, tmp_path):
    out = shutil.copytree(whole, tmp_path / "two")
    (out / "finished").unlink()
    for path in (
        "predictions/stage-01",
        "predictions/stage-02",
        "predictions/stage-03",
        "checkpoints/stage-02",
        "checkpoints/stage-03",
    ):
        shutil.rmtree(out / path)
    code, said = launch(tmp_path, "run", *run_keys, *BOTH, f"out={out}")
    assert code == 0, said
    assert said.count("resuming") == 1, "one process speaks"
    assert said.count("Learning accuracy") == 1
    assert_alike(out, whole)


def die(step: int, *words: str) -> None:
    """The command line, whose process of rank 1 is gone in the middle of its so-manieth step, as if
    killed.
    """
    from continual.training import stage

    gradient, calls = stage._backward_or_halve, []

    def step_or_end(*args):
        calls.append(1)
        if len(calls) == step and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return gradient(*args)

    stage._backward_or_halve = step_or_end
    subprocesses.run_command(*words)


def test_a_lost_process_ends_the_others_and_one_alone_goes_on_to_the_same_end(
    whole, run_keys, tmp_path
):
    out = tmp_path / "lost"
    told = [
        process.wait()
        for process in subprocesses.start_two_ranks(
            tmp_path, die, 6, "run", *run_keys, *BOTH, f"out={out}"
        )
    ]
    assert [code for code, _ in told] == [2, -signal.SIGKILL], told
    assert "error: another of the 2 processes is lost" in told[0][1]
    assert "resumes after the last checkpoint, also with another number of processes" in told[0][1]
    _, said = run_in_process(out, run_keys, *BOTH)
    assert f"resuming {out} from stage-02-step-" in said
    assert_alike(out, whole)


def test_several_processes_are_refused_what_is_the_work_of_one(cli_error, monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert cli_error("compare") == (
        "continual compare needs one process, but 2 were started; only continual run and adapt can "
        "use several"
    )


def test_half_an_environment_is_told(cli_error, run_keys, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in processes.NEEDED:
        monkeypatch.delenv(name, raising=False)
    assert "not LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start with torchrun" in cli_error(
        "run", *run_keys, f"out={tmp_path}"
    )


# What is dealt out


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 5))
def test_every_item_is_dealt_once_and_to_each_about_as_much(sizes, world):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_world", world)
        patch.setenv("WORLD_SIZE", str(world))
        dealt = []
        for rank in range(world):
            patch.setenv("RANK", str(rank))
            dealt.append(work.assign_work(sizes))
    assert sorted(i for mine in dealt for i in mine) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in mine) for mine in dealt]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def read(part):
    """The tokens of a part, what examples begin with alike counted once, or as a padded batch."""
    rows = sorted(e.ids for e in part.examples)
    if part.layout.packed:
        return sum(map(len, rows)) - sum(common_prefix_length(a, b) for a, b in pairwise(rows))
    return len(rows) * max(map(len, rows))


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), min_size=1, max_size=12),
    st.booleans(),
    st.integers(8, 60),
    st.integers(2, 4),
)
def test_a_step_is_cut_into_smaller_parts_for_more_processes(shapes, flat, budget, world):
    layout = Layout(
        pad_token_id=1, device=torch.device("cpu"), packed=flat, tokens_per_microbatch=budget
    )
    batch = Batch(
        tuple(
            make_encoded([5 + p, 3, 4], [*range(10 + 20 * i, 10 + 20 * i + n)], str(i))
            for i, (p, n) in enumerate(shapes)
        ),
        layout,
    )
    few = batch.micro_batches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_world", world)
        parts = batch.micro_batches()
    assert sorted(e.id for part in parts for e in part.examples) == sorted(
        e.id for e in batch.examples
    )
    assert len(few) <= len(parts) <= -(-len(few) // world) * world
    assert all(read(part) <= budget for part in parts if len(part.examples) > 1)
    assert flat or len(parts) >= min(2, len(shapes))
    assert sum(part.supervised_tokens for part in parts) == batch.supervised_tokens


def test_where_each_process_works_for_itself_nothing_is_dealt_out(of):
    of(1, 2)
    with processes.single_process():
        assert work.assign_work([1, 1, 1]) == [0, 1, 2]
        assert processes.all_gather("mine") == ["mine"]
    assert len(work.assign_work([1, 1, 1])) == 1


def test_what_torch_draws_does_not_depend_on_who_does_which_part(of):
    drawn = {}
    for rank in (0, 1):
        of(rank, 2)
        torch.manual_seed(0)
        drawn.update(
            {part: torch.rand(2).tolist() for part in work.iter_own_items("abcd", [1, 2, 3, 4])}
        )
        after = torch.rand(1).item()
        drawn.setdefault("after", after)
        assert drawn["after"] == after
    assert sorted(drawn) == ["a", "after", "b", "c", "d"]
    assert len({str(value) for value in drawn.values()}) == 5

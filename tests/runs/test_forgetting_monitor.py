"""Forgetting seen within a stage: what is told of it, that looking changes nothing, and the gate
that stops a run.
"""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

from continual.errors import DataError
from continual.results.matrix import Matrix
from continual.results.run_folder import Run
from continual.runs.forgetting_monitor import preserve_state
from continual.runs.stop_if import ForgettingLimitExceeded
from continual.training import checkpoint
from strategies.per_task import PerTask
from tests.support import subprocesses, toy
from tests.support.models import TASKS, load_json_lines, run_in_process, write_model, write_rows

LOOK = ("score.metric=perplexity", "score.every_steps=2")
CLASH = (
    "train.lr=0.03",
    "train.steps=10",
    "train.schedule=constant",
    "train.warmup_ratio=0",
    "score.metric=perplexity",
    "score.every_steps=1",
)


def points(out):
    """What is told within stages, by stage and step, as the report reads it."""
    return {(e["stage"], e["step"]): e for e in Run.load(out).events("during")}


def ends(out):
    """The scores, and what was learned in all."""
    return (
        Matrix.load(out / "matrix.json").scores,
        load_file(next(iter(sorted((out / "checkpoints").iterdir())[-1:])) / "weights.safetensors"),
    )


def assert_same(a, b):
    (scores, one), (others, other) = ends(a), ends(b)
    assert scores == others
    assert toy.bitwise_equal(one, other)


@pytest.fixture(scope="module")
def looked(run_keys, tmp_path_factory):
    """A run that looks at all test rows every second of its stages' four steps."""
    out = tmp_path_factory.mktemp("early") / "looked"
    return out, *run_in_process(out, run_keys, *LOOK, "score.monitor_examples=99")


# What is told


def test_every_task_seen_so_far_is_scored_as_a_stage_begins_and_every_so_many_steps(looked):
    told = points(looked[0])
    assert list(told) == [(stage, step) for stage in (1, 2, 3) for step in (0, 2, 4)]
    assert all(list(e["scores"]) == [*TASKS[:stage]] for (stage, _), e in told.items())


def test_a_stage_begins_with_the_scores_that_the_one_before_left(looked):
    out, matrix, _ = looked
    for stage in (1, 2, 3):
        assert [*points(out)[stage, 0]["scores"].values()] == pytest.approx(
            matrix.scores[stage - 1][:stage]
        )


def test_forgetting_is_what_the_matrix_would_say_if_the_stage_ended_here(looked):
    out, matrix, _ = looked
    for (stage, step), told in points(out).items():
        rows = [row[:stage] for row in matrix.scores[:stage]] + [tuple(told["scores"].values())]
        cut = Matrix(
            "s",
            "",
            "naive",
            0,
            TASKS[:stage],
            dict.fromkeys(TASKS, "perplexity"),
            ("base", *TASKS[:stage]),
            tuple(rows),
        ).summary()["forgetting"]
        if stage == 1:
            assert told["forgetting"] is cut is None
        else:
            assert told["forgetting"] == pytest.approx(cut)
            assert told["forgetting"] != 0 or step == 0


def test_the_end_of_a_stage_is_in_its_last_point_where_nothing_follows_the_last_step(looked):
    out, matrix, _ = looked
    for stage in (1, 2, 3):
        assert [*points(out)[stage, 4]["scores"].values()] == pytest.approx(
            matrix.scores[stage][:stage]
        )


def test_the_sample_is_the_same_all_the_run_through_and_another_of_another_seed(run_keys, tmp_path):
    chosen = {}
    for seed in (0, 1):
        out = tmp_path / str(seed)
        run_in_process(
            out, run_keys, *LOOK, "score.monitor_examples=2", f"seed={seed}", "train.lr=0"
        )
        told = {e["scores"]["first"] for e in points(out).values()}
        assert max(told) == pytest.approx(min(told)), (
            "nothing was learned, and so the same examples score the same"
        )
        marks = [row["score"] for row in load_json_lines(out / "predictions/stage-00/first.jsonl")]
        chosen[seed] = next(
            (i, j)
            for i in range(4)
            for j in range(i)
            if (marks[i] + marks[j]) / 2 == pytest.approx(min(told), rel=1e-6)
        )
    assert chosen[0] != chosen[1]


def test_the_terminal_has_a_line_for_each(looked):
    _, matrix, said = looked
    assert f"stage 1 step 0: first {matrix.scores[0][0]:.3f}\n" in said
    assert "stage 2 step 2: forgetting " in said


def test_its_seconds_are_of_scoring_not_of_training(looked):
    out, matrix, _ = looked
    spent = sum(e["seconds"] for e in points(out).values())
    rows = sum(e["seconds"] for e in Run.load(out).events("score"))
    assert spent > 0
    assert matrix.cost["score_seconds"] == pytest.approx(spent + rows)


# Looking changes nothing


@pytest.mark.parametrize(
    "kind",
    [
        ["strategy=naive"],
        ["strategy=router"],
        ["strategy=progressive_prompts", "model.adapter=prompt_tuning", "train.lr=0.1"],
        ["strategy=gain_lora", "strategy.gain_lora.rank=2", "model.adapter=lora"],
    ],
    ids=lambda kind: kind[0].partition("=")[2],
)
def test_a_run_that_looks_ends_as_one_that_does_not_bit_for_bit(kind, run_keys, tmp_path):
    model = write_model(tmp_path / "model", "gpt2")  # which has dropout
    told = [*run_keys, f"model.name={model}", *kind]
    run_in_process(tmp_path / "blind", told)
    run_in_process(tmp_path / "looked", told, "score.every_steps=1", "score.monitor_examples=3")
    assert_same(tmp_path / "blind", tmp_path / "looked")
    assert len(points(tmp_path / "looked")) == 3 * 5


def test_aside_a_model_may_be_routed_drawn_with_and_put_to_work_and_is_as_it_was():
    made = toy.make_model()
    made.net.train()
    strategy = PerTask()
    strategy.adapters = {
        "a": {n: torch.zeros_like(w) for n, w in toy.copy_parameters(made).items()}
    }
    strategy.home = {"a": "a"}
    before = {n: w.clone() for n, w in toy.copy_parameters(made).items()}
    random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), torch.rand(1).item()
    random.seed(1)
    torch.manual_seed(1)
    with preserve_state(made, strategy):
        assert not made.net.training
        strategy.route(made, "a")
        assert not any(w.any() for w in toy.copy_parameters(made).values())
        random.random(), torch.rand(3)
    assert made.net.training
    assert toy.bitwise_equal(before, toy.copy_parameters(made))
    assert (random.random(), torch.rand(1).item()) == expected


def test_a_strategy_with_an_adapter_a_task_has_the_stage_s_own_answered_by_the_weights_at_hand(
    run_keys, tmp_path
):
    matrix, _ = run_in_process(
        tmp_path, run_keys, *LOOK, "score.monitor_examples=99", "strategy=per_task"
    )
    told = points(tmp_path)
    for stage in (1, 2, 3):
        assert [*told[stage, 4]["scores"].values()] == pytest.approx(matrix.scores[stage][:stage])
        assert (
            told[stage, 2]["scores"][TASKS[stage - 1]] != told[stage, 0]["scores"][TASKS[stage - 1]]
        )
    assert told[3, 4]["forgetting"] == pytest.approx(0), "an adapter of its own forgets nothing"


# Going on


def test_a_run_that_goes_on_within_a_stage_has_every_point_once(
    looked, run_keys, tmp_path, monkeypatch
):
    out, whole, save = tmp_path / "cut", tmp_path / "whole", checkpoint.save

    def leave_a_copy(folder, *more, **named):
        if folder.name == "stage-02":
            shutil.copytree(whole, out)
        return save(folder, *more, **named)

    told = [*run_keys, *LOOK, "score.monitor_examples=99", "checkpoint.every_steps=3"]
    monkeypatch.setattr(checkpoint, "save", leave_a_copy)
    run_in_process(whole, told)
    monkeypatch.undo()
    _, said = run_in_process(out, told)
    assert "from stage-02-step-00000003" in said
    plain = [
        {
            key: {k: v for k, v in e.items() if k not in ("time", "seconds")}
            for key, e in points(o).items()
        }
        for o in (looked[0], whole, out)
    ]
    assert plain[0] == plain[1] == plain[2]
    assert_same(whole, out)


def test_answers_of_an_earlier_stage_that_are_gone_are_named_with_the_mend(
    looked, run_keys, tmp_path
):
    out = shutil.copytree(looked[0], tmp_path / "copy")
    for path in ("finished", "predictions/stage-01/first.jsonl"):
        (out / path).unlink()
    for path in ("checkpoints/stage-03", "predictions/stage-03"):
        shutil.rmtree(out / path)
    with pytest.raises(
        DataError,
        match=r"stage-01/first.jsonl: expected a score for every .* with score.every_steps=null",
    ):
        run_in_process(out, run_keys, *LOOK, "score.monitor_examples=99")
    assert (
        run_in_process(out, run_keys, *LOOK, "score.every_steps=null")[0].scores == looked[1].scores
    )


# The gate


@pytest.fixture(scope="module")
def clash(tmp_path_factory):
    """A stream of two tasks that ask the same and want different answers: the second one undoes the
    first.
    """
    root = tmp_path_factory.mktemp("clash")
    for task, answer in (("red", "red"), ("blue", "blue")):
        for split, n in (("train", 12), ("test", 4)):
            write_rows(
                root / task / f"{split}.jsonl",
                [
                    {"instruction": "Name it.", "input": f"{split} {i}", "output": answer}
                    for i in range(n)
                ],
            )
    (root / "stream.json").write_text(json.dumps({"tasks": [{"name": "red"}, {"name": "blue"}]}))
    return root


@pytest.fixture
def clashing(clash, run_keys):
    """The keys of a run over it, which forgets."""
    return (*run_keys, f"stream.path={clash}", *CLASH)


@pytest.fixture(scope="module")
def free(clash, run_keys, tmp_path_factory):
    """That run without a gate."""
    out = tmp_path_factory.mktemp("free")
    run_in_process(out, run_keys, f"stream.path={clash}", *CLASH)
    return out


def test_a_gate_stops_the_run_where_it_forgets_more_keeps_it_and_lets_it_go_on_when_it_is_raised(
    run_cli, clashing, free, tmp_path
):
    out = tmp_path / "gated"
    code, said, err = run_cli("run", *clashing, "stop_if.forgetting>0.2", f"out={out}")
    assert (code, said) == (3, "")
    told = points(out)
    (*fine, last), stop = (
        [e for e in told.values() if e["stage"] == 2],
        json.loads((out / "stopped.json").read_text()),
    )
    assert all(e["forgetting"] <= 0.2 for e in fine)
    assert last["forgetting"] > 0.2
    assert (stop["task"], stop["step"], stop["forgetting"]) == (
        "blue",
        last["step"],
        last["forgetting"],
    )
    assert (
        f"stopped by stop_if.forgetting=0.2: forgetting was {last['forgetting']:.3f} after step"
        in err
    )
    assert "Traceback" not in err
    assert (out / f"checkpoints/stage-02-step-{last['step']:08d}").is_dir()
    assert "It was stopped by stop_if.forgetting=0.2" in " ".join(run_cli("report", out)[1].split())

    before = load_json_lines(out / "events.jsonl")
    assert run_cli("run", *clashing, "stop_if.forgetting>0.2", f"out={out}")[0] == 3
    assert load_json_lines(out / "events.jsonl") == before, (
        "the same gate does not let it pass, and nothing is done"
    )

    code, said, err = run_cli("run", *clashing, "stop_if.forgetting=null", f"out={out}")
    assert (code, "resuming" in err) == (0, True)
    assert not (out / "stopped.json").exists()
    assert_same(out, free)


def test_a_gate_that_is_raised_stops_the_run_again_where_it_is_passed(clashing, tmp_path):
    with pytest.raises(ForgettingLimitExceeded):
        run_in_process(tmp_path, clashing, "stop_if.forgetting=0.1")
    with pytest.raises(ForgettingLimitExceeded, match=r"stopped by stop_if.forgetting=0.4: "):
        run_in_process(tmp_path, clashing, "stop_if.forgetting=0.4")
    gates = [e for e in load_json_lines(tmp_path / "events.jsonl") if e["event"] == "gate"]
    assert [e["limit"] for e in gates] == [0.1, 0.4]
    assert gates[0]["forgetting"] < gates[1]["forgetting"]


def test_a_gate_stops_two_processes_alike_and_one_goes_on_to_the_same_end(clashing, free, tmp_path):
    out = tmp_path / "two"
    told = [
        process.wait()
        for process in subprocesses.start_two_ranks(
            tmp_path,
            subprocesses.run_command,
            "run",
            *clashing,
            "stop_if.forgetting=0.2",
            f"out={out}",
        )
    ]
    assert [code for code, _ in told] == [3, 3], told
    assert told[0][1].count("stopped by stop_if.forgetting=0.2") == 1
    seen, alone = points(out), points(free)
    assert {p: e["scores"] for p, e in seen.items()} == {
        p: pytest.approx(alone[p]["scores"], rel=1e-2) for p in seen
    }
    matrix, _ = run_in_process(out, clashing)
    assert matrix.scores[-1] == pytest.approx(ends(free)[0][-1], abs=1e-2)


def test_a_run_of_a_comparison_that_a_gate_stops_leaves_the_others_whole(
    run_cli, clashing, tmp_path
):
    code, _, err = run_cli(
        "compare",
        *clashing,
        "strategy=naive,per_task",
        "seed=0",
        "stop_if.forgetting>0.2",
        f"out={tmp_path / 'all'}",
    )
    assert code == 2
    assert "naive" in err
    assert "stopped by stop_if.forgetting=0.2" in err
    done = [p.parent.name for p in (tmp_path / "all").glob("*/finished")]
    assert [name for name in done if "per_task" in name] == done != []


def test_what_stopped_a_run_is_read_with_care(looked, run_keys, tmp_path):
    out = shutil.copytree(looked[0], tmp_path / "copy")
    (out / "finished").unlink()
    for text in (
        "{",
        "[]",
        '{"schema": 1}',
        '{"schema": 1, "task": "a\\u001b", "step": 1, "forgetting": 1, "limit": 0}',
    ):
        (out / "stopped.json").write_text(text)
        with pytest.raises(DataError, match=r"stopped.json"):
            run_in_process(out, run_keys, *LOOK, "score.monitor_examples=99")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("score.every_steps=0",), "score.every_steps=0: expected a whole number of at least 1"),
        (
            ("score.monitor_examples=half",),
            "score.monitor_examples=half: expected a whole number of at least 1",
        ),
        (
            ("stop_if.forgetting=0.2",),
            "forgetting within a stage is not measured; set score.every_steps=N",
        ),
        (
            ("score.every_steps=5", "stop_if.forgetting=20"),
            "expected a share of at least 0 and below 1, such as 0.2",
        ),
        (
            ("score.every_steps=5", "stop_if.forgetting"),
            "without quotes the shell takes > for a file to write to",
        ),
        (("score.every_steps=5", "stop_if.forgeting>0.2"), "did you mean 'stop_if.forgetting'"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_before_training(
    words, expected, cli_error, run_keys, tmp_path
):
    assert expected in cli_error("run", *run_keys, *words, f"out={tmp_path}")


def test_adapt_scores_at_steps_of_its_own(cli_error, run_keys, tmp_path):
    assert "score.every_steps=5: adapt has one task and scores it at adapt.eval_steps" in cli_error(
        "adapt", *run_keys, "stream.tasks=[first]", "score.every_steps=5", f"out={tmp_path}"
    )

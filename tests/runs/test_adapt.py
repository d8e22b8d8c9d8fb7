"""Adapting to a new task: draws of support sets, what a stopped command keeps, and what it takes to
reach the base.
"""

import io
import json
import shutil
import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from continual.cli import main
from continual.errors import DataError
from continual.inference.reopen import ModelSource, load_run_model
from continual.reports import write as report
from continual.reports.reach import compute_reach
from continual.results.curve import Curve
from continual.runs import adapt
from continual.runs.signals import RunInterrupted
from continual.tracking import events
from tests.support.fake_run import write_fake_adaptation
from tests.support.models import run_in_process, stream_text, train_byte_bpe, write_model
from tests.support.toy import all_close, bitwise_equal

QUICK = (
    "task=loud",
    "adapt.steps=3",
    "adapt.eval_steps=[0,2]",
    "adapt.shots=[2,5,null]",
    "adapt.draws=2",
)


def adapted(out, keys, *more):
    events.silence_libraries()
    return adapt.adapt(
        main.compose_config("adapt", [*keys, *QUICK, *more, f"out={out}"]),
        Console(file=io.StringIO()),
    )


@pytest.fixture
def learned(monkeypatch):
    """The ids of the examples of every curve that is learned, as it is begun."""
    learn, sets = adapt.train_stage, []

    def noted(model, task, *args, **more):
        sets.append([e.id for e in task.train])
        return learn(model, task, *args, **more)

    monkeypatch.setattr(adapt, "train_stage", noted)
    return sets


# The command


def test_checkpoint_and_task_are_short_for_the_start_and_the_one_task_of_the_stream(run_keys):
    short = main.compose_config(
        "adapt", [*run_keys, "checkpoint=runs/a", "task=loud", "stream.arrange=joint", "out=x"]
    )
    long = main.compose_config(
        "adapt",
        [
            *run_keys,
            "adapt.init_from=runs/a",
            "stream.tasks=[loud]",
            "stream.arrangement=joint",
            "out=x",
        ],
    )
    assert short == long


def test_checkpoint_starts_from_a_run(run_cli, run_keys, tmp_path):
    run_in_process(tmp_path / "run", run_keys, "stream.tasks=[first]", "train.steps=1")
    code, out, err = run_cli(
        "adapt", *run_keys, *QUICK, f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'new'}"
    )
    assert code == 0, err
    assert "mean of 2 draws" in out.replace("\n", " ")
    assert Curve.load(tmp_path / "new").start == str(tmp_path / "run/checkpoints/stage-01")


@pytest.mark.filterwarnings(
    "ignore:Setting .save_embedding_layers. to .True.:UserWarning"
)  # peft's own
def test_it_starts_from_the_runs_network_whatever_its_own_seed(run_keys, tmp_path, monkeypatch):
    """The embedding of the end of sequence that its tokenizer lacked was drawn by the run's seed,
    and is frozen.
    """
    bare = write_model(
        tmp_path / "model", tokenizer=train_byte_bpe(stream_text(), eos=None, pad=None)
    )
    more, curves, started = (f"model.name={bare}", "model.adapter=lora"), adapt.train_curves, []
    run_in_process(
        tmp_path / "run", run_keys, *more, "stream.tasks=[first]", "train.steps=1", "seed=1"
    )
    monkeypatch.setattr(
        adapt,
        "train_curves",
        lambda bench, *rest: started.append(state(bench)) or curves(bench, *rest),
    )
    adapted(
        tmp_path / "new",
        run_keys,
        *more,
        "adapt.draws=1",
        f"checkpoint={tmp_path / 'run'}",
        "seed=2",
    )
    begun, new = (
        load_run_model(
            ModelSource.load(tmp_path / name), main.compose_config("run", ["device=cpu"])
        )
        for name in ("run", "new")
    )
    begun.load_stage("first")
    assert bitwise_equal(started[0], state(begun))
    assert bitwise_equal(
        *({n: w for n, w in state(opened).items() if "lora_" not in n} for opened in (begun, new))
    )


def state(held):
    """All weights of the model that a bench or a reopened run holds."""
    return {n: w.clone() for n, w in held.model.net.state_dict().items()}


# The inner loop of the start's run

META = (
    "strategy=maml",
    "strategy.maml.inner_lr=0.05",
    "stream.arrange=episodes",
    "stream.tasks=[first,last]",
    "train.steps=2",
)


@pytest.fixture(scope="module")
def prepared(run_keys, tmp_path_factory):
    """A run of first-order MAML."""
    events.silence_libraries()
    run_in_process(out := tmp_path_factory.mktemp("prepared") / "maml", run_keys, *META)
    return out


def test_by_the_inner_rule_it_takes_plain_sgd_at_the_inner_lr_whatever_train_says(
    run_keys, tmp_path, prepared
):
    start = f"checkpoint={prepared}"
    adapted(
        tmp_path / "inner",
        run_keys,
        start,
        "adapt.update_rule=inner",
        "train.max_grad_norm=1e-9",
        "train.lr=7",
    )
    adapted(
        tmp_path / "sgd",
        run_keys,
        start,
        "train.optimizer=sgd",
        "train.lr=0.05",
        "train.max_grad_norm=null",
    )
    adapted(tmp_path / "adamw", run_keys, start)
    inner, sgd, adamw = (
        load_file(tmp_path / out / "model/model.safetensors") for out in ("inner", "sgd", "adamw")
    )
    assert all_close(inner, sgd, rtol=1e-5, atol=1e-7)
    assert not all_close(inner, adamw, rtol=1e-2, atol=1e-4)
    told = [Curve.load(tmp_path / out).start_label for out in ("inner", "sgd")]
    assert told == ["maml stage-01, inner loop", "maml stage-01"]


def test_by_the_inner_rule_of_meta_sgd_each_weight_has_its_learned_rate(run_keys, tmp_path):
    run_in_process(
        tmp_path / "run",
        run_keys,
        *META,
        "strategy.maml.inner_optimizer=meta_sgd",
        "strategy.maml.rates_lr=0.02",
    )
    checkpoint = tmp_path / "run/checkpoints/stage-01"
    rates = load_file(checkpoint / "memory.safetensors")["memory/rates"]
    adapted(
        tmp_path / "new",
        run_keys,
        f"checkpoint={checkpoint}",
        "adapt.update_rule=inner",
        "adapt.steps=1",
        "adapt.draws=1",
        "adapt.shots=[5]",
    )
    adapted(
        tmp_path / "one",
        run_keys,
        f"checkpoint={checkpoint}",
        "train.optimizer=sgd",
        "train.lr=1",
        "train.max_grad_norm=null",
        "adapt.steps=1",
        "adapt.draws=1",
        "adapt.shots=[5]",
    )
    before, new, one = (
        load_file(f)
        for f in (
            checkpoint / "weights.safetensors",
            tmp_path / "new/model/model.safetensors",
            tmp_path / "one/model/model.safetensors",
        )
    )
    names = [
        n
        for n, _ in AutoModelForCausalLM.from_pretrained(tmp_path / "new/model").named_parameters()
    ]
    for name, rate in zip(names, rates.split([before[n].numel() for n in names]), strict=True):
        w = before[name]
        assert torch.allclose(
            new[name] - w, rate.view_as(w) * (one[name] - w), rtol=1e-3, atol=1e-6
        ), name
    assert rates.std() > 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("checkpoint=base",), "the base model has none"),
        (("checkpoint={run}", "strategy=l2"), "found strategy=l2 and adapt.update_rule=inner"),
        (("checkpoint={run}", "adapt.update_rule=outer"), "unknown adapt.update_rule 'outer'"),
    ],
)
def test_an_inner_rule_that_cannot_be_is_refused(
    cli_error, run_keys, tmp_path, prepared, words, told
):
    words = [word.format(run=prepared) for word in words]
    assert told in cli_error(
        "adapt",
        *run_keys,
        "task=loud",
        "adapt.update_rule=inner",
        *words,
        f"out={tmp_path / 'new'}",
    )


def test_a_start_that_was_prepared_for_no_inner_loop_is_refused(cli_error, run_keys, tmp_path):
    run_in_process(tmp_path / "run", run_keys, "stream.tasks=[first]", "train.steps=1")
    told = cli_error(
        "adapt",
        *run_keys,
        "task=loud",
        f"checkpoint={tmp_path / 'run'}",
        "adapt.update_rule=inner",
        f"out={tmp_path / 'new'}",
    )
    assert "Strategy has no inner loop" in told
    assert not (tmp_path / "new/curve.json").exists()


def test_an_inner_rule_that_is_no_installed_strategy_s_is_refused(
    cli_error, run_keys, tmp_path, prepared
):
    shutil.copytree(prepared, tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("strategies.maml.MAML", "os.system"))
    told = cli_error(
        "adapt",
        *run_keys,
        "task=loud",
        f"checkpoint={tmp_path / 'run'}",
        "adapt.update_rule=inner",
        f"out={tmp_path / 'new'}",
    )
    assert "strategy.maml._target_='os.system', which is neither" in told


# Draws


def test_every_draw_of_every_number_of_shots_has_a_curve(run_keys, tmp_path):
    points = adapted(tmp_path, run_keys)
    assert [(p["shots"], p["draw"], p["step"]) for p in points] == [
        (shots, draw, step) for shots in (2, 5, 12) for draw in (0, 1) for step in (0, 2, 3)
    ]
    assert json.loads((tmp_path / "curve.json").read_text())["points"] == points


def test_the_support_set_of_fewer_shots_is_a_part_of_that_of_more(run_keys, tmp_path, learned):
    adapted(tmp_path, run_keys)
    for draw in (0, 1):
        two, five, every = learned[draw::2]
        assert every[:5] == five
        assert five[:2] == two
    assert learned[0] != learned[1]
    assert sorted(learned[4]) == sorted(learned[5])


def test_more_shots_than_examples_are_all_of_them_once(run_keys, tmp_path, learned):
    adapted(tmp_path, run_keys, "adapt.shots=[50,20,null]", "adapt.draws=1")
    assert [len(chosen) for chosen in learned] == [12]


@pytest.mark.parametrize("value", ["0", "two", "1.5"])
def test_draws_that_cannot_be_are_refused(cli_error, run_keys, tmp_path, value):
    told = cli_error("adapt", *run_keys, "task=loud", f"adapt.draws={value}", f"out={tmp_path}")
    assert f"adapt.draws={value}: expected a whole number of at least 1" in told


# Stopped and given again


def test_a_killed_adaptation_keeps_its_finished_curves_and_ends_as_if_it_had_not_been(
    run_keys, tmp_path, monkeypatch, learned
):
    adapted(tmp_path / "whole", run_keys)
    noted, killed = adapt.train_stage, len(learned) + 4

    def dies(*args, **more):
        if len(learned) == killed:
            raise KeyboardInterrupt
        return noted(*args, **more)

    monkeypatch.setattr(adapt, "train_stage", dies)
    with pytest.raises(KeyboardInterrupt):
        adapted(tmp_path / "cut", run_keys)
    monkeypatch.setattr(adapt, "train_stage", noted)
    assert not (tmp_path / "cut/curve.json").exists()
    adapted(tmp_path / "cut", run_keys)
    assert len(learned) == killed + 2
    for name in ("curve.json", "curves.png"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert bitwise_equal(
        *(load_file(tmp_path / out / "model/model.safetensors") for out in ("cut", "whole"))
    )
    assert not (tmp_path / "cut/curve.unfinished.json").exists()


def test_killed_before_its_model_is_kept_it_learns_the_last_curve_anew(
    run_keys, tmp_path, monkeypatch, learned
):
    monkeypatch.setattr(adapt, "write_atomically", failing(adapt.write_atomically, "curve.json"))
    with pytest.raises(KeyboardInterrupt):
        adapted(tmp_path, run_keys)
    monkeypatch.undo()
    adapted(tmp_path, run_keys)
    assert len(Curve.load(tmp_path).points) == 18


def failing(write, name):
    def wrapped(path, *rest):
        if path.name == name:
            raise KeyboardInterrupt
        return write(path, *rest)

    return wrapped


def test_a_signal_stops_it_with_the_command_that_goes_on(run_keys, tmp_path, monkeypatch, learned):
    score, times = adapt.score_task, []

    def interrupted(*args):
        times.append(1)
        if len(times) == 4:
            signal.raise_signal(signal.SIGINT)
        return score(*args)

    monkeypatch.setattr(adapt, "score_task", interrupted)
    with pytest.raises(
        RunInterrupted, match=r"(?s)curve of 2 shots and draw 1, which begins anew.*Go on with"
    ):
        adapted(tmp_path, run_keys)
    adapted(tmp_path, run_keys)
    assert len(learned) == 2 + 5


# The curve on disk


def written(folder, *points, start="base", task="rotate"):
    """An adapt folder of these (shots, draw, step, score)."""
    folder.mkdir(parents=True)
    told = Curve(folder, task, "exact_match", start, tuple(points)).to_dict()
    (folder / "curve.json").write_text(json.dumps(told))
    return Curve.load(folder)


def test_a_curve_without_draws_is_read_as_one_draw(tmp_path):
    curve = Curve.load(write_fake_adaptation(tmp_path / "a"))
    assert curve.num_draws == 1
    assert [(step, score, score) for step, score in curve.mean_scores(64)] == curve.band(64)


@pytest.mark.parametrize("draw", ['"first"', "-1", "1e999", "[]"])
def test_a_draw_that_is_none_is_refused(tmp_path, draw):
    write_fake_adaptation(tmp_path / "a")
    point = f'{{"shots": 1, "step": 0, "score": 1, "draw": {draw}}}'
    (tmp_path / "a/curve.json").write_text(
        f'{{"schema": 1, "task": "a", "metric": "m", "start": "base", "points": [{point}]}}'
    )
    with pytest.raises(DataError, match="these are no draws"):
        Curve.load(tmp_path / "a")


@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.integers(0, 2), st.integers(0, 4), st.floats(0, 1)),
        min_size=1,
    )
)
def test_the_mean_over_draws_is_within_their_band(points):
    curve = Curve(None, "a", "m", "base", tuple(points))
    for shots in curve.shots:
        for (step, score), (at, low, high) in zip(
            curve.mean_scores(shots), curve.band(shots), strict=True
        ):
            assert step == at
            assert low - 1e-12 <= score <= high + 1e-12


# What it takes to reach the reference


def rising(shots, goal, draws=2, top=1.0):
    """Points that come to the top at the step `goal`, in every draw."""
    return [
        (shots, draw, step, top if step >= goal else 0.5)
        for draw in range(draws)
        for step in (0, 4, 8, 40)
    ]


def test_steps_and_examples_to_reach_95_percent_of_the_base_s_best(tmp_path):
    base = written(tmp_path / "base", *rising(5, 99), *rising(600, 40, top=0.8))
    meta = written(
        tmp_path / "maml",
        *rising(1, 99),
        *rising(5, 8, top=0.77),
        *rising(600, 4, top=0.77),
        start="maml",
    )
    never = written(tmp_path / "naive", *rising(5, 99), *rising(600, 4, top=0.75), start="naive")
    own, fast, none = compute_reach([base, meta, never])
    assert own.goal_score == fast.goal_score == pytest.approx(0.95 * 0.8)
    assert (own.steps, own.share_of_reference, own.num_examples) == (40, 1, 600)
    assert (fast.steps, fast.share_of_reference, fast.num_examples) == (4, 0.1, 5)
    assert (none.steps, none.share_of_reference, none.num_examples) == (None, None, None)


def test_steps_are_a_share_of_what_the_base_needs_and_of_all_that_it_was_trained_for(tmp_path):
    base = written(tmp_path / "base", *rising(9, 8))
    meta = written(tmp_path / "maml", *rising(9, 4), start="maml")
    assert [(r.share_of_reference, r.share_of_budget) for r in compute_reach([base, meta])] == [
        (1, 8 / 40),
        (0.5, 4 / 40),
    ]


def test_a_step_reaches_it_by_the_mean_over_draws(tmp_path):
    base = written(tmp_path / "base", *rising(9, 40))
    late = [(9, 1, step, 0.5 if step < 8 else 1) for step in (0, 4, 8)]
    half = written(tmp_path / "b", *rising(9, 4, draws=1), *late, start="b")
    assert compute_reach([base, half])[1].steps == 8


def test_what_reaches_it_before_any_step_needs_no_example(tmp_path):
    base, joint = (
        written(tmp_path / "base", *rising(9, 40)),
        written(tmp_path / "b", *rising(9, 0), start="joint"),
    )
    assert [(r.steps, r.share_of_reference, r.num_examples) for r in compute_reach([base, joint])][
        1
    ] == (0, 0, 0)


def test_a_task_whose_base_is_not_among_them_is_left_out(tmp_path):
    base, other = (
        written(tmp_path / "a", *rising(9, 4)),
        written(tmp_path / "b", *rising(9, 4), task="b", start="x"),
    )
    assert [r.curve.path.name for r in compute_reach([base, other])] == ["a"]


def test_the_report_of_several_adaptations_tells_it_by_start_and_task(tmp_path):
    folders = []
    for task in ("rotate", "swap"):
        for start, goal in (("base", 40), ("runs/maml/checkpoints/stage-01", 4)):
            folders.append(tmp_path / f"{task}-{start[:4]}")
            written(folders[-1], *rising(5, goal), *rising(600, goal), task=task, start=start)
    console = Console(file=io.StringIO(), width=150)
    report.print_tables(console, *folders)
    told = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    for line in (
        "base 40 (100%) 40 (100%) 2 of 2 100% 100%",
        "maml stage-01 4 (10%) 4 (10%) 2 of 2 10% 10%",
        "maml stage-01 5 5 2 of 2",
    ):
        assert line in told
    report.write_report(*folders, out=tmp_path / "all")
    assert (tmp_path / "all/curves.png").read_bytes().startswith(b"\x89PNG")


def test_without_the_base_there_is_no_such_table(tmp_path):
    for name in "ab":
        written(tmp_path / name, *rising(5, 4), start=name)
    console = Console(file=io.StringIO(), width=150)
    report.print_tables(console, tmp_path / "a", tmp_path / "b")
    assert "steps to reach" not in console.file.getvalue()

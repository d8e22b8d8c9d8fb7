"""Experiments that sweep and search: the leaderboard's runs, tuned settings, and Optuna's search on
dev rows.
"""

import json
from pathlib import Path

import pytest
import yaml

from benchmarks import leaderboard
from continual.config import catalogue
from continual.results import comparison
from continual.results.run_folder import Run, find_runs, group_runs
from continual.results.uncertainty import interval_over_runs
from tests.support.models import write_stream

SMALL = ("train.epochs=1", "stream.tasks=[first,loud]")
FLOOR_AND_CEILING = {"naive", "joint"}
# Strategies that are not on the leaderboard, and why.
ELSEWHERE = {
    **dict.fromkeys(
        ("incremental_lora", "olora", "gain_lora", "slao"),
        "they train a LoRA, and the others the whole model",
    ),
    "progressive_prompts": "it trains virtual tokens alone, at a rate of their own",
    "la_maml": "it is trained by SGD, and the others by AdamW",
    "avalanche": "it is whatever plugin is named",
}


def params(experiment: str) -> dict[str, str]:
    return told("experiment", experiment)["hydra"]["sweeper"]["params"]


def told(group: str, name: str) -> dict:
    """A configuration's file."""
    return yaml.safe_load(
        (Path(__file__).parents[2] / "conf" / group / f"{name}.yaml").read_text("utf-8")
    )


def test_the_leaderboard_has_every_strategy():
    strategies = params("leaderboard")["strategy"].replace(" ", "").split(",")
    assert len(set(strategies)) == len(strategies)
    assert {*strategies, *ELSEWHERE} == {c.name for c in catalogue.list_choices("strategy")}
    assert not ELSEWHERE.keys() & set(strategies)


def test_the_long_leaderboard_is_the_ten_most_used_between_floor_and_ceilings():
    strategies = set(params("leaderboard_long15")["strategy"].replace(" ", "").split(","))
    assert strategies > FLOOR_AND_CEILING
    assert len(strategies - FLOOR_AND_CEILING - {"per_task"}) == 10


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (
            ["strategy=replay"],
            {
                f"seed={seed}_strategy=replay_stream.order={o}"
                for seed in "012"
                for o in ("default", "reverse")
            },
        ),
        (
            ["strategy=l2", "seed=5", "strategy.l2.strength=2"],
            {f"seed=5_strategy=l2_stream.order={o}" for o in ("default", "reverse")},
        ),
    ],
)
def test_an_experiment_s_sweeps_are_the_comparison_s_but_for_what_the_command_sets(
    run_cli, monkeypatch, tmp_path, words, found
):
    monkeypatch.setattr("continual.runs.compare._run_sweep", lambda words: None)
    run_cli("compare", "experiment=leaderboard", *words, f"out={tmp_path}")
    assert (
        set(json.loads((tmp_path / comparison.CELLS_FILE).read_text())["commands"][-1]["cells"])
        == found
    )


def test_tuned_settings_are_those_of_their_strategy_and_give_way_to_the_command_s(
    run_cli, run_keys, tmp_path
):
    code, _, err = run_cli(
        "compare",
        *run_keys,
        *SMALL,
        "strategy=[replay,l2]",
        "+strategy_defaults.replay={share:0.4,capacity:3}",
        "+strategy_defaults.l2.strength=7",
        "strategy.replay.capacity=5",
        f"out={tmp_path / 'it'}",
    )
    assert code == 0, err
    config = yaml.safe_load(next(tmp_path.glob("it/*/config.yaml")).read_text())
    kept = config["strategy"]
    assert (kept["replay"]["share"], kept["replay"]["capacity"], kept["l2"]["strength"]) == (
        0.4,
        5,
        7,
    )
    assert not {"strategy_defaults", "search_spaces", "strategies"} & config.keys()


# The search


def test_without_its_plugin_a_search_says_what_to_install(cli_error):
    assert "pip install hydra-ax-sweeper" in cli_error("compare", "hydra/sweeper=ax")


def test_every_strategy_of_the_leaderboard_that_has_a_number_to_choose_has_ranges_to_search():
    without = FLOOR_AND_CEILING | {"cumulative", "per_task", "router"}
    strategies = set(params("leaderboard")["strategy"].replace(" ", "").split(","))
    assert strategies - without == told("experiment", "tune")["search_spaces"].keys()


def test_every_searched_key_is_one_of_its_strategy_and_holds_the_default_in_its_range():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for name, space in told("experiment", "tune")["search_spaces"].items():
        settings = told("strategy", name)[name]
        assert set(space) <= set(settings), name
        for key, searched in space.items():
            parsed = OverridesParser.create().parse_override(f"x={searched}")
            if parsed.is_interval_sweep():
                assert parsed.value().start <= settings[key] <= parsed.value().end, (name, key)
            else:
                assert settings[key] in parsed.value().list, (name, key)


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # the plugin's Optuna uses a name that SQLAlchemy has moved
def test_a_search_gives_each_strategy_its_budget_and_says_what_was_best(
    run_cli, run_keys, tmp_path
):
    stream = write_stream(
        tmp_path / "graded", metric="perplexity"
    )  # so that no two runs score alike
    words = [
        *run_keys,
        *SMALL,
        f"stream.path={stream}",
        "experiment=tune",
        "strategy=l2",
        "hydra.sweeper.n_trials=3",
        f"out={tmp_path / 'it'}",
    ]
    code, out, err = run_cli("compare", *words)
    assert code == 0, err
    runs, _ = find_runs([tmp_path / "it"])
    scores = {run.path: run.matrix.summary()["average_performance"] for run in runs}
    assert len(set(scores.values())) == 3
    best = max(scores, key=scores.__getitem__)
    strength = yaml.safe_load((best / "config.yaml").read_text())["strategy"]["l2"]["strength"]
    assert f"best: strategy.l2.strength={strength}" in out
    assert f"  l2: {{strength: {strength}}}" in leaderboard.tuned([tmp_path / "it"])
    assert {run.settings["score.split"] for run in runs} == {"dev"}
    code, _, err = run_cli("compare", *words)
    assert code == 0, err
    assert err.count("is finished") == 3  # the same search again is the same runs


def test_a_search_without_anything_to_look_through_is_refused(cli_error):
    assert "there is none for naive; give one" in cli_error(
        "compare", "experiment=tune", "strategy=naive"
    )


# The table


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A comparison with invented numbers: two strategies and two ceilings, two runs each."""
    from tests.support.fake_run import write_fake_run

    out = tmp_path_factory.mktemp("board") / "it"
    names = []
    for seed in (0, 1):
        for strategy in ("naive", "replay", "ewc", "per_task"):
            names.append(f"seed={seed}_strategy={strategy}")
            write_fake_run(out / names[-1], strategy, seed)
        names.append(f"seed={seed}_strategy=joint")
        write_fake_run(out / names[-1], "joint", seed, joint=True)
    comparison.record_command(out, ["experiment=leaderboard", "seed=0,1"], names)
    return [out]


def test_the_page_has_a_row_a_strategy_between_floor_and_ceilings_and_the_command_that_makes_it(
    folders,
):
    page = leaderboard.page(folders)
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    names = [row[0].removeprefix("| ") for row in rows[1:]]
    assert names[:2] in (
        ["joint (ceiling)", "per_task (ceiling)"],
        ["per_task (ceiling)", "joint (ceiling)"],
    )
    assert set(names[2:]) == {"naive (floor)", "replay", "ewc"}
    assert all(len(row) == 9 and row[1] == "2" for row in rows[1:])
    assert f"continual compare experiment=leaderboard seed=0,1 out={folders[0]}" in page
    assert "**" in rows[1 + names.index("replay")][2]


def test_what_is_stored_is_the_strategy_s_memory_in_the_last_checkpoint(folders):
    group = next(g for g in group_runs(find_runs(folders)[0]) if g.label == "replay")
    last = Run.load(group.runs[0].path).events("checkpoint")[-1]["memory_bytes"]
    assert leaderboard.stored(group) == last > 0


def test_the_table_shows_half_of_students_interval_behind_the_mean(folders):
    group = next(g for g in group_runs(find_runs(folders)[0]) if g.label == "replay")
    span = interval_over_runs(group.finished_values("forgetting"))
    assert f" ± {50 * (span.high - span.low):.1f}" in leaderboard.table([group])


def test_what_people_wrote_of_the_figures_stays(folders, tmp_path, monkeypatch):
    path = tmp_path / "board.md"
    monkeypatch.setattr("sys.argv", ["leaderboard", str(folders[0]), "--to", str(path)])
    leaderboard.main()
    path.write_text(path.read_text() + "Replay wins.\n")
    leaderboard.main()
    assert path.read_text().endswith("## What the figures say\n\nReplay wins.\n")
    assert path.read_text().count("What the figures say") == 1

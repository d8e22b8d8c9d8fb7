"""Reports: what the page, the picture and the terminal show of run, comparison and adapt folders."""

from __future__ import annotations

import io
import json
import re
import statistics
from dataclasses import replace

import pytest
from rich.console import Console

from continual.errors import ConfigError, DataError, MissingError
from continual.reports import figures, write
from continual.reports.pages import locate_step_events, sample_answers
from continual.results.matrix import Matrix, forgetting_by_stage
from continual.results.run_folder import Run, find_joint_reference, group_runs
from tests.support.fake_run import SKILLS, make_fake_matrix, write_fake_adaptation, write_fake_run
from tests.support.pages import EVIL, Page, page


def charts(folder):
    """What a page draws, by the charts' titles."""
    html = (folder / "report.html").read_text(encoding="utf-8")
    told = re.search(r'<script type="application/json" id="data">(.*?)</script>', html)[1]
    return {chart["title"]: chart for chart in json.loads(told)["charts"]}


def terminal(*folders, width=120):
    told = Console(file=io.StringIO(), width=width, color_system="truecolor", force_terminal=True)
    write.print_tables(told, *folders)
    return re.sub(r"\x1b\[[0-9;]*m", "", told.file.getvalue())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_fake_run(
        tmp_path_factory.mktemp("r") / "multitask-0", "multitask", notes=True, wrong_text=EVIL
    )
    write.write_report(folder)
    return folder


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("c") / "compare"
    for seed in range(2):
        for strategy in ("naive", "ewc", "replay"):
            write_fake_run(folder / f"{strategy}-{seed}", strategy, seed)
        write_fake_run(
            folder / f"joint-{seed}", "naive", seed, joint=True, settings={"arrangement": "joint"}
        )
    write_fake_run(folder / "maml-0", "maml", finished=False)
    (folder / "maml-1").mkdir()
    (folder / "maml-1" / "config.yaml").write_text("seed: 1\n")
    write.write_report(folder)
    return folder


def test_a_run_page_holds_every_figure_of_the_matrix_and_its_summaries(run):
    text, matrix = page(run).text, Matrix.load(run / "matrix.json")
    for row in matrix.scores:
        for score in row:
            assert figures.format_percent(score) in text
    for name, value in matrix.summary().items():
        assert figures.SUMMARY_INFO[name].title in text
        assert figures.format_percent(value, figures.SUMMARY_INFO[name].signed) in text


def test_a_run_page_has_a_panel_for_each_task_the_loss_the_notes_the_cost_and_the_configuration(
    run,
):
    told, drawn = page(run), charts(run)
    assert {*SKILLS, "loss", "weight"} <= drawn.keys()
    assert [series["name"] for series in drawn["weight"]["series"]] == list(
        SKILLS
    )  # multitask's weights
    assert "Strategy: weight" in told.text
    assert "612 MB" in told.text
    assert '"_target_": "strategies.multitask"' in told.text
    assert "Examples that did not fit the model's context: 2 skipped, 7 shortened." in told.text


def test_every_task_has_a_ring_at_its_own_stage(run):
    matrix = Matrix.load(run / "matrix.json")
    for i, task in enumerate(SKILLS, 1):
        own = next(series for series in charts(run)[task]["series"] if series["name"] == task)
        assert own["rings"] == [[i, matrix.own_stage_score(task)]]


@pytest.mark.parametrize("which", ["run", "comparison"])
def test_a_page_loads_nothing_from_anywhere(which, request):
    folder = request.getfixturevalue(which)
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//cdn|@import|url\(", html)
    for tag, attrs in Page(html).tags:
        assert tag not in {"link", "img", "iframe", "object"}
        assert "src" not in attrs
        if "href" in attrs:
            assert (folder / attrs["href"]).is_file()


def test_text_of_prompts_and_answers_is_shown_and_never_run(run):
    html = (run / "report.html").read_text(encoding="utf-8")
    assert html.count("<script") == 3  # the data, the library and the page's own
    assert "<script>alert('x')</script>&amp;" in page(run).text


def test_task_names_and_settings_are_escaped_in_pages_and_charts(tmp_path):
    folder = write_fake_run(tmp_path / "r", tasks=("<b>a", "c&d"), settings={"note": "<i>"})
    write.write_report(folder)
    told = page(folder)
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "<b>a" not in html
    assert '<i>"' not in html
    assert "<b>a" in told.text
    assert "<i>" in told.text


def test_samples_tell_the_forgotten_from_what_was_never_learned(tmp_path):
    told = {t["task"]: t for t in sample_answers(Run.load(write_fake_run(tmp_path / "r", "naive")))}
    first, last = told[SKILLS[0]], told[SKILLS[-1]]
    assert first["sorts"]["forgotten"] > 0
    assert last["sorts"]["forgotten"] == 0
    lost = next(s for s in first["shown"] if s["sort"] == "forgotten")
    assert lost["before"] == lost["references"] != lost["answer"]


def test_predictions_without_an_answer_such_as_perplexities_are_shown_too(tmp_path):
    folder = write_fake_run(tmp_path / "r", tasks=("a", "b"))
    for path in (folder / "predictions").rglob("*.jsonl"):
        path.write_text(
            json.dumps(
                {"id": "x", "prompt": "Say it", "references": ["so"], "perplexity": 2, "score": 0.5}
            )
        )
    write.write_report(folder)
    assert "mark 0.50" in page(folder).text


def test_steps_told_again_after_a_resume_are_drawn_once(tmp_path):
    folder = write_fake_run(tmp_path / "r", tasks=("a", "b"))
    lines = (folder / "events.jsonl").read_text().splitlines(keepends=True)
    once, _ = locate_step_events(Run.load(folder))
    (folder / "events.jsonl").write_text("".join([*lines[:9], '{"event": "st\n', *lines]))
    twice, walls = locate_step_events(Run.load(folder))
    assert twice == once
    assert [name for _, name in walls] == ["a", "b"]
    write.write_report(folder)
    assert "1 line of events.jsonl could not be read" in page(folder).text


def test_an_unfinished_run_says_so_and_shows_what_there_is(tmp_path):
    folder = write_fake_run(tmp_path / "r", finished=False)
    write.write_report(folder)
    for told in (page(folder).text, terminal(folder)):
        assert "unfinished" in told
        assert figures.format_percent(Matrix.load(folder / "matrix.json").scores[2][0]) in told


def test_a_run_of_base_row_only_and_no_events_has_a_page(tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    whole = make_fake_matrix()
    replace(whole, stages=whole.stages[:1], scores=whole.scores[:1], cost={}).save(
        folder / "matrix.json"
    )
    assert [path.name for path in write.write_report(folder)] == ["report.html", "curves.png"]
    assert "unfinished: 0 stages scored so far" in page(folder).text


def test_a_published_style_matrix_without_base_row_and_with_empty_cells_has_a_page(tmp_path):
    Matrix(
        stream="long15",
        order="",
        strategy="seqft",
        seed=None,
        tasks=("a", "b"),
        metrics={"a": "m", "b": "m"},
        stages=("a", "b"),
        scores=((0.97, None), (0.891, 0.552)),
    ).save(tmp_path / "matrix.json")
    write.write_report(tmp_path)
    assert "97.0 – 2 b 89.1 55.2" in page(tmp_path).text


def test_pictures_are_png(run, comparison):
    for folder in (run, comparison):
        assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_terminal_shows_the_matrix_and_the_summaries_of_a_run(run):
    told, matrix = terminal(run), Matrix.load(run / "matrix.json")
    for score in matrix.scores[-1]:
        assert figures.format_percent(score) in told
    assert "Forgetting" in told


def test_scores_within_a_stage_stand_at_their_step_of_all(tmp_path):
    folder = write_fake_run(tmp_path / "r")
    with (folder / "events.jsonl").open("a") as file:
        for step, score in ((20, 0.9), (10, 0.95), (20, 0.8)):  # a resumed run tells a step anew
            file.write(
                json.dumps(
                    {"event": "during", "stage": 2, "step": step, "scores": {SKILLS[0]: score}}
                )
                + "\n"
            )
    write.write_report(folder)
    series = charts(folder)["Score within the stages"]["series"]
    assert [(one["name"], one["points"]) for one in series] == [
        (SKILLS[0], [[105, 0.95], [115, 0.8]])
    ]


@pytest.mark.parametrize("strategy", ["naive", "ewc", "replay"])
def test_forgetting_so_far_ends_in_the_published_forgetting(strategy):
    matrix = make_fake_matrix(strategy)
    assert forgetting_by_stage(matrix)[0] is None
    assert forgetting_by_stage(matrix)[-1] == pytest.approx(matrix.summary()["forgetting"])


def test_a_band_is_drawn_where_there_are_three_runs(comparison, tmp_path):
    for seed in range(3):
        (write_fake_run(tmp_path / f"c/{seed}", "ewc", seed) / "report.html").touch()
    write.write_report(tmp_path / "c")
    title = "Average over the tasks learned so far"
    (three,) = charts(tmp_path / "c")[title]["series"]
    assert all(
        low <= y <= high
        for (_, y), (_, low, high) in zip(three["points"], three["band"], strict=True)
    )
    assert not any(series["band"] for series in charts(comparison)[title]["series"])


def test_a_narrow_terminal_shows_a_long_stream_by_numbers_whole(tmp_path):
    folder = write_fake_run(tmp_path / "r", tasks=tuple(f"a_long_task_name_{i}" for i in range(15)))
    told = terminal(folder, width=100)
    assert "…" not in told
    last = next(line for line in told.splitlines() if line.startswith("15 a_long"))
    assert len(re.findall(r"\d+", last.split("name_14")[1])) == 15


def test_a_comparison_averages_over_seeds_with_the_sample_standard_deviation(comparison):
    told = json.loads((comparison / "comparison.json").read_text())
    ewc = next(group for group in told["groups"] if group["strategy"] == "ewc")
    values = [
        Matrix.load(comparison / f"ewc-{seed}" / "matrix.json").summary()["forgetting"]
        for seed in range(2)
    ]
    assert ewc["n"] == 2
    assert ewc["mean"]["forgetting"] == pytest.approx(statistics.mean(values))
    assert ewc["spread"]["forgetting"] == pytest.approx(statistics.stdev(values))
    shown = figures.format_mean_std(ewc["mean"]["forgetting"], ewc["spread"]["forgetting"])
    assert shown in page(comparison).text
    assert shown in terminal(comparison)


def test_comparison_json_lists_every_run_with_its_summary_and_cost(comparison):
    told = json.loads((comparison / "comparison.json").read_text())
    assert told["schema"] == 1
    assert len(told["runs"]) == 9
    one = next(run for run in told["runs"] if run["path"] == "ewc-1")
    assert (one["strategy"], one["seed"], one["order"]) == ("ewc", 1, "default")
    assert one["summary"].keys() >= {"average_performance", "intransigence"}
    assert one["cost"]["seconds"] > 0


def test_the_joint_run_of_the_same_seed_is_the_reference_for_intransigence(comparison):
    run, joint = (Run.load(comparison / name) for name in ("ewc-1", "joint-1"))
    told = json.loads((comparison / "comparison.json").read_text())
    one = next(r for r in told["runs"] if r["path"] == "ewc-1")
    assert one["summary"]["intransigence"] == run.matrix.summary(joint.matrix)["intransigence"]
    assert find_joint_reference(run, [Run.load(comparison / "joint-0"), joint]) == joint


def test_the_joint_arm_is_known_by_its_matrix_and_drawn_as_a_ceiling(comparison):
    told = json.loads((comparison / "comparison.json").read_text())
    assert [group["strategy"] for group in told["groups"]].count("joint") == 1
    ceilings = [
        title
        for title, chart in charts(comparison).items()
        if any(series["look"] == "ceiling" for series in chart.get("series", ()))
    ]
    assert ceilings == ["Average over the tasks learned so far", *SKILLS]


def test_unfinished_runs_are_named_and_count_in_no_mean(comparison):
    told = json.loads((comparison / "comparison.json").read_text())
    maml = next(group for group in told["groups"] if group["strategy"] == "maml")
    assert (maml["n"], maml["mean"]["average_performance"]) == (0, None)
    for text in (page(comparison).text, terminal(comparison)):
        assert re.search(r"nfinished, and in no mean: maml-0", text)
        assert re.search(r"othing scored yet: maml-1", text)


def test_a_comparison_links_to_the_runs_own_pages_and_writes_missing_ones(comparison):
    links = {attrs["href"] for tag, attrs in page(comparison).tags if tag == "a"}
    assert "replay-0/report.html" in links
    assert all((comparison / link).is_file() for link in links)


def test_runs_of_one_strategy_with_other_settings_are_other_groups(tmp_path):
    for name, strength, seed in (("a", 1, 0), ("b", 1, 1), ("c", 10, 0)):
        write_fake_run(tmp_path / name, "ewc", seed, settings={"strength": strength})
    groups = group_runs([Run.load(tmp_path / name) for name in "abc"])
    assert {group.label: len(group.runs) for group in groups} == {
        "ewc strength=1": 2,
        "ewc strength=10": 1,
    }


@pytest.mark.parametrize(
    ("strengths", "labels"),
    [
        ((0.2588170214937917, 0.07270932527768392), {"ewc strength=0.259", "ewc strength=0.0727"}),
        (
            (0.2588170214937917, 0.2588170214937918),
            {"ewc strength=0.2588170214937917", "ewc strength=0.2588170214937918"},
        ),
        ((100000, 0.5), {"ewc strength=100000", "ewc strength=0.5"}),
    ],
)
def test_a_long_fraction_is_told_in_three_digits_where_they_tell_it_apart(
    tmp_path, strengths, labels
):
    runs = [
        Run.load(write_fake_run(tmp_path / str(n), "ewc", settings={"strength": s}))
        for n, s in enumerate(strengths)
    ]
    assert {group.label for group in group_runs(runs)} == labels


def test_several_orders_are_one_group_and_the_page_says_which_order_its_panels_show(tmp_path):
    for i, tasks in enumerate((SKILLS, SKILLS, SKILLS[::-1])):
        write_fake_run(
            tmp_path / "c" / str(i),
            "replay",
            seed=i,
            tasks=tasks,
            order="forth" if tasks == SKILLS else "back",
        )
    write.write_report(tmp_path / "c")
    told = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert [group["n"] for group in told["groups"]] == [3]
    assert "Runs of order forth" in page(tmp_path / "c").text


def test_run_folders_from_anywhere_are_compared_into_a_folder_of_their_own(tmp_path, comparison):
    other = write_fake_run(tmp_path / "elsewhere", "multitask")
    written = write.write_report(comparison, other, out=tmp_path / "both")
    assert [path.name for path in written] == [
        "comparison.json",
        "comparison.parquet",
        "report.html",
        "curves.png",
    ]
    told = json.loads((tmp_path / "both" / "comparison.json").read_text())
    assert len(told["runs"]) == 10
    assert "multitask" in terminal(comparison, other)
    with pytest.raises(ConfigError, match="out="):
        write.write_report(comparison, other)


def test_an_adaptation_shows_its_curve_by_steps_and_shots(tmp_path):
    folder = write_fake_adaptation(tmp_path / "a")
    write.write_report(folder)
    points = json.loads((folder / "curve.json").read_text())["points"]
    for told in (page(folder).text, terminal(folder)):
        assert all(figures.format_percent(point["score"]) in told for point in points)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_adaptations_from_several_starts_are_drawn_over_one_another(tmp_path):
    base = write_fake_adaptation(tmp_path / "a")
    meta = write_fake_adaptation(tmp_path / "b", "runs/maml/checkpoints/stage-06", rate=0.1)
    write.write_report(base, meta, out=tmp_path / "both")
    drawn = charts(tmp_path / "both")["Adapting to rotate"]
    assert [series["name"] for series in drawn["series"]] == [
        "base, 256 shots",
        "maml stage-06, 256 shots",
    ]
    assert "What it takes to reach the base" in page(tmp_path / "both").text


def test_runs_and_adaptations_share_a_page(tmp_path):
    run, curve = write_fake_run(tmp_path / "r"), write_fake_adaptation(tmp_path / "a")
    written = write.write_report(run, curve, out=tmp_path / "both")
    assert [path.name for path in written] == ["report.html", "curves.png"]
    assert {*SKILLS, "Adapting to rotate"} <= charts(tmp_path / "both").keys()
    assert "Forgetting" in (told := terminal(run, curve))
    assert "adapting to rotate" in told


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no run in it .it is empty."),
        ({"notes.txt": ""}, "no run in it .it holds notes.txt."),
        ({"config.yaml": "seed: 0"}, "has scored nothing yet"),
    ],
)
def test_a_folder_without_runs_is_refused_with_what_it_holds(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(MissingError, match=message):
        write.write_report(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(MissingError, match="there is no such folder"):
        write.print_tables(Console(), tmp_path / "none")


def test_a_broken_curve_or_prediction_is_named(tmp_path):
    folder = write_fake_adaptation(tmp_path / "a")
    (folder / "curve.json").write_text('{"schema": 7}')
    with pytest.raises(DataError, match=r"curve\.json: no curve of schema 1"):
        write.write_report(folder)
    folder = write_fake_run(tmp_path / "r")
    path = folder / "predictions" / "stage-06" / f"{SKILLS[0]}.jsonl"
    path.write_text('{"id": "a", "score": 1}\n{"id": "b"}\noops\n')
    with pytest.raises(DataError, match=r"reverse\.jsonl:2: .*\n.*reverse\.jsonl:3:1: "):
        write.write_report(folder)


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        (figures.format_percent(0.4567), "45.7"),
        (figures.format_percent(-0.145, True), "−14.5"),
        (figures.format_percent(0.009, True), "+0.9"),
        (figures.format_percent(-0.0001, True), "0.0"),
        (figures.format_percent(None), "–"),
        (figures.format_seconds(0.42), "0.42 s"),
        (figures.format_seconds(185), "3 min 05 s"),
        (figures.format_seconds(7800), "2 h 10 min"),
        (figures.format_bytes(999), "999 B"),
        (figures.format_bytes(3200), "3.2 kB"),
        (figures.format_bytes(4.1e7), "41 MB"),
        (figures.format_count(48640), "48\u2009640"),
        (figures.format_cost("seconds", 12), ("wall time", "12 s")),
        (figures.format_cost("peak_bytes", 1e6), ("peak", "1.0 MB")),
    ],
)
def test_figures_are_written_for_people(told, shown):
    assert told == shown

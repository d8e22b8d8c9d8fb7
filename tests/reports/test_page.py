"""The page in a real browser: it draws, sorts, filters, keeps its state in the address, and needs
no network.
"""

from __future__ import annotations

import json
import re
import shutil
from itertools import pairwise

import pytest
from playwright.sync_api import expect, sync_playwright

from continual.reports import write
from tests.support.fake_run import SKILLS, write_fake_adaptation, write_fake_run

BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")

PATIENCE = 120_000  # ms, on a busy machine
expect.set_options(timeout=PATIENCE)
EVIL = (
    "<img src=x onerror=\"document.title='owned'\"></script><script>document.title='owned'</script>"
)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as player:
        chromium = player.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"]
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A report of each kind; the comparison has three strategies, a joint run and an adaptation
    beside it.
    """
    root = tmp_path_factory.mktemp("page")
    for seed in range(3):
        for strategy in ("naive", "ewc", "replay"):
            one = write_fake_run(
                root / f"c/{strategy}-{seed}",
                strategy,
                seed,
                settings={"strength": strategy},
                wrong_text=EVIL,
            )
            (one / "report.html").touch()  # their own pages are no matter here
    write_fake_run(root / "c/joint-0", "naive", 0, joint=True)
    run, new = (
        write_fake_run(root / "run", "multitask", notes=True, wrong_text=EVIL),
        write_fake_adaptation(root / "new"),
    )
    with (run / "events.jsonl").open("a") as file:
        for step in range(10, 96, 20):
            file.write(
                json.dumps(
                    {
                        "event": "during",
                        "stage": 2,
                        "step": step,
                        "scores": {SKILLS[0]: 1 - step / 100},
                    }
                )
            )
            file.write("\n")
    series = {"safe": [0.9, *[0.8] * len(SKILLS)], EVIL: [0.5] * (1 + len(SKILLS))}
    probe = {
        "says": "what the base knew before",
        "source": "here",
        "better": "higher",
        "series": series,
    }
    told = {"schema": 1, "stages": ["base", *SKILLS], "probes": {"general ability": probe}}
    (run / "probes.json").write_text(json.dumps(told))
    for strategy in ("naive", "ewc"):
        write_fake_run(root / f"few/{strategy}-0", strategy, tasks=SKILLS[:3])
    write.write_report(root / "c")
    write.write_report(run)
    write.write_report(root / "few")
    write.write_report(root / "c", new, out=root / "all")
    return {"run": run, "comparison": root / "c", "all": root / "all", "few": root / "few"}


@pytest.fixture
def show(browser, folders):
    """Opens a report; at the end there must have been no word of trouble, and no request."""
    trouble, asked = [], []
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    context.set_default_timeout(PATIENCE)

    def show(kind, state="", **how):
        page = context.new_page()
        page.emulate_media(**how)
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((folders[kind] / "report.html").as_uri() + (f"#{state}" if state else ""))
        return page

    yield show
    context.close()
    assert trouble == []
    assert all(re.match("file:.*/report.html", url) for url in asked)


def drawn(page):
    """The page when all its charts are there."""
    page.locator("body[data-drawn]").wait_for()
    return page


def column(page, table, number=1):
    return page.locator(
        f"[data-table={table}] tbody tr:visible > :nth-child({number})"
    ).all_inner_texts()


def lines(page, title):
    """The names at the ends of a chart's lines."""
    figure = page.locator("figure.chart", has_text=title).first
    return set(figure.locator("svg .mark-text.role-mark text").all_text_contents())


@pytest.mark.parametrize("kind", ["run", "comparison", "all"])
def test_every_chart_is_drawn_and_says_what_it_is(show, kind):
    page = drawn(show(kind))
    figures = page.locator("figure.chart")
    assert figures.count() == page.locator("figure.chart svg").count() > 6
    assert page.locator("[role='graphics-document'][aria-label]").count() == figures.count()
    labels = page.locator("svg [role='graphics-symbol']").evaluate_all(
        "all => all.map(one => one.ariaLabel)"
    )
    assert len(labels) > figures.count()
    assert all(labels)
    assert not any("var(" in label for label in labels)


def test_no_axis_says_a_number_twice(show):
    page = drawn(show("few"))
    axes = page.locator("svg .role-axis").evaluate_all(
        "all => all.map(axis => [...axis.querySelectorAll('.role-axis-label text')].map(one => "
        "one.textContent))"
    )
    assert ["1", "2", "3"] in axes
    assert all(len(set(labels)) == len(labels) for labels in axes), axes


def test_text_of_prompts_names_and_probes_is_text(show):
    page = show("run")
    assert drawn(page).title() == "multitask on skills"
    assert EVIL in page.locator(".sample pre").first.text_content()
    assert page.locator("img").count() == 0


def test_a_script_that_is_none_of_ours_does_not_run(show, folders, tmp_path, browser):
    html = (folders["run"] / "report.html").read_text("utf-8")
    (tmp_path / "report.html").write_text(html.replace("<footer>", f"<footer>{EVIL}"), "utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    assert drawn(page).title() == "multitask on skills"
    page.close()


def test_a_heading_sorts_down_then_up_then_as_given(show):
    page = show("comparison")
    given = column(page, "groups")
    head = page.locator("[data-table=groups] th", has_text="Forgetting")
    seen = []
    for way in ("descending", "ascending", "none"):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == way
        seen.append(column(page, "groups"))
    assert seen[0][:3] == ["naive", "ewc", "replay"]
    assert seen[1][:3] == ["replay", "ewc", "naive"]
    assert seen[2] == given


def test_numbers_are_sorted_as_numbers_and_what_is_missing_comes_last(show):
    page = show("comparison", "sort=runs+0+ascending")
    assert column(page, "runs")[0] == "ewc-0"
    page.locator("[data-table=runs] th", has_text="Forgetting").locator("button").click()
    told = [float(text) for text in column(page, "runs", 6) if text != "–"]
    assert told == sorted(told, reverse=True)
    assert column(page, "runs", 6)[-1] == "–"  # the joint run's


def test_what_is_found_filters_tables_charts_and_matrices(show):
    page = show("comparison")
    page.locator("#find").fill("ewc")
    expect(page).to_have_url(re.compile("#find=ewc$"))
    drawn(page)
    assert page.locator("#count").inner_text() == "1 of 4 shown"
    assert column(page, "groups") == ["ewc"]
    assert column(page, "runs") == ["ewc-0", "ewc-1", "ewc-2"]
    assert page.locator(".heats figcaption:visible").all_inner_texts() == ["ewc"]
    assert (
        page.locator("figure.chart", has_text=SKILLS[0])
        .first.locator("svg .mark-line path")
        .count()
        == 1
    )


def test_one_run_is_found_by_its_seed(show):
    page = show("comparison", "find=seed%3D1+naive")
    assert column(page, "groups") == ["naive"]
    assert column(page, "runs") == ["naive-1"]


def test_strategies_and_tasks_are_left_out_by_keyboard_and_the_address_brings_the_same_view_back(
    show,
):
    page = drawn(show("comparison"))
    assert {"naive", "ewc", "replay", "joint"} == lines(page, "Average over")
    page.get_by_role("button", name="naive", exact=True).focus()
    page.keyboard.press("Space")
    page.get_by_text("Tasks 6 of 6").click()
    page.get_by_role("button", name=SKILLS[1], exact=True).focus()
    page.keyboard.press("Enter")
    page.locator("figure.chart select[data-axis=x]").select_option("memory_bytes")
    drawn(page)
    again = drawn(show("comparison", page.evaluate("location.hash.slice(1)")))
    for one in (page, again):
        assert lines(one, "Average over") == {"ewc", "replay", "joint"}
        assert (
            one.get_by_role("button", name="naive", exact=True).get_attribute("aria-pressed")
            == "false"
        )
        assert one.locator("#tasks").inner_text() == "5 of 6"
        assert not one.locator(f"figure.chart:has-text('{SKILLS[1]}')").first.is_visible()
        assert (
            "Memory, kB (better: left)"
            in one.locator("figure", has_text="Score against cost").inner_text()
        )


def test_a_point_a_cell_and_a_heading_say_what_they_are_and_escape_hushes_them(show):
    page, tip = drawn(show("comparison")), "#tip"
    page.locator("figure.chart", has_text="Average over").locator("svg .mark-symbol path").nth(
        3
    ).hover(force=True)
    assert re.fullmatch(r"\w+, stage \d: \d+\.\d \(\d+\.\d to \d+\.\d\)", page.inner_text(tip))
    page.locator(".heat td").nth(1).hover()
    assert page.inner_text(tip).startswith(f"{SKILLS[1]} after 0 base: ")
    page.locator("[data-table=groups] th button", has_text="Forgetting").focus()
    assert "mean fall of a task" in page.inner_text(tip)
    page.keyboard.press("Escape")
    assert page.locator(tip).is_hidden()


def test_a_chart_has_its_numbers_as_a_table(show):
    page = show("run")
    figure = page.locator("figure.chart", has_text="general ability")
    figure.locator("summary").click()
    rows = figure.locator("tr").all_inner_texts()
    assert len(rows) == 1 + 2 * (1 + len(SKILLS))
    assert rows[1].split("\t")[:3] == ["safe", "0 base", "90.0"]


def test_forgotten_examples_are_found_by_their_texts(show):
    page = show("run")
    page.locator("#text").fill("red 18 blue")
    expect(page).to_have_url(re.compile("#text="))
    shown = page.locator(".flips .sample:visible .sort").all_inner_texts()
    assert len(shown) > 1  # of several tasks: their texts unfold
    assert all("/18" in text for text in shown)


def test_configurations_are_told_apart(show):
    page = show("comparison")
    assert "strategy.strength" in column(page, "settings")


def test_the_page_follows_the_dark_scheme_and_prints_light_without_its_tools(show):
    ground = "getComputedStyle(document.body).backgroundColor"
    page = show("comparison", color_scheme="dark")
    assert page.evaluate(ground) == "rgb(15, 20, 25)"
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    assert page.locator("#tools").is_hidden()


@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_a_narrow_page_scrolls_only_within_its_parts(show, kind):
    page = show(kind)
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_names_beside_lines_never_overlap(show):
    page = show("run")
    for wanted in ([0, 0, 0, 0], [10, 12, 290, 300], [300] * 12):
        placed = page.evaluate("wanted => apart(wanted, 15, 300)", wanted)
        assert all(b - a >= 15 - 1e-9 for a, b in pairwise(placed))
        assert placed[-1] <= 300

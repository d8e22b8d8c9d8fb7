"""The benchmarks' own arms and measures, on the smallest models; the peers are an extra that the
tests go without.
"""

import json
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import answer, common, fisher, maml, overhead, sft, works

SMALL = works.Shape(16, 32, 1, 2, 2)
KEYS = {"benchmark", "work", "arm", "median_s", "examples_per_s", "peak_bytes", "ratio_to"}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(works, "SHAPES", {"3M": SMALL})


def in_this_process(loads, build, steps=1):
    return {arm: common.peak(build, arguments, steps) for arm, arguments in loads.items()}


def test_the_engines_arms_learn_the_same_and_each_is_a_row_with_ratios_to_its_peers(monkeypatch):
    monkeypatch.setattr(sft, "peaks", in_this_process)
    work = sft.Work("tiny", tuple(works.rows("agnews", sft.EXAMPLES * sft.CYCLE)), SMALL)
    rows = sft.measure(work, ["continual", "low memory", "padded"], seconds=0)
    assert [r["arm"] for r in rows] == ["continual", "low memory", "padded"]
    assert all(set(r) >= KEYS and r["median_s"] > 0 and 0 < r["peak_share"] < 1 for r in rows)
    assert {"padded"} <= set(rows[0]["ratio_to"]) <= {"padded", "padded memory"}
    assert len({r["first_losses"] for r in rows}) == 1
    table = common.table(rows)
    assert table.splitlines()[0].startswith(
        "| work | arm | ms a step | examples/s | MB above the model | ratio to |"
    )


def test_arms_that_learn_differently_are_refused():
    work = sft.Work("tiny", (), SMALL)
    with pytest.raises(RuntimeError, match="do not learn the same"):
        sft._compare({"a": [2.0, 1.9], "b": [2.0, 1.8]}, work)


def test_answers_a_second_are_measured_against_generate(monkeypatch):
    monkeypatch.setattr(answer, "peaks", in_this_process)
    monkeypatch.setattr(answer, "PROMPTS", 20)
    prompts = [p for _, _, p in answer._works()]
    rows = answer.measure("3M", "tiny", prompts[0], seconds=0)
    assert [r["arm"] for r in rows] == ["continual", "generate"]
    assert all(set(r) >= KEYS and r["median_s"] > 0 for r in rows)
    assert {"generate"} <= set(rows[0]["ratio_to"]) <= {"generate", "generate memory"}
    assert [min(len(e.ids) for e in p) > 150 for p in prompts] == [False, True]
    assert not any(e.response_mask[-1] for p in prompts for e in p)


def test_answers_are_compared_by_their_tokens_up_to_the_end():
    numbers = answer.Numbers(end=0)
    assert numbers.batch_decode([[5, 71, 0, 0], [571, 3]], skip_special_tokens=True) == [
        "5 71",
        "571 3",
    ]
    with pytest.raises(RuntimeError, match="1 of 2 answers differ"):
        answer.compare({"continual": ["5 71", "571 3"], "generate": ["5 71", "57 13"]})


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_the_fisher_of_examples_together_is_measured_against_the_loop(monkeypatch, adapter):
    monkeypatch.setattr(fisher, "peaks", in_this_process)
    rows = fisher.measure("3M", adapter, works.rows("agnews", 20), ["continual", "loop"], seconds=0)
    assert [r["arm"] for r in rows] == ["continual", "loop"]
    assert all(set(r) >= KEYS and r["median_s"] > 0 for r in rows)
    assert {"loop"} <= set(rows[0]["ratio_to"]) <= {"loop", "loop memory"}


def test_another_fisher_is_refused():
    ours = {"w": torch.tensor([1.0, 2.0])}
    with pytest.raises(RuntimeError, match=r"the Fisher of loop differs by .* in w"):
        fisher.compare({"continual": ours, "loop": {"w": ours["w"] * 1.001}})


@pytest.mark.filterwarnings("ignore")  # of learn2learn's own imports
@pytest.mark.parametrize("second_order", [False, True])
def test_the_meta_gradient_is_measured_against_learn2learn_s(monkeypatch, second_order):
    pytest.importorskip("learn2learn.algorithms")
    monkeypatch.setattr(maml, "peaks", in_this_process)
    monkeypatch.setattr(maml, "INNER_STEPS", 2)
    rows = works.rows("agnews", 8)
    tasks = [[replace(e, task_index=i) for e in rows[i::2]] for i in range(2)]
    found = maml.measure("3M", tasks, second_order, seconds=0)
    assert [r["arm"] for r in found] == ["continual", "learn2learn"]
    assert all(set(r) >= KEYS and r["median_s"] > 0 for r in found)


def test_another_meta_gradient_is_refused():
    with pytest.raises(RuntimeError, match="the meta-gradient of learn2learn differs"):
        maml.compare(
            {"continual": {"w": torch.ones(3)}, "learn2learn": {"w": torch.ones(3) * 1.001}}
        )


@pytest.mark.parametrize("name", overhead.STRATEGIES)
def test_a_strategys_step_is_measured_against_naives(name):
    (found,) = overhead.against_naive("3M", "lora", name, works.rows("agnews", 96), seconds=0)
    assert set(found) >= KEYS
    assert found["ratio_to"]["naive time"] > 0


def test_the_memory_of_online_ewc_does_not_grow_with_the_number_of_tasks():
    rows = overhead.growth("3M", "online_ewc", works.rows("agnews", 60), (2, 4), seconds=0)
    assert rows[1]["ratio_to"]["2 tasks memory"] == pytest.approx(1, abs=0.05)


def test_flops_are_those_that_run_and_a_frozen_weight_has_no_gradient_to_compute():
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, 16)
    assert common.flops(lambda: (x @ w).sum().backward()) == 2 * (2 * 4 * 8 * 16)
    w.requires_grad_()
    assert common.flops(lambda: (x @ w).sum().backward()) == 3 * (2 * 4 * 8 * 16)


def test_causal_attention_counts_the_half_that_it_needs():
    q, k, v = torch.randn(3, 2, 4, 64, 16, requires_grad=True)

    def attend(causal):
        return common.flops(
            lambda: (
                torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
                .sum()
                .backward()
            )
        )

    assert 2 * attend(True) == attend(False) > 0


@pytest.mark.parametrize("task", works.TASKS)
def test_synthetic_rows_share_an_instruction_of_the_datasets_length(task):
    rows = works.rows(task, 8)
    length, inputs, _ = works.LENGTHS[task]
    assert len({e.ids[:length] for e in rows}) == 1
    assert all(min(inputs) <= e.response_mask.index(True) - length <= max(inputs) for e in rows)


def test_a_long_instruction_takes_the_place_of_the_rows_own():
    rows = works.rows("agnews", 8)
    behind = works.behind(150, rows)
    assert [len(b.ids) - len(r.ids) for b, r in zip(behind, rows, strict=True)] == [150 - 30] * 8
    assert len({b.ids[:150] for b in behind}) == 1
    assert [b.ids[150:] for b in behind] == [r.ids[30:] for r in rows]


def test_the_command_writes_a_table_that_names_the_machine_and_all_rows_as_json(
    tmp_path, monkeypatch
):
    row = common.row("overhead", "a work", "naive", 0.5, 32, 2_000_000, {"naive time": 1.0})
    monkeypatch.setattr(overhead, "run", lambda: [row])
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(
        sys, "argv", ["benchmarks", "overhead", "--json", str(tmp_path / "rows.json")]
    )
    command.main()
    told = (tmp_path / "results" / "overhead-cpu.md").read_text()
    assert common.machine() in told
    assert "| a work | naive | 500.0 | 64 | 2.0 | naive time 1.00 |" in told
    assert json.loads((tmp_path / "rows.json").read_text()) == [row]


def test_a_benchmark_that_does_not_exist_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "speed"])
    with pytest.raises(SystemExit):
        command.main()
    assert "no benchmark speed" in capsys.readouterr().err

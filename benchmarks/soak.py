"""One stream of 200 tiny tasks: memory, open files and the time of a step must not grow with the
tasks behind.

`python -m benchmarks.soak [--tasks 200] [--strategies NAME ...] [--out PATH]`. Each strategy runs
in a process of its own: a small Llama, six steps a task, a checkpoint after each of which the
newest two are kept, and after each stage the first eight tasks are scored. The resident memory,
what of it Python's and torch's own allocations can grow by, and the open files are read after every
task. Times are medians over the ten tasks up to the one named: a step's, on the clock, and the CPU
time that training and scoring of a stage take with all they write, the matrix of all tasks among
it.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import gc
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "soak-cpu.md"
STRATEGIES = {
    "naive": [],
    "replay": ["strategy.replay.capacity=64"],
    "online_ewc": ["strategy.online_ewc.num_examples=8"],
}
SCORED = 8
EARLY = 20  # what the last task is compared with: by then all code has run
MOST = 1.05  # times the memory of that task
WORDS = ("red", "blue", "green", "gold", "grey", "pink", "teal", "plum")


def write_work(root: Path, tasks: int) -> list[str]:
    """A stream of so many tasks and a small random Llama, written into `root`; returns the keys of
    a run on them.
    """
    from benchmarks.works import write_small

    rows = {
        f"task{i:03d}": {
            split: [_row(i, split, k) for k in range(n)] for split, n in (("train", 8), ("test", 2))
        }
        for i in range(tasks)
    }
    return [
        *write_small(root, rows),
        "train.steps=6",
        "train.batch_size=4",
        "train.log_every_steps=1",
        "checkpoint.keep=2",
    ]


def _row(task: int, split: str, i: int) -> dict[str, str]:
    return {
        "instruction": f"Say the word of task{task:03d}.",
        "input": f"{split} {i} {WORDS[(i + task) % 8]}",
        "output": WORDS[task % 8],
    }


def soak(root: Path, strategy: str, tasks: int) -> list[dict[str, float]]:
    """Learn all tasks in this process; after each one what it holds and what it took."""
    import torch
    from rich.console import Console

    from benchmarks.common import resident
    from continual.cli.main import compose_config
    from continual.runs.run import StageCallback, empty_matrix, run_stage, score_stage
    from continual.runs.session import make_forgetting_monitor, prepare_session
    from continual.runs.signals import StopSignal
    from continual.tracking.events import EventLog, silence_libraries

    torch.set_num_threads(1)
    silence_libraries()
    out = root / strategy
    config = compose_config(
        "run",
        [
            *write_work(root / f"{strategy}-work", tasks),
            f"strategy={strategy}",
            *STRATEGIES[strategy],
            f"out={out}",
        ],
    )
    bench = prepare_session(config, out)
    bench.load_network()
    bench = replace(bench, test_sets=bench.test_sets[:SCORED])
    found, matrix, early = [], empty_matrix(bench), make_forgetting_monitor(out, bench)
    with (
        EventLog(out / "events.jsonl", Console(stderr=True, quiet=True)) as events,
        StopSignal() as signals,
    ):
        for number in range(1, tasks + 1):
            events.stage, began = number, time.thread_time()
            keeper = StageCallback(out, bench, matrix, number, events, signals, early)
            matrix = run_stage(out, bench, keeper, None)
            trained = time.thread_time()
            matrix = score_stage(out, bench, matrix, events, signals)
            found.append(
                {
                    "train_ms": 1e3 * (trained - began),
                    "score_ms": 1e3 * (time.thread_time() - trained),
                    "files": len(os.listdir("/proc/self/fd")),
                    "objects": len(gc.get_objects()),
                    "resident": resident("VmRSS"),
                }
            )
    for task, ms in zip(found, _steps(out / "events.jsonl"), strict=True):
        task["step_ms"] = ms
    return found


def _steps(events: Path) -> list[float]:
    """The median milliseconds of a step after the first, of each stage."""
    clock: dict[str, list[float]] = {}
    for line in events.read_text("utf-8").splitlines():
        if (event := json.loads(line))["event"] == "step":
            clock.setdefault(event["task"], []).append(event["seconds"])
    return [
        1e3 * statistics.median(b - a for a, b in pairwise(seconds)) for seconds in clock.values()
    ]


def summary(strategy: str, told: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The last task beside an early one."""
    early, last = told[min(EARLY, len(told) // 2) - 1], told[-1]
    times = {
        key: [
            statistics.median(t[key] for t in told[end - 10 : end])
            for end in (min(EARLY, len(told) // 2), len(told))
        ]
        for key in ("step_ms", "train_ms", "score_ms")
    }
    return {
        "strategy": strategy,
        "MB early": early["resident"] / 1e6,
        "MB last": last["resident"] / 1e6,
        "ratio": last["resident"] / early["resident"],
        "KB a task": (last["resident"] - early["resident"])
        / 1e3
        / (len(told) - min(EARLY, len(told) // 2)),
        "objects": f"{early['objects']:.0f} -> {last['objects']:.0f}",
        "files": f"{early['files']:.0f} -> {last['files']:.0f}",
        "ms a step": f"{times['step_ms'][0]:.2f} -> {times['step_ms'][1]:.2f}",
        "ms to train": f"{times['train_ms'][0]:.1f} -> {times['train_ms'][1]:.1f}",
        "ms to score": f"{times['score_ms'][0]:.1f} -> {times['score_ms'][1]:.1f}",
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One row a strategy."""
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        lines.append(
            "| "
            + " | ".join(
                f"{v:.3f}" if k == "ratio" else f"{v:.1f}" if isinstance(v, float) else str(v)
                for k, v in row.items()
            )
            + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what the command line asks for; exits with 1 where memory or open files grow."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tasks", type=int, default=200, metavar="N")
    parser.add_argument(
        "--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES, metavar="NAME"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULT, metavar="PATH", help="where the table goes"
    )
    asked = parser.parse_args()
    from benchmarks.common import machine

    rows, grown, began = [], [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.strategies:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                told = pool.apply(soak, (Path(folder), name, asked.tasks))
            rows.append(summary(name, told))
            early, last = told[min(EARLY, len(told) // 2) - 1], told[-1]
            grown += [name] if rows[-1]["ratio"] > MOST or last["files"] > early["files"] else []
    text = (
        f"# soak\n\n{__doc__.strip()}\n\n{asked.tasks} tasks, early: after task "
        f"{min(EARLY, asked.tasks // 2)}. In {time.monotonic() - began:.0f} s on "
        f"{machine()}.\n\n{table(rows)}"
    )
    asked.out.write_text(text)
    print(text)
    sys.exit(bool(grown))


if __name__ == "__main__":
    main()
